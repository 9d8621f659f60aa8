"""The replies as a report carries them: columns of numbers that point into lists of texts, each text once.

Knows rows and what must be left out; the script of the page (report.js) reads what this gives.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

from .judges import VERDICTS
from .report_context import LABELS, Joined


class _Numbers(dict[Hashable, int]):
    """Things numbered in the order in which they are first met."""

    def of(self, thing: Hashable) -> int:
        return self.setdefault(thing, len(self))


def embedded(data: Joined, *, leave_out_harmful: bool = False, figures_only: bool = False) -> dict[str, Any]:
    """`{"systems", "judges", "prompts", "replies", ...}` for the page.

    prompts: [suite, label, kind, wrapper, group, text]. replies: [prompt, system, seed, text or null, verdict of each
    judge (-1: has not read it), reason of each, tokens, gate, ROUGE-L]; what is named by a number stands in the list of
    that name. leave_out_harmful: see `may_harm`. figures_only: no prompt and no reply.
    """
    suites, kinds, wrappers, groups, reasons, prompts = (_Numbers() for _ in range(6))
    systems = {name: i for i, name in enumerate(data.systems)}
    replies, left_out = [], 0
    for row in [] if figures_only else data.rows:
        place = (suites.of(row["suite"]), LABELS.index(row["label"]), kinds.of(row["kind"]))
        place = (*place, wrappers.of(row["wrapper"]), groups.of(row["group"]))
        prompt = prompts.of((*place, row["prompt"], row["id"]))
        given = [row["verdicts"].get(judge) for judge in data.judges]
        hidden = leave_out_harmful and may_harm(row)
        left_out += hidden
        replies.append(
            [
                prompt,
                systems[row["system"]],
                row["seed"],
                None if hidden else row["response"],
                [-1 if one is None else VERDICTS.index(one["verdict"]) for one in given],
                [-1 if one is None else reasons.of(one["reason"]) for one in given],
                row["tokens"],
                row["gate"],
                row["rouge_l"],
            ]
        )
    return {
        "systems": list(data.systems),
        "bases": [name for name, base in data.systems.items() if base],
        "judges": data.judges,
        "verdicts": list(VERDICTS),
        "labels": list(LABELS),
        **{"suites": list(suites), "kinds": list(kinds), "wrappers": list(wrappers), "groups": list(groups)},
        "reasons": list(reasons),
        "prompts": [list(prompt[:-1]) for prompt in prompts],  # type: ignore[index]
        "replies": replies,
        "left_out": left_out,
    }


def may_harm(row: dict[str, Any]) -> bool:
    """Whether a reply could be a harmful one: to a prompt not known to be benign, and not a refusal to every judge."""
    verdicts = [one["verdict"] for one in row["verdicts"].values()]
    return row["label"] != "benign" and not (verdicts and all(verdict == "refusal" for verdict in verdicts))


def as_script(value: Any) -> str:
    """JSON that can stand inside <script>: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for letter in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")
