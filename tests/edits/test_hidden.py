"""A vector added at a block's output: on which rows and positions, how far, and undone exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postalign.edits import Control, Edit, HiddenEdit, edit_from_state
from postalign.edits.edit import attach_all, under_prefix, with_prefix
from postalign.errors import PostalignError, UsageError
from tests.decoding.tools import hooks
from tests.decoding.twin import blocks_of, push, vector
from tests.tiny import KINDS, inputs, tiny_model


def outputs(model: Any, edit: HiddenEdit | None, control: Control, given: dict[str, Tensor]) -> list[Tensor]:
    """Every block's output `[rows, length, hidden]` with the edit live under `control`, and the logits last."""
    seen: list[Tensor] = []
    handles = edit.attach(model, control) if edit else []
    for block in blocks_of(model):
        handles.append(
            block.register_forward_hook(
                lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
            )
        )
    with torch.no_grad():
        seen.append(model(**given, use_cache=False).logits)
    for handle in handles:
        handle.remove()
    return seen


# the control


def positions(scope: tuple[str, ...], start: int | Tensor, length: int = 5, rows: int = 2) -> list[list[float]]:
    strength = torch.arange(1.0, rows + 1)
    found = Control(strength, start).coefficients(scope, rows, length, torch.device("cpu"))
    return [[0.0] * length] * rows if found is None else found.tolist()


@pytest.mark.parametrize(
    ("scope", "start", "expected"),
    [
        (("last",), 5, [0, 0, 0, 0, 1]),
        (("prompt",), 5, [1, 1, 1, 1, 1]),
        (("generation",), 5, [0, 0, 0, 0, 0]),
        (("last", "generation"), 5, [0, 0, 0, 0, 1]),
        (("last",), 0, [0, 0, 0, 0, 0]),
        (("prompt",), 0, [0, 0, 0, 0, 0]),
        (("generation",), 0, [1, 1, 1, 1, 1]),
        (("all",), 0, [1, 1, 1, 1, 1]),
        (("all",), 3, [1, 1, 1, 1, 1]),
        (("last",), 3, [0, 0, 1, 0, 0]),
        (("generation",), 3, [0, 0, 0, 1, 1]),
        (("last", "generation"), 3, [0, 0, 1, 1, 1]),
        (("prompt",), 3, [1, 1, 1, 0, 0]),
    ],
)
def test_scopes(scope: tuple[str, ...], start: int, expected: list[int]) -> None:
    assert positions(scope, start) == [[float(x) for x in expected], [2.0 * x for x in expected]]


def test_each_row_may_start_elsewhere() -> None:
    assert positions(("last", "generation"), torch.tensor([2, 4])) == [[0, 1, 1, 1, 1], [0, 0, 0, 2, 2]]


def test_without_strength_nothing_is_done() -> None:
    assert Control().coefficients(("all",), 2, 3, torch.device("cpu")) is None


# the edit


@pytest.mark.parametrize("kind", KINDS)
def test_the_vector_is_added_at_one_block_only(kind: str) -> None:
    model, edit = tiny_model(kind), push(1, 0.7, scope=("last", "generation"))
    given = inputs(model, length=6, rows=2)
    plain = outputs(model, None, Control(), given)
    edited = outputs(model, edit, Control(torch.tensor([1.0, -0.5]), start=4), given)
    assert torch.equal(edited[0], plain[0])
    added = torch.zeros(2, 6, 32)
    added[0, 3:], added[1, 3:] = 0.7 * edit.vector, -0.35 * edit.vector
    torch.testing.assert_close(edited[1] - plain[1], added, rtol=0, atol=2e-5)
    assert not torch.allclose(edited[3][:, 3:], plain[3][:, 3:], atol=1e-3)
    torch.testing.assert_close(edited[3][:, :3], plain[3][:, :3], rtol=1e-5, atol=1e-5)  # what comes before is not met


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen2_moe"])
@pytest.mark.parametrize("how", ["strength 0", "row strength 0", "no strength", "removed"])
def test_switched_off_is_bit_equal(kind: str, how: str) -> None:
    model = tiny_model(kind)
    given = inputs(model)
    plain = outputs(model, None, Control(), given)
    edit = push(1, 0.0 if how == "strength 0" else 5.0, scope=("all",))
    if how == "removed":
        for handle in edit.attach(model, Control(torch.ones(2))):
            handle.remove()
        assert hooks(model) == 0
        found = outputs(model, None, Control(), given)
    else:
        strength = {"strength 0": torch.ones(2), "row strength 0": torch.zeros(2), "no strength": None}[how]
        found = outputs(model, edit, Control(strength), given)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_a_closed_row_stays_bit_equal_beside_an_open_one(tiny_llama: Any) -> None:
    given = inputs(tiny_llama)
    plain = outputs(tiny_llama, None, Control(), given)
    found = outputs(tiny_llama, push(scope=("all",)), Control(torch.tensor([0.0, 1.0])), given)
    for a, b in zip(plain[1:], found[1:], strict=True):
        assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])


def test_the_models_dtype_is_kept() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    found = outputs(model, push(scope=("all",)), Control(torch.ones(2)), inputs(model))
    assert all(tensor.dtype == torch.bfloat16 for tensor in found)


def test_the_activation_is_not_written_in_place(tiny_llama: Any) -> None:
    seen: list[Tensor] = []
    blocks = blocks_of(tiny_llama)
    first = blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    handles = [first, *push(scope=("all",)).attach(tiny_llama, Control(torch.ones(2)))]
    with torch.no_grad():
        tiny_llama(**inputs(tiny_llama), use_cache=False)
    for handle in handles:
        handle.remove()
    plain = outputs(tiny_llama, None, Control(), inputs(tiny_llama))
    assert torch.equal(seen[0] if isinstance(seen[0], Tensor) else seen[0][0], plain[1])


def test_at() -> None:
    edit = push(1, 0.5, scope=("all",))
    other = edit.at(layer=2)
    assert (other.layer, other.strength, other.scope) == (2, 0.5, ("all",)) and other.vector is edit.vector
    assert edit.at(strength=0.0).strength == 0.0 and edit.layer == 1


# errors


@pytest.mark.parametrize("scope", [(), ("first",), ("last", "answer")])
def test_unknown_scope(scope: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="scope") as caught:
        push(scope=scope)
    assert "generation" in str(caught.value)


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_out_of_range(layer: int, tiny_llama: Any) -> None:
    with pytest.raises(UsageError, match=f"layer {layer} .* 0 to 2"):
        push(layer=layer).check(tiny_llama) if layer >= 0 else HiddenEdit(vector(), layer, 1.0).check(tiny_llama)


def test_vector_of_another_width(tiny_llama: Any) -> None:
    with pytest.raises(PostalignError, match=r"\(31,\).*32"):
        HiddenEdit(vector(size=31), 1, 1.0).attach(tiny_llama, Control())
    assert hooks(tiny_llama) == 0


def test_all_are_attached_or_none(tiny_llama: Any) -> None:
    with pytest.raises(UsageError):
        attach_all([push(), push(), push(layer=8)], tiny_llama, Control())
    assert hooks(tiny_llama) == 0
    handles = attach_all([push(), push(2)], tiny_llama, Control())
    assert len(handles) == hooks(tiny_llama) == 2
    for handle in handles:
        handle.remove()


# states


def test_state_and_back() -> None:
    edit = push(2, -0.25, scope=("prompt", "generation"))
    again = edit_from_state(*edit.state())
    assert isinstance(again, HiddenEdit) and isinstance(again, Edit)
    assert (again.layer, again.strength, again.scope) == (2, -0.25, ("prompt", "generation"))
    assert torch.equal(again.vector, edit.vector)


def test_unknown_or_damaged_state() -> None:
    settings, tensors = push().state()
    with pytest.raises(PostalignError, match="unknown to this version"):
        edit_from_state({**settings, "kind": "from.the.future"}, tensors)
    with pytest.raises(PostalignError, match=r"vector.*damaged"):
        edit_from_state(settings, {})
    with pytest.raises(PostalignError, match=r"layer.*damaged"):
        edit_from_state({k: v for k, v in settings.items() if k != "layer"}, tensors)


def test_prefixes() -> None:
    tensors = {"a": torch.ones(1), "b.c": torch.zeros(1)}
    assert under_prefix("x", with_prefix("x", tensors)) == tensors
    assert under_prefix("x", {"xa": torch.ones(1)}) == {}


def test_an_edit_is_a_protocol() -> None:
    assert isinstance(push(), Edit) and not isinstance(nn.Linear(1, 1), Edit)
