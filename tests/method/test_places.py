"""Places by memory, by copies and by a function, in the training step of every family."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from refine_lab.config import RefineConfig
from refine_lab.method.custom import function_source
from refine_lab.method.custom_selection import checked_selection, selection_function
from refine_lab.method.memory import gains, short_difference
from refine_lab.method.places import place_scores
from refine_lab.method.selection import selection_probabilities
from refine_lab.method.step import next_token_stats, train_step
from refine_lab.models import FastWeightLM
from refine_lab.rng import Draws
from refine_lab.types import Batch
from tests.factories import gated_deltanet, hybrids
from tests.factories.lact import make_lact
from tests.factories.step import make_batch, make_policy, train_state_for
from tests.support.refusals import naming, refused

DRAWS = Draws(seed=3, step=2)
MEMORY = RefineConfig(selection="memory", window=16, margin=2, num_chunks=4, tau=0.5)
FAMILIES = {
    "delta_net": make_policy,
    "gated_deltanet": gated_deltanet.make_policy,
    "lact": make_lact,
    "qwen3_next": lambda: hybrids.make("qwen3_next"),
    "olmo_hybrid": lambda: hybrids.make("olmo_hybrid"),
}


def scores_of(policy: FastWeightLM, batch: Batch, refine: RefineConfig, selection=None) -> torch.Tensor:
    with torch.no_grad():
        stats = next_token_stats(policy, policy.read(batch.tokens, batch.lengths), batch, entropy=True)
    entropies = torch.nn.functional.pad(stats.entropies, (0, 1))
    return place_scores(policy, batch, entropies, stats.logprobs, refine, DRAWS, selection)


# -- scores and probabilities --------------------------------------------------------------------------------------------


def test_probabilities_of_gains_by_hand():
    """Chunk one: gains 0, 1 and unknown; chunk two: nothing is known, so that its eligible positions are equal."""
    config = replace(MEMORY, num_chunks=2, margin=0, rollout_length=1, tau=0.5)
    scores = torch.tensor([[0.0, 1.0, -math.inf, 0.0] + [-math.inf] * 4])
    e = math.exp(2)
    expected = [1 / (2 + e), e / (2 + e), 0, 1 / (2 + e), 1 / 3, 1 / 3, 1 / 3, 0]
    assert selection_probabilities(scores, torch.tensor([8]), config)[0].tolist() == pytest.approx(expected)


def test_copies_and_functions_use_their_scores_without_shift_or_smoothing():
    scores = torch.tensor([[0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 9.0]])
    for selection in ("copy", "custom"):
        config = RefineConfig(
            selection=selection, num_chunks=2, margin=0, rollout_length=1, entropy_index="equation", tau=1.0
        )
        e, e2 = math.exp(1), math.exp(2)
        expected = [1 / (3 + e), e / (3 + e), 1 / (3 + e), 1 / (3 + e), e2 / (2 + e2), 1 / (2 + e2), 1 / (2 + e2), 0]
        assert selection_probabilities(scores, torch.tensor([8]), config)[0].tolist() == pytest.approx(expected)
    with naming(ValueError, "scores", "nan", "row 0"):
        selection_probabilities(scores * torch.nan, torch.tensor([8]), config)


def test_the_score_of_memory_is_the_gain_where_the_first_token_is_known():
    policy, batch = make_policy(), make_batch()
    scores = scores_of(policy, batch, MEMORY)
    with torch.no_grad():
        logprobs = next_token_stats(policy, policy.read(batch.tokens, batch.lengths), batch, entropy=False).logprobs
    difference = short_difference(policy, batch, logprobs, MEMORY, DRAWS)
    unknown = difference.isnan()
    assert 0.1 < unknown.double().mean() < 0.25, "a quarter of each segment, less its first token's context"
    assert torch.equal(scores == -torch.inf, unknown)
    assert torch.equal(scores[~unknown], gains(difference.nan_to_num(), 5)[~unknown])


@pytest.mark.parametrize("selection", ["memory", "copy"])
def test_a_row_within_the_window_is_uniform(selection):
    policy, batch = make_policy(), make_batch((64, 45))
    config = replace(MEMORY, selection=selection, window=64)
    scores = scores_of(policy, batch, config)
    probabilities = selection_probabilities(scores, batch.lengths, config)
    uniform = selection_probabilities(scores, batch.lengths, replace(config, selection="uniform"))
    assert scores.count_nonzero() == 0
    assert torch.equal(probabilities, uniform)


# -- the training step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["memory", "copy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_rolls_out_at_the_places_it_scores(family, selection):
    policy, batch = FAMILIES[family](), make_batch((90, 70, 81))
    refine = replace(MEMORY, selection=selection)
    scores = scores_of(policy, batch, refine)
    probabilities = selection_probabilities(scores, batch.lengths, refine)
    state = train_state_for(policy, refine)
    rollouts = train_step(state, batch, DRAWS).rollouts
    assert (probabilities.gather(1, rollouts.positions) > 0).all()
    again = train_step(train_state_for(FAMILIES[family](), refine, micro_batch_size=1), batch, DRAWS).rollouts
    if family == "delta_net":  # the factories of the hybrids draw other weights in each call
        assert torch.equal(rollouts.positions, again.positions)


@pytest.mark.parametrize("short_contexts", ["segments", "windows"])
def test_micro_batches_padding_and_several_updates_change_no_place(short_contexts):
    refine = replace(MEMORY, short_contexts=short_contexts)
    batch, positions = make_batch(), []
    for sizes in ({}, {"micro_batch_size": 1}, {"mini_batch_size": 1}, {"micro_batch_size": 2, "mini_batch_size": 3}):
        positions.append(train_step(train_state_for(make_policy(), refine, **sizes), batch, DRAWS).rollouts.positions)
    assert all(torch.equal(positions[0], other) for other in positions[1:])
    order = [2, 0, 1]
    permuted = Batch(
        tokens=batch.tokens[order],
        lengths=batch.lengths[order],
        sequence_ids=tuple(batch.sequence_ids[i] for i in order),
    )
    other = train_step(train_state_for(make_policy(), refine), permuted, DRAWS).rollouts.positions
    assert torch.equal(positions[0][order], other)


def test_the_reading_leaves_gradients_as_they_are():
    """With places that the scores do not change, the step by memory is that of uniform selection."""
    moved = []
    for selection in ("uniform", "memory"):
        refine = replace(MEMORY, selection=selection, tau=1e9, short_contexts="windows")
        policy = make_policy()
        train_step(train_state_for(policy, refine), make_batch(), DRAWS)
        moved.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*moved)


# -- functions of one's own ----------------------------------------------------------------------------------------------


def least_likely(inputs):
    return -inputs.logprobs


def by_memory(inputs):
    kept = inputs.long_short_difference
    return torch.nn.functional.pad(kept, (0, inputs.rollout_length - 1)).unfold(1, inputs.rollout_length, 1).sum(-1)


def test_a_function_scores_the_statistics_of_the_row():
    policy, batch = make_policy(), make_batch()
    refine = replace(MEMORY, selection="custom")
    scores = scores_of(policy, batch, refine, selection_function(function_source("selection", least_likely)))
    with torch.no_grad():
        logprobs = next_token_stats(policy, policy.read(batch.tokens, batch.lengths), batch, entropy=False).logprobs
    for row, length in enumerate(batch.lengths.tolist()):
        assert torch.equal(scores[row, : length - 1], -logprobs[row, : length - 1])
        assert scores[row, length - 1 :].count_nonzero() == 0


def test_a_function_may_use_the_long_short_difference_which_is_computed_only_then(monkeypatch):
    policy, batch = make_policy(), make_batch()
    refine = replace(MEMORY, selection="custom")
    by_name = scores_of(policy, batch, replace(refine, selection="memory")).nan_to_num(neginf=0)
    scores = scores_of(policy, batch, refine, checked_selection(by_memory))
    known = scores_of(policy, batch, replace(refine, selection="memory")) != -torch.inf
    assert torch.equal(scores[known], by_name[known])
    monkeypatch.setattr("refine_lab.method.places.long_short_difference", lambda *_: pytest.fail("it is computed"))
    scores_of(policy, batch, refine, checked_selection(least_likely))


def test_a_function_cannot_compare_contexts_shorter_than_the_attention_window():
    policy, batch = make_lact(), make_batch()
    refine = replace(MEMORY, selection="custom", window=policy.config.window_size - 1)
    assert scores_of(policy, batch, refine, checked_selection(least_likely)).shape == batch.tokens.shape
    with naming(RuntimeError, "by_memory", "RefineConfig.window", refine.window):
        scores_of(policy, batch, refine, checked_selection(by_memory))


def test_a_step_with_a_function_starts_where_it_says():
    def at_thirty(inputs):
        place = torch.arange(inputs.tokens.shape[1])
        return -1e6 * (place % 30 != 0).float().expand(inputs.tokens.shape)

    refine = replace(MEMORY, selection="custom", num_chunks=3)
    state = replace(train_state_for(make_policy(), refine), selection=checked_selection(at_thirty))
    rollouts = train_step(state, make_batch((90, 90)), DRAWS).rollouts
    assert (rollouts.positions[:, 1:] % 30 == 0).all()


def one_per_row(inputs):
    return inputs.entropies[:, 0]


def whole_numbers(inputs):
    return inputs.tokens


def infinite(inputs):
    return inputs.entropies.log()


def raises(inputs):
    raise KeyError("nothing")


@pytest.mark.parametrize(
    ("function", "kind", "fact"),
    [
        (one_per_row, ValueError, "[3, 150]"),
        (whole_numbers, ValueError, "torch.int64"),
        (infinite, ValueError, "must be finite"),
        (raises, RuntimeError, "KeyError"),
    ],
)
def test_what_is_no_score_is_refused_by_name(function, kind, fact):
    with naming(kind, f"selection {function.__name__!r}", fact):
        scores_of(make_policy(), make_batch(), replace(MEMORY, selection="custom"), checked_selection(function))


def test_what_is_missing_is_refused():
    with naming(ValueError, "'custom'", "got none"):
        selection_function(None)
    with refused("selection", None):
        scores_of(make_policy(), make_batch(), replace(MEMORY, selection="custom"))
    with refused("a selection", "a lambda"):
        function_source("selection", lambda inputs: inputs.entropies)
    batch, flat = make_batch(), torch.zeros(3, 150)
    with refused("logprobs", None):
        place_scores(make_policy(), batch, flat, None, MEMORY, DRAWS)
