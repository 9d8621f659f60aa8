"""How long the report takes to open in a browser: `python benchmarks/report_load.py [--rows 20000] [--times 7]`.

Replies are made up (four systems, two judges, 40 words each). Seconds from the start of the navigation to the end of
the page's load event, by which the first replies are drawn, in a fresh headless Chromium for each size. Writes
benchmarks/results/report_load.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from command import command

sys.path.insert(0, str(Path(__file__).parents[1]))

from postalign.evaluation import write_report
from postalign.files import write_whole
from tests.browser import Browser, chromium
from tests.evaluation.made_up import SYSTEMS, write_run

RESULT = Path(__file__).parent / "results" / "report_load.json"


def measure(rows: int, times: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", prompts=rows // len(SYSTEMS), tables=False)
        page = write_report([run], Path(folder) / "report.html")
        with Browser() as browser:
            seconds = [browser.open(page) for _ in range(times)]
            search = (
                "(() => { const began = performance.now(), box = document.querySelector('input[type=search]');"
                " box.value = 'crust sounds hollow'; box.dispatchEvent(new Event('input'));"
                " return new Promise((done) => setTimeout(() => done(0), 150)).then(() => performance.now() - began"
                " - 150); })()"
            )
            searching = browser.run(search) / 1000
        return {
            "rows": rows,
            "megabytes": round(page.stat().st_size / 1e6, 1),
            "first_load_seconds": round(seconds[0], 3),
            "median_load_seconds": round(statistics.median(seconds), 3),
            "slowest_load_seconds": round(max(seconds), 3),
            "search_seconds": round(searching, 3),
            "errors": browser.errors,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if chromium() is None:
        parser.error("no Chromium is installed: get your system's package.")
    sizes = [measure(rows, given.times) for rows in given.rows]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    result = {"command": command(), "cores": os.cpu_count(), "load_average": load, "sizes": sizes}
    text = json.dumps(result, indent=2) + "\n"
    write_whole(given.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
