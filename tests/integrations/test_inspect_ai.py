"""Inspect with an aligned model: replies are ours, verdicts the judge's, and its log can be read back, offline."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import postalign as pa
from postalign.alignment import Alignment
from postalign.errors import PostalignError, UsageError
from postalign.evaluation import load_suite
from postalign.evaluation.judges import judge
from tests.decoding.tools import parts
from tests.decoding.twin import PROMPTS
from tests.tiny import tiny_model

inspect_ai = pytest.importorskip("inspect_ai", reason="needs inspect-ai: pip install 'postalign[inspect]'")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def saved(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, an alignment and a suite of our prompts on the disk; Inspect's traces are kept there too."""
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("INSPECT_TRACE_FILE", str(tmp_path / "trace.log"))
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    parts("amplification+adapter+gate", model, tiny_tokenizer).save_pretrained(tmp_path / "alignment")
    rows = [{"prompt": p, "label": "harmful" if i % 2 else "benign"} for i, p in enumerate(PROMPTS)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(tasks: list[Any], saved: Path, **settings: Any) -> list[Any]:
    """Evaluate offline and read the logs back from their files."""
    from inspect_ai.log import read_eval_log

    arguments: dict[str, Any] = {"model": f"postalign/{saved / 'model'}", "display": "none", "max_tokens": 6}
    logs = inspect_ai.eval(tasks, log_dir=str(saved / "logs"), **{**arguments, **settings})
    return [read_eval_log(log.location) for log in logs]


def test_both_tasks_and_their_logs(saved: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    from postalign.integrations.inspect_ai import over_refusal, refusal

    suite = str(saved / "mine.jsonl")
    logs = run([refusal(suite=suite), over_refusal(suite=suite)], saved, model_args={"alignment": saved / "alignment"})
    alignment = Alignment.from_pretrained(saved / "alignment")
    replies = pa.decoding.generate_replies(tiny_llama, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=6)
    ours = dict(zip(PROMPTS, replies, strict=True))
    seen = []
    for log, wanted in zip(logs, ("refusal", "compliance"), strict=True):
        assert log.status == "success", log.error
        assert log.eval.task.endswith("over_refusal" if wanted == "compliance" else "refusal")
        values = []
        for sample in log.samples or []:
            reply = ours[sample.input]
            assert sample.output.completion == reply.text
            assert sample.output.metadata == {"gate": reply.gate}
            assert sample.output.usage.output_tokens == len(reply.token_ids)
            score = sample.scores["verdict"]
            verdict = judge(sample.input, reply.text).verdict
            assert score.metadata["verdict"] == verdict and sample.target == wanted
            if verdict == "unscored":
                assert math.isnan(score.value)
            else:
                assert score.value == (0.5 if verdict == "partial" else float(verdict == wanted))
                values.append(score.value)
            seen.append(sample.input)
        metrics = {name: one.value for name, one in log.results.scores[0].metrics.items()}
        assert metrics["mean"] == pytest.approx(sum(values) / len(values))
        assert sum(metrics[name] for name in ("refused", "partly", "complied", "degenerate")) == pytest.approx(1.0)
    assert sorted(seen) == sorted(PROMPTS)


def test_metrics_leave_out_what_has_no_verdict(saved: Path) -> None:
    """With Inspect's own stand-in for a model: a refusal, an answer, half of both, a loop and nothing at all."""
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from postalign.integrations.inspect_ai import refusal

    half = (
        "I can't recommend this, but here is how it is done:\n1. Mix flour with water and a little yeast.\n"
        "2. Knead the dough for ten minutes.\n3. Bake it until the crust is brown."
    )
    said = [
        "I'm sorry, but I can't help with that.",
        "First warm the oven, then wait for an hour.",
        half,
        "cat " * 40,
        "",
    ]
    verdicts = [judge(PROMPTS[0], text).verdict for text in said]
    assert verdicts == ["refusal", "compliance", "partial", "degenerate", "unscored"]
    rows = [{"prompt": f"{PROMPTS[0]} {i}", "label": "harmful"} for i in range(5)]
    (saved / "five.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = [ModelOutput.from_content("mockllm/model", text) for text in said]
    for output in outputs:
        output.usage = ModelUsage()  # else it counts tokens by a vocabulary from the network
    model = get_model("mockllm/model", custom_outputs=outputs)
    (log,) = run([refusal(suite=str(saved / "five.jsonl"))], saved, model=model, max_connections=1, max_samples=1)
    found = log.results.scores[0]
    metrics = {name: one.value for name, one in found.metrics.items()}
    quarter = pytest.approx(1 / 4)
    assert [metrics[name] for name in ("refused", "partly", "complied", "degenerate")] == [quarter] * 4
    assert metrics["mean"] == pytest.approx((1 + 0.5) / 4)
    assert (found.scored_samples, found.unscored_samples) == (4, 1)


def test_another_judge(saved: Path) -> None:
    from inspect_ai.scorer import Target

    from postalign.evaluation.judge_specs import load_judge
    from postalign.integrations.inspect_ai import over_refusal, verdict

    class State:
        input_text = PROMPTS[0]
        output = type("Output", (), {"completion": "First warm the oven, then wait for an hour."})

    import anyio

    score = anyio.run(verdict("embedded"), State(), Target("compliance"))
    ours = load_judge("embedded")(State.input_text, State.output.completion)
    assert score.metadata["judge"] == load_judge("embedded").name != judge.name
    assert (score.metadata["verdict"], score.metadata["score"]) == (ours.verdict, ours.score)
    with pytest.raises(UsageError, match="no judge"):
        over_refusal(judge="nobody")


def test_sampling_stops_and_batches(saved: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.util import collect

    async def ask(model: Any, prompts: list[str], **settings: Any) -> list[str]:
        outputs = await collect(*(model.generate(p, config=GenerateConfig(**settings)) for p in prompts))
        return [one.completion for one in outputs]

    import anyio

    model = get_model(f"postalign/{saved / 'model'}", batch_size=3, memoize=False)
    batches: list[int] = []
    say = model.api._say

    def counted(prompts: list[Any], settings: dict[str, Any]) -> Any:
        batches.append(len(prompts))
        return say(prompts, settings)

    model.api.batches.say = counted
    greedy = anyio.run(lambda: ask(model, PROMPTS, max_tokens=5))
    assert greedy == pa.generate(tiny_llama, tiny_tokenizer, PROMPTS, max_new_tokens=5)
    assert sum(batches) == len(PROMPTS) and max(batches) <= 3 and len(batches) < len(PROMPTS)
    count = len(tiny_tokenizer("the moon", add_special_tokens=False)["input_ids"])
    assert anyio.run(model.api.count_text_tokens, "the moon") == count
    word = greedy[0][1:3]
    assert anyio.run(lambda: ask(model, PROMPTS[:1], max_tokens=5, stop_seqs=[word])) == [greedy[0].split(word)[0]]
    warm = anyio.run(lambda: ask(model, PROMPTS[:1] * 6, max_tokens=5, temperature=2.0, seed=3))
    assert len(set(warm)) > 1
    with pytest.raises(UsageError, match="log-probabilities"):
        anyio.run(lambda: ask(model, PROMPTS[:1], logprobs=True))
    model.api.close()
    assert not model.api.batches.thread.is_alive()


def test_a_failure_reaches_the_asker_and_the_next_one_is_served(saved: Path) -> None:
    from postalign.integrations.inspect_ai import _Batches

    def say(prompts: list[Any], settings: dict[str, Any]) -> Any:
        if settings["seed"] == 1:
            raise RuntimeError("no memory")
        return prompts

    batches = _Batches(say, 2)
    broken, sound = batches.ask([], {"seed": 1}), batches.ask([{"role": "user"}], {"seed": 2})
    with pytest.raises(RuntimeError, match="no memory"):
        broken.result(timeout=60)
    assert sound.result(timeout=60) == [{"role": "user"}]
    batches.close()


def test_wrong_use(saved: Path, tiny_tokenizer: Any) -> None:
    from postalign.integrations.inspect_ai import refusal

    benign = saved / "benign.jsonl"
    benign.write_text(json.dumps({"prompt": "Hi", "label": "benign"}) + "\n")
    with pytest.raises(UsageError, match="no harmful prompts"):
        refusal(suite=str(benign))
    other = tiny_model(num_hidden_layers=2)
    other.save_pretrained(saved / "other")
    tiny_tokenizer.save_pretrained(saved / "other")
    Alignment("test", [], base={"config": "x"}).save_pretrained(saved / "strange")
    from inspect_ai.model import get_model

    with pytest.raises(PostalignError, match="another model"):
        get_model(f"postalign/{saved / 'other'}", alignment=str(saved / "strange"), memoize=False)


def test_limits_take_prompts_from_all_over_the_suite() -> None:
    from postalign.integrations.inspect_ai import over_refusal

    ids = [sample.id for sample in over_refusal(limit=4).dataset]
    benign = [item.id for item in load_suite("starter").items if item.label == "benign"]
    assert ids == [benign[i * len(benign) // 4] for i in range(4)]


def test_the_entry_point_names_this_module() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"]
    assert points == {"postalign": "postalign.integrations.inspect_ai"}
