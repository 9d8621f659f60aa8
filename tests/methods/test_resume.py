"""An interrupted fit goes on where it was and ends as an uninterrupted one, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from postalign.alignment import Alignment
from postalign.data.records import Data
from postalign.methods import choose, guide
from tests.methods.small import ALL_STAGES, DATA, Told, fit
from tests.tiny import tiny_model, tiny_tokenizer


def files(alignment: Alignment, folder: Path) -> dict[str, bytes]:
    alignment.save_pretrained(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    told = Told()
    alignment = fit(tiny_model(), tiny_tokenizer(), on_progress=told)
    assert told.stages == ALL_STAGES
    return files(alignment, tmp_path_factory.mktemp("whole") / "a")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Counts the candidates that were answered with and the trainings that were begun."""
    counts = SimpleNamespace(answers=0, trainings=0)

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            setattr(counts, name, getattr(counts, name) + 1)
            return real(*args, **kwargs)

        return run

    monkeypatch.setattr(choose, "greedy", counting("answers", choose.greedy))
    monkeypatch.setattr(guide, "train_adapter", counting("trainings", guide.train_adapter))
    return counts


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_an_interrupted_fit_goes_on(
    stage: str, work: SimpleNamespace, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        fit(model, tokenizer, on_progress=Told(stage), workdir=tmp_path / "work")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "work").glob("*")), "nothing half-written"

    told = Told()
    alignment = fit(model, tokenizer, on_progress=told, workdir=tmp_path / "work")
    reported_again = {"choosing strength", "fitting the gate"}  # from what was kept
    finished = ALL_STAGES[: ALL_STAGES.index(stage)]
    if stage == "training the unsafe guide":  # pairs are never written down: the guide is one stage
        finished.remove("pairs for the unsafe guide")
    assert not (set(finished) - reported_again) & set(told.stages)
    assert set(ALL_STAGES[ALL_STAGES.index(stage) :]) <= set(told.stages)
    assert work.answers == 2, "each candidate answers once, in one of the two runs"
    assert work.trainings == 1 + (stage == "training the unsafe guide")
    assert files(alignment, tmp_path / "a") == uninterrupted


def test_nothing_is_done_twice(work: SimpleNamespace, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    fit(model, tokenizer, workdir=tmp_path / "work")
    work.answers = work.trainings = 0
    told = Told()
    alignment = fit(model, tokenizer, on_progress=told, workdir=tmp_path / "work")
    assert told.stages == ["choosing strength", "fitting the gate"]
    assert (work.answers, work.trainings) == (0, 0)
    assert files(alignment, tmp_path / "a") == uninterrupted


OTHERS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("seed", {"seed": 1}, ALL_STAGES),
    ("trials", {"trials": 4}, ALL_STAGES[:3]),
    ("corruption", {"corruption": "mixed"}, ALL_STAGES[1:3]),
    ("heads", {"heads": 3}, ["choosing strength"]),
    ("guide_steps", {"guide_steps": 1}, ALL_STAGES[3:5]),
    ("data", {"data": Data(DATA.rows[:-1])}, ALL_STAGES),
]


@pytest.mark.parametrize(("what", "settings", "stages"), OTHERS, ids=[case[0] for case in OTHERS])
def test_other_settings_are_other_work(
    what: str, settings: dict[str, Any], stages: list[str], work: SimpleNamespace, tmp_path: Path
) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    fit(model, tokenizer, workdir=tmp_path / "work")
    work.answers = 0
    told = Told()
    resumed = fit(model, tokenizer, on_progress=told, workdir=tmp_path / "work", **settings)
    assert set(told.stages) == {*stages, "choosing strength", "fitting the gate"}
    assert work.answers == (2 if "choosing strength" in stages else 0)
    fresh = fit(model, tokenizer, **settings)
    assert files(resumed, tmp_path / "a") == files(fresh, tmp_path / "b")


def test_another_model_is_other_work(tiny_tokenizer: Any, tmp_path: Path) -> None:
    settings = {"workdir": tmp_path, "strength": 0.5, "guide": "none", "gate": False}
    fit(tiny_model(), tiny_tokenizer, **settings)
    other = fit(tiny_model(seed=1), tiny_tokenizer, **settings)
    fresh = fit(tiny_model(seed=1), tiny_tokenizer, **{**settings, "workdir": None})
    assert torch.equal(other.arrays["head_effects"], fresh.arrays["head_effects"])
