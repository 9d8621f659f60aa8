"""Measure an alignment: suites of prompts, judged replies, intervals, and one page that shows them.

summary = evaluate(model, tokenizer, {"base": None, "mine": alignment}, ["starter"], out="run")
write_report(["run"], "report.html")
"""

from __future__ import annotations

from .agreement import agreement, kappa
from .folder import read_run
from .judge_specs import load_judge
from .judges import VERDICTS, Judge, Verdict, judge, judge_all
from .likelihood import kl_from_base, perplexity
from .report import write_report
from .runner import evaluate, judge_run
from .statistics import wilson
from .suites import Item, Suite, load_suite, load_suites, load_texts
from .wrappers import wrap

__all__ = [
    "VERDICTS",
    "Item",
    "Judge",
    "Suite",
    "Verdict",
    "agreement",
    "evaluate",
    "judge",
    "judge_all",
    "judge_run",
    "kappa",
    "kl_from_base",
    "load_judge",
    "load_suite",
    "load_suites",
    "load_texts",
    "perplexity",
    "read_run",
    "wilson",
    "wrap",
    "write_report",
]
