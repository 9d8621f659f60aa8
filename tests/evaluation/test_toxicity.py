"""A classifier's probability of one label, on tiny random classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from postalign.errors import PostalignError, UsageError
from postalign.evaluation.toxicity import classifier
from tests.tiny import TOKENIZER_SIZE, tiny_tokenizer

TEXTS = ["the cat sleeps", "a much longer text about the moon and the sea and the fox", "no"]


def saved(folder: Path, labels: dict[int, str], problem: str | None) -> Any:
    config = tf.BertConfig(
        vocab_size=TOKENIZER_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
        problem_type=problem,
        initializer_range=1.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("several", [True, False])
def test_it_is_the_label_s_probability(tmp_path: Path, several: bool) -> None:
    labels = {0: "neutral", 1: "toxic", 2: "insult"}
    model = saved(tmp_path, labels, "multi_label_classification" if several else None)
    found = classifier(str(tmp_path), batch_size=2)(TEXTS)
    expected = []
    for text in TEXTS:  # one at a time: padding must not matter
        with torch.no_grad():
            logits = model(torch.tensor([tiny_tokenizer()(text)["input_ids"]])).logits[0]
        expected.append(float((logits.sigmoid() if several else logits.softmax(-1))[1]))
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(one or 0, 4) for one in found}) == 3
    other = classifier(str(tmp_path), label="Insult")(TEXTS)
    assert other != found


def test_labels_and_models_that_are_not_there(tmp_path: Path) -> None:
    saved(tmp_path / "a", {0: "calm", 1: "angry"}, None)
    with pytest.raises(UsageError, match=r"no label that means toxic\. It has: calm, angry"):
        classifier(str(tmp_path / "a"))
    with pytest.raises(UsageError, match="Did you mean 'angry'"):
        classifier(str(tmp_path / "a"), label="angri")
    with pytest.raises(PostalignError, match="could not load the classifier"):
        classifier(str(tmp_path / "none"))
