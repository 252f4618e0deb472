"""The placebo: REFINE whose rewards belong to other rollouts of the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from refine_lab.config import RefineConfig
from refine_lab.method.advantages import advantages
from refine_lab.method.step import StepResult, train_step
from refine_lab.rng import Draws
from refine_lab.types import Batch
from tests.factories.step import make_batch, make_policy, train_state_for

REFINE = RefineConfig(num_chunks=4, margin=5, group_size=2)
PLACEBO = replace(REFINE, placebo=True)


def step(refine: RefineConfig, batch: Batch | None = None, **sizes: int) -> StepResult:
    return train_step(train_state_for(make_policy(), refine, **sizes), batch or make_batch(), Draws(seed=5, step=1))


def test_a_placebo_has_the_rollouts_and_the_rewards_of_refine_but_no_rollout_has_its_own():
    refine, placebo = step(REFINE).rollouts, step(PLACEBO).rollouts
    assert torch.equal(placebo.tokens, refine.tokens)
    assert torch.allclose(placebo.rewards.sort().values, refine.rewards.sort().values, rtol=0, atol=1e-12)
    assert len(refine.rewards.unique()) == len(refine.rewards), "cosines differ, so that one can tell them apart"
    assert (placebo.rewards - refine.rewards).abs().min() > 1e-6
    assert torch.allclose(placebo.cosine, refine.cosine, rtol=0, atol=1e-12)
    expected = advantages(placebo.rewards, 4, 2, "sequence")
    assert torch.equal(placebo.advantages, expected) and placebo.advantages.abs().max() > 0.5


def test_rewards_move_between_rows():
    own = step(REFINE).rollouts.rewards.view(3, -1).sort(1).values
    found = step(PLACEBO).rollouts.rewards.view(3, -1).sort(1).values
    assert not torch.allclose(found, own)


@pytest.mark.parametrize("sizes", [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"mini_batch_size": 1}])
def test_neither_micro_batches_nor_updates_change_who_receives_which_reward(sizes):
    whole, parts = step(PLACEBO).rollouts, step(PLACEBO, **sizes).rollouts
    assert torch.equal(parts.tokens, whole.tokens)
    assert torch.allclose(parts.rewards, whole.rewards, rtol=0, atol=1e-9)
    assert torch.allclose(parts.advantages, whole.advantages, rtol=0, atol=1e-6)


def test_the_order_of_rows_does_not_change_who_receives_which_reward():
    batch, order = make_batch(), [2, 0, 1]
    ids = tuple(batch.sequence_ids[i] for i in order)
    turned = Batch(tokens=batch.tokens[order], lengths=batch.lengths[order], sequence_ids=ids)
    whole, found = step(PLACEBO).rollouts.rewards, step(PLACEBO, turned).rollouts.rewards
    assert torch.allclose(found.view(3, -1), whole.view(3, -1)[order], rtol=0, atol=1e-9)


def test_the_metrics_of_a_placebo_are_named_as_those_of_refine():
    refine, placebo = step(REFINE).metrics, step(PLACEBO).metrics
    assert placebo.keys() == refine.keys()
    for name in ("reward_mean", "reward_std", "cosine_mean", "entropy_mean", "ntp_loss"):
        assert placebo[name] == pytest.approx(refine[name], rel=1e-9)
    assert placebo["ratio_mean"] == pytest.approx(1, abs=1e-9), "the first update is by the policy that sampled"
