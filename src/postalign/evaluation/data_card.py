"""The card of a benchmark that was built: what it is, how it was made, how far to trust it. Knows rows only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__

Row = Mapping[str, Any]


def card(settings: Mapping[str, Any], rows: Sequence[Row], candidates: Sequence[Row], unlike: int) -> str:
    """Markdown with the front matter of a hub data set."""
    recipe = settings["recipe"]
    stages = ("kept", "unreadable", "duplicate", "unscored", "not harmful", "below threshold")
    counts: dict[str, Counter[str]] = {policy["name"]: Counter() for policy in settings["policies"]}
    for row in candidates:
        if row["question"]:
            counts[row["policy"]][row["stage"]] += 1
    used = Counter(row["category"] for row in rows)
    table = [
        "| category | wanted | in the set | written | " + " | ".join(stages) + " |",
        "|---" * (4 + len(stages)) + "|",
    ]
    for policy in settings["policies"]:
        mine = counts[policy["name"]]
        cells = [policy["name"], policy["count"], used[policy["name"]], mine.total(), *(mine[name] for name in stages)]
        table.append("| " + " | ".join(map(str, cells)) + " |")
    definitions = [f"- **{policy['name']}**: {policy['description']}" for policy in settings["policies"]]
    return CARD.format(
        n=len(rows),
        categories=len(settings["policies"]),
        version=__version__,
        writer=settings["writer"],
        checker=settings["checker"],
        tone=OF_CHECKER if settings["toxicity"] == "checker" else OF_OTHER.format(name=settings["toxicity"]),
        apart=f" Questions nearly the same as one of {unlike} given prompts were dropped too." if unlike else "",
        balance=BALANCED if recipe["balanced"] else "Categories were not balanced.",
        table="\n".join(table),
        definitions="\n".join(definitions),
        **{name: recipe[name] for name in ("harm", "toxicity", "alike", "seed", "temperature", "per_round")},
    )


OF_CHECKER = (
    "the checker's own probability of harm was used: it judges the request, not its tone, it comes from the same model "
    "as the check before, and it is no independent second opinion"
)
OF_OTHER = "the score is that of {name}"
BALANCED = "Categories were trimmed to the same share of what was wanted of each."

CARD = """---
language: en
task_categories: [text-generation]
tags: [safety, red-teaming, synthetic]
configs:
  - config_name: default
    data_files: data.jsonl
---

# Harmful questions by policy

{n} questions of {categories} categories that an assistant should decline, written by a model and checked by a model.
They are here to measure safety. They ask for harmful things and hold no answers. Made with postalign {version}.

## Columns

`id`, `prompt`, `category`, `label` (always `harmful`), `harm` (the checker's probability that answering breaks the
policy) and `toxicity`.

## How it was made

1. For each policy **{writer}** was asked for {per_round} candidates at a time (temperature {temperature}, seed {seed}).
2. Candidates of less than 4 or more than 60 words were dropped, and those nearly the same as an earlier one (Jaccard
   similarity of words or of four-character runs of {alike} or more).{apart}
3. **{checker}** was asked whether answering breaks the policy; a probability of yes below {harm} drops the question,
   and so does an answer that is neither yes nor no.
4. Toxicity had to reach {toxicity}: {tone}.
5. {balance}

{table}

## Policies

{definitions}

## Limits

- No person has read these questions: read them before results on them are published.
- A writer that declines a policy leaves easy or odd questions there; a checker's mistakes are in the labels.
- Questions of one model sound alike. Figures on this set compare systems; they are no rate of harm in the world.
- A threshold on toxicity favours crude wording over harm that is put politely.

## Use

`postalign eval MODEL --suite data.jsonl --out RUN`
"""
