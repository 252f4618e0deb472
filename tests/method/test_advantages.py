"""Advantages by hand."""

import math

import pytest
import torch

from refine_lab.method.advantages import advantages
from refine_lab.method.rewards import cosine
from refine_lab.types import RewardInputs
from tests.support.refusals import refused


def test_a_sequence_by_hand():
    """1, 2, 3, 6: mean 3, unbiased variance (4 + 1 + 0 + 9) / 3."""
    std = math.sqrt(14 / 3)
    result = advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]), 4, 1, "sequence")
    assert result.tolist() == pytest.approx([v / (std + 1e-6) for v in (-2, -1, 0, 3)], rel=1e-6)


def test_groups_do_not_mix():
    """Two sequences of two positions with two rollouts each: one group a sequence, or one a position."""
    rewards = torch.tensor([0.0, 1.0, 10.0, 20.0, 5.0, 5.0, 0.0, 4.0], dtype=torch.float64)
    by_prefix = advantages(rewards, 2, 2, "prefix")
    half = math.sqrt(0.5)  # of two values, whatever their distance
    signs = [-1, 1, -1, 1, 0, 0, -1, 1]
    assert by_prefix.tolist() == pytest.approx([half * sign for sign in signs], rel=1e-5)
    by_sequence = advantages(rewards, 2, 2, "sequence").view(2, 4)
    for row, values in zip(by_sequence, rewards.view(2, 4), strict=True):
        expected = (values - values.mean()) / (values.std() + 1e-6)
        assert torch.allclose(row, expected, rtol=1e-12)


def test_leave_one_out_and_no_division_by_hand():
    """1, 2, 6 by RLOO: 1 - 4, 2 - 3.5, 6 - 1.5. The unbiased variance of the three is 7."""
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    loo = advantages(rewards, 1, 3, "prefix", baseline="leave_one_out", scale_by_std=False)
    assert loo.tolist() == pytest.approx([-3, -1.5, 4.5], rel=1e-12)
    assert advantages(rewards, 1, 3, "prefix", scale_by_std=False).tolist() == pytest.approx([-2, -1, 3], rel=1e-12)
    scaled = advantages(rewards, 1, 3, "prefix", baseline="leave_one_out")
    assert scaled.tolist() == pytest.approx([v / (math.sqrt(7) + 1e-6) for v in (-3, -1.5, 4.5)], rel=1e-12)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_and_groups_of_one_give_zero_with_any_baseline(baseline, scale):
    settings = {"baseline": baseline, "scale_by_std": scale}
    near = torch.tensor([0.7, 0.7 * (1 + 2**-23), 0.7])
    assert len(near.unique()) > 1
    assert advantages(near, 1, 3, "prefix", **settings).tolist() == [0, 0, 0]
    assert advantages(torch.tensor([0.3, 0.8]), 1, 1, "sequence", **settings).tolist() == [0, 0]


def test_eps_counts_where_the_spread_is_small():
    result = advantages(torch.tensor([0.0, 2e-6], dtype=torch.float64), 2, 1, "sequence")
    std = math.sqrt(2) * 1e-6
    assert result.tolist() == pytest.approx([-1e-6 / (std + 1e-6), 1e-6 / (std + 1e-6)])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, -0.9, 1e8, 0.0])
@pytest.mark.parametrize("count", [2, 3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(value, count, dtype):
    result = advantages(torch.full((2 * count,), value, dtype=dtype), count, 1, "sequence")
    assert result.dtype == dtype
    assert result.tolist() == [0.0] * (2 * count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, 0.7, -0.9, 3e-4])
def test_rewards_that_are_equal_within_rounding_give_exactly_zero(value, dtype):
    """A last bit is no preference: of float32 rewards near 1 it would make advantages of 0.1."""
    eps = torch.finfo(dtype).eps
    near = torch.tensor([value * (1 + step * eps) for step in (0, 1, -1, 2)], dtype=torch.float64).to(dtype)
    assert len(near.unique()) > 1
    assert advantages(near, 4, 1, "sequence").tolist() == [0.0] * 4
    mixed = torch.cat([near, torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype)])
    assert advantages(mixed, 4, 1, "sequence")[4:].abs().min() > 0.8  # each group is judged by itself


def test_cosines_that_are_equal_but_for_their_rounding_give_exactly_zero():
    """Vectors at the same angle but of other lengths have one cosine, which float32 gives in several last bits."""
    generator = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(2, 5, 64, generator=generator)
    lengths = torch.linspace(0.3, 3, 8).view(-1, 1, 1)
    ids = torch.zeros(8, 5, dtype=torch.long)
    states = dict(hidden_states=lengths * hidden, target_hidden_states=lengths.flip(0) * target)
    rewards = cosine(RewardInputs(rollout_ids=ids, target_ids=ids, logprobs=torch.zeros(8, 5), **states))
    assert len(rewards.unique()) > 1
    assert advantages(rewards, 8, 1, "sequence").tolist() == [0.0] * 8


def test_a_difference_above_rounding_keeps_its_advantage():
    """Ten units in the last place of float32: the deviation is 8e-7 and the 1e-6 beside it counts, as ever."""
    rewards = torch.tensor([1.0, 1.0 + 10 * 2**-23])
    difference = 10 * 2**-23
    expected = difference / 2 / (difference / math.sqrt(2) + 1e-6)
    assert advantages(rewards, 2, 1, "sequence").tolist() == pytest.approx([-expected, expected], rel=1e-6)


def test_a_group_of_one_gives_zero():
    assert advantages(torch.tensor([0.3, 0.8]), 1, 1, "sequence").tolist() == [0, 0]


def test_prefix_with_one_rollout_is_refused():
    with refused("group_size", 1, "at least 2 if group_by is 'prefix'"):
        advantages(torch.tensor([0.3, 0.8]), 2, 1, "prefix")


def test_rewards_that_are_no_whole_rows_are_refused():
    with refused("rewards", 9, "whole rows of 4 * 2"):
        advantages(torch.zeros(9), 4, 2, "sequence")


def test_no_gradient_passes():
    assert not advantages(torch.rand(8, requires_grad=True), 8, 1, "sequence").requires_grad


def test_a_reward_that_is_not_finite_is_not_hidden():
    for wrong in (float("nan"), float("inf")):
        assert advantages(torch.tensor([0.0, wrong, 0.0, 1.0]), 4, 1, "sequence").isnan().any()
