"""What the verbs share: failures as one line, progress bars, arguments turned into models and alignments.

Standard output carries the answer; progress, notes and errors go to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import CycloptsError, Parameter

from ..errors import PostalignError, UsageError

if TYPE_CHECKING:
    from ..alignment import Alignment

OnProgress = Callable[[str, int, int], None]
Flag = Annotated[bool, Parameter(negative=())]
Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print the answer as JSON.")]
Repeated = Annotated[list[str] | None, Parameter(negative=())]


@Parameter(name="*")
@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded; the names are those of transformers."""

    dtype: str | None = None
    "Number format of the weights, such as bfloat16. Default: the model's own on a GPU, float32 on a CPU."
    device_map: str | None = None
    "Where the weights go, such as auto or cuda."
    revision: str | None = None
    "Branch, tag or commit of a hub model."
    trust_remote_code: Flag = False
    "Run the code that comes with a hub model."


def guarded(work: Callable[[], Any], verbose: bool) -> int:
    """Run `work` and return the exit code; a failure is one line on standard error (verbose: a traceback)."""
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
                os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
                os.environ.setdefault("HF_HUB_VERBOSITY", "error")
            result = work()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        error.verbose = False
        return _fail(f"{_one_line(error)} See postalign --help.", 2, verbose)
    except PostalignError as error:
        return _fail(_one_line(error), error.exit_code, verbose)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", 1, verbose)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 1
    except Exception as error:  # the last line of defence: the user gets one line, -v the rest
        hint = "" if verbose else " (-v gives the traceback)"
        return _fail(f"{type(error).__name__}: {_one_line(error)}{hint}", 1, verbose)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else text[:500] + " ..."


def _fail(line: str, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"error: {line}", file=sys.stderr)
    return code


def note(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns on standard output, as wide as they need to be."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # a file or a pipe has no width: let no cell be cut there
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


@contextmanager
def progress() -> Iterator[OnProgress]:
    """Yield `on_progress(stage, done, total)`: bars with rate and time left on a terminal, else lines.

    What stands behind " | " in a stage is a figure of the moment (a loss), shown beside the bar.
    """
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def on_stage(stage: str, done: int, total: int) -> None:
            stage, _, _ = stage.partition(" | ")
            if stage not in seen:
                seen.add(stage)
                note(f"{stage} ({total})" if total else stage)

        yield on_stage
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeft(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            stage, _, figure = stage.partition(" | ")
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None, rate="")
            task = bars.tasks[bars.task_ids.index(tasks[stage])]
            rate = f"{task.speed:.1f}/s" if task.speed else ""
            rate = f"{rate} {figure}".strip()
            bars.update(tasks[stage], completed=done, total=total or None, rate=rate)

        yield on_progress


def load_model(name: str, options: ModelOptions | None) -> tuple[Any, Any]:
    """The model and tokenizer that the command line names."""
    import postalign as pa

    options = options or ModelOptions()
    return pa.load_model(
        name,
        dtype=options.dtype,
        device_map=options.device_map,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )


def load_alignments(folders: Sequence[Path]) -> dict[str, Alignment]:
    """Alignments by folder name. Raises UsageError for two of one name, or one named `base`."""
    import postalign as pa

    found: dict[str, Alignment] = {}
    for folder in folders:
        name = folder.resolve().name
        if name == "base" or name in found:
            raise UsageError(f"two systems would be called {name!r}: rename the folder {folder}.")
        found[name] = pa.Alignment.from_pretrained(folder)
    return found


def read_config(file: Path | None, settings: Iterable[str]) -> dict[str, Any]:
    """A YAML file's configuration, overridden by `key=value` settings (a dot in a key: one level down)."""
    import yaml

    config: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read --config {file}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {file} is not YAML: {error}") from error
        if not isinstance(loaded or {}, dict):
            raise UsageError(f"--config {file} must hold `key: value` lines.")
        config = dict(loaded or {})
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {setting!r} must read key=value.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {setting!r}: the value is not YAML; quote it.") from error
        *parents, last = key.strip().split(".")
        level = config
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise UsageError(f"--set {setting!r}: {parent!r} is one value, it has no keys below it.")
        level[last] = value
    return config


def folder_size(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def readable(size: float) -> str:
    """1536 -> '1.5 kB'."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
