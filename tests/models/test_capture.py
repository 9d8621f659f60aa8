"""What is recorded is what ran, whatever shares the batch; moments of a stream are those of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postalign.errors import UsageError
from postalign.models.anatomy import anatomy
from postalign.models.capture import RunningMoments, captured, last_token_states
from postalign.models.chat import encode
from tests.tiny import KINDS, inputs, tiny_model, tiny_tokenizer

PROMPTS = ["a", "Please explain how the moon moves the water of the sea.", "Who are you?", "Sure " * 9]


def test_captured_inputs_and_outputs() -> None:
    model = tiny_model()
    body, given = anatomy(model), inputs(model)
    hidden = tiny_model()(**given, output_hidden_states=True).hidden_states
    with torch.no_grad(), captured(body.blocks, inputs=True) as into:
        assert all(state.numel() == 0 for state in into)
        with captured(body.blocks, inputs=False) as out:
            model(**given)
            model(**inputs(model, rows=1, seed=1))
            assert into[0].shape == out[0].shape == (1, 32)  # the latest pass
            model(**given)
    for i in range(3):
        assert torch.equal(into[i], hidden[i][:, -1])
    for i in range(2):
        assert torch.equal(out[i], hidden[i + 1][:, -1])
    assert not body.blocks[0]._forward_hooks
    assert not body.blocks[0]._forward_pre_hooks


def test_captured_lets_go_after_an_error(tiny_llama: Any) -> None:
    body = anatomy(tiny_llama)
    with pytest.raises(ZeroDivisionError), captured(body.attention_out, inputs=True):
        raise ZeroDivisionError
    assert not body.attention_out[0]._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_single_runs(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    together = last_token_states(model, tokenizer, PROMPTS)
    assert together.shape == (4, 3, 32)
    assert together.dtype == torch.float32
    for i, prompt in enumerate(PROMPTS):
        ids = encode(tokenizer, [prompt]).input_ids
        with torch.no_grad(), captured(anatomy(model).blocks, inputs=False) as taken:
            model(input_ids=ids, use_cache=False)  # no mask, no positions: as plain as can be
        torch.testing.assert_close(together[i], torch.stack(taken, 1)[0], atol=1e-4, rtol=1e-4)


def test_layers_order_and_progress(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    whole = last_token_states(tiny_llama, tiny_tokenizer, PROMPTS, system="Be brief.")
    some = last_token_states(
        tiny_llama, tiny_tokenizer, PROMPTS, layers=[2, 0], batch_size=3, system="Be brief.",
        on_progress=lambda *told: seen.append(told),
    )  # fmt: skip
    torch.testing.assert_close(some, whole[:, [2, 0]], atol=1e-4, rtol=1e-4)
    assert seen == [("reading prompts", 3, 4), ("reading prompts", 4, 4)]
    plain = last_token_states(tiny_llama, tiny_tokenizer, PROMPTS)
    assert not torch.allclose(plain, whole, atol=1e-2)


def test_nothing_to_read(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    assert last_token_states(tiny_llama, tiny_tokenizer, []).shape == (0, 3, 32)


def test_wrong_use(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="layer 3 is out of range: choose one from 0 to 2"):
        last_token_states(tiny_llama, tiny_tokenizer, ["a"], layers=[3])
    with pytest.raises(UsageError, match="batch_size=0"):
        last_token_states(tiny_llama, tiny_tokenizer, ["a"], batch_size=0)
    with pytest.raises(UsageError, match="prompt 2 has"):
        last_token_states(tiny_llama, tiny_tokenizer, ["a", "long " * 300])


def test_running_moments() -> None:
    rows = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    moments, other = RunningMoments(), RunningMoments()
    for part in rows[:30].split([1, 0, 7, 22]):
        moments.add(part)
    other.add(rows[30:])
    moments.merge(other)
    moments.merge(RunningMoments())
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, rows.double().mean(0), atol=1e-9, rtol=0)
    torch.testing.assert_close(moments.variance, rows.double().var(0), atol=1e-8, rtol=0)
    assert moments.mean.dtype == torch.float64
    with pytest.raises(UsageError, match="do not fit"):
        moments.add(torch.zeros(2, 5))


def test_moments_of_too_little() -> None:
    moments = RunningMoments()
    with pytest.raises(UsageError, match="add at least 1"):
        _ = moments.mean
    moments.add(torch.ones(1, 2, dtype=torch.bfloat16))
    assert moments.mean.tolist() == [1.0, 1.0]
    with pytest.raises(UsageError, match="add at least 2"):
        _ = moments.variance
