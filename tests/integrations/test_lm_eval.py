"""lm-eval with an aligned model gives the numbers that decoding under the alignment has, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import postalign as pa
from postalign.alignment import Alignment
from postalign.decoding import next_token_log_probs
from postalign.errors import UsageError
from tests.decoding.tools import GUIDES, parts
from tests.decoding.twin import PROMPTS, Twin, distribution, guidance_of, merged, push, union64
from tests.tiny import SENTENCES, tiny_model

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'postalign[lm-eval]'")

ANSWERS = [" A", " first warm the oven", "Sorry", "Sorry, I"]


def asked(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    kind = "generate_until" if isinstance(arguments[-1], dict) else "loglikelihood"
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def made(model: Any, tokenizer: Any, alignment: Alignment | None = None, **settings: Any) -> Any:
    from postalign.integrations.lm_eval import AlignedLM

    return AlignedLM(model, alignment, tokenizer=tokenizer, **settings)


def expected(model: Any, tokenizer: Any, prompt: str, answer: str, alignment: Any) -> tuple[float, bool]:
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    scores, ids = next_token_log_probs(model, tokenizer, [prompt], [ids], alignment)[0]
    return float(scores.gather(1, ids.unsqueeze(1)).sum()), scores.argmax(-1).tolist() == ids.tolist()


@pytest.mark.parametrize("name", ["", "amplification", *(f"amplification+{kind}+gate" for kind in GUIDES)])
def test_loglikelihood_is_ours(name: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts(name, tiny_llama, tiny_tokenizer) if name else None
    wanted = [expected(tiny_llama, tiny_tokenizer, p, a, alignment) for p in PROMPTS for a in ANSWERS]
    for size in (1, 4, "auto"):
        lm = made(tiny_llama, tiny_tokenizer, alignment, batch_size=size)
        contexts = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
        found = lm.loglikelihood([asked(c, a) for c in contexts for a in ANSWERS], disable_tqdm=True)
        for (score, greedy), (ours, best) in zip(found, wanted, strict=True):
            assert score == pytest.approx(ours, abs=1e-3) and greedy == best


def test_the_greedy_reply_is_known_as_such(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts("amplification+adapter", tiny_llama, tiny_tokenizer)
    lm = made(tiny_llama, tiny_tokenizer, alignment)
    context = lm.apply_chat_template([{"role": "user", "content": PROMPTS[0]}])
    ids = Twin(tiny_llama, tiny_tokenizer, alignment).run(PROMPTS[0], 3)[0]
    said, other = [*ids[:2], ids[2]], [*ids[:2], (ids[2] + 1) % 384]
    found = lm._loglikelihood_tokens([((context, "x"), lm.tok_encode(context), one) for one in (said, other)], True)
    assert [greedy for _, greedy in found] == [True, False]


def test_answers_that_share_all_but_their_last_token_share_a_pass(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    passes: list[int] = []
    handle = tiny_llama.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        lm = made(tiny_llama, tiny_tokenizer)
        lm.loglikelihood([asked("Would you", f" {word}") for word in "ABCD"], disable_tqdm=True)
    finally:
        handle.remove()
    assert passes == [1]


@pytest.mark.parametrize("guide", [None, "adapter", "prompt"])
def test_raw_contexts(guide: str | None, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """Without a chat the whole context is the prompt, for the model and for the guide."""
    edits = [push()] + ([guidance_of(guide, tiny_llama)] if guide else [])
    lm = made(tiny_llama, tiny_tokenizer, Alignment("test", edits), batch_size=2)
    context, answer = "The quick brown fox ", "jumps over"  # lm-eval gives the space to the answer
    head = tiny_tokenizer(context.rstrip())["input_ids"]
    whole = tiny_tokenizer(context + answer)["input_ids"]
    scores = distribution_along(tiny_llama, head, whole, [push()])
    if guide == "adapter":
        theirs: Any = edits[1]
        other = merged(tiny_llama, theirs.guide.patch)
        scores = union64(scores, distribution_along(other, head, whole, []), 0.9)
    elif guide == "prompt":  # which has no other view of a raw text
        scores = union64(scores, distribution_along(tiny_llama, head, whole, []), 0.9)
    tail = torch.tensor(whole[len(head) :])
    ours = float(scores.gather(1, tail.unsqueeze(1)).sum())
    found = lm.loglikelihood([asked("Hi", " there, then"), asked(context, answer)], disable_tqdm=True)[1]
    assert found[0] == pytest.approx(ours, abs=1e-3)


def distribution_along(model: Any, head: list[int], whole: list[int], edits: list[Any]) -> torch.Tensor:
    """`[tokens after head, vocab]`, one slow pass for each."""
    steps = range(len(head), len(whole))
    return torch.stack([distribution(model, whole[:n], len(head), edits, 1.0) for n in steps])


@pytest.mark.parametrize("length", [None, 12])
def test_rolling(length: int | None, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    lm = made(tiny_llama, tiny_tokenizer, batch_size=3, max_length=length)
    found = lm.loglikelihood_rolling([asked(text) for text in SENTENCES[:3]], disable_tqdm=True)
    for text, score in zip(SENTENCES, found, strict=False):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        total, size = 0.0, (length or 512) - 1
        for begin in range(0, len(ids), size):  # lm-eval's windows: as much as fits before the tokens that are scored
            part = ids[begin : begin + size]
            before = [tiny_tokenizer.bos_token_id] if begin == 0 else ids[begin + len(part) - size - 1 : begin]
            for n, token in enumerate(part):
                total += float(distribution(tiny_llama, before + part[:n], len(before), [], 1.0)[token])
        assert score == pytest.approx(total, abs=1e-2)
    steered = made(tiny_llama, tiny_tokenizer, Alignment("test", [push()]), max_length=length)
    assert steered.loglikelihood_rolling([asked(SENTENCES[0])], disable_tqdm=True)[0] != pytest.approx(found[0])


@pytest.mark.parametrize("name", ["amplification", *(f"amplification+{kind}+gate" for kind in GUIDES)])
def test_replies_are_ours(name: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    alignment = parts(name, tiny_llama, tiny_tokenizer)
    ours = pa.generate(tiny_llama, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=6)
    lm = made(tiny_llama, tiny_tokenizer, alignment, batch_size=2)
    contexts = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    assert lm.generate_until([asked(c, settings) for c in contexts], disable_tqdm=True) == ours
    word = ours[0][2:4]
    cut = lm.generate_until([asked(contexts[0], {"until": word, "max_gen_toks": 6})], disable_tqdm=True)
    assert cut == [ours[0][: ours[0].find(word)]]


def test_a_reply_that_is_begun(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """A task's gen_prefix stands after the opened reply; a prompt guide reads it after its own view."""
    alignment = Alignment("test", [guidance_of("prompt", tiny_llama)])
    lm = made(tiny_llama, tiny_tokenizer, alignment)
    chat = [{"role": "user", "content": PROMPTS[3]}, {"role": "assistant", "content": "Sorry,"}]
    context = lm.apply_chat_template(chat, add_generation_prompt=False)
    opened = lm.apply_chat_template(chat[:1])
    assert context == opened + "Sorry,"
    head, tail = lm.tok_encode(context), tiny_tokenizer(" first", add_special_tokens=False)["input_ids"]
    begun = head[len(lm.tok_encode(opened)) :]
    ours = next_token_log_probs(tiny_llama, tiny_tokenizer, [PROMPTS[3]], [begun + tail], alignment)[0][0]
    score = float(ours[len(begun) :].gather(1, torch.tensor(tail).unsqueeze(1)).sum())
    assert lm.loglikelihood([asked(context, " first")], disable_tqdm=True)[0][0] == pytest.approx(score, abs=1e-3)


def test_sampling_and_wrong_use(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    settings = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 6}
    said = [
        made(tiny_llama, tiny_tokenizer, batch_size=size).generate_until(
            [asked(prompt, settings) for prompt in PROMPTS], disable_tqdm=True
        )
        for size in (1, 3)
    ]
    assert said[0] == said[1] and len(set(said[0])) > 1
    lm = made(tiny_llama, tiny_tokenizer)
    with pytest.raises(UsageError, match="num_beams"):
        lm.generate_until([asked("Hi", {"num_beams": 4})], disable_tqdm=True)
    with pytest.raises(UsageError, match="tokenizer"):
        made(tiny_llama, None)
    with pytest.raises(UsageError, match="out of range"):
        made(tiny_llama, tiny_tokenizer, Alignment("test", [replace(push(), layer=9)]))


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["bread", "the moon", "a cat"]
doc_to_target: right
metric_list: [{{metric: acc}}]
"""
SAY = """
task: tiny_say
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{right}}}}"
generation_kwargs: {{until: [], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": q, "right": i % 3}) + "\n" for i, q in enumerate(PROMPTS)))
    for name, text in (("choice", CHOICE), ("say", SAY)):
        (tmp_path / "tasks" / name).mkdir(parents=True)
        (tmp_path / "tasks" / name / f"{name}.yaml").write_text(text.format(data=data))
    return tmp_path


@pytest.fixture
def saved(task_folder: Path, tiny_tokenizer: Any) -> Path:
    """A model and an alignment on the disk, beside the tasks."""
    model = tiny_model()
    model.save_pretrained(task_folder / "model")
    tiny_tokenizer.save_pretrained(task_folder / "model")
    parts("amplification+adapter+gate", model, tiny_tokenizer).save_pretrained(task_folder / "alignment")
    return task_folder


def choices(folder: Path, model: Any, tokenizer: Any) -> list[int]:
    """The choice of each prompt by our own numbers."""
    alignment = Alignment.from_pretrained(folder / "alignment")
    options = ["bread", "the moon", "a cat"]  # in a chat, lm-eval puts no space before an answer
    scores = [[expected(model, tokenizer, p, o, alignment)[0] for o in options] for p in PROMPTS]
    return [row.index(max(row)) for row in scores]


def test_a_task_file(saved: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import postalign.integrations.lm_eval  # noqa: F401  registers the model

    results = lm_eval.simple_evaluate(
        model="postalign",
        model_args={"pretrained": str(saved / "model"), "alignment": str(saved / "alignment")},
        batch_size=4,
        tasks=["tiny_choice", "tiny_say"],
        task_manager=TaskManager(include_path=str(saved / "tasks"), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    right = [a == i % 3 for i, a in enumerate(choices(saved, tiny_llama, tiny_tokenizer))]
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    alignment = Alignment.from_pretrained(saved / "alignment")
    ours = pa.generate(tiny_llama, tiny_tokenizer, PROMPTS, alignment=alignment, max_new_tokens=4)
    said = {s["doc"]["question"]: s["resps"][0][0] for s in results["samples"]["tiny_say"]}
    assert said == dict(zip(PROMPTS, ours, strict=True))
    assert results["config"]["alignment"] == "test"


def test_the_command(saved: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    arguments = f"pretrained={saved / 'model'},alignment={saved / 'alignment'}"
    command = [sys.executable, "-m", "postalign.integrations.lm_eval", "--model", "postalign"]
    command += ["--model_args", arguments, "--tasks", "tiny_choice", "--include_path", str(saved / "tasks")]
    command += ["--apply_chat_template", "--batch_size", "2", "--output_path", str(saved / "out")]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(saved / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(next((saved / "out").rglob("results*.json")).read_text())
    right = [a == i % 3 for i, a in enumerate(choices(saved, tiny_llama, tiny_tokenizer))]
    assert written["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
