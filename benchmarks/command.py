"""How a result names the command and the machine that made it.

Shared by the scripts here, which run as `python benchmarks/NAME.py`.
"""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path


def command() -> str:
    """The command line of this run, as one would type it in the repository; paths by their last names."""
    script = Path(sys.argv[0]).name
    return " ".join(["python", f"benchmarks/{script}", *(shlex.quote(without_folder(word)) for word in sys.argv[1:])])


def without_folder(argument: str) -> str:
    """A path, or the path in `--name=path`, by its last name: where things lie on a machine is nobody's business."""
    name, equals, value = argument.rpartition("=")
    return name + equals + (Path(value).name if "/" in value else value)


def cpu_name() -> str:
    """The processor's name, with its family and model: those of one make may all go by one name, and round apart."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"
