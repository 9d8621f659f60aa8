"""The runner: every system answers every prompt, and judges read the replies.

A run is a folder: `run.json` (the manifest), `replies.jsonl` (a line per system, suite, seed and prompt, appended when
the reply ends), `verdicts-JUDGE.jsonl`, `measures.jsonl` (perplexity and divergence), `costs.jsonl` (time and memory of
each reply), and the tables made of these (tables.py, comparisons.py). Killed at any point, the same call goes on, and
ends with the same bytes in all files but those of the costs. Knows nothing of how a report looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .asking import Asking, OnProgress, counter
from .environment import environment
from .folder import MEASURE_KEY, arrange, claimed, finish, missing_replies
from .journal import Journal, Row
from .judges import Judge
from .judging import REPLY_KEY, described, give_verdicts, named_judges, read_verdicts
from .run_settings import covers, head_maps, planned, read_manifest, run_settings, settle, write_manifest
from .suites import Suite, load_suites, load_texts

if TYPE_CHECKING:
    from torch import nn

    from ..alignment import Alignment
    from ..data.records import Data

MEASURES = ("perplexity", "kl")
Judges = Judge | str | Iterable[Judge | str] | None


def evaluate(
    model: nn.Module | Callable[[], tuple[nn.Module, Any]],
    tokenizer: Any,
    systems: Mapping[str, Alignment | None],
    suites: Iterable[str | Path | Suite | Data] = ("starter",),
    *,
    out: str | Path,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seeds: Sequence[int] = (0,),
    batch_size: int = 16,
    system_prompt: str | None = None,
    judges: Judges = None,
    measures: Sequence[str] = MEASURES,
    text: str | Path | None = None,
    kl_prompts: int = 48,
    load: Mapping[str, Any] | None = None,
    reproduce: str | None = None,
    on_progress: OnProgress = None,
) -> list[Row]:
    """Run `systems` on `suites`, write the run to the folder `out`, and return the rows of `summary.json` and
    `costs.json`.

    model: or, with a tokenizer of None, a function that loads both, which is called only if there is something to
    generate. systems: name -> alignment, None for the model as it is (call that one `base`). suites: see `load_suite`.
    Replies are at most `max_new_tokens` long; greedy, or sampled once for each of `seeds` with do_sample. judges: see
    `named_judges`; a reply that one fails on is `unscored`. measures: any of `perplexity` (on `text`, default the
    shipped paragraphs) and `kl` (from the system that is None, on its replies to the first `kl_prompts` benign prompts
    of each suite; left out where no system is None). load, reproduce: how the model was loaded and the command line,
    for the manifest. on_progress(stage, done, total).

    Called again with the same `out` it goes on where it was: finished rows are kept; further systems, suites, seeds and
    judges may be added. Raises UsageError when the model, a system, a suite or a setting of the same name is not what
    it was, and for a prompt that is longer than the model's context.
    """
    out, asked, judged = Path(out), load_suites(suites), named_judges(judges)
    seeds = tuple(dict.fromkeys(seeds)) if do_sample else (0,)
    _check(systems, measures, seeds, batch_size, max_new_tokens)
    texts = load_texts(text) if "perplexity" in measures else []
    where = Path(text).stem if text is not None else "plain text"
    sampling = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    settings: dict[str, Any] = {
        "load": dict(load) if load else None,
        "max_new_tokens": max_new_tokens,
        **sampling,
        "seeds": list(seeds),
        "asked": [[name, suite.name, seed] for name in systems for suite in asked for seed in seeds],
        "system_prompt": system_prompt,
        "kl_prompts": kl_prompts,
        "reproduce": [reproduce] if reproduce else [],
    }
    if tokenizer is None and callable(model):
        plan = planned(systems, asked, texts, **settings)
        if covers(out, plan) and not missing_replies(out) and _measured(out, systems, asked, measures, where):
            return judge_run(out, judged.values(), on_progress=on_progress)
        model, tokenizer = model()
    for alignment in systems.values():
        if alignment is not None:
            alignment.check(model, tokenizer)  # type: ignore[arg-type]
    settings["environments"] = [environment(model) | {"batch_size": batch_size}]
    with claimed(out):
        settle(out, run_settings(model, tokenizer, systems, asked, texts, **settings))  # type: ignore[arg-type]
        ask = {"system": system_prompt, "max_new_tokens": max_new_tokens, **sampling, "batch_size": batch_size}
        run = Asking(model, tokenizer, ask, on_progress, out)
        run.check(asked)
        for name, alignment in systems.items():
            for suite in asked:
                for seed in seeds:
                    run.ask(name, alignment, suite, seed)
        base = next((name for name, alignment in systems.items() if alignment is None), None)
        for name, alignment in systems.items():
            if texts:
                run.read(name, alignment, texts, where)
            if "kl" in measures and base is not None and alignment is not None:
                for suite in asked:
                    run.diverge(name, alignment, suite, seeds[0], base, kl_prompts)
        head_maps(out, systems)
        arrange(out, {suite.name: [item.id for item in suite.items] for suite in asked})
        return _judge(out, judged, on_progress)


def judge_run(out: str | Path, judges: Judges = None, *, on_progress: OnProgress = None) -> list[Row]:
    """Let judges read the replies of a finished run; no model is needed. Returns what `evaluate` returns.

    Verdicts that are there already are kept, unless the judge says by another `digest` that it has changed. Raises
    UsageError where `out` is no run.
    """
    out, judged = Path(out), named_judges(judges)
    read_manifest(out)
    with claimed(out):
        if missing_replies(out):
            raise UsageError(f"the run {out} is unfinished: give the command that began it again.")
        return _judge(out, judged, on_progress)


def _judge(out: Path, judges: Mapping[str, Judge], on_progress: OnProgress) -> list[Row]:
    manifest = read_manifest(out)
    known = dict(manifest.get("judges") or {})
    now = described(dict(judges))
    for name, one in now.items():
        if name in known and known[name].get("digest") != one["digest"]:
            (out / one["file"]).unlink(missing_ok=True)
            (out / "summary.json").unlink(missing_ok=True)
    if {**known, **now} != known:
        write_manifest(out, {**manifest, "judges": {**known, **now}})
    replies = Journal(out / "replies.jsonl", REPLY_KEY).rows
    for name, judge in judges.items():
        verdicts = read_verdicts(out, name)
        if give_verdicts(judge, replies, verdicts, counter(on_progress, f"judge {name}", len(replies))):
            (out / "summary.json").unlink(missing_ok=True)
    return finish(out)


def _measured(
    out: Path, systems: Mapping[str, Any], suites: Sequence[Suite], measures: Sequence[str], where: str
) -> bool:
    """Whether nothing of `measures` is missing, as far as that shows without asking the model."""
    there = Journal(out / "measures.jsonl", MEASURE_KEY)
    if "perplexity" in measures and not all((name, where, "perplexity") in there for name in systems):
        return False
    if "kl" not in measures or all(systems.values()):
        return True
    benign = [suite.name for suite in suites if any(item.label == "benign" for item in suite.items)]
    return all((name, suite, "kl") in there for name, one in systems.items() if one is not None for suite in benign)


def _check(systems: Mapping[str, Any], measures: Sequence[str], seeds: Sequence[int], batch: int, tokens: int) -> None:
    if not systems:
        raise UsageError("no system given: pass for instance {'base': None}.")
    unknown = set(measures) - set(MEASURES)
    if unknown:
        raise UsageError(f"no measure {sorted(unknown)[0]!r}: choose from {', '.join(MEASURES)}.")
    if batch < 1 or tokens < 1:
        raise UsageError("batch_size and max_new_tokens must be 1 or more.")
    if not seeds:
        raise UsageError("no seed given: pass for instance seeds=[0].")
