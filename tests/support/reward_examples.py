"""Rollouts whose rewards can be computed by hand."""

from __future__ import annotations

import torch

from refine_lab.types import RewardInputs


def two_rollouts() -> RewardInputs:
    """Two rollouts of two tokens; hidden states at 0, 90, 180 degrees and at 3-4-5."""
    return RewardInputs(
        rollout_ids=torch.tensor([[4, 7], [1, 2]]),
        target_ids=torch.tensor([[4, 8], [2, 1]]),
        hidden_states=torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 1.0]]]),
        target_hidden_states=torch.tensor([[[5.0, 0.0], [3.0, 0.0]], [[1.0, 0.0], [-2.0, -2.0]]]),
        logprobs=torch.tensor([[-0.5, -1.5], [-1.0, -2.0]]),
    )
