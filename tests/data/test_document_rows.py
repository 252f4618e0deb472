"""Rows of one document each: their tokens and lengths, what the loss and REFINE see of them, and an exact resumption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from refine_lab.config import DataConfig, RefineConfig, TrainConfig, from_json, to_json
from refine_lab.data.batches import SequenceData, plain_rows
from refine_lab.data.tokenizer import train_tokenizer
from refine_lab.method.rewards import REWARDS
from refine_lab.method.step import roll_out
from refine_lab.models import load_model
from refine_lab.rng import Draws
from refine_lab.runs.writer import RunWriter
from refine_lab.training.evaluation import next_token
from refine_lab.training.trainer import train
from tests.factories.durable_runs import After, assert_same, go, tiny_config, tiny_model
from tests.support.paths import TEXT
from tests.support.refusals import naming, refused

LENGTH = 32
WORDS = TEXT.joinpath("lighthouse.txt").read_text(encoding="utf-8").split()
SIZES = (5, 40, 1, 12, 60, 25, 33, 90, 18, 7, 52, 44, 29, 3, 70, 38, 21, 66, 10, 80, 47, 15, 55)
"""Words of each document; row 0 and 20 of the table are held out."""
TEXTS = [" ".join(WORDS[i * 17 : i * 17 + size]) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def source(home: Path) -> str:
    path = home / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(WORDS)], 400)


@pytest.fixture
def data(source: str) -> DataConfig:
    return DataConfig(sources={source: 1.0}, sequence_length=LENGTH, rows="document", validation_sequences=2)


def rows(data: SequenceData, count: int) -> list[list[int]]:
    batch = data.batch(0, count)
    return [row[:length].tolist() for row, length in zip(batch.tokens, batch.lengths, strict=True)]


def first_tokens(tokenizer: PreTrainedTokenizerFast, held_out: bool = False) -> list[list[int]]:
    texts = [text for i, text in enumerate(TEXTS) if (i % 20 == 0) == held_out]
    return [tokenizer.encode(text)[:LENGTH] for text in texts]


def test_a_row_is_the_first_tokens_of_a_document_and_an_epoch_has_each_once(data, tokenizer):
    expected = first_tokens(tokenizer)
    assert {len(row) for row in expected} > {LENGTH} and min(map(len, expected)) < LENGTH
    found = rows(SequenceData(data, tokenizer, seed=0), 2 * len(expected))
    assert sorted(found[: len(expected)]) == sorted(found[len(expected) :]) == sorted(expected)
    assert found[: len(expected)] not in (expected, found[len(expected) :])
    assert not any(tokenizer.eos_token_id in row for row in found)


def test_shorter_documents_are_padded_on_the_right_or_left_out(data, tokenizer):
    batch = SequenceData(data, tokenizer, seed=0).batch(0, 21)
    assert batch.tokens.shape == (21, LENGTH)
    assert sorted(batch.lengths.tolist()) == sorted(map(len, first_tokens(tokenizer)))
    for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
        assert not row[length:].any() and row[:length].all()
    long_enough = SequenceData(replace(data, min_tokens=LENGTH), tokenizer, seed=0)
    expected = [row for row in first_tokens(tokenizer) if len(row) == LENGTH]
    assert sorted(rows(long_enough, len(expected))) == sorted(expected)


def test_the_bos_token_counts_as_one_of_the_first_tokens(data, tokenizer):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    found = plain_rows(replace(data, add_bos=True), tokenizer, next(iter(data.sources)), "train")
    expected = [[tokenizer.bos_token_id, *row][:LENGTH] for row in first_tokens(tokenizer)]
    assert [found[i].tolist() for i in range(len(found))] == expected


def test_a_document_of_one_token_leaves_nothing_to_predict(data, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["held out", "a", "the keeper"]
    assert [len(tokenizer.encode(text)) > 1 for text in texts] == [True, False, True]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    found = plain_rows(replace(data, sources={str(path): 1.0}), tokenizer, str(path), "train")
    assert [found[i].tolist() for i in range(len(found))] == [tokenizer.encode("the keeper")]


def test_max_tokens_counts_whole_rows_and_not_the_rest_of_their_documents(data, tokenizer, source):
    expected = first_tokens(tokenizer)
    most = sum(map(len, expected[:5])) + 1
    found = plain_rows(replace(data, max_tokens=most), tokenizer, source, "train")
    assert [found[i].tolist() for i in range(len(found))] == expected[:5]


def test_held_out_rows_are_documents_too(data, tokenizer):
    batches = [SequenceData(data, tokenizer, seed=seed).validation() for seed in (0, 1)]
    assert torch.equal(batches[0].tokens, batches[1].tokens)
    found = [row[:n].tolist() for row, n in zip(batches[0].tokens, batches[0].lengths.tolist(), strict=True)]
    assert sorted(found) == sorted(first_tokens(tokenizer, held_out=True))
    with naming(ValueError, "3 of the 3 validation sequences", "2 rows of at most 32 tokens"):
        SequenceData(replace(data, validation_sequences=3), tokenizer, seed=0).validation()


def test_both_forms_of_rows_share_the_cache_without_being_confused(data, tokenizer):
    for form in ("document", "packed", "document", "packed"):
        found = rows(SequenceData(replace(data, rows=form), tokenizer, seed=0), 40)
        assert any(tokenizer.eos_token_id in row for row in found) == (form == "packed")


def test_the_loss_is_that_of_the_documents_alone(data, home):
    policy, tokenizer = load_model(str(tiny_model(home / "alone")), device="cpu")
    batch = SequenceData(data, tokenizer, seed=0).batch(0, 21)  # all of them
    assert len(set(batch.lengths.tolist())) > 2
    losses = []
    for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
        alone = row[:length]
        with torch.no_grad():
            logits = policy(alone.unsqueeze(0)).logits[0]
        losses += F.cross_entropy(logits[:-1], alone[1:], reduction="none").tolist()
    measured = next_token(policy, batch)["ntp_loss"]
    assert measured == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    pads = torch.arange(LENGTH) >= batch.lengths.unsqueeze(1)
    assert next_token(policy, replace(batch, tokens=batch.tokens.masked_fill(pads, 7)))["ntp_loss"] == measured


def test_rollouts_and_their_targets_stay_within_a_document(data, home):
    policy, tokenizer = load_model(str(tiny_model(home / "within")), device="cpu")
    refine = RefineConfig(num_chunks=3, rollout_length=4, margin=2, selection="uniform")
    batch = SequenceData(replace(data, min_tokens=15), tokenizer, seed=0).batch(0, 20)
    lengths = batch.lengths.tolist()
    assert min(lengths) < LENGTH == max(lengths)
    ends = [set(), set()]
    for step in range(20):
        draws, flat = Draws(seed=0, step=step), torch.zeros(batch.tokens.shape)
        with torch.no_grad():
            trace = policy.read(batch.tokens, batch.lengths)
            found, _ = roll_out(policy, trace, flat, batch, refine, REWARDS["cosine"], draws)
        targets = iter(found.target_ids.tolist())
        for row, length, places in zip(batch.tokens.tolist(), lengths, found.positions.tolist(), strict=True):
            for chunk, t in enumerate(places):
                assert t // (length // 3) == chunk and 1 <= t and t + 4 < length
                assert next(targets) == row[t + 1 : t + 5]
            ends[length == LENGTH].add(length - 5 - places[-1])
    assert min(ends[0]) == min(ends[1]) == 0, "the last possible position is drawn in short and long documents"


def test_a_resumed_run_equals_one_that_was_not_interrupted(data, home, tmp_path):
    config = tiny_config(tiny_model(home / "resumed"), data=replace(data, min_tokens=11), batch_size=4)  # a whole epoch
    with RunWriter.create(config, tmp_path / "whole") as writer:
        whole = go(writer.run)
    with RunWriter.create(config, tmp_path / "stopped") as writer:
        train(writer.path, After(writer.path, 3))
    stopped = writer.run
    assert stopped.done == 3
    assert_same(go(stopped), whole)
    tokens = whole.metrics()["tokens"].diff().fillna(whole.metrics()["tokens"]).tolist()
    lengths = [SequenceData(config.data, load_model(config.model)[1], 0).batch(i, 4).lengths.sum() for i in range(6)]
    assert tokens == [int(length) for length in lengths] and len(set(tokens)) > 1


def test_older_files_have_packed_rows():
    config = TrainConfig(recipe="x", refine=None)
    values = json.loads(to_json(config))
    assert values["data"].pop("rows") == "packed"
    assert from_json(json.dumps(values)) == config


def test_documents_that_are_too_short_are_refused_before_training():
    short = DataConfig(rows="document", sequence_length=512)
    needed = "at least 161 for the method's num_chunks, rollout_length and margin in every document"
    with refused("TrainConfig.data.min_tokens", 1, needed):
        TrainConfig(recipe="x", data=short)
    for accepted in (replace(short, min_tokens=161), replace(short, min_tokens=512), replace(short, rows="packed")):
        assert TrainConfig(recipe="x", data=accepted).refine is not None
    assert TrainConfig(recipe="x", data=short, refine=None).data.min_tokens == 1
    with refused("DataConfig.max_tokens", 500, "at least sequence_length 512 for rows of one document"):
        replace(short, max_tokens=500)
    with refused("DataConfig.rows", "documents", "one of 'packed', 'document'"):
        DataConfig(rows="documents")  # type: ignore[arg-type]
