"""Measure an alignment: suites of prompts, judged replies, intervals, and one page that shows them.

summary = evaluate(model, tokenizer, {"base": None, "mine": alignment}, ["starter"], out="run")
write_report(["run"], "report.html")
"""

from __future__ import annotations

from .judges import VERDICTS, Judge, Verdict, judge
from .likelihood import kl_from_base, perplexity
from .report import write_report
from .runner import evaluate, summarize
from .statistics import wilson
from .suites import Item, Suite, load_suite, load_suites, load_texts

__all__ = [
    "VERDICTS",
    "Item",
    "Judge",
    "Suite",
    "Verdict",
    "evaluate",
    "judge",
    "kl_from_base",
    "load_suite",
    "load_suites",
    "load_texts",
    "perplexity",
    "summarize",
    "wilson",
    "write_report",
]
