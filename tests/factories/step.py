"""What the tests of step and others share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import refine_lab.method.step as step_module
from refine_lab.config import RefineConfig, TrainConfig
from refine_lab.method.rewards import REWARDS
from refine_lab.method.rollout import Branches, read_rollouts
from refine_lab.method.step import TrainState, assess, next_token_stats
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.training.optim import make_optimizers
from refine_lab.types import Batch

VOCABULARY, LENGTH, K = 53, 150, 5


def make_policy(dtype: torch.dtype = torch.float64, seed: int = 0) -> DeltaNetForCausalLM:
    # Weights of 0.05, larger than the default 0.02. At 0.2 (and, for rewards that are mostly equal, 0.1) float32 itself is
    # the limit: there the naive procedure is off its own float64 gradient by 2e-5, and the two differ by up to 1.6e-5.
    torch.manual_seed(seed)
    sizes = dict(hidden_size=24, num_heads=2, num_hidden_layers=2, intermediate_size=40, vocab_size=VOCABULARY)
    policy = DeltaNetForCausalLM(
        DeltaNetConfig(**sizes, expand_v=2.0, tie_word_embeddings=True, initializer_range=0.05)
    )
    return policy.to(dtype)


def make_batch(lengths: tuple[int, ...] = (LENGTH, 97, 131), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
    return Batch(tokens=tokens, lengths=torch.tensor(lengths), sequence_ids=tuple(range(len(lengths))))


def train_state_for(policy: DeltaNetForCausalLM, refine: RefineConfig | None, **sizes) -> TrainState:
    config = TrainConfig(recipe="test", refine=refine, **{"batch_size": 3, "mini_batch_size": 3, "lr": 0.01, **sizes})
    reward = REWARDS[refine.reward] if refine else None
    return TrainState(policy=policy, optimizers=make_optimizers(policy, config), config=config, reward=reward)


def relative_errors(policy: DeltaNetForCausalLM, reference: list[Tensor]) -> dict[str, float]:
    named = dict(policy.named_parameters())
    pairs = zip(named.items(), reference, strict=True)
    return {name: float((p.grad - g).norm() / g.norm()) for (name, p), g in pairs}


def fast_gradients(policy: DeltaNetForCausalLM, batch: Batch, refine: RefineConfig, positions: Tensor, **changes):
    """Gradients by the fast path at given positions, on rollouts whose old logprobs were moved by `changes['shift']`."""
    policy.zero_grad()
    torch.manual_seed(1)
    rows = positions.numel() * refine.group_size
    tokens = torch.randint(VOCABULARY, (rows, refine.rollout_length))
    trace = policy.read(batch.tokens, batch.lengths)
    stats = next_token_stats(policy, trace, batch, entropy=True)
    branches = Branches.of(trace, positions, refine.group_size, detach=refine.prefix_gradient == "detached")
    continuation = read_rollouts(policy, branches, tokens, refine.temperature)
    entropies = torch.nn.functional.pad(stats.entropies.detach(), (0, 1))
    reward = REWARDS[refine.reward]
    rollouts = assess(trace, entropies, batch, positions, tokens, continuation, refine, reward)
    rollouts = replace(rollouts, old_logprobs=rollouts.old_logprobs + changes.get("shift", 0.0))
    ntp = step_module.ntp_loss(stats.logprobs, batch.lengths, batch.num_targets)
    nsp, metrics = step_module.rollout_loss(continuation, rollouts, refine, tokens.numel())
    (refine.ntp_coef * ntp + nsp).backward()
    return rollouts, metrics


EDGES = torch.tensor([[0, 62, 63, 64, LENGTH - K - 1], [0, 62, 63, 64, 97 - K - 1]])
