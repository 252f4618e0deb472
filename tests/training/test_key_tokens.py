"""Key tokens against reading each short context alone; LongPPL by hand; a run keeps those of the model it starts from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

from refine_lab import fork
from refine_lab.config import DataConfig, TrainConfig
from refine_lab.data.batches import SequenceData
from refine_lab.experiments.midtrain import final_results, held_out_rows
from refine_lab.models import FastWeightLM, load_model
from refine_lab.models.loading import manifest_of
from refine_lab.runs.run import Run
from refine_lab.training import key_tokens as module
from refine_lab.training.evaluation import key_measures, next_token, recall_documents
from refine_lab.training.inputs import new_run
from refine_lab.training.key_tokens import FILE, THRESHOLD, WINDOW, key_tokens, key_tokens_of, short_contexts
from refine_lab.training.trainer import train
from refine_lab.types import Batch
from tests.factories.durable_runs import go
from tests.factories.lact import make_lact
from tests.factories.step import make_batch, make_policy
from tests.support.paths import TEXT
from tests.support.refusals import naming
from tests.training.test_inputs import After

ROW = 420
"""Tokens of a row: more than two windows, so that some tokens are compared."""


@cache
def shipped() -> tuple[FastWeightLM, SequenceData]:
    policy, tokenizer = load_model("tiny-deltanet", device="cpu")
    data = DataConfig(sources={str(TEXT): 1.0}, sequence_length=ROW, validation_sequences=2)
    return policy, SequenceData(data, tokenizer, 0, "validation", manifest_of("tiny-deltanet"))


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@torch.no_grad()
def logprob(policy: FastWeightLM, tokens: torch.Tensor) -> float:
    """log p of the last token given those before it, with nothing else read."""
    logits = policy.head(policy.read(tokens[None, :-1]).hidden_states[:, -1])
    return float(logits.double().log_softmax(-1)[0, tokens[-1]])


# -- which tokens ----------------------------------------------------------------------------------------------------------


def test_key_tokens_are_those_that_lose_a_nat_without_their_prefix(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 16)
    monkeypatch.setattr(module, "THRESHOLD", threshold := 0.05)  # random weights use their prefix little
    policy, batch = make_policy(), make_batch((90, 60, 20))
    found = key_tokens(policy, batch)
    assert found.shape == (3, 89) and found[:2].any(1).all() and not found[2].any()
    for row, length in enumerate(batch.lengths.tolist()):
        for place in range(1, length):  # x_place, read from the start of its window of w to 2 w - 1 tokens
            start = 0 if place < 32 else place // 16 * 16 - 16
            tokens = batch.tokens[row, : place + 1]
            difference = logprob(policy, tokens) - logprob(policy, tokens[start:])
            assert bool(found[row, place - 1]) == (difference >= threshold), (row, place, difference)
        assert not found[row, length - 1 :].any()


def test_pads_and_micro_batches_change_no_key_token(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 16)
    monkeypatch.setattr(module, "THRESHOLD", 0.05)
    policy, batch = make_policy(), make_batch((150, 97, 131))
    together = key_tokens(policy, batch)
    assert torch.equal(key_tokens(policy, batch, micro_batch_size=1), together)
    for row, length in enumerate(batch.lengths.tolist()):
        assert torch.equal(key_tokens(policy, batch.rows(row, row + 1))[0], together[row, : length - 1])


def test_an_answer_that_stands_far_above_is_a_key_token():
    policy, held_out = shipped()
    documents = recall_documents("number-1", 12, ROW, held_out)
    tokens = torch.tensor([document.tokens[:ROW] for document in documents])
    batch = Batch(tokens=tokens, lengths=torch.full((12,), ROW), sequence_ids=tuple(range(12)))
    found, far, hits = key_tokens(policy, batch), 0, 0
    for row, document in enumerate(documents):
        (question,) = document.questions
        answer = list(question.answer_ids)
        tokens = list(document.tokens)
        first = next(i for i in range(len(tokens)) if tokens[i : i + len(answer)] == answer)
        if question.prompt_end - first > 2 * WINDOW:  # the fact lies outside every short context
            far += 1
            hits += bool(found[row, question.prompt_end - 1 : question.prompt_end - 1 + len(answer)].any())
    assert far >= 3 and hits >= far / 2, "the model knows six answers of ten"
    assert found.float().mean() < 0.1


def test_the_short_context_is_no_smaller_than_the_window_of_the_attention():
    lact, wide = make_lact(), make_lact(window_size=200)
    assert [short_contexts(policy).window for policy in (make_policy(), lact, wide)] == [WINDOW, WINDOW, 200]
    short_contexts(wide)  # and is accepted there
    assert not key_tokens(wide, make_batch((300,))).any(), "a row of fewer than two windows has none"


# -- LongPPL ---------------------------------------------------------------------------------------------------------------


def test_long_ppl_is_the_perplexity_of_the_key_tokens_alone():
    policy, batch = make_policy(), make_batch()
    keys = torch.zeros(3, batch.tokens.shape[1] - 1, dtype=torch.bool)
    places = [(0, 3), (0, 148), (2, 77)]
    for row, index in places:
        keys[row, index] = True
    losses = [-logprob(policy, batch.tokens[row, : index + 2]) for row, index in places]
    mean = sum(losses) / 3
    for size in (1, 2, 4):
        found = next_token(policy, batch, size, keys)
        assert found.pop("key_loss") == pytest.approx(mean, abs=1e-9)
        assert found.pop("long_ppl") == pytest.approx(math.exp(mean), rel=1e-9)
        assert found.pop("key_tokens") == 3
        assert found == next_token(policy, batch, size), "the other measures are bit for bit what they were"
    assert next_token(policy, batch, 4, torch.zeros_like(keys)) == next_token(policy, batch)


def test_a_loss_beyond_every_perplexity_is_a_number():
    assert key_measures(2e3, 1) == {"long_ppl": math.exp(300), "key_loss": 2e3, "key_tokens": 1}


# -- the file of a run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config() -> TrainConfig:
    _, held_out = shipped()
    sizes = dict(batch_size=1, mini_batch_size=1, micro_batch_size=1, steps=3, eval_every=1, checkpoint_every=1)
    return TrainConfig(recipe="key", refine=None, data=held_out.config, **sizes, lr=1e-3, device="cpu", threads=1)


@pytest.mark.slow
def test_a_run_keeps_the_key_tokens_of_its_first_weights(config, tmp_path):
    whole = go(new_run(config, tmp_path / "whole"))
    rows = whole.evaluations()
    policy, held_out = shipped()
    expected = key_tokens(policy, held_out.validation())
    assert rows["key_tokens"].tolist() == [int(expected.sum())] * 4 and expected.sum() > 3
    first = next_token(policy, held_out.validation(), key_tokens=expected)
    assert rows["key_loss"][0] == first["key_loss"] and len(set(rows["key_loss"])) == 4
    assert rows["long_ppl"].tolist() == pytest.approx([math.exp(loss) for loss in rows["key_loss"]])

    again = new_run(config, tmp_path / "parts")
    train(again.path, After(again.path, 2))
    stored = (again.path / FILE).read_bytes()
    assert stored == (whole.path / FILE).read_bytes()
    child = fork(again, 2, tmp_path / "fork")
    for run in (again, child):  # the second chooses with the weights that the first run began with, not its own
        measures = ["key_tokens", "key_loss", "long_ppl"]
        assert go(run).evaluations()[measures].equals(rows[measures])
        assert (run.path / FILE).read_bytes() == stored


def test_a_run_of_an_earlier_version_chooses_when_it_goes_on(config, tmp_path):
    run = new_run(config, tmp_path)
    train(run.path, After(run.path, 2))
    stored = (run.path / FILE).read_bytes()
    (run.path / FILE).unlink()
    assert go(Run(run.path)).state == "finished" and (run.path / FILE).read_bytes() == stored


def test_the_stored_tokens_are_used_while_the_rows_are_the_same(config, tmp_path):
    run, batch = new_run(config, tmp_path), make_batch()
    keys = torch.rand(3, 149, generator=torch.Generator().manual_seed(0)) < 0.1
    keys &= torch.arange(149) < batch.lengths.unsqueeze(1) - 1
    asked = []
    choose = lambda: asked.append(1) or keys  # noqa: E731
    assert all(torch.equal(key_tokens_of(run, batch, choose), keys) for _ in range(2)) and len(asked) == 1
    values = json.loads((run.path / FILE).read_text())
    assert values["threshold"] == THRESHOLD and [len(row) for row in values["key_tokens"]] == keys.sum(1).tolist()
    other = replace(batch, tokens=batch.tokens + 1)
    assert torch.equal(key_tokens_of(run, other, choose), keys) and len(asked) == 2, "chosen anew for other rows"


@pytest.mark.parametrize("places", [None, [], [[1], [2], "3"], [[0], [], []], [[150], [], []], [[1.5], [], []]])
def test_a_damaged_file_is_named(config, tmp_path, places):
    run, batch = new_run(config, tmp_path), make_batch()
    key_tokens_of(run, batch, lambda: torch.zeros(3, 149, dtype=torch.bool))
    values = json.loads((run.path / FILE).read_text())
    (run.path / FILE).write_text(json.dumps(values | {"key_tokens": places}))
    with naming(ValueError, run.path / FILE, "3 held-out rows"):
        key_tokens_of(run, batch, lambda: pytest.fail("damaged, not missing"))


# -- results ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_models_are_compared_on_the_tokens_that_the_base_chose(config, tmp_path, capsys):
    run = go(new_run(config, tmp_path / "runs"))
    base, trained = final_results([run], num_documents=1, num_tokens=64).rows
    last = run.evaluations().iloc[-1]
    assert trained["key_loss"] == pytest.approx(last["key_loss"], rel=1e-6)
    assert base["key_tokens"] == trained["key_tokens"] == last["key_tokens"]
    assert f"key_tokens {base['key_tokens']}," in capsys.readouterr().out
    first = held_out_rows([run], tmp_path, documents=1, document_tokens=64)
    assert first["base"]["long_ppl"] == base["long_ppl"] != first[str(run.path)]["long_ppl"]
    assert held_out_rows([run], tmp_path, documents=1, document_tokens=64) == first
