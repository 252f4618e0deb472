"""Batches follow from the seed and the step: every window once an epoch, the same after a stop, the shares asked for."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from refine_lab.config import DataConfig
from refine_lab.data.batches import SequenceData
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from refine_lab.models.hub import SHIPPED
from tests.support.paths import ROOT, TEXT
from tests.support.recorded_rows import digests
from tests.support.refusals import naming, refused

PLAIN = DataConfig(sources={str(TEXT): 1.0}, sequence_length=64, validation_sequences=6)
MIXED = replace(PLAIN, sequence_length=160, recall={"word-1": 0.3, "pairs": 0.2}, validation_sequences=3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), vocab_size=1200)


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def rows(data: SequenceData, count: int) -> list[list[int]]:
    batch = data.batch(0, count)
    return [row[:length].tolist() for row, length in zip(batch.tokens, batch.lengths, strict=True)]


def windows(data: SequenceData, source: str) -> list[list[int]]:
    length = data.config.sequence_length
    tokens = data.tokens[source]
    return [tokens[start : start + length].tolist() for start in range(0, len(tokens) - length + 1, length)]


def test_an_epoch_holds_every_window_once(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(PLAIN, tokenizer, seed=0)
    expected = windows(data, str(TEXT))
    found = rows(data, 2 * len(expected))
    first, second = found[: len(expected)], found[len(expected) :]
    assert len(expected) > 50
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second
    assert first != expected


def test_with_recall_documents_between_them_too(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(MIXED, tokenizer, seed=3)
    expected = windows(data, str(TEXT))
    known = set(map(tuple, expected))
    plain = [row for row in rows(data, 8 * len(expected)) if tuple(row) in known]
    assert len(plain) > 3 * len(expected)
    for epoch in range(3):
        assert sorted(plain[epoch * len(expected) : (epoch + 1) * len(expected)]) == sorted(expected)


def test_a_batch_is_the_same_whatever_was_asked_before(tokenizer: PreTrainedTokenizerFast) -> None:
    data, fresh = SequenceData(MIXED, tokenizer, seed=1), SequenceData(MIXED, tokenizer, seed=1)
    for step in range(4):
        before = data.batch(step, 8)
    after = fresh.batch(3, 8)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.lengths, after.lengths)
    assert before.sequence_ids == after.sequence_ids == tuple(range(24, 32))


def test_a_row_is_the_same_in_batches_of_another_size(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(MIXED, tokenizer, seed=1)
    whole = rows(data, 24)
    for row in range(24):
        single = data.batch(row, 1)
        assert single.tokens[0, : int(single.lengths[0])].tolist() == whole[row]
        assert single.sequence_ids == (row,)


def test_two_seeds_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = (rows(SequenceData(MIXED, tokenizer, seed=seed), 32) for seed in (0, 1))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 4


def test_recall_documents_come_in_their_shares(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(MIXED, tokenizer, seed=0)
    known = set(map(tuple, windows(data, str(TEXT))))
    kinds = Counter(
        "plain" if tuple(row) in known else "word" if "What is the secret word" in tokenizer.decode(row) else "pairs"
        for row in rows(data, 600)
    )
    assert kinds["plain"] == pytest.approx(300, abs=40)
    assert kinds["word"] == pytest.approx(180, abs=40)
    assert kinds["pairs"] == pytest.approx(120, abs=40)


def test_shorter_documents_are_padded(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(MIXED, tokenizer, seed=0)
    batch = data.batch(0, 32)
    assert batch.tokens.shape == (32, 160)
    assert set(batch.lengths.tolist()) == {159, 160}  # pairs take three tokens each
    assert batch.tokens[batch.lengths == 159][:, 159].eq(0).all()


def test_sources_come_in_their_shares(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("only this line again\n" * 2000)
    config = replace(PLAIN, sources={str(TEXT): 3.0, str(other): 1.0}, recall={"word-1": 0.2})
    data = SequenceData(config, tokenizer, seed=0)
    texts = [str(tokenizer.decode(row)) for row in rows(data, 500)]
    recall = ["What is the secret word" in text for text in texts]
    repeated = ["only this line again\nonly this line again" in text for text in texts]
    assert sum(recall) == pytest.approx(100, abs=25)
    assert sum(r and not q for r, q in zip(repeated, recall, strict=True)) == pytest.approx(100, abs=25)
    assert sum(r and q for r, q in zip(repeated, recall, strict=True)) == pytest.approx(25, abs=15)


def test_recall_alone_needs_no_plain_row(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(replace(PLAIN, recall={"pairs": 0.7, "word-1": 0.3}), tokenizer, seed=0)
    known = set(map(tuple, windows(data, str(TEXT))))
    assert not any(tuple(row) in known for row in rows(data, 200))


def test_validation_is_held_out_plain_text_the_same_for_every_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = [SequenceData(MIXED, tokenizer, seed=seed).validation() for seed in (0, 1)]
    assert torch.equal(batches[0].tokens, batches[1].tokens)
    held_out = SequenceData(MIXED, tokenizer, seed=0, split="validation")
    train = set(map(tuple, windows(SequenceData(MIXED, tokenizer, seed=0), str(TEXT))))
    found = [tuple(row) for row in batches[0].tokens.tolist()]
    assert len(set(found)) == 3
    assert set(found) <= set(map(tuple, windows(held_out, str(TEXT))))
    assert not set(found) & train


def test_fewer_held_out_rows_are_the_first_of_more(tokenizer: PreTrainedTokenizerFast) -> None:
    more = SequenceData(PLAIN, tokenizer, seed=0).validation()
    fewer = SequenceData(replace(PLAIN, validation_sequences=2), tokenizer, seed=0).validation()
    assert torch.equal(more.tokens[:2], fewer.tokens)


def test_more_held_out_rows_than_there_are_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(replace(PLAIN, validation_sequences=500), tokenizer, seed=0)
    with naming(ValueError, "500 of the 500 validation sequences", "rows of 64"):
        data.validation()


def test_a_source_shorter_than_a_row_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a short text")
    config = DataConfig(sources={str(tmp_path): 1.0}, sequence_length=64)
    with naming(ValueError, tmp_path, "train", "one row of 64"):
        SequenceData(config, tokenizer, seed=0)


def test_recall_that_is_unknown_or_does_not_fit_is_refused_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    with refused("a kind of recall document", "needle-1"):
        SequenceData(replace(PLAIN, recall={"needle-1": 0.1}), tokenizer, seed=0)
    with naming(ValueError, "'word-40'", 64):
        SequenceData(replace(PLAIN, recall={"word-40": 0.1}), tokenizer, seed=0)


# -- far into a run ------------------------------------------------------------------------------------------------------


def test_no_row_of_any_seed_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the recorded sources are relative paths
    recorded = json.loads((TEXT.parent / "rows.json").read_text(encoding="utf-8"))
    assert len(recorded) == 196
    assert dict(digests(AutoTokenizer.from_pretrained(SHIPPED / "tiny-deltanet"))) == recorded


def test_a_batch_is_the_same_in_every_order_of_steps(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(MIXED, tokenizer, seed=1)
    for step in (300, 7, 7, 8, 301, 0, 300):
        batch, alone = data.batch(step, 4), SequenceData(MIXED, tokenizer, seed=1).batch(step, 4)
        assert torch.equal(batch.tokens, alone.tokens) and batch.sequence_ids == alone.sequence_ids


def test_a_batch_costs_at_step_100_000_what_the_first_costs(tokenizer: PreTrainedTokenizerFast) -> None:
    """The second of two consecutive calls, early and late by turns, the best of twenty: other processes share the machine."""
    runs = {step: SequenceData(PLAIN, tokenizer, seed=0) for step in (0, 100_000)}
    for step, data in runs.items():
        data.batch(step, 32)
    fastest = dict.fromkeys(runs, float("inf"))
    for further in range(1, 21):
        for step, data in runs.items():
            began = time.perf_counter()
            data.batch(step + further, 32)
            fastest[step] = min(fastest[step], time.perf_counter() - began)
    assert fastest[100_000] <= 1.5 * fastest[0], fastest  # measured: 1.0 to 1.1; without a place kept: 400


def test_the_pass_over_earlier_rows_needs_little_memory(tokenizer: PreTrainedTokenizerFast) -> None:
    data = SequenceData(PLAIN, tokenizer, seed=0)
    tracemalloc.start()
    try:
        data.batch(30_000, 128)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12e6  # bytes; the kinds of all 3.84 million rows are 31e6
