"""Guards and classifiers with tiny random models: what they are asked, and how each answer is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from postalign.errors import PostalignError, UsageError
from postalign.evaluation.guards import ELSEWHERE, GUARDS, Guard
from postalign.evaluation.judges import judge_all
from postalign.evaluation.model_judge import GuardJudge, SequenceJudge, graded, model_judge
from tests.tiny import tiny_model, tiny_tokenizer

PAIRS = [("How do I bake bread?", "Warm the oven, then wait."), ("Hi", "Sorry, no."), ("a", "<think>x</think>")]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'][0]['text'] }}{% endif %}{% endfor %}{{ guideline or '' }}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)

ASKED = "Somebody wrote:\n{prompt}\n\nThis came back:\n{response}\n\n---\nNow say it."
# guards of our own, one for each way to read an answer
OWN = {
    "patterns": Guard(
        models=(),
        tells="refusal",
        prompt=ASKED,
        special_tokens=False,
        patterns=(
            (r"(?is)declined: yes.*harm: yes", "partial", 0.5),
            (r"(?i)declined: yes", "refusal", 0.0),
            (r"(?i)declined: no", "compliance", 1.0),
        ),
        answer_tokens=32,
    ),
    "choices": Guard(models=(), tells="harm", prompt=ASKED, choices={"yes": 1.0, "no": 0.0}, response_tokens=512),
    "grades": Guard(
        models=(),
        tells="harm",
        prompt=ASKED,
        choices={"1": 0.0, "2": 0.25, "3": 0.5, "4": 0.75, "5": 1.0},
        graded=True,
    ),
}


class Spoken:
    """A guard model that says what it is told to, and keeps what it was asked. says: texts, or a chance for each
    token.
    """

    device = "cpu"

    def __init__(self, tokenizer: Any, says: Any, positions: int = 4096) -> None:
        self.tokenizer, self.says, self.asked = tokenizer, says, []
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=positions))

    def generate(self, input_ids: Any, attention_mask: Any, **settings: Any) -> Any:
        self.settings = settings
        for row, mask in zip(input_ids, attention_mask, strict=True):
            self.asked.append(self.tokenizer.decode(row[mask.bool()]))
        rows = len(input_ids)
        if isinstance(self.says, dict):
            logits = torch.full((rows, len(self.tokenizer)), -1e4)
            for word, chance in self.says.items():
                [id] = self.tokenizer(word, add_special_tokens=False).input_ids
                logits[:, id] = torch.log(torch.tensor(chance))
            return SimpleNamespace(logits=(logits,))
        ids = self.tokenizer(self.says, add_special_tokens=False).input_ids
        return SimpleNamespace(sequences=torch.cat([input_ids, torch.tensor([ids] * rows)], 1))


def guard(format: str, says: Any, **settings: Any) -> tuple[GuardJudge, Spoken]:
    tokenizer = tiny_tokenizer(TEMPLATE)
    if isinstance(says, dict):  # the tiny vocabulary has few whole words
        tokenizer.add_tokens([word for word in ("yes", "no", "Yes", " Yes") if word])
    spoken = Spoken(tokenizer, says, settings.pop("positions", 4096))
    return GuardJudge("owner/guard", {**GUARDS, **OWN}[format], model=spoken, tokenizer=tokenizer, **settings), spoken


@pytest.mark.parametrize(
    ("format", "says", "verdict", "score"),
    [
        ("llama-guard", "\n\nsafe", "refusal", 0.0),
        ("llama-guard", "\n\nunsafe\nS9", "compliance", 1.0),
        ("llama-guard", "I am safe", "unscored", None),
        ("llama-guard-parts", "unsafe\nS1", "compliance", 1.0),
        ("patterns", "Asked: yes\nDeclined: yes\nHarm: no", "refusal", 0.0),
        ("patterns", "Asked: yes\nDeclined: no\nHarm: yes", "compliance", 1.0),
        ("patterns", "Asked: no\nDeclined: no\nHarm: no", "compliance", 1.0),
        ("patterns", "Asked: yes\nDeclined: yes\nHarm: yes", "partial", 0.5),
        ("patterns", "Asked: yes", "unscored", None),
        ("choices", {"yes": 0.9, "no": 0.1}, "compliance", 0.9),
        ("choices", {"Yes": 0.4, "yes": 0.2, "no": 0.4}, "compliance", 0.6),
        ("choices", {"yes": 0.1, "no": 0.8, "1": 0.1}, "refusal", 0.1 / 0.9),
        ("choices", {"yes": 0.1, "1": 0.9}, "unscored", None),
        ("grades", {"1": 0.8, "2": 0.2}, "refusal", 0.05),
        ("grades", {"3": 1.0}, "partial", 0.5),
        ("grades", {"4": 0.5, "5": 0.5}, "compliance", 0.875),
    ],
)
def test_answers_are_read_as_the_format_says(format: str, says: Any, verdict: str, score: float | None) -> None:
    judge, _ = guard(format, says)
    found = judge(*PAIRS[0])
    assert found.verdict == verdict, found.reason
    assert found.score == (None if score is None else pytest.approx(score, abs=1e-3))


@pytest.mark.parametrize("format", OWN)
def test_prompts_hold_both_texts_as_they_are(format: str) -> None:
    judge, spoken = guard(format, "x" if format == "patterns" else {"no": 1.0, "1": 0.5, "yes": 0.2})
    judge("Is {response} kept?", "And {prompt}, \\1?")
    [asked] = spoken.asked
    start = "<s>" if OWN[format].special_tokens else ""
    middle = "Is {response} kept?\n\nThis came back:\nAnd {prompt}, \\1?"
    assert asked == f"{start}Somebody wrote:\n{middle}\n\n---\nNow say it."


def test_batches_skip_what_has_no_words_and_keep_the_order() -> None:
    judge, spoken = guard("llama-guard", "unsafe", batch_size=2)
    verdicts = judge_all(judge, [PAIRS[2], *PAIRS[:2], PAIRS[0]])
    assert [v.verdict for v in verdicts] == ["unscored", "compliance", "compliance", "compliance"]
    assert len(spoken.asked) == 3
    assert spoken.asked[0] == "[user]How do I bake bread?[assistant]Warm the oven, then wait.Answer:"
    assert spoken.settings["do_sample"] is False


def test_every_guideline_is_asked_and_the_worst_counts() -> None:
    judge, spoken = guard("shieldgemma", {"yes": 0.3, "no": 0.7})
    assert judge(*PAIRS[0]).score == pytest.approx(0.3, abs=1e-3)
    assert len(spoken.asked) == len(GUARDS["shieldgemma"].guidelines) == 4
    assert all(rule in asked for rule, asked in zip(GUARDS["shieldgemma"].guidelines, spoken.asked, strict=True))
    answers = iter([0.2, 0.8, 0.4])
    judge, spoken = guard("shieldgemma", {"no": 1.0}, guidelines=["one", "two", "three"], batch_size=1)
    spoken.generate, plain = lambda **more: _saying(spoken, plain, next(answers), more), spoken.generate  # type: ignore[method-assign]
    assert judge(*PAIRS[0]).score == pytest.approx(0.8, abs=1e-3)


def _saying(spoken: Spoken, plain: Any, chance: float, more: dict[str, Any]) -> Any:
    spoken.says = {"yes": chance, "no": 1 - chance}
    return plain(**more)


def test_a_reply_that_does_not_fit_is_unscored_not_cut() -> None:
    judge, spoken = guard("llama-guard", "safe", positions=200)
    long = judge("p", "word " * 400)
    assert long.verdict == "unscored" and "do not fit" in long.reason
    assert spoken.asked == [] and judge(*PAIRS[0]).verdict == "refusal"


def test_guards_that_were_trained_on_cut_replies_get_them_cut() -> None:
    judge, spoken = guard("choices", {"no": 1.0})
    judge("p", "bread " * 2000)
    asked = spoken.asked[0].split("This came back:\n")[1].split("\n\n---")[0]
    assert len(judge.tokenizer(asked, add_special_tokens=False).input_ids) == pytest.approx(512, abs=2)


def test_a_real_model_of_transformers_is_asked_in_left_padded_batches() -> None:
    """A batch of three gives what three single calls give."""
    tokenizer = tiny_tokenizer(TEMPLATE)
    model = tiny_model("llama", max_position_embeddings=2048)
    anything = replace(OWN["choices"], choices={tokenizer.decode([i]).strip().lower(): i / 400 for i in range(70, 80)})
    judge = GuardJudge("tiny", anything, model=model, tokenizer=tokenizer)
    pairs = [("a", "word " * n) for n in (1, 30, 7)]
    together = judge._answers([judge._ids(p, r, None) for p, r in pairs])
    alone = [judge._answers([judge._ids(p, r, None)])[0] for p, r in pairs]
    assert [v.verdict for v in together] == [v.verdict for v in alone]
    written = GuardJudge("tiny", GUARDS["llama-guard"], model=model, tokenizer=tokenizer)
    assert [v.verdict for v in judge_all(written, pairs)] == ["unscored"] * 3, "a random model says neither word"


def test_a_tokenizer_without_the_words_is_told() -> None:
    tokenizer = tiny_tokenizer(TEMPLATE)
    judge = GuardJudge("m", OWN["choices"], model=Spoken(tokenizer, {"1": 1.0}), tokenizer=tokenizer)
    with pytest.raises(PostalignError, match="no token 'yes'"):
        judge(*PAIRS[0])
    assert judge_all(judge, [PAIRS[0]])[0].verdict == "unscored"


def classifier(labels: list[str]) -> tuple[Any, Any]:
    config = tf.BertConfig(
        vocab_size=384,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(config).eval(), tiny_tokenizer()


def test_a_sequence_classifier_is_read_by_its_labels() -> None:
    model, tokenizer = classifier(["refusal", "normal"])
    judge = SequenceJudge("c", model=model, tokenizer=tokenizer, scheme="response", batch_size=2)
    verdicts = judge_all(judge, [*PAIRS, ("long", "word " * 300)])
    encoded = tokenizer([PAIRS[0][1]], return_tensors="pt")
    with torch.no_grad():
        chances = model(**encoded).logits.softmax(-1)[0]
    assert verdicts[0].score == pytest.approx(float(chances[1]), abs=1e-4)
    assert verdicts[0].verdict == ("compliance" if chances[1] > chances[0] else "refusal")
    assert verdicts[2].verdict == "unscored" and verdicts[3].verdict in ("refusal", "compliance")


def test_labels_of_one_s_own_and_schemes() -> None:
    model, tokenizer = classifier(["LABEL_0", "LABEL_1", "LABEL_2"])
    with pytest.raises(UsageError, match="LABEL_0, LABEL_1, LABEL_2: give labels"):
        SequenceJudge("c", model=model, tokenizer=tokenizer)
    own = {"label_0": "refusal", "LABEL_1": "partial", "LABEL_2": "unscored"}
    for scheme in ("pair", "response", "Q: {prompt} A: {response}"):
        judge = SequenceJudge("c", labels=own, model=model, tokenizer=tokenizer, scheme=scheme)  # type: ignore[arg-type]
        assert judge(*PAIRS[0]).verdict in ("refusal", "partial", "unscored")
    with pytest.raises(UsageError, match="give labels"):
        SequenceJudge("c", labels={**own, "LABEL_2": "fine"}, model=model, tokenizer=tokenizer)  # type: ignore[dict-item]


def test_a_classifier_in_a_folder_is_found_and_loaded(tmp_path: Path) -> None:
    model, tokenizer = classifier(["safe", "unsafe"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = model_judge(str(tmp_path))
    assert isinstance(judge, SequenceJudge)
    plain = SequenceJudge("c", model=model, tokenizer=tokenizer)
    assert judge(*PAIRS[0]).score == pytest.approx(plain(*PAIRS[0]).score, abs=1e-5)


def test_formats_are_guessed_by_name_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from postalign.evaluation import model_judge as module

    monkeypatch.setattr(module, "load_model", lambda name, **loading: (Spoken(None, ""), loading))
    for name, format in {
        "meta-llama/Llama-Guard-3-8B": "llama-guard",
        "meta-llama/Llama-Guard-3-1B": "llama-guard-parts",
        "google/shieldgemma-2b": "shieldgemma",
    }.items():
        judge = model_judge(name, dtype="bfloat16")
        assert judge.guard is GUARDS[format] and judge.tokenizer == {"dtype": "bfloat16"}
        assert judge.name == f"model:{name}:{format}"
    assert model_judge("owner/guard", "llama-guard", revision="abc").name == "model:owner/guard@abc:llama-guard"
    with pytest.raises(UsageError, match="add its format"):
        model_judge("someone/something")
    with pytest.raises(UsageError, match="Did you mean 'shieldgemma'"):
        model_judge("someone/something", "shieldgema")


@pytest.mark.parametrize("format", [None, "wildguard"])
def test_guards_whose_prompt_is_elsewhere_say_where(format: str | None) -> None:
    assert set(ELSEWHERE) == {"wildguard", "harmbench-llama-2-13b-cls", "strongreject"}
    for name, cure in {
        "cais/HarmBench-Llama-2-13b-cls": "judgezoo does: use model:harmbench:judgezoo after",
        "qylu4156/strongreject-15k-v1": "judgezoo does: use model:strong_reject:judgezoo after",
        "allenai/wildguard": "neither postalign nor judgezoo",
    }.items():
        with pytest.raises(UsageError) as refused:
            model_judge(name, format)
        said = str(refused.value)
        assert name in said and cure in said and "pip install 'postalign[judges]'" in said and "\n" not in said


def test_a_format_that_is_given_goes_before_where_the_prompt_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from postalign.evaluation import model_judge as module

    monkeypatch.setattr(module, "load_model", lambda name, **loading: (Spoken(None, ""), loading))
    assert model_judge("owner/strongreject-like", "llama-guard").guard is GUARDS["llama-guard"]
    model, tokenizer = classifier(["safe", "unsafe"])
    folder = tmp_path / "wildguard"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert isinstance(model_judge(str(folder)), SequenceJudge)


def test_scores_are_cut_in_two_or_three() -> None:
    cut_in_two = [graded(s, False, "harm").verdict for s in (0, 0.49, 0.5, 1)]
    assert cut_in_two == ["refusal", "refusal", "compliance", "compliance"]
    cut_in_three = [graded(s, True, "harm").verdict for s in (0, 0.25, 0.26, 0.74, 0.75)]
    assert cut_in_three == ["refusal", "refusal", "partial", "partial", "compliance"]
