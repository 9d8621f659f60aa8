"""What a linear layer costs by the number of rows, in torch and in `models/products.py`, against torch's with one row.

    python benchmarks/products.py

A decoding step at small batch does little but read weights: those of a whole model here, once each. Figures go to
benchmarks/results/products.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from command import command, cpu_name

from postalign.files import write_whole
from postalign.models.products import quick_linear, slow_products

RESULTS = Path(__file__).parent / "results"
SHAPES = {"up": (1536, 576), "down": (576, 1536), "head": (49152, 576)}  # SmolLM2-135M's
COPIES = {"up": 60, "down": 60, "head": 2}  # more than the caches hold


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,3,4,8,16,32,64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    found: dict[str, Any] = {}
    counts = [int(rows) for rows in args.rows.split(",")]
    for name, shape in SHAPES.items():
        weights = [torch.randn(shape, dtype=dtype) for _ in range(COPIES[name])]
        kinds = {"torch": torch.nn.functional.linear} | ({"quick": quick_linear} if dtype == torch.float32 else {})
        times: dict[str, dict[int, list[float]]] = {kind: {rows: [] for rows in counts} for kind in kinds}
        for _ in range(args.repeats + 1):
            for rows in counts:
                x = torch.randn(rows, shape[1], dtype=dtype)
                for kind, product in kinds.items():
                    began = time.perf_counter()
                    for weight in weights:
                        product(x, weight)
                    times[kind][rows].append(time.perf_counter() - began)
        one = statistics.median(times["torch"][counts[0]][1:])
        found[name] = {
            kind: {str(rows): round(statistics.median(seconds[1:]) / one, 2) for rows, seconds in by_rows.items()}
            for kind, by_rows in times.items()
        }
        print(name, found[name], flush=True)
    facts = {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__, "dtype": args.dtype}
    facts["quick products are used here"] = slow_products()
    result = {"command": command(), "facts": facts, "time over that of one row": found}
    write_whole(RESULTS / "products.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
