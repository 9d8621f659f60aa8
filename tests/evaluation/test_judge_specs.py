"""Judges by name: what each name makes, and what a wrong one says."""

from __future__ import annotations

from typing import Any

import pytest

from postalign.errors import UsageError
from postalign.evaluation import judge as rules
from postalign.evaluation import load_judge
from postalign.evaluation.embedded import EmbeddedJudge
from postalign.evaluation.endpoint import EndpointJudge


def test_built_in_judges() -> None:
    assert load_judge("rules") is rules
    one, other = load_judge("embedded"), load_judge("embedded:harm", threshold=0.7)
    assert isinstance(one, EmbeddedJudge) and isinstance(other, EmbeddedJudge)
    assert (one.name, one.tells, one.threshold) == ("embedded", "refusal", 0.5)
    assert (other.name, other.tells, other.threshold) == ("embedded:harm", "harm", 0.7)


def test_endpoints_by_model_and_address() -> None:
    judge = load_judge("endpoint:org/judge@v2@http://127.0.0.1:8000/v1/", workers=2)
    assert isinstance(judge, EndpointJudge)
    assert (judge.model, judge.base_url, judge.workers) == ("org/judge@v2", "http://127.0.0.1:8000/v1", 2)


@pytest.mark.parametrize(
    ("spec", "name", "format"),
    [
        ("model:owner/guard", "owner/guard", None),
        ("model:owner/guard:shieldgemma", "owner/guard", "shieldgemma"),
        ("model:./folder:sequence", "./folder", "sequence"),
        ("model:llama_guard_4:judgezoo", "llama_guard_4", "judgezoo"),
        ("model:owner/guard:shieldgema", "owner/guard", "shieldgema"),
        ("model:C:\\folder", "C:\\folder", None),
    ],
)
def test_models_by_name_and_format(spec: str, name: str, format: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from postalign.evaluation import model_judge as module

    calls: list[Any] = []
    monkeypatch.setattr(module, "model_judge", lambda name, format=None, **more: calls.append((name, format, more)))
    load_judge(spec, batch_size=3)
    assert calls == [(name, format, {"batch_size": 3})]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rule", "Did you mean 'rules'"),
        ("embeded", "Did you mean 'embedded'"),
        ("embedded:lies", "Choose from"),
        ("model:", "Choose from"),
        ("endpoint:gpt", "must read endpoint:MODEL@BASE_URL"),
        ("endpoint:@http://x/v1", "must read endpoint:MODEL@BASE_URL"),
    ],
)
def test_names_that_mean_nothing(spec: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_judge(spec)
    assert said in str(refused.value)


def test_settings_that_a_judge_does_not_have() -> None:
    for spec in ("rules", "embedded", "endpoint:m@http://127.0.0.1/v1"):
        with pytest.raises(UsageError, match="no such setting"):
            load_judge(spec, colour="red")
