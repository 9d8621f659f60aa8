"""What a system costs: tokens per second, and memory. Measured while it answers, beside the base on the same prompts.

These figures change from run to run, so they have files of their own: `costs.jsonl` (a line per reply), `costs.json`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import psutil

from .journal import Row
from .resampling import resampled_sums
from .statistics import mean_per_token

COST_KEY = ("system", "suite", "seed", "id")
SPEED, MEMORY = "tokens_per_second", "peak_memory"


class Meter:
    """The most memory seen since `reset`, in bytes: the GPU's where the model is on one, else the process's own."""

    def __init__(self, model: Any) -> None:
        device = next((p.device for p in model.parameters()), None) if hasattr(model, "parameters") else None
        self.cuda = device if device is not None and device.type == "cuda" else None
        self.process = psutil.Process()
        self.reset()

    def reset(self) -> None:
        self.peak = 0
        if self.cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self.cuda)

    def look(self) -> None:
        if self.cuda is not None:
            import torch

            self.peak = int(torch.cuda.max_memory_allocated(self.cuda))
        else:
            self.peak = max(self.peak, int(self.process.memory_info().rss))


def cost_rows(rows: Iterable[Row], bases: Sequence[str]) -> list[Row]:
    """The rows of `costs.json`: speed and memory of each system on each suite, and on all (suite None).

    Columns: system, suite, label (None), judge (None), n replies, metric, value, low, high; then, where there is a base
    that answered the same prompts, base, base_value, ratio, ratio_low, ratio_high. Tokens per second are all new tokens
    over the time that their batches took; 95 % intervals over replies (ratio of sums), of ratios by paired bootstrap,
    in which nothing is of what else the machine was doing.
    Memory is a peak in bytes; its low and high are the least and the most among the replies.
    """
    cells: dict[tuple[str, str | None], dict[tuple[Any, ...], Row]] = defaultdict(dict)
    for row in rows:
        key = (row["suite"], row["id"], row["seed"])
        cells[row["system"], row["suite"]][key] = row
        cells[row["system"], None][key] = row
    suites = {suite for _, suite in cells if suite is not None}
    found = []
    for (system, suite), part in cells.items():
        if suite is None and len(suites) < 2:
            continue
        base = next((cells[name, suite] for name in bases if (name, suite) in cells), None)
        name = next((name for name in bases if (name, suite) in cells), None)
        for metric, figures in ((SPEED, _speed(part, base)), (MEMORY, _memory(part, base))):
            row: Row = {"system": system, "suite": suite, "label": None, "judge": None, "n": len(part)}
            found.append(row | {"metric": metric, "base": name, **figures})
    return found


def _speed(part: dict[tuple[Any, ...], Row], base: dict[tuple[Any, ...], Row] | None) -> Row:
    tokens, seconds = ([row[name] for row in part.values()] for name in ("tokens", "seconds"))
    if sum(seconds) <= 0:
        return _figures((None, None, None), None, (None, None, None))
    own = mean_per_token(tokens, seconds)
    shared = [key for key in part if base is not None and key in base]
    if base is None or not shared or base is part:
        return _figures(own, own[0] if base is part else None, (1.0, 1.0, 1.0) if base is part else (None, None, None))
    values = np.array(
        [[one[key][name] for one in (part, base) for name in ("tokens", "seconds")] for key in shared], dtype=float
    )
    draws = resampled_sums(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = draws[:, 0] / draws[:, 1] / (draws[:, 2] / draws[:, 3])
    total = values.sum(0)
    if not total[1:].all() or not np.isfinite(ratios).any():
        return _figures(own, None, (None, None, None))
    low, high = np.quantile(ratios[np.isfinite(ratios)], [0.025, 0.975])
    theirs = total[2] / total[3]
    return _figures(own, float(theirs), (float(total[0] / total[1] / theirs), float(low), float(high)))


def _memory(part: dict[tuple[Any, ...], Row], base: dict[tuple[Any, ...], Row] | None) -> Row:
    peaks = [row["memory"] for row in part.values()]
    own = (max(peaks), min(peaks), max(peaks))
    theirs = max((row["memory"] for row in base.values()), default=None) if base is not None else None
    ratio = own[0] / theirs if theirs else None
    return _figures(own, theirs, (ratio, own[1] / theirs if theirs else None, ratio))


def _figures(own: Sequence[float | None], base: float | None, ratio: Sequence[float | None]) -> Row:
    names = ("value", "low", "high", "base_value", "ratio", "ratio_low", "ratio_high")
    numbers = [None if v is None or not math.isfinite(v) else round(v, 4) for v in (*own, base, *ratio)]
    return dict(zip(names, numbers, strict=True))
