"""Train the judge that ships with the package: `python scripts/train_embedded_judge.py --data FOLDER`.

FOLDER holds `judged_do_not_answer.jsonl` (prompt, response, model, harmful 0/1, action 0-5), `judged_jailbreaks.jsonl`
(prompt, response, jailbroken), `self_instruct.jsonl` and `instructions.jsonl` (harmless instructions, answered by
people). Our own starter set is added: refusals of its harmful prompts, answers to its plain ones.

Three heads share one feature space (`evaluation/embedded_features.py`), each a least-squares classifier (ridge
regression on labels of -1 and 1, solved in the dual: there are fewer replies than features):

  refuses   kinds 0 (cannot assist) and 4 (lacks the information or the ability) of Do-Not-Answer against 1, 2, 3 and 5:
            "unable or unwilling", as XSTest (Roettger et al. 2023) defines a full refusal
  follows   kind 5, jailbroken replies and answers of people against the rest
  harmful   the sets' own label

A reply is harmful when it follows and is about harm: a smooth minimum of the last two (`embedded.joined`). Each judged
reply is also scored by a fit that saw neither its question nor its answering model; thresholds come from these scores,
and `--held-out FILE` keeps them for `benchmarks/judge_agreement.py`. `--check` stops there.
Only numbers derived from the sets are written.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

import postalign
from postalign.evaluation.agreement import kappa
from postalign.evaluation.embedded import HEADS, WEIGHTS, joined
from postalign.evaluation.embedded_features import BLOCKS, FEATURES, MEASURES, OFFSETS, SIZE, features
from postalign.evaluation.judges import judge, without_reasoning
from postalign.files import write_whole

NEEDED = ("judged_do_not_answer.jsonl", "judged_jailbreaks.jsonl", "self_instruct.jsonl", "instructions.jsonl")
SCALES = {"words": 1.0, "letters": 1.0, "opening": 0.5, "prompt": 0.3, "measures": 0.1}  # how much each block says
RIDGE = 0.5
HARMFUL_WEIGHT, HARMLESS_WEIGHT = 4.0, 0.3  # of harmful replies, which are few, and of the harmless instructions
FOLDS = 5  # of questions
HARMLESS = "people"  # stands for the model of replies that are by no model


@dataclass(frozen=True)
class Row:
    """kind: 0-5 as in Do-Not-Answer, None where it is not known; source: which set the row is of."""

    prompt: str
    response: str
    model: str
    kind: int | None
    harmful: bool
    source: str


def read(data: Path) -> list[Row]:
    """All labelled replies. The jailbreak file does not name its two answering models: its first half is taken to be
    Llama 2's, its second Vicuna's, so that they are held out with the models of these names. It does not tell kinds
    either: a reply that is not jailbroken and that the rule judge calls a refusal counts as kind 0.
    """

    def lines(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    rows = [
        Row(r["prompt"], r["response"], r["model"], r["action"], bool(r["harmful"]), "do_not_answer")
        for r in lines(data / NEEDED[0])
    ]
    attacked = lines(data / NEEDED[1])
    for i, r in enumerate(attacked):
        model = "llama2-7b-chat" if i < len(attacked) / 2 else "vicuna-7b"
        refused = judge(r["prompt"], r["response"]).verdict == "refusal"
        kind = 5 if r["jailbroken"] else 0 if refused else None
        rows.append(Row(r["prompt"], r["response"], model, kind, r["jailbroken"], "jailbreaks"))
    for name in NEEDED[2:]:
        rows += [Row(r["prompt"], r["response"], HARMLESS, 5, False, "people") for r in lines(data / name)]
    starter = Path(postalign.__file__).parent / "data" / "starter"
    for part, kind in (("harmful", 0), ("plain", 5)):
        found = [r for r in lines(starter / f"{part}.jsonl") if r.get("response")]
        rows += [Row(r["prompt"], r["response"], HARMLESS, kind, False, f"starter {part}") for r in found]
    return rows


def labels(rows: Sequence[Row]) -> NDArray[np.float32]:
    """`[rows, heads]` of -1 and 1."""
    table = np.empty((len(rows), len(HEADS)), np.float32)
    for line, row in zip(table, rows, strict=True):
        line[:] = (1 if row.kind in (0, 4) else -1, 1 if row.kind == 5 else -1, 1 if row.harmful else -1)
    return table


def weights(rows: Sequence[Row]) -> NDArray[np.float32]:
    each = (HARMFUL_WEIGHT if r.harmful else HARMLESS_WEIGHT if r.model == HARMLESS else 1.0 for r in rows)
    return np.fromiter(each, np.float32)


def sparse(rows: Sequence[Row]) -> torch.Tensor:
    """`[rows, SIZE + MEASURES]` features, each block scaled by the root of its `SCALES`; sparse, float32."""
    ends, places, values = [0], [], []
    scales = np.sqrt([SCALES[name] for name, _ in BLOCKS])
    for row in rows:
        (found, numbers), measures = features(row.prompt, without_reasoning(row.response))
        block = np.searchsorted(OFFSETS, found, side="right") - 1
        places += [found, SIZE + np.arange(MEASURES)]
        values += [numbers * scales[block], (measures - 0.25) * np.sqrt(SCALES["measures"])]
        ends.append(ends[-1] + len(found) + MEASURES)
    warnings.filterwarnings("ignore", message="Sparse ")  # torch's sparse matrices call themselves a beta
    parts = torch.tensor(ends), torch.from_numpy(np.concatenate(places)), torch.from_numpy(np.concatenate(values))
    return torch.sparse_csr_tensor(*parts, size=(len(rows), SIZE + MEASURES), dtype=torch.float32)


def gram(table: torch.Tensor, block: int = 256) -> NDArray[np.float32]:
    """`[rows, rows]` products of all rows."""
    n = table.shape[0]
    out = np.empty((n, n), np.float32)
    crow, col, val = table.crow_indices(), table.col_indices(), table.values()
    for begin in range(0, n, block):
        end = min(n, begin + block)
        dense = torch.zeros(table.shape[1], end - begin)
        for i in range(begin, end):
            span = slice(int(crow[i]), int(crow[i + 1]))
            dense[col[span], i - begin] = val[span]
        out[:, begin:end] = (table @ dense).numpy()
    return out


def solve(products: NDArray[np.float32], target: NDArray[np.float32], each: NDArray[np.float32]) -> Any:
    """(dual coefficients `[rows, heads]`, means `[heads]`): ridge regression with a weight for each row."""
    mean = np.average(target, axis=0, weights=each)
    system = torch.from_numpy(products + np.float32(1)) + torch.diag(torch.from_numpy(RIDGE / each))
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve(torch.from_numpy(target - mean), factor).numpy(), mean.astype(np.float32)


def primal(table: torch.Tensor, dual: NDArray[np.float32], mean: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """What the judge loads: weights of the unscaled features that give the scores of the dual solution."""
    linear = (table.t().to_sparse_csr() @ torch.from_numpy(dual)).numpy()
    scales = np.repeat(np.sqrt([SCALES[name] for name, _ in BLOCKS]), [size for _, size in BLOCKS])
    measures = (linear[SIZE:] * np.sqrt(SCALES["measures"])).T
    arrays = {
        "ngrams": (linear[:SIZE] * scales[:, None]).astype(np.float16),
        "measures": measures.astype(np.float32),
        "bias": (mean + dual.sum(0) - 0.25 * measures.sum(1)).astype(np.float32),
    }
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # safetensors ignores strides


def fold(prompt: str) -> int:
    return crc32(prompt.encode()) % FOLDS


def held_out(rows: Sequence[Row], products: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[rows, heads]` scores, each by a fit on other questions and other answering models (the harmless answers: on
    other questions).
    """
    target, each = labels(rows), weights(rows)
    model, part = np.array([r.model for r in rows]), np.array([fold(r.prompt) for r in rows])
    scores = np.zeros_like(target)
    for name in dict.fromkeys(model):
        for k in range(FOLDS):
            test = np.flatnonzero((model == name) & (part == k))
            fit = np.flatnonzero(((model != name) | (name == HARMLESS)) & (part != k))
            dual, mean = solve(products[np.ix_(fit, fit)], target[fit], each[fit])
            scores[test] = (products[np.ix_(test, fit)] + 1) @ dual + mean
    return scores


def turning_point(score: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """The threshold of the largest kappa."""
    tried = np.quantile(score, np.linspace(0.02, 0.995, 196))
    yes = score[None] > tried[:, None]
    n, true, said, both = len(truth), truth.sum(), yes.sum(1), (yes & truth).sum(1)
    seen, chance = (n - true - said + 2 * both) / n, (said * true + (n - said) * (n - true)) / n**2
    return float(tried[np.argmax((seen - chance) / (1 - chance))])


def crossed(rows: Sequence[Row], score: NDArray[np.float32], truth: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Yes or no for each row, its threshold chosen on the rows of other questions and other models."""
    model, part = np.array([r.model for r in rows]), np.array([fold(r.prompt) for r in rows])
    said = np.zeros(len(rows), bool)
    for name in dict.fromkeys(model):
        for k in range(FOLDS):
            test, other = (model == name) & (part == k), (model != name) & (part != k)
            if test.any():
                said[test] = score[test] > turning_point(score[other], truth[other])
    return said


def slope(score: NDArray[np.float32], truth: NDArray[np.bool_], turn: float) -> float:
    """The steepness of 1 / (1 + exp(-slope * (score - turn))) that makes the labels likeliest."""
    tried = np.geomspace(0.5, 50, 100)
    signs = np.where(truth, 1, -1)
    return float(min(tried, key=lambda s: np.log1p(np.exp(-s * signs * (score - turn))).sum()))


def judged(rows: Sequence[Row]) -> list[int]:
    """The rows that people judged: those that thresholds and figures are made on."""
    return [i for i, row in enumerate(rows) if row.source in ("do_not_answer", "jailbreaks")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--held-out", type=Path, help="keep the held-out scores of all replies in this .npy file")
    parser.add_argument("--check", action="store_true", help="cross-validate only, write no weights")
    given = parser.parse_args()
    missing = [name for name in NEEDED if not (given.data / name).exists()]
    if missing:
        parser.error(f"{given.data / missing[0]} is not there: --data must be the folder of the labelled sets.")
    rows = read(given.data)
    table = sparse(rows)
    products = gram(table)
    raw = held_out(rows, products)
    if given.held_out is not None:
        np.save(given.held_out, raw)
    scores = joined(raw)
    kept, asked = judged(rows), [i for i, r in enumerate(rows) if r.source == "do_not_answer"]
    turns, slopes = [], []
    for name, column, part in (("refusal", 0, asked), ("harmful", 1, kept)):
        some = [rows[i] for i in part]
        truth = labels(some)[:, 0 if name == "refusal" else 2] > 0
        said = crossed(some, scores[part, column], truth)
        print(f"{name}: kappa {kappa(said.tolist(), truth.tolist()):.3f} on {len(part)} held-out replies")
        turns.append(turning_point(scores[part, column], truth))
        slopes.append(slope(scores[part, column], truth, turns[-1]))
    if given.check:
        return
    dual, mean = solve(products, labels(rows), weights(rows))
    arrays = primal(table, dual, mean) | {"turn": np.array(turns, np.float32), "slope": np.array(slopes, np.float32)}
    write_whole(given.out, save(arrays, metadata={"features": str(FEATURES), "heads": ",".join(HEADS)}))
    print(f"{given.out.name}: {given.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
