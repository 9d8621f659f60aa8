"""The tokens that carry a loss, the order of the examples, how processes share a batch, and losses of rows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from postalign.training.batches import IGNORED, batch_order, labelled_batch, share_of
from postalign.training.losses import npo, row_divergences, row_losses, target_logits
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.tools import PAIRS

CPU = torch.device("cpu")


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("add_bos", [True, False])
def test_the_question_alone(template: bool, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(template, add_bos=add_bos)
    prompts = [
        "How do I bake a loaf of bread?",
        "  Hi ",
        [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Why?"}],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Hi"},
        ],
    ]
    batch = labelled_batch(tokenizer, [(prompt, "Sure") for prompt in prompts], CPU, "question")
    for i, text in enumerate(["How do I bake a loaf of bread?", "Hi", "Why?", "Hi"]):
        labelled = batch["labels"][i] != IGNORED
        shown = tokenizer.decode(batch["labels"][i][labelled])
        first = int(batch["attention_mask"][i].argmax())
        if not labelled[first + 1 :].all() and not add_bos and not template:
            # without anything before it, the first token is predicted by nothing
            assert text.endswith(shown.strip()) or text.startswith(shown.strip())
        else:
            assert shown.strip() == text
        assert not bool(labelled[first]) and torch.equal(batch["labels"][i][labelled], batch["input_ids"][i][labelled])
    assert "Sure" not in tokenizer.decode(batch["input_ids"][0])


def test_all_tokens(tiny_tokenizer: Any) -> None:
    batch = labelled_batch(tiny_tokenizer, PAIRS, CPU, "all")
    labelled, shown = batch["labels"] != IGNORED, batch["attention_mask"].bool()
    assert torch.equal(labelled.sum(-1), shown.sum(-1) - 1)
    assert bool((labelled <= shown).all()) and torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


@pytest.mark.parametrize("loss_on", ["answer", "question", "all"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_loss_of_each_row(kind: str, loss_on: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model(kind)
    with torch.no_grad():
        batch = labelled_batch(tiny_tokenizer, PAIRS, CPU, loss_on)
        found = row_losses(model, batch)
        for i in range(len(PAIRS)):
            shown = batch["attention_mask"][i].bool()
            ids, labels = batch["input_ids"][i][shown], batch["labels"][i][shown]
            scores = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            each = [-scores[j - 1, ids[j]] for j in range(1, len(ids)) if labels[j] != IGNORED]
            torch.testing.assert_close(found[i], torch.stack(each).mean(), rtol=1e-4, atol=1e-5)


def test_the_first_tokens_count_more(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    batch = labelled_batch(tiny_tokenizer, PAIRS, CPU)
    with torch.no_grad():
        found = row_losses(tiny_llama, batch, head_tokens=3, rest_weight=0.5)
        scores = [row_losses(tiny_llama, batch), row_losses(tiny_llama, batch, head_tokens=99, rest_weight=0.5)]
        logits, labels = target_logits(tiny_llama, batch)
    torch.testing.assert_close(*scores)  # no answer is longer than that
    for row, (given, label) in enumerate(zip(logits.log_softmax(-1), labels, strict=True)):
        each = [-given[i, token] for i, token in enumerate(label.tolist()) if token != IGNORED]
        head, rest = torch.stack(each[:3]), each[3:]
        expected = head.mean() + (0.5 * torch.stack(rest).mean() if rest else 0.0)
        torch.testing.assert_close(found[row], expected)


def test_divergence_of_each_row(tiny_tokenizer: Any) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.no_grad():
        batch = labelled_batch(tiny_tokenizer, PAIRS, CPU, "answer")
        found = row_divergences(model, batch, other)
        (p, labels), (q, _) = target_logits(other, batch), target_logits(model, batch)
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1)
    exact = torch.stack([row[label != IGNORED].mean() for row, label in zip(each, labels, strict=True)])
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-6)
    assert float(found.min()) > 0


def test_divergence_on_the_prompt(tiny_tokenizer: Any) -> None:
    """It is added, times its weight, and the answer's first tokens count as much as the others together."""
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.no_grad():
        batch = labelled_batch(tiny_tokenizer, PAIRS, CPU)
        found = row_divergences(model, batch, other, head_tokens=2, prompt_weight=3.0)
        whole = labelled_batch(tiny_tokenizer, PAIRS, CPU, "all")
        (p, labels), (q, _) = target_logits(other, whole), target_logits(model, whole)
    each = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    for row, labelled in enumerate(labels != IGNORED):
        answer = int((batch["labels"][row] != IGNORED).sum())
        prompt, answered = each[row][labelled][:-answer], each[row][labelled][-answer:]
        exact = answered[:2].mean() + (answered[2:].mean() if answer > 2 else 0.0) + 3.0 * prompt.mean()
        torch.testing.assert_close(found[row], exact, rtol=1e-4, atol=1e-6)


def test_npo_is_minus_the_log_sigmoid() -> None:
    losses, reference, counts = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.5]), torch.tensor([4, 7])
    ratio = (-losses * counts) - (-reference * counts)  # log p - log p_ref of the whole answer
    exact = -2 / 0.1 * torch.log(torch.sigmoid(-0.1 * ratio))
    torch.testing.assert_close(npo(losses, reference, counts, 0.1), exact)


def test_the_order_of_batches() -> None:
    batches = list(itertools.islice(batch_order(5, 2, seed=3), 10))
    seen = list(itertools.chain(*batches))
    assert all(sorted(seen[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    assert batches == list(itertools.islice(batch_order(5, 2, seed=3), 10))
    assert batches != list(itertools.islice(batch_order(5, 2, seed=4), 10))
    assert [len(b) for b in itertools.islice(batch_order(2, 7, seed=0), 3)] == [7, 7, 7]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_processes_share_a_batch(world: int, micro_batch: int) -> None:
    shares = [share_of(PAIRS, rank, world, micro_batch) for rank in range(world)]
    assert len({tuple(len(part) for part, _ in share) for share in shares}) == 1
    assert all(0 < len(part) <= micro_batch and 0 <= real <= len(part) for share in shares for part, real in share)
    counted = [pair for share in shares for part, real in share for pair in part[:real]]
    assert sorted(counted) == sorted(PAIRS)
