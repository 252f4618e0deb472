"""One training step: select, roll out, reward, and update, with one forward pass over every sequence (paper, section 3).

With one update per batch, a single forward pass over the sequences provides the next-token loss, the entropies, the
states that rollouts branch from and the reference continuation's hidden states, and a single backward pass covers all
of it. With several updates, one pass without gradients rolls out the whole batch, and every update reads its own
sequences once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from refine_lab.config import RefineConfig, UpdateConfig
from refine_lab.method.advantages import advantages
from refine_lab.method.losses import entropy_loss, kl_loss, mask_last, ntp_loss, policy_loss
from refine_lab.method.memory import check_window
from refine_lab.method.places import places
from refine_lab.method.rewards import binary, cosine
from refine_lab.method.rollout import Branches, Continuation, read_rollouts, sample
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import Trace, hidden_states_only
from refine_lab.ops.head import TokenStats
from refine_lab.ops.precision import autocast
from refine_lab.rng import Draws
from refine_lab.types import Batch, RewardFunction, RewardInputs, Rollouts, SelectionFunction

C = TypeVar("C", bound=UpdateConfig)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainState(Generic[C]):
    """The state of training: the policy, the optimizers of its parameters, and what the losses need."""

    policy: FastWeightLM
    optimizers: Sequence[Optimizer]
    config: C
    reward: RewardFunction | None = None  # None for SFT
    reference: FastWeightLM | None = None  # for kl_coef above 0
    selection: SelectionFunction | None = None  # for selection `custom`

    def __post_init__(self) -> None:
        check_window(self.config.refine, type(self.policy), self.policy.config)

    def autocast(self) -> AbstractContextManager:
        """Returns the autocast context of the run's steps and evaluations."""
        return autocast(self.policy.device, self.config.dtype)


@dataclass(frozen=True, eq=False)
class StepResult:
    """Metrics of a step, named as in metrics.jsonl, and its rollouts (none for SFT)."""

    metrics: dict[str, float]
    rollouts: Rollouts | None


def next_token_stats(policy: FastWeightLM, trace: Trace, batch: Batch, *, entropy: bool) -> TokenStats:
    """Returns statistics of x_{i+1} given x_{<=i} for i < T - 1, each [B, T - 1]; entries beyond a row's end are undefined."""
    return policy.head(trace.hidden_states[:, :-1], batch.tokens[:, 1:], entropy=entropy)


def roll_out(
    policy: FastWeightLM,
    trace: Trace,
    entropies: Float[Tensor, "B T"],
    batch: Batch,
    refine: RefineConfig,
    reward: RewardFunction,
    draws: Draws,
    logprobs: Float[Tensor, "B S"] | None = None,
    selection: SelectionFunction | None = None,
) -> tuple[Rollouts, Continuation]:
    """Selects positions, rolls out from the states there, and computes rewards and advantages (eq. 5 to 12).

    `logprobs` and `selection` are as in `places`. Returns the rollouts, which carry no gradient, and the policy's outputs
    on them, which do if gradients are enabled.
    """
    positions = places(policy, batch, entropies, logprobs, refine, draws, selection)
    branches = Branches.of(trace, positions, refine.group_size, detach=refine.prefix_gradient == "detached")
    shape = (refine.num_chunks, refine.group_size, refine.rollout_length)
    uniforms = draws.uniforms(batch.sequence_ids, "rollout", shape).flatten(0, 2)
    tokens = sample(policy, branches.detach(), uniforms, refine.temperature)
    continuation = read_rollouts(policy, branches, tokens, refine.temperature)
    return assess(trace, entropies, batch, positions, tokens, continuation, refine, reward), continuation


@torch.no_grad()
def assess(
    trace: Trace,
    entropies: Float[Tensor, "B T"],
    batch: Batch,
    positions: Tensor,
    tokens: Tensor,
    continuation: Continuation,
    refine: RefineConfig,
    reward: RewardFunction,
) -> Rollouts:
    """Computes rewards and advantages of rollout tokens against the reference continuation, without gradients."""
    offsets = torch.arange(1, refine.rollout_length + 1, device=positions.device)
    index = positions.unsqueeze(-1) + offsets  # t+1..t+k [B, C, K]

    def repeated(values: Tensor) -> Tensor:
        return values.unflatten(1, index.shape[1:]).flatten(0, 1).repeat_interleave(refine.group_size, 0)

    inputs = RewardInputs(
        rollout_ids=tokens,
        target_ids=repeated(batch.tokens.gather(1, index.flatten(1))),
        hidden_states=continuation.hidden_states.detach(),
        target_hidden_states=repeated(trace.hidden_at(index.flatten(1))).detach(),
        logprobs=continuation.logprobs.detach(),
    )
    rewards = reward(inputs)
    return Rollouts(
        positions=positions,
        tokens=tokens,
        old_logprobs=inputs.logprobs,
        target_ids=inputs.target_ids,
        entropies=entropies.gather(1, positions).flatten().repeat_interleave(refine.group_size),
        cosine=cosine(inputs),
        binary=binary(inputs),
        rewards=rewards,
        advantages=advantages(rewards, refine.num_chunks, refine.group_size, refine.group_by),
    )


def rollout_loss(
    continuation: Continuation,
    rollouts: Rollouts,
    refine: RefineConfig,
    num_tokens: int,
    reference_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """nsp_coef * policy loss (eq. 10), plus KL and entropy terms with nonzero coefficients."""
    clips = (refine.clip_eps, refine.dual_clip)
    loss, metrics = policy_loss(continuation.logprobs, rollouts.old_logprobs, rollouts.advantages, *clips, num_tokens)
    metrics["nsp_loss"] = loss.detach()
    loss = refine.nsp_coef * loss
    if reference_logprobs is not None:
        divergence = kl_loss(continuation.logprobs, rollouts.old_logprobs, reference_logprobs, num_tokens)
        loss, metrics["kl"] = loss + refine.kl_coef * divergence, divergence.detach()
    if refine.entropy_coef:
        loss = loss + refine.entropy_coef * entropy_loss(continuation.entropies, num_tokens)
    return loss, metrics


def train_step(train_state: TrainState, batch: Batch, draws: Draws) -> StepResult:
    """Makes all updates on one batch, each on `config.mini_batch_size` sequences with clipped gradients.

    The metrics count skipped updates (see `OptimizerUpdate.apply`) as `skipped_updates`, if there are any. Neither the
    micro-batch size nor the order of rows within an update changes a draw or (up to rounding) a gradient.
    """
    config = train_state.config
    refine = config.refine
    several = refine is not None and len(batch.lengths) > config.mini_batch_size
    try:
        planned, entropy_mean = _roll_out_batch(train_state, batch, draws) if several else (None, None)
    except NotFinite:
        updates = len(batch.lengths) / config.mini_batch_size
        nothing = {"ntp_loss": math.nan, "grad_norm": math.nan, "skipped_updates": updates, "updates": updates}
        return StepResult(nothing, None)
    sums: dict[str, float] = defaultdict(float)
    kept: list[Rollouts] = [] if planned is None else [planned]

    minis = [*split(batch, config.mini_batch_size)]
    for start, mini in minis:
        update = OptimizerUpdate(train_state)
        for offset, micro in split(mini, config.micro_batch_size):
            row = start + offset
            part = None if planned is None else planned.rows(row, row + len(micro.lengths))
            loss, metrics, rollouts = _loss(train_state, micro, mini, draws, part)
            if rollouts is not None and planned is None:
                kept.append(rollouts)
            if not update.add(loss, metrics):
                break
        for name, value in update.apply().items():
            sums[name] += value
    skipped = sums.pop("skipped_updates", 0.0)
    metrics = {name: value / len(minis) for name, value in sums.items()}
    if skipped:
        metrics["skipped_updates"] = skipped
    if entropy_mean is not None:
        metrics["entropy_mean"] = entropy_mean
    rollouts = Rollouts.cat(kept) if kept else None
    if rollouts is not None:
        metrics |= _rollout_metrics(rollouts)
    return StepResult({**metrics, "updates": len(minis)}, rollouts)


class OptimizerUpdate:
    """One optimizer update: `add` accumulates the gradients of one micro-batch after another, `apply` changes the weights."""

    def __init__(self, train_state: TrainState) -> None:
        self._train_state, self._finite = train_state, True
        self._sums: dict[str, float] = defaultdict(float)
        for optimizer in train_state.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> bool:
        """Adds a micro-batch's share of loss and metrics; returns False if the loss is NaN or infinite."""
        for name, value in metrics.items():
            self._sums[name] += float(value)
        self._finite = bool(torch.isfinite(loss))
        if self._finite:
            loss.backward()
        return self._finite

    def apply(self) -> dict[str, float]:
        """Returns the sums of the metrics, and `grad_norm` before clipping.

        If the last loss or that norm is not finite, or the norm is above `config.skip_above_grad_norm`, no weight or
        moment changes, and `skipped_updates` is 1.
        """
        config, norm = self._train_state.config, torch.tensor(math.nan)
        if self._finite:
            norm = torch.nn.utils.clip_grad_norm_(self._train_state.policy.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm) or norm > (config.skip_above_grad_norm or math.inf):  # before the weights are lost
            return {**self._sums, "grad_norm": float(norm), "skipped_updates": 1.0}
        for optimizer in self._train_state.optimizers:
            optimizer.step()
        return {**self._sums, "grad_norm": float(norm)}


class NotFinite(FloatingPointError):
    """The next-token loss of sequences is NaN or infinite, so nothing can be sampled from them."""


def _loss(
    train_state: TrainState, micro: Batch, mini: Batch, draws: Draws, planned: Rollouts | None
) -> tuple[Tensor, dict[str, Tensor], Rollouts | None]:
    """Returns a micro-batch's share of its update's loss; follows `planned` rollouts, or samples new ones."""
    policy, refine = train_state.policy, train_state.config.refine
    with train_state.autocast():
        with nullcontext() if refine is not None else hidden_states_only():
            trace = policy.read(micro.tokens, micro.lengths)
        stats = next_token_stats(policy, trace, micro, entropy=refine is not None and planned is None)
        ntp = ntp_loss(stats.logprobs, micro.lengths, mini.num_targets)
        correct = mask_last(stats.is_top1, micro.lengths).sum()
        metrics = {"ntp_loss": ntp.detach(), "ntp_accuracy": correct / mini.num_targets}
        if refine is None or not torch.isfinite(ntp):  # nothing can be sampled from a loss that is not finite
            return ntp, metrics, None
        if planned is None:
            assert train_state.reward is not None
            entropies = _with_last(stats.entropies.detach(), micro)
            metrics["entropy_mean"] = mask_last(entropies[:, :-1], micro.lengths).sum() / mini.num_targets
            chosen = (train_state.reward, draws, stats.logprobs, train_state.selection)
            rollouts, continuation = roll_out(policy, trace, entropies, micro, refine, *chosen)
        else:
            detach = refine.prefix_gradient == "detached"
            branches = Branches.of(trace, planned.positions, planned.group_size, detach=detach)
            rollouts, continuation = planned, read_rollouts(policy, branches, planned.tokens, refine.temperature)
        per_row = refine.num_chunks * refine.group_size * refine.rollout_length
        reference = _reference_logprobs(train_state, micro, rollouts, refine)
        nsp, nsp_metrics = rollout_loss(continuation, rollouts, refine, len(mini.lengths) * per_row, reference)
        return refine.ntp_coef * ntp + nsp, metrics | nsp_metrics, rollouts


@torch.no_grad()
def _roll_out_batch(train_state: TrainState, batch: Batch, draws: Draws) -> tuple[Rollouts, float]:
    """Returns the rollouts of a whole batch, sampled before its first update, and the policy's mean entropy on it."""
    micros = split(batch, train_state.config.micro_batch_size)
    parts, entropies = zip(*(_rolled_out(train_state, micro, draws) for _, micro in micros), strict=True)
    return Rollouts.cat(parts), sum(entropies) / batch.num_targets


def _rolled_out(train_state: TrainState, micro: Batch, draws: Draws) -> tuple[Rollouts, float]:
    """Returns a micro-batch's rollouts and the sum of its entropies, and frees its trace."""
    policy, refine = train_state.policy, train_state.config.refine
    assert refine is not None and train_state.reward is not None
    with train_state.autocast():
        trace = policy.read(micro.tokens, micro.lengths)
        stats = next_token_stats(policy, trace, micro, entropy=True)
        if not torch.isfinite(ntp_loss(stats.logprobs, micro.lengths, micro.num_targets)):
            raise NotFinite
        entropies = _with_last(stats.entropies, micro)
        chosen = (train_state.reward, draws, stats.logprobs, train_state.selection)
        rollouts, _ = roll_out(policy, trace, entropies, micro, refine, *chosen)
    return rollouts, float(mask_last(stats.entropies, micro.lengths).sum())


@torch.no_grad()
def _reference_logprobs(
    train_state: TrainState, batch: Batch, rollouts: Rollouts, refine: RefineConfig
) -> Tensor | None:
    if not refine.kl_coef:
        return None
    if train_state.reference is None:
        raise ValueError(f"kl_coef {refine.kl_coef} needs a reference policy to compare with, got none")
    trace = train_state.reference.read(batch.tokens, batch.lengths)
    branches = Branches.of(trace, rollouts.positions, rollouts.group_size)
    return read_rollouts(train_state.reference, branches, rollouts.tokens, refine.temperature).logprobs


def _with_last(entropies: Float[Tensor, "B S"], batch: Batch) -> Float[Tensor, "B T"]:
    """Returns entropies of T - 1 positions as a row of T, 0 from each row's last token on, whose successor is unknown.

    The last token's entropy is 0 whether or not padding follows, so that smoothing sees the same row in every batch.
    """
    return torch.nn.functional.pad(mask_last(entropies, batch.lengths), (0, 1))


def split(batch: Batch, size: int) -> Iterator[tuple[int, Batch]]:
    """Yields rows of a batch, at most `size` at once, with the index of the first."""
    for start in range(0, len(batch.lengths), size):
        yield start, batch.rows(start, start + size)


def _rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    metrics = {}
    for name, values in (("reward", rollouts.rewards), ("cosine", rollouts.cosine), ("binary", rollouts.binary)):
        deviation = float(values.std()) if len(values) > 1 else 0.0
        metrics |= {f"{name}_mean": float(values.mean()), f"{name}_std": deviation}
    return metrics
