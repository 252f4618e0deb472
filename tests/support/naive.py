"""The plain procedure that the fast one is held against: every truncated prefix read again from scratch."""

from __future__ import annotations

import torch
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.method.losses import policy_loss
from refine_lab.models import FastWeightLM
from refine_lab.types import Batch, Rollouts


def naive_loss(policy: FastWeightLM, batch: Batch, rollouts: Rollouts, refine: RefineConfig) -> Tensor:
    """ntp_coef * NTP + nsp_coef * GRPO for given rollouts, one row and one prefix at a time, with whole logits."""
    ntp, count, logprobs = torch.zeros(()), 0, []
    per_position = rollouts.group_size
    member = 0
    for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
        alone = row[:length].unsqueeze(0)
        losses = torch.log_softmax(_logits(policy, alone)[0, :-1], -1).gather(-1, alone[0, 1:, None])
        ntp, count = ntp - losses.sum(), count + length - 1
        for position in rollouts.positions[len(logprobs) // (rollouts.positions.shape[1] * per_position)].tolist():
            for _ in range(per_position):
                logprobs.append(_rollout_logprobs(policy, alone[:, : position + 1], rollouts.tokens[member], refine))
                member += 1
    stacked = torch.stack(logprobs)
    clips = (refine.clip_eps, refine.dual_clip)
    nsp, _ = policy_loss(stacked, rollouts.old_logprobs, rollouts.advantages, *clips, stacked.numel())
    return refine.ntp_coef * ntp / count + refine.nsp_coef * nsp


def _rollout_logprobs(policy: FastWeightLM, prefix: Tensor, tokens: Tensor, refine: RefineConfig) -> Tensor:
    if refine.prefix_gradient == "full":
        logits = _logits(policy, torch.cat([prefix, tokens.unsqueeze(0)], 1))[0, prefix.shape[1] - 1 : -1]
    else:
        with torch.no_grad():
            trace = policy.read(prefix)
        read = policy.read(tokens.unsqueeze(0), state=trace.final_state).hidden_states
        hidden = torch.cat([trace.hidden_states[:, -1:], read[:, :-1]], 1)
        logits = policy.lm_head(hidden)[0]
    return torch.log_softmax(logits / refine.temperature, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _logits(policy: FastWeightLM, tokens: Tensor) -> Tensor:
    return policy.lm_head(policy.read(tokens).hidden_states)
