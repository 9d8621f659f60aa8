"""Training whole weights: against a plain loop, its directions and terms, its limits, and what stays as it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from postalign.edits import SparsePatch
from postalign.edits.weights import block_linears
from postalign.errors import PostalignError, UsageError
from postalign.models.anatomy import anatomy
from postalign.training import TrainSettings, train_delta, training_history
from postalign.training.losses import row_divergences
from postalign.training.weights import labelled_batch
from tests.tiny import tiny_model
from tests.training.tools import PAIRS, SMALL, moved, same_bits, slow_loss, slow_training, train

CPU = torch.device("cpu")
BENIGN = ["Tell me of the moon.", "How do I bake bread?"]


def loss(model: Any, tokenizer: Any) -> float:
    with torch.no_grad():
        return float(slow_loss(model, tokenizer, PAIRS))


def divergence(model: Any, base: Any, tokenizer: Any) -> float:
    batch = labelled_batch(tokenizer, [(prompt, "") for prompt in BENIGN], CPU, "all")
    with torch.no_grad():
        return float(row_divergences(model, batch, base).mean())


# against the plain loop


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize(("direction", "sign"), [("descent", 1.0), ("ascent", -1.0)])
def test_training_equals_a_plain_loop(
    kind: str, direction: str, sign: float, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model(kind)
    # AdamW's first steps are the gradient's signs, which rounding turns where it is all but nothing
    found = train(model, tiny_tokenizer, tmp_path, direction=direction, steps=4, batch_size=5, learning_rate=1e-4)
    exact = slow_training(model, tiny_tokenizer, list(found), sign, 4, 1e-4)
    for name, delta in found.items():
        assert float(delta.abs().max()) > 5e-5
        off = (delta - exact[name]).abs() > 1e-5
        assert float(off.float().mean()) < 0.01, name
    together = torch.cat([delta.flatten() for delta in found.values()])
    theirs = torch.cat([exact[name].flatten() for name in found])
    assert float(torch.cosine_similarity(together, theirs, dim=0)) > 0.999


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_small_batches_do_not_matter(micro_batch: int, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    one = train(model, tiny_tokenizer, tmp_path / "a", batch_size=5, micro_batch=5, optimiser="sgd", learning_rate=0.1)
    other = train(
        model, tiny_tokenizer, tmp_path / "b", batch_size=5, micro_batch=micro_batch, optimiser="sgd", learning_rate=0.1
    )
    for name, delta in one.items():
        torch.testing.assert_close(delta, other[name], rtol=1e-3, atol=1e-6)


# directions and terms


@pytest.mark.parametrize("train_what", ["full", "adapter"])
@pytest.mark.parametrize("kind", ["llama_bias", "gpt2", "qwen2_moe"])
def test_directions(kind: str, train_what: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(kind)
    before = loss(model, tiny_tokenizer)
    for direction, sign in (("ascent", 1), ("descent", -1), ("npo", 1)):
        told: list[tuple[Any, ...]] = []
        deltas = train(
            model,
            tiny_tokenizer,
            tmp_path / direction,
            direction=direction,
            train=train_what,
            steps=12,
            batch_size=5,
            learning_rate=3e-3 if train_what == "full" else 1e-2,
            on_step=lambda *step: told.append(step),  # noqa: B023
        )
        after = loss(moved(model, deltas), tiny_tokenizer)
        assert sign * (after - before) > 0.02
        assert [step[:2] for step in told] == [(i, 12) for i in range(1, 13)]
        assert told[0][3] == pytest.approx(before, rel=1e-4)
        assert sign * (told[-1][3] - told[0][3]) > 0
        if direction != "npo":
            assert all(step[2] == pytest.approx(-sign * step[3]) for step in told)


def test_an_adapter_changes_what_it_says_it_changes(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    deltas = train(model, tiny_tokenizer, tmp_path, train="adapter", rank=2, steps=8, batch_size=5, learning_rate=1e-2)
    assert list(deltas) == [f"{name}.weight" for name in block_linears(model, anatomy(model).block_names)]
    assert all(torch.linalg.matrix_rank(delta, rtol=1e-3) <= 2 for delta in deltas.values())
    told = training_history(tmp_path).answer_losses
    before = loss(model, tiny_tokenizer)
    assert loss(moved(model, deltas), tiny_tokenizer) < told[-1] < before


def test_npo_starts_as_ascent_on_whole_answers(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    pairs = [("Hi", "Sure, here is a short answer")]
    settings = {"pairs": pairs, "steps": 1, "batch_size": 1, "optimiser": "sgd", "max_grad_norm": 1e9}
    up = train(model, tiny_tokenizer, tmp_path / "a", direction="ascent", learning_rate=1e-2, **settings)
    npo = train(model, tiny_tokenizer, tmp_path / "b", direction="npo", learning_rate=1e-2, **settings)
    count = len(tiny_tokenizer(pairs[0][1], add_special_tokens=False)["input_ids"])
    assert count > 1
    for name, delta in up.items():
        torch.testing.assert_close(npo[name], delta * count, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("train_what", ["full", "adapter"])
def test_npo_compares_with_the_base(train_what: str, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    told: list[Any] = []
    settings = {"direction": "npo", "train": train_what, "batch_size": 1, "learning_rate": 1e-2, "pairs": PAIRS[:1]}
    train(tiny_llama, tiny_tokenizer, tmp_path, steps=12, on_step=lambda *step: told.append(step), **settings)
    count = len(tiny_tokenizer(PAIRS[0][1], add_special_tokens=False)["input_ids"])
    for _, _, objective, answer in told:
        log_ratio = (told[0][3] - answer) * count
        assert objective == pytest.approx(20 * math.log1p(math.exp(0.1 * log_ratio)), rel=1e-3)
    assert told[-1][2] < 0.9 * told[0][2]


@pytest.mark.parametrize("train_what", ["full", "adapter"])
def test_kl_holds_the_model_where_it_was(train_what: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    settings = {"direction": "ascent", "train": train_what, "steps": 15, "learning_rate": 5e-3}
    free = moved(model, train(model, tiny_tokenizer, tmp_path / "a", **settings))
    held = moved(model, train(model, tiny_tokenizer, tmp_path / "b", benign=BENIGN, kl_weight=5.0, **settings))
    assert divergence(model, model, tiny_tokenizer) == pytest.approx(0.0, abs=1e-6)
    assert divergence(held, model, tiny_tokenizer) < 0.5 * divergence(free, model, tiny_tokenizer)


def test_benign_prompts_are_held_too(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    asked = labelled_batch(tiny_tokenizer, [(prompt, "") for prompt in BENIGN], CPU, "question")
    settings = {"direction": "ascent", "steps": 15, "learning_rate": 5e-3, "kl_weight": 5.0}
    settings["benign"] = [(prompt, "Yes.") for prompt in BENIGN]
    off = []
    for weight in (0.0, 3.0):
        trained = moved(model, train(model, tiny_tokenizer, tmp_path / str(weight), prompt_weight=weight, **settings))
        with torch.no_grad():
            off.append(float(row_divergences(trained, asked, model).mean()))
    assert off[1] < 0.5 * off[0]


def test_wanted_pairs_become_likelier(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    wanted = [(prompt, "I cannot help with that.") for prompt, _ in PAIRS]
    settings = {"direction": "ascent", "steps": 15, "learning_rate": 3e-3}
    alone = moved(model, train(model, tiny_tokenizer, tmp_path / "a", **settings))
    both = moved(model, train(model, tiny_tokenizer, tmp_path / "b", wanted=wanted, **settings))
    with torch.no_grad():
        base, up, mixed = (float(slow_loss(m, tiny_tokenizer, wanted)) for m in (model, alone, both))
    assert mixed < base and mixed < up
    assert loss(both, tiny_tokenizer) > loss(model, tiny_tokenizer)


# limits


def test_ascent_stops_at_the_limit(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    settings = {"direction": "ascent", "steps": 40, "batch_size": 5, "learning_rate": 1e-2}
    deltas = train(model, tiny_tokenizer, tmp_path, max_loss_rise=1.0, **settings)
    history = training_history(tmp_path)
    assert history.stopped and history.step == len(history.answer_losses) < 40
    limit = sum(history.answer_losses[:4]) / 4 + 1.0
    assert sum(history.answer_losses[-4:]) / 4 >= limit > sum(history.answer_losses[-5:-1]) / 4
    # the step that finds the limit reached changes nothing
    assert loss(moved(model, deltas), tiny_tokenizer) == pytest.approx(history.answer_losses[-1], rel=1e-4)


def test_descent_knows_no_limit(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    train(tiny_llama, tiny_tokenizer, tmp_path, max_loss_rise=1e-3)
    assert training_history(tmp_path).step == SMALL["steps"]


@pytest.mark.parametrize("settings", [{"learning_rate": 1e30}, {"direction": "ascent", "learning_rate": 1e30}])
def test_divergence_is_told_and_leaves_the_model_alone(
    settings: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PostalignError, match="lower learning rate") as caught:
        train(model, tiny_tokenizer, tmp_path, steps=20, **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "delta").exists()
    assert same_bits(before, model.state_dict())


# what is trained, and what stays


def test_the_matrices_of_the_blocks_are_trained(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    deltas = train(model, tiny_tokenizer, tmp_path, steps=1)
    parameters = dict(model.named_parameters())
    wanted = [name for name, p in parameters.items() if p.ndim >= 2 and ".layers." in name]
    assert sorted(deltas) == sorted(wanted) and any(delta.ndim == 3 for delta in deltas.values())
    assert all(delta.shape == parameters[name].shape for name, delta in deltas.items())


def test_named_modules(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama_bias")  # tied embeddings, biases
    deltas = train(model, tiny_tokenizer, tmp_path / "a", modules=["layers.1.self_attn.q_proj", "embed_tokens"])
    q = "model.layers.1.self_attn.q_proj"
    assert sorted(deltas) == sorted(["model.embed_tokens.weight", f"{q}.weight", f"{q}.bias"])
    assert all(float(delta.abs().max()) > 0 for delta in deltas.values())
    deltas = train(model, tiny_tokenizer, tmp_path / "b", modules=["mlp.down_proj"], train="adapter")
    assert sorted(deltas) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    with pytest.raises(UsageError, match="down_proj"):
        train(model, tiny_tokenizer, tmp_path / "c", modules=["down_prog"])
    with pytest.raises(UsageError, match="no weight"):
        train(model, tiny_tokenizer, tmp_path / "c", modules=["embed_tokens"], train="adapter")


@pytest.mark.parametrize("train_what", ["full", "adapter"])
def test_the_model_is_left_as_it_was(train_what: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt2").train()  # with dropout
    model.transformer.wte.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    first = train(model, tiny_tokenizer, tmp_path / "a", train=train_what)
    with pytest.raises(ZeroDivisionError):
        train(model, tiny_tokenizer, tmp_path / "b", train=train_what, on_step=lambda *_: 1 / 0)
    assert model.training and all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert same_bits(before, model.state_dict())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert same_bits(first, train(model.eval(), tiny_tokenizer, tmp_path / "c", train=train_what))  # dropout was off


def test_accelerate_is_left_as_it_was(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    train(tiny_llama, tiny_tokenizer, tmp_path / "a", steps=1)
    assert not AcceleratorState._shared_state and not PartialState._shared_state and not GradientState._shared_state
    try:
        Accelerator(mixed_precision="bf16", cpu=True)
        train(tiny_llama, tiny_tokenizer, tmp_path / "b", steps=1)
        assert AcceleratorState().mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# number formats


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral", "qwen2_moe"])
def test_a_bfloat16_model_is_trained_in_float32(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(kind).bfloat16()
    settings = {"direction": "descent", "steps": 20, "batch_size": 5, "learning_rate": 1e-3}
    low = train(model, tiny_tokenizer, tmp_path / "a", **settings)
    high = train(model, tiny_tokenizer, tmp_path / "b", precision="float32", **settings)
    assert all(delta.dtype == torch.float32 for delta in low.values())
    # float32 weights keep steps that bfloat16 would round away
    assert any(bool((delta != delta.bfloat16()).any()) for delta in low.values())
    before = loss(moved(model, {}), tiny_tokenizer)
    losses = [loss(moved(model, deltas), tiny_tokenizer) for deltas in (low, high)]
    assert all(after < before - 0.05 for after in losses)
    assert losses[0] == pytest.approx(losses[1], abs=0.3 * (before - losses[1]))


def test_half_precision_passes_of_a_float32_model(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    full = train(tiny_llama, tiny_tokenizer, tmp_path / "a")
    auto = train(tiny_llama, tiny_tokenizer, tmp_path / "b", precision="float32")
    low = train(tiny_llama, tiny_tokenizer, tmp_path / "c", precision="bfloat16")
    assert same_bits(full, auto) and not same_bits(full, low)


def test_half_precision_on_disk(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    full = train(tiny_llama, tiny_tokenizer, tmp_path / "a")
    half = train(tiny_llama, tiny_tokenizer, tmp_path / "b", delta_dtype="bfloat16")
    assert all(torch.equal(delta.bfloat16(), half[name]) for name, delta in full.items())


# wrong use


def test_the_weights_of_a_patch_alone(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """It starts from the patch, moves its weights, and tells the difference to the model without it."""
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    values = torch.zeros_like(model.get_parameter(name))
    values.view(-1)[::7] = 0.01
    patch = SparsePatch.from_dense({name: values})
    still = train(model, tiny_tokenizer, tmp_path / "a", at=patch, learning_rate=1e-12)
    assert set(still) == {name}
    torch.testing.assert_close(still[name], values, rtol=0, atol=1e-6)
    moved_on = train(model, tiny_tokenizer, tmp_path / "b", at=patch)
    places = values != 0
    assert not bool(moved_on[name][~places].any())
    assert bool((moved_on[name] - values)[places].abs().gt(1e-4).any())
    assert loss(moved(model, moved_on), tiny_tokenizer) < loss(moved(model, still), tiny_tokenizer) - 0.01
    other = SparsePatch.from_dense({name: values.roll(1)})
    again = train(model, tiny_tokenizer, tmp_path / "b", at=other)  # not the same training
    assert bool(again[name][values.roll(1) != 0].any())
    for settings in ({"train": "adapter"}, {"modules": ["q_proj"]}):
        with pytest.raises(UsageError, match="patch"):
            train(model, tiny_tokenizer, tmp_path / "c", at=patch, **settings)


def test_a_linear_schedule_falls_to_a_tenth(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: Any, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    for schedule in ("constant", "linear"):
        train(
            *(tiny_model("llama"), tiny_tokenizer, tmp_path / schedule),
            **{"optimiser": "sgd", "schedule": schedule, "steps": 20, "learning_rate": 1e-3, "warmup": 0.2},
        )
    constant, linear = rates[:20], rates[20:]
    assert constant[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3]) and set(constant[4:]) == {1e-3}
    assert linear[10] == pytest.approx(0.5e-3) and linear[-1] == pytest.approx(0.1e-3)


def test_wrong_use(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pairs"):
        train_delta(tiny_llama, tiny_tokenizer, [], TrainSettings(), workdir=tmp_path)
    with pytest.raises(UsageError, match="benign"):
        train(tiny_llama, tiny_tokenizer, tmp_path, kl_weight=1.0)
    with pytest.raises(ValueError, match="momentum"):
        TrainSettings(momentum=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="learning_rate"):
        TrainSettings(learning_rate=math.nan)


def test_weights_that_cannot_be_trained(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    packed = torch.zeros(48, 16, dtype=torch.uint8)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(PostalignError, match="quantised"):
        train(model, tiny_tokenizer, tmp_path)
