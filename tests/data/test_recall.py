"""Recall documents: the answer stands in the text and after its question, anywhere, and never in training by that key."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from refine_lab.data.corpus import Split
from refine_lab.data.recall import RecallDocument, make_document, parse_kind, recall_words
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from tests.support.paths import TEXT
from tests.support.refusals import naming, refused

KINDS = ("word-1", "word-4", "number-1", "number-3", "word-5-q2", "number-4-q1")
FACTS = {
    "word": re.compile(r"\nThe secret word for ([a-z]+) is( [a-z]+)\.\n"),
    "number": re.compile(r"\nOne of the special magic numbers for ([a-z]+) is:( \d{7})\.\n"),
}
QUESTIONS = {
    "word": "What is the secret word for {0}? The secret word for {0} is",
    "number": "What is the special magic number for {0} mentioned in the provided text? "
    "The special magic number for {0} mentioned in the provided text is",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), vocab_size=1200)


@pytest.fixture(scope="module")
def filler(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    texts = [path.read_text() for path in sorted(TEXT.glob("*.txt"))]
    return np.array(tokenizer.encode("<|endoftext|>".join(texts)), dtype=np.int32)


def make(
    kind: str,
    tokenizer: PreTrainedTokenizerFast,
    filler: np.ndarray,
    seed: int,
    split: Split = "train",
    length: int = 384,
) -> RecallDocument:
    return make_document(kind, length, filler, torch.Generator().manual_seed(seed), tokenizer, split)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_question_asks_for_a_fact_of_the_text(
    kind: str, split: Split, tokenizer: PreTrainedTokenizerFast, filler: np.ndarray
) -> None:
    form, count = kind.split("-")[0], int(kind.split("-")[1])
    asked = 1 if split == "validation" else int(kind.split("-q")[1]) if "-q" in kind else count
    for seed in range(5):
        document = make(kind, tokenizer, filler, seed, split)
        assert len(document.tokens) == 384
        assert len(document.questions) == asked
        facts = dict(FACTS[form].findall(tokenizer.decode(document.tokens)))
        assert len(facts) == count
        assert len(set(facts.values())) == count
        keys = set()
        for question in document.questions:
            prompt = str(tokenizer.decode(document.tokens[: question.prompt_end]))
            key = prompt.rsplit(" for ", 1)[1].split()[0]
            keys.add(key)
            assert prompt.endswith("\n" + QUESTIONS[form].format(key))
            end = question.prompt_end + len(question.answer_ids)
            assert document.tokens[question.prompt_end : end] == question.answer_ids
            assert tokenizer.decode(question.answer_ids) == facts[key]
        assert len(keys) == asked


def test_answer_and_fact_are_the_same_tokens(tokenizer: PreTrainedTokenizerFast, filler: np.ndarray) -> None:
    for kind, width in (("word-1", 1), ("number-1", 5)):
        document = make(kind, tokenizer, filler, 0, "validation")
        question = document.questions[0]
        answer = question.answer_ids
        assert len(answer) == width
        starts = [i for i in range(question.prompt_end) if document.tokens[i : i + width] == answer]
        assert len(starts) >= 1
        assert any(tokenizer.decode(document.tokens[i - 2 : i]).rstrip(":").endswith(" is") for i in starts)


def test_a_held_out_document_ends_with_its_answer(tokenizer: PreTrainedTokenizerFast, filler: np.ndarray) -> None:
    for kind in ("word-4", "number-2", "pairs"):
        document = make(kind, tokenizer, filler, 3, "validation")
        question = document.questions[-1]
        assert document.tokens[question.prompt_end :] == [*question.answer_ids, *tokenizer.encode(".")]


def test_pairs_state_and_ask(tokenizer: PreTrainedTokenizerFast, filler: np.ndarray) -> None:
    for seed in range(20):
        document = make("pairs", tokenizer, filler, seed, length=128)
        assert 126 <= len(document.tokens) <= 128
        stated = document.questions[0].prompt_end - 1
        words = str(tokenizer.decode(document.tokens[:stated])).strip(". ").split(". ")
        facts = dict(pair.split() for pair in words)
        assert len(facts) == len(words) >= 2
        first = []
        for question in document.questions:
            key = str(tokenizer.decode(document.tokens[question.prompt_end - 1 : question.prompt_end])).strip()
            assert str(tokenizer.decode(question.answer_ids)).strip() == facts[key]
            first.append(key)
        assert set(first[: len(facts)]) == set(facts)  # all are asked for before one is asked for again


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("pairs-is", r" ?([a-z]+) is( [a-z]+)\."),
        ("pairs-word", r"\nThe secret word for ([a-z]+) is( [a-z]+)\."),
        ("pairs-number", r"\nOne of the special magic numbers for ([a-z]+) is:( \d{7})\."),
    ],
)
def test_pairs_in_sentences_state_and_ask(
    kind: str, pattern: str, tokenizer: PreTrainedTokenizerFast, filler: np.ndarray
) -> None:
    """Every sentence, asked or stated, is the same text; the answers are those that were stated."""
    for seed in range(10):
        document = make(kind, tokenizer, filler, seed, length=160)
        assert len(document.tokens) <= 160
        text = str(tokenizer.decode(document.tokens))
        assert re.fullmatch(f"({pattern})+", text), text
        found = re.findall(pattern, text)
        stated, asked = found[: -len(document.questions)], found[-len(document.questions) :]
        facts = dict(stated)
        assert len(facts) == len(stated) >= 1
        assert asked == [(key, facts[key]) for key, _ in asked]
        assert {key for key, _ in asked[: len(facts)]} == set(facts)
        assert [str(tokenizer.decode(question.answer_ids)) for question in document.questions] == [v for _, v in asked]
        held_out = make(kind, tokenizer, filler, seed, "validation", length=160)
        assert len(held_out.questions) == 1
        assert held_out.tokens[held_out.questions[0].prompt_end :][: len(held_out.questions[0].answer_ids)] == (
            held_out.questions[0].answer_ids
        )


@pytest.mark.parametrize("kind", ["word-3-d100", "number-2-q1-d100"])
def test_facts_at_a_distance_end_before_it(kind: str, tokenizer: PreTrainedTokenizerFast, filler: np.ndarray) -> None:
    """Between the last fact and the first question stand at least so many tokens, and somewhere no more than a few."""
    form, nearest = kind.split("-")[0], []
    for seed in range(40):
        document = make(kind, tokenizer, filler, seed, length=256)
        body = str(tokenizer.decode(document.tokens[: document.questions[0].prompt_end]))
        last = [match.end() for match in FACTS[form].finditer(body)][-1]
        start = body.index("\nWhat is")
        nearest.append(len(tokenizer.encode(body[last:start])))
    assert min(nearest) >= 99  # encoded apart, the text may take a token less
    assert min(nearest) < 130
    with naming(ValueError, repr(kind), 110):
        make(kind, tokenizer, filler, 0, length=110)


def test_keys_of_held_out_documents_are_no_keys_in_training(
    tokenizer: PreTrainedTokenizerFast, filler: np.ndarray
) -> None:
    words = recall_words(tokenizer)
    train, held_out = set(words.keys["train"]), set(words.keys["validation"])
    assert not train & held_out
    assert train | held_out == set(words.texts)
    assert 0.1 < len(held_out) / len(words.texts) < 0.3
    seen: dict[str, set[str]] = {"train": set(), "validation": set()}
    for split in ("train", "validation"):
        for seed in range(100):
            text = str(tokenizer.decode(make("word-4", tokenizer, filler, seed, split).tokens))
            seen[split] |= {key for key, _ in FACTS["word"].findall(text)}
    assert len(seen["train"]) > len(seen["validation"]) > 5
    assert not seen["train"] & seen["validation"]


def test_words_are_single_tokens_with_the_space_before_them(tokenizer: PreTrainedTokenizerFast) -> None:
    words = recall_words(tokenizer)
    assert len(words.texts) > 50
    for token, text in words.texts.items():
        assert tokenizer.encode(text) == [token]
        assert re.fullmatch(" [a-z]{3,}", text)
    assert not {" secret", " word", " the", " magic"} & set(words.texts.values())


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """Of the Llama kind: a space before the first word of all it reads, and none before the first it writes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(tokenizer_sample({str(TEXT): 10**6}), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_words_of_a_tokenizer_that_writes_no_first_space(metaspace: PreTrainedTokenizerFast) -> None:
    words = recall_words(metaspace)
    assert len(words.texts) > 50
    assert all(metaspace.convert_ids_to_tokens(token) == "▁" + text[1:] for token, text in words.texts.items())
    filler = np.array(metaspace.encode("Some text of no interest. " * 200, add_special_tokens=False), dtype=np.int32)
    for kind in ("word-4", "number-2", "pairs"):
        document = make(kind, metaspace, filler, 0, "validation", length=300)
        (question,) = document.questions
        width, answer = len(question.answer_ids), question.answer_ids
        assert width == 1 or kind == "number-2"
        assert answer in [document.tokens[i : i + width] for i in range(question.prompt_end - width)]
        ending = str(metaspace.decode(document.tokens[question.prompt_end - 1 :]))
        assert ending.endswith(f"{metaspace.decode(answer)}.")


def test_depth_is_uniform(tokenizer: PreTrainedTokenizerFast, filler: np.ndarray) -> None:
    depths = []
    for seed in range(400):
        text = str(tokenizer.decode(make("word-2", tokenizer, filler, seed, "validation", length=256).tokens))
        body = text[: text.rindex("\nWhat is")]
        depths += [match.start() / len(body) for match in FACTS["word"].finditer(body)]
    counts, _ = np.histogram(depths, bins=5, range=(0, 1))
    assert sum(counts) == 800
    assert counts.min() > 100  # 160 expected
    assert counts.max() < 220


def test_pairs_leave_words_for_the_values(tokenizer: PreTrainedTokenizerFast, filler: np.ndarray) -> None:
    half = len(recall_words(tokenizer).texts) // 2
    for seed in range(30):
        document = make("pairs", tokenizer, filler, seed, length=20 * half)
        assert half // 2 <= len({document.tokens[q.prompt_end - 1] for q in document.questions}) <= half


def test_one_generator_state_makes_one_document(tokenizer: PreTrainedTokenizerFast, filler: np.ndarray) -> None:
    for kind in (*KINDS, "pairs"):
        assert make(kind, tokenizer, filler, 5) == make(kind, tokenizer, filler, 5)
        assert make(kind, tokenizer, filler, 5) != make(kind, tokenizer, filler, 6)


def test_the_text_around_the_facts_has_no_end_in_it(tokenizer: PreTrainedTokenizerFast, filler: np.ndarray) -> None:
    assert tokenizer.eos_token_id in filler
    documents = [make("word-1", tokenizer, filler, seed) for seed in range(50)]
    assert all(tokenizer.eos_token_id not in document.tokens for document in documents)


def test_a_document_that_does_not_fit_says_what_it_takes(
    tokenizer: PreTrainedTokenizerFast, filler: np.ndarray
) -> None:
    with pytest.raises(
        ValueError, match=r"kind 'word-4' needs at least (\d+) tokens, but only 40 are allowed"
    ) as caught:
        make("word-4", tokenizer, filler, 0, length=40)
    least = int(re.findall(r"least (\d+)", str(caught.value))[0])
    document = make("word-4", tokenizer, filler, 0, length=least)
    assert len(document.tokens) == least
    assert len(FACTS["word"].findall(str(tokenizer.decode(document.tokens)))) == 4
    with naming(ValueError, "'pairs'", "6 tokens", 5):
        make("pairs", tokenizer, filler, 0, length=5)


def test_too_little_text_or_too_few_words_are_named(tokenizer: PreTrainedTokenizerFast, filler: np.ndarray) -> None:
    with naming(ValueError, "the source has 10"):
        make("word-1", tokenizer, filler[:10], 0)
    with naming(ValueError, "500 facts"):
        make("word-500", tokenizer, filler, 0)


@pytest.mark.parametrize(
    "name", ["words-1", "word", "word-0", "word-2-q3", "number-1-q0", "pairs-2", "pairs-d8", "word-1-d0", ""]
)
def test_an_unknown_kind_names_those_there_are(name: str) -> None:
    with refused("a kind of recall document", name):
        parse_kind(name)
