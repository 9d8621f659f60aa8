"""The probe is penalised logistic regression; the threshold never lets more through than it was told."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postalign.errors import UsageError
from postalign.methods.probe import auc, fit_probe, threshold_at


def clouds(harmful: int = 30, benign: int = 90, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes of unequal size, features of very unequal scale and mean, one of them constant."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(harmful + benign) < harmful
    x = torch.randn(len(y), width, generator=generator)
    x[:, 0] += y * 1.5
    x = x * torch.tensor([1.0, 50.0, 1e-3, 1.0, 1.0, 0.0]) + torch.tensor([0.0, 300.0, 0.0, -7.0, 1.0, 4.0])
    return x, y


@pytest.mark.parametrize("l2", [0.5, 1.0, 20.0])
def test_probe_is_scikit_learns(l2: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = clouds()
    weight, bias = fit_probe(x, y, l2)
    mean, scale = x.double().mean(0), x.double().std(0).clamp(min=1e-6)
    other = linear_model.LogisticRegression(C=1 / l2, class_weight="balanced", tol=1e-9, max_iter=2000)
    other.fit(((x.double() - mean) / scale).numpy(), y.numpy())
    scores = torch.from_numpy(other.decision_function(((x.double() - mean) / scale).numpy()))
    torch.testing.assert_close((x @ weight + bias).double(), scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("l2", [0.5, 20.0])
def test_probe_minimises_its_loss(l2: float) -> None:
    """The gradient by hand, on standardised states, classes weighing the same, the bias not penalised."""
    x, y = clouds()
    weight, bias = fit_probe(x, y, l2)
    assert weight.dtype == torch.float32
    assert isinstance(bias, float)
    scale = x.double().std(0).clamp(min=1e-6)
    standard = (x.double() - x.double().mean(0)) / scale
    own = weight.double() * scale
    share = torch.where(y, 60 / 30, 60 / 90).double()
    error = share * ((x.double() @ weight.double() + bias).sigmoid() - y.double())
    torch.testing.assert_close(standard.T @ error + l2 * own, torch.zeros(6).double(), atol=2e-3, rtol=0)
    assert float(error.sum()) == pytest.approx(0, abs=2e-3)


def test_probe_finds_a_separating_direction_and_repeats() -> None:
    x, y = clouds()
    x[:, 0] += y * 20
    weight, bias = fit_probe(x, y, 0.1)
    assert torch.equal(x @ weight + bias > 0, y)
    again = fit_probe(x, y, 0.1)
    assert torch.equal(again[0], weight)
    assert again[1] == bias
    with torch.no_grad():  # also where the caller has switched gradients off
        assert torch.equal(fit_probe(x, y, 0.1)[0], weight)


@pytest.mark.parametrize("y", [torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)])
def test_probe_needs_both_classes(y: Tensor) -> None:
    with pytest.raises(UsageError, match="both harmful and benign"):
        fit_probe(torch.randn(4, 3), y)


def passing(scores: Tensor, threshold: float) -> int:
    return int((scores >= threshold).sum())


def test_threshold_by_hand() -> None:
    scores = torch.arange(10.0)
    assert threshold_at(scores, 0.2) == 7.5
    assert threshold_at(scores, 0.29) == 7.5
    assert threshold_at(scores, 0.3) == 6.5
    assert threshold_at(scores, 0.0) == 10.0  # one above the highest
    assert threshold_at(scores, 0.05) == 10.0  # not one row may pass
    assert threshold_at(scores.flip(0), 0.2) == 7.5
    assert threshold_at(torch.tensor([3.0]), 0.5) == 4.0
    assert threshold_at(torch.tensor([-1e9]), 0.0) > -1e9


def test_threshold_takes_ties_together() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert passing(scores, threshold_at(scores, 0.25)) == 0
    assert passing(scores, threshold_at(scores, 0.74)) == 0
    assert passing(scores, threshold_at(scores, 0.75)) == 3
    assert passing(torch.zeros(5), threshold_at(torch.zeros(5), 0.9)) == 0


def test_threshold_between_neighbouring_floats() -> None:
    low = torch.tensor(1.0)
    scores = torch.stack([low, low.nextafter(torch.tensor(2.0))])
    assert passing(scores, threshold_at(scores, 0.5)) == 1


SCORES = st.lists(st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0, -2.5]), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SCORES, st.floats(0, 1, exclude_max=True) | st.sampled_from([0.01, 0.03, 0.07, 0.29, 0.5]))
def test_threshold_never_exceeds_its_share(values: list[float], share: float) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    threshold = threshold_at(scores, share)
    through = passing(scores, threshold)
    assert through <= share * len(scores) + 1e-6
    # and as many as may: the next lower score, with all that tie with it, would be too many
    rest = scores[scores < threshold]
    assert len(rest)
    assert passing(scores, float(rest.max())) > math.floor(share * len(scores))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_threshold_of_an_impossible_share(share: float) -> None:
    with pytest.raises(UsageError, match=r"outside \[0, 1\)"):
        threshold_at(torch.zeros(3), share)


def test_threshold_without_scores() -> None:
    with pytest.raises(UsageError, match="benign prompts in the tune split"):
        threshold_at(torch.zeros(0), 0.03)


def test_auc() -> None:
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert auc(torch.tensor([0.0]), torch.tensor([1.0])) == 0.0
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([1.0])) == 0.75
