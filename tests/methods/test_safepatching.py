"""SafePatching from data to alignment: the equations, the identities, resuming, stage after stage, what is unsafe."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import postalign as pa
from postalign import methods
from postalign.alignment import Alignment
from postalign.data.records import Data, Prompt
from postalign.edits import SparsePatch
from postalign.errors import UsageError
from postalign.methods import patch_derivation, safepatching, sparsify
from postalign.methods.greedy import greedy, whole_sentences
from postalign.methods.importance import snip_scores, with_delta
from postalign.methods.patch_pairs import (
    balanced,
    benign_pairs,
    emphasised,
    harmful_pairs,
    loops,
    own_refusals,
    refusal_pairs,
    telling_opening,
)
from postalign.methods.safepatching import BASELINES, controllable_patching, over_safety_patch, read_config
from postalign.methods.sparsify import retention_mask, top_mask
from postalign.methods.tune_effect import NEW_TOKENS
from postalign.models.chat import token_ids
from postalign.models.shards import DictWeights, FolderWeights, ModelWeights, write_tensors
from postalign.training import TrainSettings, train_delta
from postalign.training.batches import labelled_batch
from postalign.training.losses import row_losses
from tests.methods.small import DATA, Told, by_bytes
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {
    "pairs": 3, "pair_tokens": 4, "safety_steps": 2, "over_safety_steps": 2, "batch_size": 2, "score_pairs": 2,
    "safety_learning_rate": 1e-2, "over_safety_learning_rate": 1e-2, "a": 0.3, "b": 0.3, "p": 0.5,
    "alpha": 1.0, "beta": 1.0, "values": "float32", "max_loss_rise": 8.0, "kl_pairs": 2, "preset": "published",
}  # fmt: skip
PRESETS = ["published", "anchored"]


def fit(model: Any, tokenizer: Any, *, data: Data = DATA, judge: Any = None, **settings: Any) -> Alignment:
    where = {key: settings.pop(key) for key in ("on_progress", "workdir") if key in settings}
    return methods.fit("safepatching", model, tokenizer, data=data, judge=judge, config={**SMALL, **settings}, **where)


def patched(model: Any, alignment: Alignment) -> dict[str, Tensor]:
    with alignment.applied(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def state(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def ascent(model: Any, tokenizer: Any, folder: Path, **more: Any) -> dict[str, Tensor]:
    """The ascent model, by the training alone."""
    rows = DATA.split("fit")
    pairs = harmful_pairs(model, tokenizer, rows, 3, 4, 0, lambda *_: None)
    given = {"direction": "ascent", "steps": 2, "batch_size": 2, "learning_rate": 1e-2, "max_loss_rise": 8.0, **more}
    delta = FolderWeights(train_delta(model, tokenizer, pairs, TrainSettings(**given), workdir=folder))
    with with_delta(model, delta):
        return state(model)


# the identities of the method


@pytest.mark.parametrize("kind", ["llama", "llama_wide", "llama_bias", "gpt2", "mixtral"])
def test_all_of_both_is_none(kind: str, tiny_tokenizer: Any) -> None:
    """p = 1, a = b = 100 %: the difference sets are empty, and not a weight changes."""
    model = tiny_model(kind)
    before = state(model)
    alignment = fit(model, tiny_tokenizer, p=1.0, a=1.0, b=1.0)
    assert alignment.weights[0].changed == 0
    assert alignment.info["patch"]["weights"] > 1000
    assert same(patched(model, alignment), before) and same(state(model), before)


@pytest.mark.parametrize("values", ["float32", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama_wide", "llama_bias", "gpt2", "mixtral"])
def test_all_of_one_is_the_ascent_model(
    kind: str, dtype: torch.dtype, values: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """a = 100 %, b = 0, alpha = 1, p = 1: to the bit with float32 values, and where no sign changes with 16 bits."""
    model = tiny_model(kind).to(dtype)
    before = state(model)
    wanted = ascent(model, tiny_tokenizer, tmp_path / "w")
    alignment = fit(model, tiny_tokenizer, p=1.0, a=1.0, b=0.0, values=values)
    found = patched(model, alignment)
    assert not same(found, before) and same(state(model), before)
    assert not any(key.startswith("over_safety") for key in alignment.info["training"])
    differing = sum(int((found[n] != wanted[n]).sum()) for n in found)
    assert differing == alignment.info["patch"]["inexact"]
    if values == "float32":
        assert differing == 0 and same(found, wanted)
    elif dtype == torch.bfloat16:
        assert differing < 0.1 * alignment.info["patch"]["changed"]
        for name, weight in found.items():  # the next number at most
            torch.testing.assert_close(weight, wanted[name], rtol=2**-7, atol=2**-7 * 0.03)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_only_matrices_of_the_blocks_change(kind: str, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    alignment = fit(model, tiny_tokenizer)
    shapes = alignment.weights[0].shapes
    assert shapes and all(len(shape) >= 2 and (".layers." in n or ".h." in n) for n, shape in shapes.items())
    one = fit(model, tiny_tokenizer, modules=["mlp.c_fc" if kind == "gpt2" else "self_attn.q_proj"])
    assert one.weights[0].shapes and all("c_fc" in n or "q_proj" in n for n in one.weights[0].shapes)


# the equations


@pytest.mark.parametrize("scope", ["matrix", "row", "global"])
@pytest.mark.parametrize("rescale", [False, True])
def test_the_equations(scope: Any, rescale: bool, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """What `fit` returns is equations 1 to 8 written out for whole tensors."""
    model = tiny_model()
    theta = state(model)
    rows = DATA.split("fit")
    pairs = harmful_pairs(model, tiny_tokenizer, rows, 3, 4, 0, lambda *_: None)
    P, I = {}, {}  # noqa: E741
    for kind, direction in (("SE", "ascent"), ("OSM", "descent")):
        settings = TrainSettings(direction=direction, steps=2, batch_size=2, learning_rate=1e-2)
        delta = FolderWeights(train_delta(model, tiny_tokenizer, pairs, settings, workdir=tmp_path / kind))
        P[kind] = {name: delta.get(name) for name in delta.names()}
        with with_delta(model, delta):
            I[kind] = snip_scores(model, tiny_tokenizer, pairs[:2], delta.names())
    names = [name for name in ModelWeights(model).names() if name in P["SE"]]
    shares = {"SE": 0.3, "OSM": 0.2}
    S = {kind: {name: top_mask(I[kind].get(name), shares[kind], scope) for name in names} for kind in P}
    if scope == "global":
        for kind in P:
            flat = top_mask(torch.cat([I[kind].get(name).flatten() for name in names]), shares[kind], "global")
            parts = flat.split([theta[name].numel() for name in names])
            S[kind] = {name: part.view(theta[name].shape) for name, part in zip(names, parts, strict=True)}
    wanted = dict(theta)
    for name in names:
        m = {kind: retention_mask(theta[name].numel(), 0.5, f"0/{word}", name).view(theta[name].shape)
             for kind, word in (("SE", "safety"), ("OSM", "over_safety"))}  # fmt: skip
        D_SE, D_OSM = S["SE"][name] & ~S["OSM"][name], S["OSM"][name] & ~S["SE"][name]
        by = 0.5 if rescale else 1.0
        wanted[name] = theta[name] + (
            0.7 * (m["SE"] * P["SE"][name] / by) * D_SE + 1.5 * (m["OSM"] * P["OSM"][name] / by) * D_OSM
        )
    alignment = fit(
        model, tiny_tokenizer, a=0.3, b=0.2, p=0.5, alpha=0.7, beta=1.5, rescale=rescale, scope=scope,
        max_loss_rise=None,
    )  # fmt: skip
    found = patched(model, alignment)
    for name in theta:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-8)
    assert 0 < alignment.info["patch"]["share"] < 0.5


SE, OSM = [1, 1, 0, 0], [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("combine", "safety", "over_safety"),
    [
        ("difference", [0, 1, 0, 0], [0, 0, 1, 0]),
        ("intersection", [1, 0, 0, 0], [1, 0, 0, 0]),
        ("union", SE, OSM),
        ("safety", SE, [0, 0, 0, 0]),
        ("over_safety", [0, 0, 0, 0], OSM),
    ],
)
def test_how_the_sets_combine(combine: Any, safety: list[int], over_safety: list[int]) -> None:
    """Scores by hand: the top half of each is SE and OSM."""
    base = DictWeights({"w": torch.zeros(4)})
    patches = {
        "safety": (DictWeights({"w": torch.full((4,), 2.0)}), DictWeights({"w": torch.tensor(SE).float()})),
        "over_safety": (DictWeights({"w": torch.full((4,), 5.0)}), DictWeights({"w": torch.tensor(OSM).float()})),
    }
    config = read_config(
        {"alpha": 1.0, "p": 1.0, "a": 0.5, "b": 0.5, "combine": combine, "beta": 10.0, "values": "float32"}
    )
    made, kept, sizes = controllable_patching(base, {kind: patches[kind] for kind in config.kinds}, config)
    wanted = 2 * torch.tensor(safety) + 50 * torch.tensor(over_safety)
    assert torch.equal(made.patch().merge("w", torch.zeros(4)), wanted.float())
    assert kept is None
    both = int(len(config.kinds) == 2)
    assert sizes == {"S_SE": 2 * ("safety" in config.kinds), "S_OSM": 2 * ("over_safety" in config.kinds), "both": both}


def test_ties_between_the_two_patches() -> None:
    base = DictWeights({"w": torch.zeros(5)})
    deltas = {"safety": torch.tensor([1.0, -1, 4, 0.1, 3]), "over_safety": torch.tensor([2.0, 3, -1, 0.2, 0])}
    patches = {kind: (DictWeights({"w": t}), DictWeights({"w": t})) for kind, t in deltas.items()}
    config = read_config({**BASELINES["ties"], "a": 0.8, "b": 0.6, "values": "float32"})
    made, *_ = controllable_patching(base, patches, config)
    # kept of each: 1 -1 4 . 3 and 2 3 -1 . .; the signs elected: + + + . +
    assert made.patch().merge("w", torch.zeros(5)).tolist() == [1.5, 3, 4, 0, 3]


def test_one_patch_may_have_tensors_that_the_other_lacks() -> None:
    base = DictWeights({"w": torch.zeros(4), "v": torch.zeros(4)})
    one = DictWeights({"w": torch.ones(4), "v": torch.ones(4)})
    config = read_config({"p": 1.0, "a": 1.0, "b": 0.0, "alpha": 1.0, "beta": 1.0})
    made, *_ = controllable_patching(base, {"safety": (one, one)}, config)
    assert sorted(made.entries) == ["v", "w"]


@pytest.mark.parametrize("scope", ["matrix", "row", "global"])
def test_shards_do_not_show(scope: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, patches and scores in memory or in shards of any cut, in pieces of any size: the same patch."""
    model = tiny_model("mixtral")
    names = [n for n, p in model.named_parameters() if p.ndim >= 2]
    generator = torch.Generator().manual_seed(0)

    def random() -> dict[str, Tensor]:
        return {n: torch.randn(model.get_parameter(n).shape, generator=generator) * 0.01 for n in names}

    def scores() -> dict[str, Tensor]:  # with many equal ones
        return {n: (tensor * 200).round() for n, tensor in random().items()}

    parts = {"safety": (random(), scores()), "over_safety": (random(), scores())}
    config = read_config(
        {"alpha": 1.0, "beta": 1.0, "p": 0.4, "a": 0.2, "b": 0.3, "scope": scope, "values": "bfloat16"}
    )
    in_memory = {kind: (DictWeights(d), DictWeights(s)) for kind, (d, s) in parts.items()}
    wanted = controllable_patching(ModelWeights(model), in_memory, config)[0].patch()

    def folder(name: str, tensors: dict[str, Tensor], size: int) -> FolderWeights:
        plan = {n: (tuple(t.shape), t.dtype) for n, t in reversed(tensors.items())}
        write_tensors(tmp_path / name, plan, reversed(tensors.items()), shard_bytes=size)
        return FolderWeights(tmp_path / name)

    base = folder("base", {n: ModelWeights(model).get(n) for n in ModelWeights(model).names()}, 30_000)
    in_shards = {kind: (folder(f"{kind}-d", d, 9000), folder(f"{kind}-s", s, 25_000)) for kind, (d, s) in parts.items()}
    ordered = DictWeights({n: base.get(n) for n in ModelWeights(model).names()})
    monkeypatch.setattr(sparsify, "CHUNK", 96)
    monkeypatch.setattr(safepatching, "CHUNK", 160)
    for i, source in enumerate((ordered, base)):
        found = controllable_patching(source, in_shards, config, folder=tmp_path / f"out{i}")[0].patch()
        assert found.bytes == wanted.bytes
        assert set(found.shapes) == set(wanted.shapes)
        for name in wanted.shapes:
            assert all(torch.equal(a, b) for a, b in zip(found.entries[name], wanted.entries[name], strict=True))


def test_pieces_are_those_of_the_masks() -> None:
    """The two patches are not retained at the same places, and another seed retains elsewhere."""
    base = DictWeights({"w": torch.zeros(1000)})
    one = DictWeights({"w": torch.ones(1000)})
    patches = {"safety": (one, one), "over_safety": (one, one)}

    def kept(**settings: Any) -> Tensor:
        config = read_config({"alpha": 1.0, "p": 0.5, "a": 1.0, "b": 1.0, "combine": "union", "beta": 2.0, **settings})
        return controllable_patching(base, patches, config)[0].patch().merge("w", torch.zeros(1000))

    assert torch.unique(kept()).tolist() == [0, 1, 2, 3]
    assert not torch.equal(kept(), kept(seed=1))
    assert torch.equal(kept(), kept())


# the choices


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model()
    before = state(model)
    alignment = fit(model, tiny_tokenizer, preset=preset)
    assert same(state(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not alignment.unsafe and alignment.weights[0].changed > 0
    assert alignment.config["preset"] == preset
    assert alignment.config["over_safety_kl_weight"] == (0 if preset == "published" else 1)
    assert alignment.provenance["data"] == {"name": "mine", "hash": DATA.hash, "fit": 8, "tune": 4}
    alignment.check(model, tiny_tokenizer)
    alignment.save_pretrained(tmp_path / "a")
    loaded = Alignment.from_pretrained(tmp_path / "a")
    assert same(patched(model, loaded), patched(model, alignment)) and same(state(model), before)
    texts = pa.generate(model, tiny_tokenizer, ["How do I bake?"], alignment=loaded, max_new_tokens=4)
    assert len(texts) == 1
    assert read_config({"preset": "anchored", "safety_kl_weight": 0.5}).safety_kl_weight == 0.5


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(name: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = fit(tiny_llama, tiny_tokenizer, **BASELINES[name])
    assert alignment.weights[0].changed > 0
    assert alignment.unsafe == (name == "over_safety_only")
    trained = {key.removesuffix("_steps") for key in alignment.info["training"] if key.endswith("_steps")}
    one = {"gradient_ascent": {"safety"}, "npo": {"safety"}, "safety_only": {"safety"}}
    one |= {"resta": {"over_safety"}, "over_safety_only": {"over_safety"}}
    assert trained == one.get(name, {"safety", "over_safety"})


def test_resta_turns_the_over_safety_patch_round(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    forth = fit(tiny_llama, tiny_tokenizer, **{**BASELINES["resta"], "beta": 1.0})
    back = fit(tiny_llama, tiny_tokenizer, **BASELINES["resta"])
    assert forth.unsafe and not back.unsafe
    before, one, other = state(tiny_llama), patched(tiny_llama, forth), patched(tiny_llama, back)
    for name, weight in before.items():
        torch.testing.assert_close(one[name] - weight, weight - other[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"importance": "patch"},
        {"importance": "magnitude"},
        {"score_on": "base", "a": 0.4},
        {"score_loss_on": "question"},
        {"scope": "global"},
        {"loss_on": "question"},
        {"loss_on": "all"},
        {"train": "adapter", "rank": 2},
        {"safety": "npo"},
        {"safety": "refusal"},
        {"over_safety": "benign"},
        {"refusal_weight": 1.0},
        {"safety_kl_weight": 1.0},
        {"over_safety_kl_weight": 1.0},
        {"safety": "refusal", "benign_weight": 1.0},
        {"safety": "refusal", "head_tokens": 2},
        {"optimiser": "sgd"},
        {"rescale": True},
        {"seed": 1},
        {"p": 0.9},
        {"alpha": 0.5},
        {"beta": 0.5},
        {"modules": ["down_proj"]},
        {"untouched": 0.5},
        {"safety": "refusal", "safety_kl_weight": 1.0, "beside": 0.5},
        {"pairs": 2},
    ],
    ids=str,
)
def test_every_setting_matters(settings: dict[str, Any], tiny_llama: Any, tiny_tokenizer: Any) -> None:
    plain = patched(tiny_llama, fit(tiny_llama, tiny_tokenizer))
    other = patched(tiny_llama, fit(tiny_llama, tiny_tokenizer, **settings))
    assert not same(plain, other)


def test_the_same_twice(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    one, two = (patched(tiny_llama, fit(tiny_llama, tiny_tokenizer)) for _ in range(2))
    assert same(one, two)


def test_scoring_the_base_alone_leaves_nothing(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """Both patches are scored on one set: at one and the same weights the two top sets are the same."""
    alignment = fit(tiny_llama, tiny_tokenizer, score_on="base")
    assert alignment.weights[0].changed == 0


def test_ascent_stops_in_time(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = fit(tiny_llama, tiny_tokenizer, max_loss_rise=1e-6, combine="safety", safety_steps=9)
    assert alignment.info["training"]["safety_stopped"] and alignment.info["training"]["safety_steps"] < 9


# what is unsafe


def test_the_over_safety_patch_is_kept_only_on_demand(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    plain = fit(tiny_llama, tiny_tokenizer)
    assert not plain.arrays and not plain.unsafe
    with pytest.raises(UsageError, match="keep_over_safety"):
        over_safety_patch(plain)
    kept = fit(tiny_llama, tiny_tokenizer, keep_over_safety=True)
    assert same(patched(tiny_llama, kept), patched(tiny_llama, plain))  # kept, not applied
    kept.save_pretrained(tmp_path / "a")
    loaded = Alignment.from_pretrained(tmp_path / "a")
    for alignment in (kept, loaded):
        assert alignment.unsafe
        with pytest.raises(UsageError, match="unsafe"):
            alignment.push_to_hub("someone/something")
        patch = over_safety_patch(alignment)
        assert isinstance(patch, SparsePatch) and patch.unsafe
        whole = fit(tiny_llama, tiny_tokenizer, combine="over_safety", b=1.0, p=1.0)
        assert same(patched(tiny_llama, Alignment("", [patch])), patched(tiny_llama, whole))


def test_its_folder_says_so(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    fit(tiny_llama, tiny_tokenizer, workdir=tmp_path / "work")
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "work").iterdir())
    assert names == ["safety", "scores-over-safety", "scores-safety", "unsafe-over-safety"]


# resuming


STAGES = [
    "answers to harmful prompts",
    "training the safety patch",
    "importance for the safety patch",
    "training the over-safety patch",
    "importance for the over-safety patch",
    "merging the patches",
    "measuring the effect",
]


def test_the_stages(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    told = Told()
    fit(tiny_llama, tiny_tokenizer, judge=by_bytes, on_progress=told)
    assert told.stages == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_fit_goes_on(stage: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model()
    before = state(model)
    wanted = fit(model, tiny_tokenizer, judge=by_bytes)
    with pytest.raises(KeyboardInterrupt):
        fit(model, tiny_tokenizer, judge=by_bytes, workdir=tmp_path / "w", on_progress=Told(stage))
    assert same(state(model), before) and all(p.requires_grad for p in model.parameters())
    again = fit(model, tiny_tokenizer, judge=by_bytes, workdir=tmp_path / "w")
    assert same(patched(model, again), patched(model, wanted))
    assert again.info == wanted.info


def test_what_is_done_is_not_done_again(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of the merge alone need no training, no scores and no pairs; those of the training do."""
    fit(tiny_llama, tiny_tokenizer, workdir=tmp_path)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("done again")

    for name in ("train_delta", "snip_scores", "harmful_pairs"):
        monkeypatch.setattr(patch_derivation, name, never)
    kept = fit(tiny_llama, tiny_tokenizer, workdir=tmp_path, a=0.1, b=0.2, p=0.9, alpha=0.3, combine="union")
    monkeypatch.undo()
    fresh = fit(tiny_llama, tiny_tokenizer, a=0.1, b=0.2, p=0.9, alpha=0.3, combine="union")
    assert same(patched(tiny_llama, kept), patched(tiny_llama, fresh))
    other = fit(tiny_llama, tiny_tokenizer, workdir=tmp_path, safety_steps=1)
    assert same(patched(tiny_llama, other), patched(tiny_llama, fit(tiny_llama, tiny_tokenizer, safety_steps=1)))


# stage after stage


def test_continual(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The second stage's patch is made on what the first one left; both are in the alignment, and come off."""
    model = tiny_model()
    before = state(model)
    first = fit(model, tiny_tokenizer)
    first.save_pretrained(tmp_path / "first")
    first_pairs = {row.prompt for row in DATA.split("fit")}

    def judge(prompt: str, reply: str) -> str:
        return "compliance" if prompt in first_pairs else by_bytes(prompt, reply)

    second = fit(model, tiny_tokenizer, after=str(tmp_path / "first"), seed=1, judge=judge)
    assert same(state(model), before)
    assert len(second.weights) == 2
    second.check(model, tiny_tokenizer)
    moved = tiny_model()
    moved.load_state_dict(patched(model, first), strict=False)
    alone = fit(moved, tiny_tokenizer, seed=1)
    assert same(patched(model, second), patched(moved, alone))
    assert second.provenance["after"]["config"]["seed"] == 0
    second.save_pretrained(tmp_path / "second")
    assert same(patched(model, Alignment.from_pretrained(tmp_path / "second")), patched(moved, alone))
    assert second.info["effect"]["harmful_n"] == 2
    third = fit(model, tiny_tokenizer, after=str(tmp_path / "second"))
    assert len(third.weights) == 3


def test_only_some_categories(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    data = Data([replace(row, category="x" if i % 2 else "y") for i, row in enumerate(DATA)], "mine")
    only = fit(tiny_llama, tiny_tokenizer, data=data, categories=["x"], pairs=9)
    by_hand = data.filter(lambda row: row.category == "x" or row.label == "benign" or row.split != "fit")
    assert only.provenance["data"]["fit"] == 6
    assert same(patched(tiny_llama, only), patched(tiny_llama, fit(tiny_llama, tiny_tokenizer, data=by_hand, pairs=9)))


def test_the_effect_by_label_and_category(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    def judge(prompt: str, reply: str) -> str:
        if prompt not in plain:  # a pair of the fit split
            return "compliance"
        return "refusal" if "sea" in prompt or reply != plain[prompt] else "compliance"

    rows = [replace(row, category="sea" if "sea" in row.prompt else None) for row in DATA]
    asked = [row.prompt for row in rows if row.split == "tune"]
    plain = dict(zip(asked, greedy(tiny_llama, tiny_tokenizer, asked, NEW_TOKENS), strict=True))
    alignment = fit(tiny_llama, tiny_tokenizer, data=Data(rows), judge=judge, a=1.0, p=1.0, combine="safety")
    effect = alignment.info["effect"]
    assert (effect["harmful_n"], effect["benign_n"]) == (2, 2)
    assert effect["harmful_refusal_before"] == effect["harmful_compliance_before"] == 0.5
    assert effect["harmful_refusal_after"] == 1.0 and effect["harmful_compliance_after"] == 0.0
    assert effect["categories"].keys() == {"harmful/sea", "benign/sea"}
    assert effect["categories"]["harmful/sea"] == {"n": 1, "refusal_before": 1.0, "refusal_after": 1.0}
    assert "effect" not in fit(tiny_llama, tiny_tokenizer, judge=by_bytes, effect_prompts=0).info


# pairs


def test_given_pairs_are_used(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    rows = [replace(row, unsafe_response="Sure." if row.label == "harmful" else None) for row in DATA.split("fit")]
    pairs = harmful_pairs(tiny_llama, tiny_tokenizer, Data(rows), 3, 4, 0, lambda *_: None)
    assert len(pairs) == 3 and {answer for _, answer in pairs} == {"Sure."}


def test_pairs_that_are_made_are_those_that_the_judge_calls_compliance(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    rows, told = DATA.split("fit"), Told()
    every = harmful_pairs(tiny_llama, tiny_tokenizer, rows, 4, 4, 0, told, lambda p, r: "compliance")
    assert sorted(p for p, _ in every) == sorted(row.prompt for row in rows.harmful)
    assert every == harmful_pairs(tiny_llama, tiny_tokenizer, rows, 4, 4, 0, told)

    def of_foxes(prompt: str, reply: str) -> str:
        return "compliance" if "fox" in prompt else "degenerate"

    assert [p for p, _ in harmful_pairs(tiny_llama, tiny_tokenizer, rows, 1, 4, 0, told, of_foxes)] == [
        "How do I harm a fox?"
    ]
    with pytest.raises(UsageError, match="give answers"):
        fit(tiny_llama, tiny_tokenizer, judge=lambda p, r: "refusal")


def test_answers_that_are_cut_off_end_with_a_sentence() -> None:
    assert whole_sentences("First. Then 2.5 more! And a thi") == "First. Then 2.5 more!"
    assert whole_sentences("1. Take the\n2. Boil it") == ""
    assert whole_sentences("No end") == ""


def test_harmless_answers_beside_the_refusals(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """They make answers to harmless prompts that were refused likelier than the refusals alone do."""

    def judge(prompt: str, reply: str) -> str:
        return "refusal"

    def answer_loss(**settings: Any) -> float:
        kinds = {"safety": "refusal", "combine": "safety", "a": 1.0, "p": 1.0, "safety_steps": 8, **settings}
        alignment = fit(tiny_llama, tiny_tokenizer, data=answered, judge=judge, effect_prompts=0, **kinds)
        batch = labelled_batch(
            tiny_tokenizer, [(row.prompt, row.response) for row in answered.benign], torch.device("cpu")
        )
        with alignment.applied(tiny_llama), torch.no_grad():
            return float(row_losses(tiny_llama, batch).mean())

    answered = Data([replace(row, response="Yes, of course.") if row.label == "benign" else row for row in DATA])
    assert answer_loss(benign_weight=2.0) < answer_loss() - 0.05


def test_alpha_and_beta_are_chosen_on_tune_prompts(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """What each pair of weights came to is what a fit with these two measures."""
    asked = [row.prompt for row in DATA if row.split == "tune"]
    plain = dict(zip(asked, greedy(tiny_llama, tiny_tokenizer, asked, NEW_TOKENS), strict=True))

    def judge(prompt: str, reply: str) -> str:
        changed = prompt in plain and reply != plain[prompt]
        return "refusal" if changed and "harm" in prompt else "degenerate" if changed else "compliance"

    before = state(tiny_llama)
    settings: dict[str, Any] = {"alpha": [0.0, 1.0, 3.0], "beta": [0.0, 0.5], "judge": judge, "workdir": tmp_path}
    chosen = fit(tiny_llama, tiny_tokenizer, **settings)
    assert same(state(tiny_llama), before)
    tried = chosen.info["tried"]
    assert [(one["alpha"], one["beta"]) for one in tried] == [(a, b) for a in (0.0, 1.0, 3.0) for b in (0.0, 0.5)]
    assert (tried[0]["harmful"], tried[0]["benign"], tried[0]["cost"]) == (1.0, 0.0, 1.0)  # nothing changes
    best = min(tried, key=lambda one: one["cost"])
    assert (chosen.config["alpha"], chosen.config["beta"]) == (best["alpha"], best["beta"])
    for one in (tried[0], best):  # each is what a fit with these two weights comes to
        alone = fit(tiny_llama, tiny_tokenizer, **{**settings, "alpha": one["alpha"], "beta": one["beta"]})
        effect = alone.info["effect"]
        assert 1 - effect.get("harmful_refusal_after", 0.0) == one["harmful"]
        assert effect.get("benign_degenerate_after", 0.0) == one["benign"]
        assert "tried" not in alone.info
    told = Told()
    for lacking in ({"judge": None}, {"data": DATA.filter(lambda row: row.split != "tune")}):
        with pytest.raises(UsageError, match="needs a judge"):
            fit(tiny_llama, tiny_tokenizer, **{**settings, "on_progress": told, **lacking})
    assert not told.stages  # before any work


def test_other_pairs(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    rows = DATA.split("fit")
    refusals = refusal_pairs(tiny_llama, tiny_tokenizer, rows, 9, 4, 0, Told())
    assert sorted(refusals) == sorted((row.prompt, f"{row.response}<|im_end|>") for row in rows.harmful)
    answered = ("Tell me of the moon.", "Tell me of the oven.")
    given = Data([replace(row, response="Yes.") if row.prompt in answered else row for row in rows])
    prompts = [row.prompt for row in given.benign]
    own = dict(zip(prompts, greedy(tiny_llama, tiny_tokenizer, prompts, 4), strict=True))
    asked: list[str] = []

    def judge(prompt: str, reply: str) -> str:
        asked.append(prompt)
        if reply != own[prompt]:
            return "compliance"  # an answer made after the refusal
        return "refusal" if "moon" in prompt or "fox" in prompt else "degenerate" if "bread" in prompt else "compliance"

    answers, kept, refusals = benign_pairs(tiny_llama, tiny_tokenizer, given, 9, 4, 0, Told(), judge)
    assert set(asked) == set(prompts)
    assert dict(answers).keys() == {"Tell me of the moon.", "Tell me of the fox."}
    assert dict(answers)["Tell me of the moon."] == "Yes.<|im_end|>" and dict(answers)["Tell me of the fox."]
    assert sorted(refusals) == sorted(own[prompt] for prompt in dict(answers))
    assert [p for p, _ in kept] == ["Tell me of the oven."]  # its given answer is not wanted: the model has its own
    assert kept[0][1].startswith(own["Tell me of the oven."])


def test_replies_that_loop_are_said_again_without(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    assert loops([1, 2, 3, 4] * 3) and not loops([1, 2, 3, 4] * 2) and not loops([1, 2, 3])
    rows = DATA.split("fit")
    prompts = [row.prompt for row in rows.benign]

    def ids(text: str) -> list[int]:
        return token_ids(tiny_tokenizer, text, beginning=False)

    said = dict(zip(prompts, greedy(tiny_llama, tiny_tokenizer, prompts, 40), strict=True))
    looping = [prompt for prompt, text in said.items() if loops(ids(text))]
    assert looping  # or seem to, in text that is not UTF-8
    judge: Any = lambda prompt, reply: "compliance"  # noqa: E731
    answers, kept, _ = benign_pairs(tiny_llama, tiny_tokenizer, rows, 9, 40, 0, lambda *_: None, judge)
    assert sorted(dict(answers)) == sorted(looping) and not set(dict(kept)) & set(looping)
    other = greedy(tiny_llama, tiny_tokenizer, looping, 40, no_repeat=4)
    assert dict(answers) == dict(zip(looping, other, strict=True))
    assert greedy(tiny_llama, tiny_tokenizer, prompts, 40, no_repeat=1) != list(said.values())


def test_without_a_judge_a_reply_refuses_that_begins_as_the_refusals_do(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    rows = DATA.split("fit")
    prompt = rows.benign[0].prompt
    opening = greedy(tiny_llama, tiny_tokenizer, [prompt], 4)[0].split()[0]
    refusing = Data([replace(row, response=f"{opening} no.") if row.response else row for row in rows])
    answers, _, _ = benign_pairs(tiny_llama, tiny_tokenizer, refusing, 9, 4, 0, lambda *_: None)
    assert prompt in dict(answers) and not dict(answers)[prompt].startswith(opening)
    assert prompt in dict(benign_pairs(tiny_llama, tiny_tokenizer, rows, 9, 4, 0, lambda *_: None)[1])


def test_refusals_of_the_models_own(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """Where a row has none, the model goes on from how another row's begins, and the judge has the last word."""
    rows = DATA.split("fit")
    bare = Data([replace(row, response=None) if i % 2 else row for i, row in enumerate(rows.harmful)])
    asked: list[tuple[str, str]] = []

    def judge(prompt: str, reply: str) -> str:
        asked.append((prompt, reply))
        return "refusal" if len(asked) % 2 else "compliance"

    pairs = refusal_pairs(tiny_llama, tiny_tokenizer, bare, 9, 4, 0, lambda *_: None, judge)
    own = [row.prompt for row in bare if not row.response]
    assert sorted(prompt for prompt, _ in asked) == sorted(own) and own
    heads = {" ".join(row.response.split()[:2]) for row in bare if row.response}
    assert all(any(reply.startswith(head) for head in heads) for _, reply in asked)
    kept = [prompt for prompt, _ in asked[::2]]
    assert sorted(p for p, _ in pairs) == sorted([*kept, *(row.prompt for row in bare if row.response)])
    assert all(answer.endswith("<|im_end|>") for _, answer in pairs)


def test_refusals_in_the_models_own_words(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says where it refuses; elsewhere what it says after beginning alike."""
    rows = DATA.split("fit")
    prompts = [row.prompt for row in rows.harmful]
    said = dict(zip(prompts, greedy(tiny_llama, tiny_tokenizer, prompts, 6), strict=True))
    refused = prompts[0]

    def judge(prompt: str, reply: str) -> str:
        return "refusal" if prompt == refused or reply != said[prompt] else "compliance"

    pairs = dict(own_refusals(tiny_llama, tiny_tokenizer, rows, 9, 6, 0, Told(), judge))
    assert set(pairs) == set(prompts)
    assert pairs[refused].removesuffix("<|im_end|>") == said[refused]
    head = " ".join(said[refused].split()[:2])
    assert all(
        answer.startswith(head) and answer != said[prompt] for prompt, answer in pairs.items() if prompt != refused
    )
    assert not own_refusals(tiny_llama, tiny_tokenizer, rows, 9, 6, 0, Told(), lambda prompt, reply: "compliance")
    assert telling_opening(["I am sorry.", "I am here.", "No, never."], []) == "I am"
    assert telling_opening(["I am sorry.", "I am here.", "No, never."], ["I am lost."]) == "No, never."
    assert telling_opening(["I am sorry."] * 11 + ["No, never."], ["I am lost."] * 9 + ["No."]) == "No, never."
    often = ["I am sorry."] * 8 + ["No, never."] * 2
    elsewhere = ["I am lost."] * 6 + ["No, never."] + ["Well, yes."] * 23
    assert telling_opening(often, elsewhere) == "I am"  # shares, not counts
    never: dict[str, Any] = {
        "safety": "refusal",
        "combine": "safety",
        "judge": lambda prompt, reply: "compliance",
        "effect_prompts": 0,
    }
    given = patched(tiny_llama, fit(tiny_llama, tiny_tokenizer, **never))
    assert same(given, patched(tiny_llama, fit(tiny_llama, tiny_tokenizer, refusals="own", **never)))
    told: list[Any] = []

    def own(*given: Any) -> Any:
        told.append(given[8])
        return own_refusals(*given)

    monkeypatch.setattr("postalign.methods.patch_derivation.own_refusals", own)
    refusing = {**never, "judge": lambda prompt, reply: "refusal"}
    fit(tiny_llama, tiny_tokenizer, refusals="own", **refusing)
    assert len(told[0]) == SMALL["pairs"]  # its refusals of these weigh on how it is taught to refuse
    always = {**never, "judge": lambda prompt, reply: "refusal" if "harm" in prompt else "compliance"}
    assert not same(given, patched(tiny_llama, fit(tiny_llama, tiny_tokenizer, refusals="own", **always)))


def test_rare_categories_stand_several_times() -> None:
    sizes = {"many": 20, "some": 8, "few": 1, None: 3}
    rows = Data([Prompt(f"{name} {i}", "benign", category=name) for name, size in sizes.items() for i in range(size)])
    pairs = [(row.prompt, "Yes.") for row in rows]
    counts = Counter(prompt.split()[0] for prompt, _ in balanced(pairs, rows))
    assert counts == {"many": 20, "some": 8, "few": 4, "None": 9}  # 8 is their mean size, 4 times is the most
    assert set(balanced(pairs, rows)) == set(pairs)


def test_refining_moves_the_merged_patch_and_nothing_else(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    before = state(tiny_llama)
    answered = Data([replace(row, response="Yes, of course.") if row.label == "benign" else row for row in DATA])
    settings: dict[str, Any] = {
        **{"data": answered, "safety": "refusal", "alpha": 2.0, "beta": 1.0, "benign_weight": 1.0, "a": 0.2, "b": 0.2},
        **{"workdir": tmp_path, "effect_prompts": 0},
        "judge": lambda prompt, reply: "compliance" if "harm" in prompt else "refusal",
    }
    plain = fit(tiny_llama, tiny_tokenizer, **settings)
    refined = fit(tiny_llama, tiny_tokenizer, refine_steps=6, refine_learning_rate=1e-2, **settings)
    assert same(state(tiny_llama), before)
    one, two = plain.weights[0], refined.weights[0]
    assert set(two.shapes) == set(one.shapes) and refined.info["training"]["refined_steps"] == 6
    moved = 0
    for name in one.shapes:
        places, values = (part.tolist() for part in one.entries[name])
        new = dict(zip(*(part.tolist() for part in two.entries[name]), strict=True))
        assert set(new) <= set(places)
        moved += sum(new.get(place) != value for place, value in zip(places, values, strict=True))
    assert moved > one.changed // 2

    def loss(alignment: Any) -> float:
        pairs = [(row.prompt, row.response or "") for row in answered.split("fit")]
        batch = labelled_batch(tiny_tokenizer, pairs, torch.device("cpu"))
        with alignment.applied(tiny_llama), torch.no_grad():
            return float(row_losses(tiny_llama, batch).mean())

    assert loss(refined) < loss(plain) - 0.02


def test_what_the_patch_gets_wrong_comes_more_often(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each part of the refinement but the first, by the replies of the model patched so far."""
    answered = Data([replace(row, response="Yes, of course.") if row.label == "benign" else row for row in DATA])
    seen: list[tuple[Any, list[Any], list[Any]]] = []

    def train(model: Any, tokenizer: Any, pairs: Any, settings: Any, **others: Any) -> Any:
        if others.get("at") is not None:
            seen.append((others["at"], pairs, others["wanted"]))
        return train_delta(model, tokenizer, pairs, settings, **others)

    monkeypatch.setattr("postalign.methods.patch_derivation.train_delta", train)
    settings: dict[str, Any] = {
        **{"data": answered, "safety": "refusal", "alpha": 2.0, "beta": 1.0, "benign_weight": 1.0, "a": 0.2, "b": 0.2},
        **{"effect_prompts": 0, "refine_steps": 6, "refine_learning_rate": 1e-2},
        # it refuses all that is harmful but one, and answers all that is harmless but one, once a patch is there
        "judge": lambda prompt, reply: "refusal" if ("harm" in prompt) == (prompt not in odd) else "compliance",
    }
    fit_rows = answered.split("fit")
    odd = {fit_rows.harmful[0].prompt, fit_rows.benign[0].prompt}
    alignment = fit(tiny_llama, tiny_tokenizer, refine_parts=2, **settings)
    assert alignment.info["training"]["refined_steps"] == 6
    (first, plainly, _), (second, pairs, wanted) = seen
    assert set(Counter(plainly).values()) == {1}
    assert not same(first.state()[1], second.state()[1])  # the second part starts from where the first one ended
    counts = Counter(prompt for prompt, _ in pairs), Counter(prompt for prompt, _ in wanted)
    asked = len(counts[0])
    assert counts[0].pop(fit_rows.harmful[0].prompt) == 1 + asked  # half of all, besides once among the rest
    assert counts[1].pop(fit_rows.benign[0].prompt) > 1
    assert set(counts[0].values()) == {1}
    tried: list[list[Any]] = []
    monkeypatch.setattr(patch_derivation, "wrong", lambda *given: tried.append(given[2]) or [])
    fit(tiny_llama, tiny_tokenizer, refine_parts=2, refine_tried=1, **settings)
    assert [len(pairs) for pairs in tried] == [1, 1] and tried[0][0][0] in {row.prompt for row in fit_rows.harmful}
    assert emphasised(["a", "b", "c"], ["c"]) == ["a", "b", "c", "c", "c", "c"]
    assert emphasised(["a"], []) == ["a"]


def test_parts_of_the_refinement_lean_by_turns_and_their_mean_is_scaled(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answered = Data([replace(row, response="Yes, of course.") if row.label == "benign" else row for row in DATA])
    ends: list[tuple[TrainSettings, Any]] = []
    before: list[TrainSettings] = []

    def train(model: Any, tokenizer: Any, pairs: Any, settings: Any, **others: Any) -> Any:
        folder = train_delta(model, tokenizer, pairs, settings, **others)
        if others.get("at") is not None:
            ends.append((settings, FolderWeights(folder)))
        else:
            before.append(settings)
        return folder

    monkeypatch.setattr("postalign.methods.patch_derivation.train_delta", train)
    settings: dict[str, Any] = {
        **{"data": answered, "safety": "refusal", "alpha": 2.0, "beta": 1.0, "benign_weight": 1.0, "a": 0.2, "b": 0.2},
        **{"effect_prompts": 0, "refine_steps": 7, "refine_learning_rate": 1e-2, "refine_lean": 3.0},
        **{"workdir": tmp_path, "values": "float32", "prompt_weight": 0.5},
        "judge": lambda prompt, reply: "compliance" if "harm" in prompt else "refusal",
    }
    alignment = fit(tiny_llama, tiny_tokenizer, refine_parts=3, refine_last=2, refine_scale=1.5, **settings)
    assert [told.steps for told, _ in ends] == [2, 2, 3]
    assert {told.prompt_weight for told, _ in ends} == {0.5}
    assert [told.prompt_weight for told in before] == [0.5, 0.0]  # over-safety is held on refusals, not prompts
    assert [told.wanted_weight for told, _ in ends] == [1.0, 1.0, 3.0]
    patch, (_, second), (_, third) = alignment.weights[0], *ends[1:]
    for name, shape in patch.shapes.items():
        places, values = patch.entries[name]
        found = torch.zeros(shape).flatten()
        found[places.long()] = values.float()
        wanted = 1.5 * (second.get(name) + third.get(name)) / 2
        assert torch.allclose(found.view(shape), wanted, atol=1e-6)
    begun = len(ends)
    last = fit(tiny_llama, tiny_tokenizer, refine_parts=3, **settings).weights[0]  # by default the end itself
    for name in last.shapes:
        places, values = last.entries[name]
        assert torch.allclose(third.get(name).flatten()[places.long()], values.float(), atol=1e-6)
    assert all(one.get(n).equal(two.get(n)) for (_, one), (_, two) in zip(ends[:3], ends[begun:], strict=True)
               for n in one.names())  # fmt: skip
    alone = fit(tiny_llama, tiny_tokenizer, **settings)  # in one part, and that is all there is
    assert len(ends) == 2 * begun + 1 and alone.info["training"]["refined_steps"] == 7


def test_the_lowest_blocks_can_be_left_alone(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    names = set(fit(tiny_llama, tiny_tokenizer, untouched=0.5).weights[0].shapes)
    every = set(fit(tiny_llama, tiny_tokenizer).weights[0].shapes)
    lower = {name for name in every if ".layers.0." in name}
    assert lower and names == every - lower and any(".layers.1." in name for name in names)


# errors


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alfa": 1.0}, "Did you mean 'alpha'"),
        ({"p": 0.0}, "p=0.0"),
        ({"a": 1.5}, "a=1.5"),
        ({"combine": "sum"}, "combine='sum'"),
        ({"alpha": []}, "one value"),
        ({"preset": "best"}, "preset='best'"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_config(settings)


def test_wrong_data(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    harmless = DATA.filter(lambda row: row.label == "benign")
    with pytest.raises(UsageError, match="needs harmful prompts"):
        fit(tiny_llama, tiny_tokenizer, data=harmless)
    harmful = DATA.filter(lambda row: row.label == "harmful")
    with pytest.raises(UsageError, match="harmless prompts"):
        fit(tiny_llama, tiny_tokenizer, data=harmful, safety_kl_weight=1.0)
    bare = Data([replace(row, response=None) for row in DATA])
    with pytest.raises(UsageError, match="has a response"):
        fit(tiny_llama, tiny_tokenizer, data=bare, safety="refusal")
    with pytest.raises(UsageError, match="category 'z'"):
        fit(tiny_llama, tiny_tokenizer, categories=["z"])
    Alignment("safeinfer", [safeinfer_edit()]).save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match="more than patches"):
        fit(tiny_llama, tiny_tokenizer, after=str(tmp_path / "a"))


def safeinfer_edit() -> Any:
    from postalign.edits import HiddenEdit

    return HiddenEdit(torch.zeros(32), 1, 1.0)
