"""Advantages by hand."""

import math

import pytest
import torch

from refine_lab.advantages import advantages


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


def test_a_group_of_one_gives_zero():
    assert advantages(torch.tensor([0.3, 0.8]), 1, 1, "sequence").tolist() == [0, 0]


def test_prefix_with_one_rollout_is_refused():
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        advantages(torch.tensor([0.3, 0.8]), 2, 1, "prefix")


def test_rewards_that_are_no_whole_rows_are_refused():
    with pytest.raises(ValueError, match=r"whole rows of 4 \* 2, got 9"):
        advantages(torch.zeros(9), 4, 2, "sequence")


def test_no_gradient_passes():
    assert not advantages(torch.rand(8, requires_grad=True), 8, 1, "sequence").requires_grad
