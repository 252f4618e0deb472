"""One training step: select, roll out, reward, and update, with one forward pass over every sequence (paper, section 3).

With one update per batch, a single forward pass over the sequences provides the next-token loss, the entropies, the
states that rollouts branch from and the reference continuation's hidden states, and a single backward pass covers all
of it. With several updates, one pass without gradients rolls out the whole batch, and every update reads its own
sequences once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.host import fetch, floats, to_device
from refine_lab.method.advantages import advantages
from refine_lab.method.estimators import formula_loss
from refine_lab.method.losses import entropy_loss, kl_loss, mask_last, ntp_loss, policy_loss
from refine_lab.method.memory import long_short_difference
from refine_lab.method.places import NotFinite, places
from refine_lab.method.rewards import binary, cosine, permuted
from refine_lab.method.rollout import Branches, Continuation, detached_logprobs, read_rollouts, sample
from refine_lab.method.update import OptimizerUpdate as OptimizerUpdate
from refine_lab.method.update import StepResult as StepResult
from refine_lab.method.update import TrainState as TrainState
from refine_lab.method.update import split as split
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import Trace, hidden_states_only
from refine_lab.ops.head import TokenStats
from refine_lab.rng import Draws
from refine_lab.types import Batch, Plan, RewardFunction, RewardInputs, Rollouts, SelectionFunction
from refine_lab.workers import ALONE, Workers


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
    workers: Workers = ALONE,
) -> tuple[Rollouts, Continuation]:
    """Selects positions, rolls out from the states there, and computes rewards and advantages (eq. 5 to 12).

    `logprobs`, `selection` and `workers` are as in `places`. Returns the rollouts, which carry no gradient, and the
    policy's outputs on them, which do if gradients are enabled.
    """
    positions = places(policy, batch, entropies, logprobs, refine, draws, selection, workers)
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
        advantages=_advantages(rewards, refine),
    )


def _advantages(rewards: Float[Tensor, "R"], refine: RefineConfig) -> Float[Tensor, "R"]:
    how = {"baseline": refine.baseline, "scale_by_std": refine.scale_by_std}
    return advantages(rewards, refine.num_chunks, refine.group_size, refine.group_by, **how)


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
    config, refine = train_state.config, train_state.config.refine
    workers, several = train_state.workers, len(batch.lengths) > config.mini_batch_size
    ahead = refine is not None and refine.has_places and (several or refine.placebo)
    try:
        plan = _plan(train_state, batch, draws) if ahead else None
    except NotFinite:
        updates = len(batch.lengths) / config.mini_batch_size
        nothing = {"ntp_loss": math.nan, "grad_norm": math.nan, "skipped_updates": updates, "updates": updates}
        return StepResult(nothing, None)
    sums: dict[str, float] = defaultdict(float)
    kept: list[Rollouts] = []

    minis = [*split(batch, config.mini_batch_size)]
    for start, mini in minis:
        update = OptimizerUpdate(train_state)
        for offset, micro in split(mini, config.micro_batch_size, workers):
            row = start + offset
            part = None if plan is None else plan.rows(row, row + len(micro.lengths))
            loss, metrics, rollouts = _loss(train_state, micro, mini, draws, part)
            kept += [] if rollouts is None else [rollouts]
            update.add(loss, metrics)
        for name, value in update.apply().items():
            sums[name] += value
    skipped = sums.pop("skipped_updates", 0.0)
    metrics = {name: value / len(minis) for name, value in sums.items()}
    if skipped:
        metrics["skipped_updates"] = skipped
    drawn: dict[str, Tensor] = {}
    if plan is not None:
        drawn = {} if plan.entropy_sum is None else {"entropy_mean": plan.entropy_sum / batch.num_targets}
        kept = [] if plan.rollouts is None else [plan.rollouts]
    complete = sum(len(part.positions) for part in kept) * workers.count == len(batch.lengths) or plan is not None
    rollouts = Rollouts.cat(kept) if kept and complete else None  # a skipped update may have sampled some rows alone
    if rollouts is not None:
        rollouts = rollouts if plan is not None else _gathered(rollouts, workers)
        drawn |= _rollout_metrics(rollouts)
    return StepResult({**metrics, **floats(drawn), "updates": len(minis)}, rollouts)


def batch_gradient(train_state: TrainState, batch: Batch, draws: Draws) -> list[Tensor | None] | None:
    """Returns the gradient of the loss of one update on the whole batch, per trained parameter; None if it is not finite.

    It is that of `train_step` with one update per batch, before clipping. Neither the weights nor their `.grad` change.
    """
    refine = train_state.config.refine
    try:
        plan = _plan(train_state, batch, draws) if refine is not None and refine.placebo else None
    except NotFinite:
        return None
    parameters = [each for each in train_state.policy.parameters() if each.requires_grad]
    total: list[Tensor | None] = [None] * len(parameters)
    for row, micro in split(batch, train_state.config.micro_batch_size):
        part = None if plan is None else plan.rows(row, row + len(micro.lengths))
        loss, _, _ = _loss(train_state, micro, batch, draws, part)
        if not torch.isfinite(loss):
            return None
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        total = [
            new if old is None else old if new is None else old + new for old, new in zip(total, found, strict=True)
        ]
    return total


def _loss(
    train_state: TrainState, micro: Batch, mini: Batch, draws: Draws, plan: Plan | None
) -> tuple[Tensor, dict[str, Tensor], Rollouts | None]:
    """Returns a micro-batch's share of its update's loss; follows a `plan`, or samples new rollouts or positions."""
    policy, refine = train_state.policy, train_state.config.refine
    with train_state.autocast():
        states = refine is not None and refine.needs_states
        trace, stats = _read(policy, micro, refine, states=states, planned=plan is not None)
        ntp = ntp_loss(stats.logprobs, micro.lengths, mini.num_targets)
        correct = mask_last(stats.is_top1, micro.lengths).sum()
        metrics = {"ntp_loss": ntp.detach(), "ntp_accuracy": correct / mini.num_targets}
        if refine is None:
            return ntp, metrics, None
        entropies = _with_last(stats.entropies.detach(), micro)
        if plan is None and _needs_entropies(refine):
            metrics["entropy_mean"] = mask_last(entropies[:, :-1], micro.lengths).sum() / mini.num_targets
        if not refine.rolls_out:
            positions = None if plan is None else plan.positions
            try:
                nsp, nsp_metrics = _formula_loss(train_state, micro, mini, trace, stats, draws, positions)
            except NotFinite:
                return ntp, metrics, None
            return refine.ntp_coef * ntp + refine.nsp_coef * nsp, metrics | nsp_metrics, None
        if plan is None or plan.rollouts is None:
            assert train_state.reward is not None
            chosen = (train_state.reward, draws, stats.logprobs, train_state.selection, train_state.workers)
            try:
                rollouts, continuation = roll_out(policy, trace, entropies, micro, refine, *chosen)
            except NotFinite:
                return ntp, metrics, None
        else:
            rollouts, detach = plan.rollouts, refine.prefix_gradient == "detached"
            branches = Branches.of(trace, plan.positions, rollouts.group_size, detach=detach)
            continuation = read_rollouts(policy, branches, rollouts.tokens, refine.temperature)
        per_row = refine.num_chunks * refine.group_size * refine.rollout_length
        reference = _reference_logprobs(train_state, micro, rollouts, refine)
        nsp, nsp_metrics = rollout_loss(continuation, rollouts, refine, len(mini.lengths) * per_row, reference)
        return refine.ntp_coef * ntp + nsp, metrics | nsp_metrics, rollouts


def _read(
    policy: FastWeightLM, micro: Batch, refine: RefineConfig | None, *, states: bool, planned: bool
) -> tuple[Trace, TokenStats]:
    """Reads a micro-batch, with states if they are needed, and entropies for a selection that uses them."""
    with nullcontext() if states else hidden_states_only():
        trace = policy.read(micro.tokens, micro.lengths)
    entropy = refine is not None and not planned and _needs_entropies(refine)
    return trace, next_token_stats(policy, trace, micro, entropy=entropy)


def _needs_entropies(refine: RefineConfig) -> bool:
    """Returns whether a step computes entropies: rollouts store those of their prefixes, and a selection may use them."""
    without = ("uniform", "memory", "copy")
    return refine.rolls_out or (refine.has_places and refine.selection not in without)


def _formula_loss(
    train_state: TrainState,
    micro: Batch,
    mini: Batch,
    trace: Trace,
    stats: TokenStats,
    draws: Draws,
    positions: Int[Tensor, "B C"] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of an estimator without rollouts and its metrics; draws the positions that it needs unless given."""
    policy, refine, difference, window = train_state.policy, train_state.config.refine, None, None
    assert refine is not None
    if refine.has_places and positions is None:
        positions = _positions(train_state, micro, stats, draws)
    if refine.estimator == "longce":
        difference = long_short_difference(policy, micro, stats.logprobs, refine, draws)[:, :-1]
    if positions is not None and refine.prefix_gradient == "detached":
        window = detached_logprobs(policy, trace, micro, positions, refine.rollout_length)
    return formula_loss(stats.logprobs, micro.lengths, refine, mini, positions, difference, window)


def _positions(train_state: TrainState, batch: Batch, stats: TokenStats, draws: Draws) -> Int[Tensor, "B C"]:
    """Returns the positions from which REFINE would roll out with the same draws."""
    refine, entropies = train_state.config.refine, _with_last(stats.entropies.detach(), batch)
    assert refine is not None
    chosen = (train_state.selection, train_state.workers)
    return places(train_state.policy, batch, entropies, stats.logprobs, refine, draws, *chosen)


@torch.no_grad()
def _plan(train_state: TrainState, batch: Batch, draws: Draws) -> Plan:
    """Draws what a whole batch needs before its first update, by the policy of that moment; permutes a placebo's rewards.

    Each worker draws for its share of the rows, and all receive the plan of the whole batch.
    """
    refine, workers = train_state.config.refine, train_state.workers
    assert refine is not None
    micros = split(batch, train_state.config.micro_batch_size, workers)
    plan = _shared(Plan.cat([_planned(train_state, micro, draws) for _, micro in micros]), workers)
    if plan.rollouts is None or not refine.placebo:
        return plan
    shape = (refine.num_chunks * refine.group_size,)
    keys = draws.uniforms(batch.sequence_ids, "placebo", shape).flatten()
    rewards = permuted(plan.rollouts.rewards, to_device(keys, plan.rollouts.rewards.device))
    return replace(plan, rollouts=replace(plan.rollouts, rewards=rewards, advantages=_advantages(rewards, refine)))


def _planned(train_state: TrainState, micro: Batch, draws: Draws) -> Plan:
    """Returns a micro-batch's plan, and frees its trace."""
    policy, refine = train_state.policy, train_state.config.refine
    assert refine is not None
    with train_state.autocast():
        trace, stats = _read(policy, micro, refine, states=refine.rolls_out, planned=False)
        total = mask_last(stats.entropies, micro.lengths).sum().double() if _needs_entropies(refine) else None
        if not refine.rolls_out:
            return Plan(positions=_positions(train_state, micro, stats, draws), rollouts=None, entropy_sum=total)
        assert train_state.reward is not None
        entropies = _with_last(stats.entropies, micro)
        chosen = (train_state.reward, draws, stats.logprobs, train_state.selection, train_state.workers)
        rollouts, _ = roll_out(policy, trace, entropies, micro, refine, *chosen)
    return Plan(positions=rollouts.positions, rollouts=rollouts, entropy_sum=total)


def _shared(plan: Plan, workers: Workers) -> Plan:
    """Returns the plan of a whole batch, from that of each worker's rows."""
    rollouts = None if plan.rollouts is None else _gathered(plan.rollouts, workers)
    total = None if plan.entropy_sum is None else workers.sum(plan.entropy_sum)
    positions = workers.gather(plan.positions)
    fetch(positions)  # known already unless it comes from several workers
    return Plan(positions=positions, rollouts=rollouts, entropy_sum=total)


def _gathered(rollouts: Rollouts, workers: Workers) -> Rollouts:
    """Returns the rollouts of all workers, in the order of the batch's rows."""
    return Rollouts(**{f.name: workers.gather(getattr(rollouts, f.name)) for f in fields(rollouts)})


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


def _rollout_metrics(rollouts: Rollouts) -> dict[str, Tensor]:
    metrics = {}
    for name, values in (("reward", rollouts.rewards), ("cosine", rollouts.cosine), ("binary", rollouts.binary)):
        deviation = values.std() if len(values) > 1 else values.new_zeros(())
        metrics |= {f"{name}_mean": values.mean(), f"{name}_std": deviation}
    return metrics
