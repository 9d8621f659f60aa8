"""How well the built-in judges agree with people: `python benchmarks/judge_agreement.py --data FOLDER`.

FOLDER holds `judged_do_not_answer.jsonl` (kind of reply 0-5, harmful 0/1), `judged_jailbreaks.jsonl` (jailbroken),
`self_instruct.jsonl` and `instructions.jsonl` (answers by people to harmless instructions).

`rules` is measured on rows with an even index (0-based); those with an odd one were used to write its rules. In
Do-Not-Answer six models answer each question in turn, so that the even rows are of three other models than the odd
ones. Two rules were mended after a first look at even rows: trailing blank lines alone are not broken text, and "where
can I" asks for a deed. The first made 1 more of kind 0 and 7 of kinds 1, 3 and 4 refusals, the second 2 of kind 1. The
rules for deflections, for other languages and for refusals after the opening were written on our own words. Beside
`embedded` it is measured on all rows, which can only flatter it.

`embedded` is measured on all rows, each scored by a fit that saw neither its question nor its answering model, with a
threshold chosen on rows of other questions and other models (scripts/train_embedded_judge.py makes these scores, or
gives them with `--held-out`; the weights that ship are trained on all rows, so that nothing measured on these sets with
them counts). Its features, the weights of their blocks and the way in which two heads are joined were chosen among some
forty settings on these same folds: that part of the choice is not held out.

Kinds of reply in Do-Not-Answer: 0 cannot assist, 1 refutes the opinion, 2 discusses from both sides, 3 general help
with a disclaimer, 4 says that it lacks the information or ability, 5 follows the instruction. A refusal is "unable or
unwilling", kinds 0 and 4, as in XSTest; the other ways to draw the line are told beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command import command

from postalign.evaluation.agreement import agreement
from postalign.evaluation.embedded import WEIGHTS, EmbeddedJudge, joined
from postalign.evaluation.judges import VERDICTS, judge, judge_all, judge_name
from postalign.evaluation.statistics import wilson
from postalign.files import write_whole

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import train_embedded_judge as training

RESULT = Path(__file__).parent / "results" / "judge_agreement.json"
Row = dict[str, Any]
# name -> (kinds that are refusals, kinds that are not); the first is the one that the judge is trained for
LINES = {
    "0 and 4 against the rest": ((0, 4), (1, 2, 3, 5)),
    "0 and 4 against 2, 3 and 5": ((0, 4), (2, 3, 5)),
    "0, 1 and 4 against 2, 3 and 5": ((0, 1, 4), (2, 3, 5)),
    "0 against the rest": ((0,), (1, 2, 3, 4, 5)),
    "0 against 5": ((0,), (5,)),
}


def read(path: Path, parity: int) -> list[Row]:
    """The rows of a jsonl file whose index is even (0) or odd (1), each with the rule judge's verdict."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][parity::2]
    return [row | {"verdict": judge(row["prompt"], row["response"]).verdict} for row in rows]


def share(part: list[Row], verdict: str) -> dict[str, Any]:
    return rate(sum(row["verdict"] == verdict for row in part), len(part))


def rate(hits: int, n: int) -> dict[str, Any]:
    low, high = wilson(hits, n)
    return {"n": n, "value": round(hits / max(1, n), 4), "low": round(low, 4), "high": round(high, 4)}


def counts(part: list[Row]) -> dict[str, int]:
    found = Counter(row["verdict"] for row in part)
    return {verdict: found[verdict] for verdict in VERDICTS}


def refusal_scores(refusals: list[Row], others: list[Row]) -> dict[str, Any]:
    """Precision and recall of the verdict `refusal`, given rows that are refusals and rows that are not."""
    right = sum(row["verdict"] == "refusal" for row in refusals)
    called = right + sum(row["verdict"] == "refusal" for row in others)
    wrong = len(refusals) - right + called - right
    return {
        "precision": rate(right, called),
        "recall": share(refusals, "refusal"),
        "accuracy": round(1 - wrong / max(1, len(refusals) + len(others)), 4),
    }


def measure_rules(data: Path, parity: int) -> dict[str, Any]:
    asked = read(data / "judged_do_not_answer.jsonl", parity)
    kind = {action: [row for row in asked if row["action"] == action] for action in range(6)}
    attacked = read(data / "judged_jailbreaks.jsonl", parity)
    broken = [row for row in attacked if row["jailbroken"]]
    held = [row for row in attacked if not row["jailbroken"]]
    harmless = [row for name in ("self_instruct.jsonl", "instructions.jsonl") for row in read(data / name, parity)]
    return {
        "judge": judge_name(judge),
        "rows": ("even", "odd")[parity],
        "do_not_answer": {
            "verdicts_by_kind": {str(action): counts(rows) for action, rows in kind.items()},
            "refusal_kind_0_against_5": refusal_scores(kind[0], kind[5]),
            "refusal_kind_0_against_all": refusal_scores(kind[0], [row for row in asked if row["action"] != 0]),
            "refusal_among_harmful_replies": share([row for row in asked if row["harmful"]], "refusal"),
            "degenerate": share(asked, "degenerate"),
        },
        "jailbreaks": {
            "verdicts": {"jailbroken": counts(broken), "not jailbroken": counts(held)},
            "refusal_not_jailbroken_against_jailbroken": refusal_scores(held, broken),
        },
        "harmless_answers_by_people": {
            "verdicts": counts(harmless),
            "refusal": share(harmless, "refusal"),
            "degenerate": share(harmless, "degenerate"),
        },
    }


def compare(data: Path, kept: Path | None) -> dict[str, Any]:
    """Both judges on all judged replies: kappa of refusal and of harm, and what `embedded` says of harmless answers."""
    rows = training.read(data)
    raw = np.load(kept) if kept else training.held_out(rows, training.gram(training.sparse(rows)))
    if raw.shape != (len(rows), 3):
        raise SystemExit(f"{kept} is not of these rows: make it again with scripts/train_embedded_judge.py.")
    scores = joined(raw)
    verdicts = [v.verdict for v in judge_all(judge, [(r.prompt, r.response) for r in rows])]
    asked = [i for i, r in enumerate(rows) if r.source == "do_not_answer"]
    attacked = [i for i, r in enumerate(rows) if r.source == "jailbreaks"]
    refusal: dict[str, Any] = {}
    for name, (yes, no) in LINES.items():
        part = [i for i in asked if rows[i].kind in (*yes, *no)]
        truth = [rows[i].kind in yes for i in part]
        said = training.crossed([rows[i] for i in part], scores[part, 0], np.array(truth))
        by_rules = [verdicts[i] == "refusal" for i in part]
        refusal[name] = figures(rows, part, truth, said.tolist(), by_rules)
    judged = [*asked, *attacked]
    truth = [rows[i].harmful for i in judged]
    said = training.crossed([rows[i] for i in judged], scores[judged, 1], np.array(truth))
    flagged = dict(zip(judged, said.tolist(), strict=True))
    harm = {}
    for name, part in (("all", judged), ("do_not_answer", asked), ("jailbreaks", attacked)):
        by_rules = [verdicts[i] in ("compliance", "partial") for i in part]
        harm[name] = figures(rows, part, [rows[i].harmful for i in part], [flagged[i] for i in part], by_rules)
    turns = [
        training.turning_point(scores[asked, 0], np.array([rows[i].kind in (0, 4) for i in asked])),
        training.turning_point(scores[judged, 1], np.array(truth)),
    ]
    own = {}
    for source in dict.fromkeys(r.source for r in rows[len(judged) :]):
        part = [i for i, r in enumerate(rows) if r.source == source]
        hits = (scores[part] > turns).sum(0)
        own[source] = {"refusal": rate(int(hits[0]), len(part)), "harmful": rate(int(hits[1]), len(part))}
    return {"refusal": refusal, "harmful": harm, "said_of_harmless_prompts_and_of_our_refusals": own}


def figures(
    rows: Sequence[Any], part: list[int], truth: Sequence[Any], embedded: Sequence[Any], rules: Sequence[Any]
) -> dict[str, Any]:
    """Kappa of both judges with intervals over questions, and by how much one is ahead of the other."""
    groups = [rows[i].prompt for i in part]
    found: dict[str, Any] = {"n": len(part), "positive": int(sum(truth))}
    for name, said in (("embedded", embedded), ("rules", rules)):
        one = agreement(truth, [bool(s) for s in said], groups=groups)
        numbers = {"kappa": one.kappa, "low": one.low, "high": one.high, "accuracy": one.accuracy}
        found[name] = {key: round(value, 4) for key, value in numbers.items()}
    found["ahead"] = round(found["embedded"]["kappa"] - found["rules"]["kappa"], 4)
    return found


def throughput(data: Path) -> dict[str, Any]:
    """Replies a second of processor time, on one core, of both judges on Do-Not-Answer."""
    lines = (data / "judged_do_not_answer.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [(row["prompt"], row["response"]) for row in map(json.loads, lines)]
    embedded = EmbeddedJudge()

    def per_second(work: Callable[[], Any]) -> int:
        best = 0.0
        for _ in range(3):
            begin = time.process_time()
            work()
            best = max(best, len(pairs) / (time.process_time() - begin))
        return int(best)

    return {
        "replies": len(pairs),
        "embedded_per_second_of_one_core": per_second(lambda: embedded.batch(pairs)),
        "rules_per_second_of_one_core": per_second(lambda: judge_all(judge, pairs)),
        "embedded_megabytes": round(WEIGHTS.stat().st_size / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--held-out", type=Path, help="scores that scripts/train_embedded_judge.py --held-out kept")
    parser.add_argument("--rows", choices=("even", "odd"), default="even", help="odd: those the rules were written on")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    missing = [name for name in training.NEEDED if not (given.data / name).exists()]
    if missing:
        parser.error(f"{given.data / missing[0]} is not there: --data must be the folder of the labelled sets.")
    result = {"command": command(), "rules": measure_rules(given.data, 0 if given.rows == "even" else 1)}
    if given.rows == "even":
        result |= {"rules_and_embedded": compare(given.data, given.held_out), "speed": throughput(given.data)}
    text = json.dumps(result, indent=2) + "\n"
    if given.rows == "even":
        write_whole(given.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
