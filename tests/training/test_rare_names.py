"""Rare names in held-out rows: which mentions count, and which are recalled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refine_lab.data.batches import padded
from refine_lab.models import load_model
from refine_lab.models.loading import load_tokenizer
from refine_lab.training.rare_names import Name, names_recalled, rare_names


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-deltanet")


def row(tokenizer, *texts: str) -> list[int]:
    return [token for text in texts for token in tokenizer.encode(text)]


def test_a_later_mention_after_a_gap_counts_once(tokenizer) -> None:
    gap = " and so it went on" * 6
    one = row(tokenizer, "There was Zanthrox", gap, " with Zanthrox", " near Zanthrox", gap, " of Zanthrox")
    other = row(tokenizer, "Quillmore", gap, " for Quillmore")
    batch = padded([np.array(one), np.array(other)], (0, 1))
    name = tokenizer.encode(" Zanthrox")
    places = [i for i in range(len(one)) if one[i : i + len(name)] == name]
    assert len(places) == 4 and len(name) > 1
    found = rare_names(tokenizer, batch, window=20)
    zanthrox = [each for each in found if each.row == 0]
    spaces = sum(not str(tokenizer.decode([token])).strip() for token in name)  # they are not part of the name
    assert zanthrox == [Name(0, place + spaces, place + len(name)) for place in (places[1], places[3])]
    (later,) = [each for each in found if each.row == 1]
    assert str(tokenizer.decode(other[later.start : later.stop])).strip() == "Quillmore"
    assert rare_names(tokenizer, batch, window=500) == []


def test_a_name_after_a_line_end_begins_with_its_own_first_token(tokenizer) -> None:
    text = row(tokenizer, "There was\nZanthrox", " and so it went on" * 6, " with\nZanthrox")
    (name,) = rare_names(tokenizer, padded([np.array(text)], (0,)), window=20)
    assert str(tokenizer.decode(text[name.start : name.stop])) == "Zanthrox"


def test_a_word_of_two_rows_is_not_rare(tokenizer) -> None:
    text = row(tokenizer, "There was Zanthrox", " and so it went on" * 6, " with Zanthrox")
    batch = padded([np.array(text), np.array(text)], (0, 1))
    assert rare_names(tokenizer, batch, window=20) == []
    assert len(rare_names(tokenizer, batch.rows(0, 1), window=20)) == 1


def test_recall_is_that_of_greedy_completion(tokenizer) -> None:
    policy, _ = load_model("tiny-deltanet", device="cpu")
    text = row(
        tokenizer, "The secret word for Zanthrox is here.", " The boats were out at sea." * 8, " It was Zanthrox."
    )
    batch = padded([np.array(text), np.array(text[: len(text) // 2])], (0, 1))
    names = [Name(0, start, start + 3) for start in range(5, len(text) - 3, 4)]
    found = names_recalled(policy, batch, names, micro_batch_size=1)
    with torch.no_grad():
        logits = policy(batch.tokens[:1]).logits[0].argmax(-1).tolist()
    assert found == [logits[s : e - 1] == text[s + 1 : e] for _, s, e in names]
    assert 0 < sum(found) < len(found)
