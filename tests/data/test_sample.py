"""The sample document: whole sentences, facts that a reader sees, keys that no training document asks for."""

from __future__ import annotations

import re

import pytest

from refine_lab.config import RefineConfig
from refine_lab.data.recall import WORD_FACT, WORD_QUESTION, recall_words
from refine_lab.data.sample import ANSWERED, ASKED, FACTS, sample_document
from refine_lab.models.loading import load_tokenizer


def test_it_is_whole_sentences_from_its_beginning() -> None:
    document = sample_document().document
    assert document.isascii() and "\t" not in document
    lines = [line for line in document.split("\n") if line]
    assert len(lines) == 10 + len(FACTS) + 1
    assert all(re.fullmatch(r"[A-Z].*\.", line) for line in lines)
    assert document == sample_document().document


def test_its_facts_are_lines_of_their_own_in_the_wording_of_training() -> None:
    document, question, answer = sample_document()
    for key, value in FACTS.items():
        fact = WORD_FACT.format(key=key, value=f" {value}")
        assert document.count(f"\n{fact}\n") == 1
        without = document.replace(f"\n{fact}\n", "\n")
        assert len(re.findall(rf"\b{value}\b", without)) == (key == ANSWERED), "nothing else says it"
    assert f"\n{WORD_QUESTION.format(key=ANSWERED)} {FACTS[ANSWERED]}.\n" in document
    assert question == f"\n{WORD_QUESTION.format(key=ASKED)}" and answer == f" {FACTS[ASKED]}"


@pytest.mark.parametrize("name", ["tiny-deltanet", "tiny-lact"])
def test_its_keys_are_held_out_and_it_is_long_enough(name: str) -> None:
    tokenizer = load_tokenizer(name)
    words = recall_words(tokenizer)
    keys = {words.texts[token].strip() for token in words.keys["validation"]}
    assert FACTS.keys() <= keys and set(FACTS.values()) <= {text.strip() for text in words.texts.values()}
    sample = sample_document()
    tokens = len(tokenizer(sample.document, add_special_tokens=False)["input_ids"])
    assert 1400 < tokens < 2000 and RefineConfig().fits(tokens * 2 // 3) and RefineConfig().num_chunks == 8
