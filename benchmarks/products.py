"""What a linear layer costs by the number of rows, against one row: the weights of a whole model, read once each.

    python benchmarks/products.py

A decoding step at small batch does little but read weights. Figures go to benchmarks/results/products.json.
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

RESULTS = Path(__file__).parent / "results"
SHAPES = {"up": (1536, 576), "down": (576, 1536), "head": (49152, 576)}  # SmolLM2-135M's
COPIES = {"up": 60, "down": 60, "head": 2}  # more than the caches hold


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
    for name, shape in SHAPES.items():
        weights = [torch.randn(shape, dtype=dtype) for _ in range(COPIES[name])]
        times: dict[int, float] = {}
        for rows in map(int, args.rows.split(",")):
            x = torch.randn(rows, shape[1], dtype=dtype)
            seconds = []
            for _ in range(args.repeats + 1):
                began = time.perf_counter()
                for weight in weights:
                    torch.nn.functional.linear(x, weight)
                seconds.append(time.perf_counter() - began)
            times[rows] = statistics.median(seconds[1:])
        found[name] = {str(rows): round(value / times[1], 2) for rows, value in times.items()}
        print(name, found[name], flush=True)
    facts = {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__, "dtype": args.dtype}
    result = {"command": command(), "facts": facts, "time over that of one row": found}
    write_whole(RESULTS / "products.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
