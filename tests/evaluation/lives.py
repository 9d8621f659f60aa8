"""A process that begins an evaluation whenever it is told to, each in a child that may be killed.

python -m tests.evaluation.lives: reads the folder of a run from standard input; forks a child that works on it and
writes the child's process id; reads another line; waits for the child, and writes how it ended (0, or the signal's
number); and so on. All that is slow to load is loaded once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from postalign.alignment import Alignment
from postalign.evaluation import evaluate
from postalign.evaluation.suites import Item, Suite
from tests.decoding.twin import push
from tests.evaluation.fakes import FullItem, Words
from tests.tiny import SENTENCES, tiny_model, tiny_tokenizer


def suites() -> list[Suite]:
    """Two suites, of 26 and 7 prompts; some replies have their beginning given."""
    harmful = [Item(f"h{i}", "harmful", f"{SENTENCES[i % 7]} {'moon ' * (i % 5)}", "abc"[i % 3]) for i in range(14)]
    benign = [
        FullItem(f"b{i}", "benign", SENTENCES[i % 7][: 8 + 3 * i], prefill="Sure, " if i % 3 == 0 else None)
        for i in range(12)
    ]
    few = [Item(f"f{i}", None, SENTENCES[i]) for i in range(7)]
    return [Suite("both", (*harmful, *benign)), Suite("few", tuple(few))]


def live(out: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = [2, 5, *range(40, 90)]  # so that replies end at different times
    evaluate(
        model,
        tokenizer,
        {"base": None, "pushed": Alignment("test", [push()])},
        suites(),
        out=out,
        max_new_tokens=12,
        do_sample=True,
        seeds=[0, 1],
        batch_size=2,
        judges=["rules", Words(word="e")],
        text=Path(__file__).with_name("lives.txt"),
        kl_prompts=3,
    )


def main() -> None:
    torch.set_num_threads(1)
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(Path(line.strip()))
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)
        sys.stdin.readline()  # not before the other side is done with it: a child waited for loses its number
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)


if __name__ == "__main__":
    main()
