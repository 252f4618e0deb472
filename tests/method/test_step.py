"""The training step: gradients against the naive procedure, invariance of draws, no large logits."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import refine_lab.method.step as step_module
from refine_lab.config import BUILT_IN_REWARDS, RefineConfig
from refine_lab.method.losses import kl_loss
from refine_lab.method.selection import selection_probabilities
from refine_lab.method.step import next_token_stats, train_step
from refine_lab.rng import Draws
from refine_lab.types import Batch, Rollouts
from tests.factories.step import (
    EDGES,
    LENGTH,
    VOCABULARY,
    fast_gradients,
    make_batch,
    make_policy,
    relative_errors,
    train_state_for,
)
from tests.support.naive import naive_loss
from tests.support.refusals import naming

SETTINGS = [
    RefineConfig(reward=reward, group_size=n, group_by=group_by, prefix_gradient=prefix, num_chunks=5, nsp_coef=0.7)
    for reward, (n, group_by), prefix in product(
        ("cosine", "binary", "hybrid"), ((1, "sequence"), (2, "sequence"), (3, "prefix")), ("full", "detached")
    )
]


def label(refine: RefineConfig) -> str:
    return f"{refine.reward}-{refine.group_by}-n{refine.group_size}-{refine.prefix_gradient}"


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("refine", SETTINGS, ids=label)
def test_gradients_equal_those_of_re_reading_every_prefix(refine, dtype, bound):
    policy, batch = make_policy(dtype), make_batch((LENGTH, 97))
    generator = torch.Generator().manual_seed(3)
    rows = EDGES.numel() * refine.group_size
    shift = 0.6 * torch.randn(rows, refine.rollout_length, generator=generator, dtype=dtype)
    rollouts, metrics = fast_gradients(policy, batch, refine, EDGES, shift=shift)
    assert 0.02 < float(metrics["clip_fraction"]) < 0.9, "some ratios, not all, must be clipped"
    assert rollouts.advantages.abs().max() > 0.5
    reference = torch.autograd.grad(naive_loss(policy, batch, rollouts, refine), list(policy.parameters()))
    errors = relative_errors(policy, reference)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= bound, f"gradient of {worst} is off by {errors[worst]:.2e}"


@pytest.mark.parametrize("reward", BUILT_IN_REWARDS)
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_whole_step_has_the_naive_gradient(reward, micro, monkeypatch):
    refine = RefineConfig(reward=reward, num_chunks=4, margin=5, nsp_coef=0.9, temperature=0.8)
    policy, batch = make_policy(), make_batch()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    train_state = train_state_for(policy, refine, micro_batch_size=micro)
    train_state = replace(train_state, optimizers=[torch.optim.SGD(policy.parameters(), lr=0.0)])  # leaves the gradient
    result = train_step(train_state, batch, Draws(seed=5, step=1))
    reference = torch.autograd.grad(naive_loss(policy, batch, result.rollouts, refine), list(policy.parameters()))
    assert max(relative_errors(policy, reference).values()) <= 1e-9


def test_a_step_with_the_edit_reward_moves_the_weights_by_its_advantages():
    refine = RefineConfig(reward="edit", num_chunks=4, margin=5, group_size=8, nsp_coef=0.7)
    moved = []
    for changed in (refine, replace(refine, nsp_coef=0.0)):
        policy = make_policy()
        train_state = train_state_for(policy, changed)
        rollouts = train_step(train_state, make_batch(), Draws(seed=5, step=1)).rollouts
        moved.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert rollouts.rewards.unique().tolist() == pytest.approx([0.0, 0.2]), "of five tokens none or one"
    assert (rollouts.rewards >= rollouts.binary - 1e-9).all() and rollouts.advantages.abs().max() > 0.5
    assert (moved[0] - moved[1]).abs().max() > 1e-4


def rollouts_by_sequence(batch: Batch, rollouts: Rollouts) -> dict[int, tuple[Tensor, Tensor]]:
    tokens = rollouts.tokens.unflatten(0, (len(batch.lengths), -1))
    return {i: (rollouts.positions[row], tokens[row]) for row, i in enumerate(batch.sequence_ids)}


def test_neither_row_order_nor_micro_batches_nor_padding_change_a_draw():
    refine = RefineConfig(num_chunks=4, margin=5, group_size=2)
    batch = make_batch()
    order = [2, 0, 1]
    permuted = Batch(
        tokens=batch.tokens[order],
        lengths=batch.lengths[order],
        sequence_ids=tuple(batch.sequence_ids[i] for i in order),
    )
    drawn = []
    for rows, micro in ((batch, 3), (permuted, 3), (permuted, 2), (batch, 1)):
        train_state = train_state_for(make_policy(), refine, micro_batch_size=micro)
        drawn.append(rollouts_by_sequence(rows, train_step(train_state, rows, Draws(seed=5, step=1)).rollouts))
    for other in drawn[1:]:
        for sequence, (positions, tokens) in drawn[0].items():
            assert torch.equal(positions, other[sequence][0])
            assert torch.equal(tokens, other[sequence][1])


@pytest.mark.parametrize("kernel, margin, k", [(5, 20, 5), (5, 0, 2), (11, 0, 5), (41, 0, 2)])
def test_a_pad_changes_no_probability_however_wide_the_smoothing(kernel, margin, k):
    refine = RefineConfig(num_chunks=4, margin=margin, rollout_length=k, smoothing_kernel=kernel)
    policy, batch = make_policy(), make_batch()

    def probabilities(rows: Batch) -> Tensor:
        stats = next_token_stats(policy, policy.read(rows.tokens, rows.lengths), rows, entropy=True)
        return selection_probabilities(step_module._with_last(stats.entropies, rows).detach(), rows.lengths, refine)

    together = probabilities(batch)
    for row, length in enumerate(batch.lengths.tolist()):
        alone = probabilities(batch.rows(row, row + 1))
        assert torch.allclose(together[row, :length], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("refine", [None, RefineConfig(num_chunks=4, margin=5)])
def test_an_update_whose_loss_is_not_finite_changes_no_weight(refine):
    policy = make_policy()
    train_state = train_state_for(policy, refine)
    with torch.no_grad():
        policy.model.norm.weight[0] = torch.nan
    kept = policy.lm_head.weight.detach().clone()
    metrics = train_step(train_state, make_batch(), Draws(seed=0, step=1)).metrics
    assert metrics["skipped_updates"] == 1
    assert math.isnan(metrics["grad_norm"])
    assert torch.equal(policy.lm_head.weight, kept)


def test_an_update_with_one_row_that_is_not_finite_has_no_rollouts():
    policy, batch = make_policy(), make_batch()
    tokens = batch.tokens.clone()
    tokens[tokens == 0] = 1
    tokens[1, 3] = 0
    with torch.no_grad():
        policy.model.embeddings.weight[0] = torch.nan
    kept = policy.model.norm.weight.detach().clone()
    train_state = train_state_for(policy, RefineConfig(num_chunks=4, margin=5), micro_batch_size=1)
    result = train_step(train_state, replace(batch, tokens=tokens), Draws(seed=0, step=1))
    assert result.metrics["skipped_updates"] == 1 and math.isnan(result.metrics["grad_norm"])
    assert result.rollouts is None and "reward_mean" not in result.metrics
    assert torch.equal(policy.model.norm.weight, kept)


def test_several_updates_use_the_logprobs_of_the_policy_that_sampled():
    refine = RefineConfig(num_chunks=4, margin=5)
    batch = make_batch()
    train_state = train_state_for(make_policy(), refine, mini_batch_size=1, batch_size=3)
    result = train_step(train_state, batch, Draws(seed=5, step=1))
    assert result.metrics["updates"] == 3
    one = train_step(train_state_for(make_policy(), refine), batch, Draws(seed=5, step=1))
    sampled = one.rollouts
    assert torch.equal(result.rollouts.tokens, sampled.tokens), (
        "all rollouts come from the policy before the first update"
    )
    assert torch.allclose(result.rollouts.old_logprobs, sampled.old_logprobs)
    assert result.metrics.keys() == one.metrics.keys(), "either method has the same columns"
    assert result.metrics["entropy_mean"] == pytest.approx(one.metrics["entropy_mean"], rel=1e-12)
    assert abs(result.metrics["ratio_mean"] - 1) > 1e-6, "later updates move the policy away from the one that sampled"


def test_sft_and_refine_make_the_same_number_of_updates():
    batch = make_batch()
    for refine in (None, RefineConfig(num_chunks=4, margin=5)):
        result = train_step(train_state_for(make_policy(), refine, mini_batch_size=1), batch, Draws(seed=0, step=1))
        assert result.metrics["updates"] == 3


def test_kl_pulls_towards_the_reference_and_needs_one():
    refine = RefineConfig(num_chunks=4, margin=5, kl_coef=0.5)
    batch, reference = make_batch(), make_policy()
    train_state = replace(train_state_for(make_policy(), refine), reference=reference)
    assert train_step(train_state, batch, Draws(seed=0, step=1)).metrics["kl"] == pytest.approx(0, abs=1e-12)
    assert train_step(train_state, batch, Draws(seed=0, step=2)).metrics["kl"] > 1e-6
    with naming(ValueError, "kl_coef 0.5"):
        train_step(train_state_for(make_policy(), refine), batch, Draws(seed=0, step=1))


def test_kl_weighs_the_tokens_of_an_earlier_policy(monkeypatch):
    """From the second update on, tokens that the policy drew before the first count by pi / pi_old."""
    ratios = []

    def recorded(logprobs, old_logprobs, reference_logprobs, num_tokens):
        ratios.append((logprobs - old_logprobs).exp().detach())
        return kl_loss(logprobs, old_logprobs, reference_logprobs, num_tokens)

    monkeypatch.setattr("refine_lab.method.step.kl_loss", recorded)
    refine = RefineConfig(num_chunks=4, margin=5, kl_coef=0.5)
    train_state = replace(train_state_for(make_policy(), refine, mini_batch_size=1), reference=make_policy())
    train_step(train_state, make_batch(), Draws(seed=0, step=1))
    first, *later = ratios
    assert len(later) == 2 and torch.allclose(first, torch.ones_like(first))
    assert all((x - 1).abs().max() > 1e-3 for x in later)


class _LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor whose last dimension is the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.ndim and x.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, x.numel() // VOCABULARY)
        return result


def test_no_tensor_over_the_vocabulary_has_more_than_1024_rows():
    policy = make_policy(torch.float32)
    batch = make_batch((900, 800, 700))
    train_state = train_state_for(policy, RefineConfig(num_chunks=8, group_size=50))
    with _LargestLogits() as seen:
        train_step(train_state, batch, Draws(seed=0, step=1))
    assert 512 <= seen.rows <= 1024, "more rows than a slice of the head"
