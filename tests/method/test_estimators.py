"""Estimators without rollouts: by hand, against the enumeration of all continuations, and in a whole step."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import refine_lab.method.step as step_module
from refine_lab.config import RefineConfig
from refine_lab.method.advantages import advantages
from refine_lab.method.estimators import (
    dft_weights,
    expected_loss,
    expected_reward,
    following,
    longce_weights,
    token_weighted_loss,
    weighted_loss,
)
from refine_lab.method.losses import policy_loss
from refine_lab.method.memory import long_short_difference
from refine_lab.method.step import next_token_stats, train_step
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.rng import Draws
from refine_lab.types import Batch
from tests.factories.step import make_batch, make_policy, relative_errors, train_state_for
from tests.support.refusals import refused

FEW = 5
"""Tokens of the vocabulary of which all continuations are enumerated."""
ROW = torch.tensor([[0, 3, 1, 4, 4, 2, 0, 1, 3, 3, 2, 1]])
PLACES = RefineConfig(estimator="expected", reward="exact", num_chunks=4, margin=5, nsp_coef=0.7)


def small_policy() -> DeltaNetForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_heads=2, num_hidden_layers=2, intermediate_size=24, vocab_size=FEW)
    return DeltaNetForCausalLM(DeltaNetConfig(**sizes, initializer_range=0.3)).double()


def row_logprobs(policy: DeltaNetForCausalLM, tokens: Tensor) -> Tensor:
    """log p of every token but the first, from whole logits."""
    logits = policy.lm_head(policy.read(tokens).hidden_states)[:, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def continuations(policy: DeltaNetForCausalLM, position: int, k: int) -> tuple[Tensor, Tensor]:
    """All continuations of ROW after a position, [5^k, k], and their log-probabilities by token, each read in its own row."""
    ids = torch.tensor([*product(range(FEW), repeat=k)])
    prefix = ROW[:, : position + 1].expand(len(ids), -1)
    return ids, row_logprobs(policy, torch.cat([prefix, ids], 1))[:, position:]


def gradient(value: Tensor, policy: DeltaNetForCausalLM) -> Tensor:
    found = torch.autograd.grad(value, [*policy.parameters()], retain_graph=True)
    return torch.cat([each.flatten() for each in found])


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) <= 1e-6


@pytest.mark.parametrize(("reward", "k"), [("exact", 1), ("exact", 2), ("exact", 3), ("binary", 1)])
def test_expected_is_the_mean_reward_of_all_continuations_with_its_gradient(reward, k):
    policy, position = small_policy(), 6
    ids, logprobs = continuations(policy, position, k)
    rewards = (ids == ROW[:, position + 1 : position + 1 + k]).all(-1).double()
    mean = (logprobs.sum(-1).exp() * rewards).sum()
    batch = Batch(tokens=ROW, lengths=torch.tensor([ROW.shape[1]]), sequence_ids=(0,))
    stats = next_token_stats(policy, policy.read(batch.tokens, batch.lengths), batch, entropy=False)
    window = following(stats.logprobs, torch.tensor([[position]]), k)
    loss = expected_loss(window, reward, 1)
    assert -loss.item() == pytest.approx(mean.item(), rel=1e-9)
    assert close(-gradient(loss, policy), gradient(mean, policy))


def test_the_mean_of_the_token_probabilities_is_not_the_mean_binary_reward_of_longer_rollouts():
    policy, position, k = small_policy(), 6, 2
    ids, logprobs = continuations(policy, position, k)
    rewards = (ids == ROW[:, position + 1 : position + 1 + k]).double().mean(-1)
    mean = (logprobs.sum(-1).exp() * rewards).sum().item()
    window = following(row_logprobs(policy, ROW), torch.tensor([[position]]), k)
    found = expected_reward(window, "binary").item()
    assert found == pytest.approx(window.exp().mean().item(), rel=1e-12)
    assert abs(found - mean) > 1e-3


@pytest.mark.parametrize(("baseline", "share"), [("leave_one_out", 1.0), ("mean", 0.5)])
def test_the_policy_gradient_of_all_pairs_of_rollouts_is_that_of_the_expected_reward(baseline, share):
    """Without division by the spread: exact with leave-one-out baselines; the mean of the group shrinks it by (n - 1) / n."""
    policy, position, k = small_policy(), 6, 2
    ids, logprobs = continuations(policy, position, k)
    rewards = (ids == ROW[:, position + 1 : position + 1 + k]).all(-1).double()
    pairs = torch.cartesian_prod(torch.arange(len(ids)), torch.arange(len(ids)))
    scores = advantages(rewards[pairs].flatten(), len(pairs), 2, "prefix", baseline=baseline, scale_by_std=False).view(
        -1, 2
    )
    chances = logprobs.detach().sum(-1).exp()[pairs].prod(-1)
    total = torch.zeros((), dtype=torch.float64)
    for pair, score, chance in zip(pairs, scores, chances, strict=True):
        loss, _ = policy_loss(logprobs[pair], logprobs[pair], score, 0.2, 3.0, 2 * k)
        total = total + chance * loss
    mean = (logprobs.sum(-1).exp() * rewards).sum()
    assert close(-gradient(total, policy) * k, share * gradient(mean, policy))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_division_by_the_spread_follows_twice_the_arcsine_of_the_root(probability):
    """k = 1, binary reward, p = sigmoid(z): the expectation over the number of hits of a group of n, for n = 40 and 400."""
    p, errors = torch.tensor(probability, dtype=torch.float64), []
    for n in (40, 400):
        hits = torch.arange(n + 1, dtype=torch.float64)
        rewards = (torch.arange(n) < hits.unsqueeze(1)).double()
        scores = advantages(rewards.flatten(), n + 1, n, "prefix").view(n + 1, n)
        chances = torch.distributions.Binomial(n, p).log_prob(hits).exp()
        slopes = torch.where(rewards > 0, 1 - p, -p)  # d log pi(drawn token) / dz
        found = float((chances * (scores * slopes).mean(1)).sum())
        z = torch.logit(p).requires_grad_()
        (slope,) = torch.autograd.grad(2 * z.sigmoid().sqrt().arcsin(), z)
        errors.append(abs(found / float(slope) - 1))
    assert errors[1] < 0.005 and errors[1] < errors[0] / 5


def test_following_takes_the_k_tokens_after_each_position():
    logprobs = -torch.arange(20.0).view(2, 10)
    found = following(logprobs, torch.tensor([[0, 7], [2, 3]]), 3)
    assert found.tolist() == [[[0, -1, -2], [-7, -8, -9]], [[-12, -13, -14], [-13, -14, -15]]]


def test_losses_by_hand():
    window = torch.tensor([[[0.5, 0.2], [0.9, 0.1]]]).log()
    assert expected_reward(window, "exact").tolist() == [pytest.approx([0.1, 0.09])]
    assert expected_reward(window, "binary").tolist() == [pytest.approx([0.35, 0.5])]
    assert float(expected_loss(window, "exact", 2)) == pytest.approx(-0.095)
    assert float(weighted_loss(window, 4)) == pytest.approx(-math.log(0.5 * 0.2 * 0.9 * 0.1) / 4)
    with refused("reward", "cosine", "'exact' or 'binary'"):
        expected_reward(window, "cosine")


def test_weights_of_tokens_by_hand():
    assert longce_weights(torch.tensor([[0.0, 1.0, 3.0]])).tolist() == [pytest.approx([1, math.e, 5])]
    logprobs = torch.tensor([[0.5, 0.2, 0.3]]).log().requires_grad_()
    loss = token_weighted_loss(logprobs, dft_weights(logprobs), torch.tensor([3]), 2)  # the third has no next token
    assert loss.item() == pytest.approx(-(0.5 * math.log(0.5) + 0.2 * math.log(0.2)) / 2)
    (slope,) = torch.autograd.grad(loss, logprobs)
    assert slope.tolist() == [pytest.approx([-0.25, -0.1, 0])], "the gradient of -p / 2 with respect to log p"


def unclipped_gradients(refine: RefineConfig, micro: int, monkeypatch, batch: Batch | None = None):
    """A step that leaves its gradient: the policy and the step's result."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    policy = make_policy()
    state = train_state_for(policy, refine, micro_batch_size=micro)
    state = replace(state, optimizers=[torch.optim.SGD(policy.parameters(), lr=0.0)])
    return policy, train_step(state, batch or make_batch(), Draws(seed=5, step=1))


def naive(policy: DeltaNetForCausalLM, batch: Batch, positions: Tensor, refine: RefineConfig) -> Tensor:
    """ntp_coef * NTP + nsp_coef * the estimator's loss, one row after the other, with whole logits."""
    ntp, nsp = torch.zeros(()), torch.zeros(())
    for row, (tokens, length) in enumerate(zip(batch.tokens, batch.lengths.tolist(), strict=True)):
        logprobs = row_logprobs(policy, tokens[None, :length])[0]
        ntp = ntp - logprobs.sum() / batch.num_targets
        if refine.estimator == "dft":
            nsp = nsp - (logprobs.exp().detach() * logprobs).sum() / batch.num_targets
            continue
        for position in positions[row].tolist():
            window = logprobs[position : position + refine.rollout_length]
            expected = {"exact": window.sum().exp(), "binary": window.exp().mean()}
            value = expected[refine.reward] if refine.estimator == "expected" else window.mean()
            nsp = nsp - value / positions.numel()
    return refine.ntp_coef * ntp + refine.nsp_coef * nsp


ESTIMATORS = [
    PLACES,
    replace(PLACES, reward="binary", selection="uniform"),
    replace(PLACES, estimator="weighted", selection="argmax"),
    replace(PLACES, estimator="dft", ntp_coef=0.0),
]


@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("refine", ESTIMATORS, ids=lambda refine: f"{refine.estimator}-{refine.reward}")
def test_a_step_has_the_naive_gradient_at_the_places_of_refine(refine, micro, monkeypatch):
    """The places are those that rollouts start from with the same draws, whatever the micro-batches."""
    sampled = replace(refine, estimator="rollouts", reward="binary", ntp_coef=1.0)
    positions = unclipped_gradients(sampled, 3, monkeypatch)[1].rollouts.positions
    policy, result = unclipped_gradients(refine, micro, monkeypatch)
    assert result.rollouts is None
    reference = torch.autograd.grad(naive(policy, make_batch(), positions, refine), list(policy.parameters()))
    assert max(relative_errors(policy, reference).values()) <= 1e-9


@pytest.mark.parametrize("micro", [1, 3])
def test_longce_weighs_every_token_by_the_long_short_difference(micro, monkeypatch):
    """Only tokens outside the first segment have a difference; all others have the weight 1."""
    refine = RefineConfig(estimator="longce", ntp_coef=0.0, nsp_coef=1.0, window=16)
    policy, result = unclipped_gradients(refine, micro, monkeypatch)
    batch = make_batch()
    stats = next_token_stats(policy, policy.read(batch.tokens, batch.lengths), batch, entropy=False)
    difference = long_short_difference(policy, batch, stats.logprobs, refine, Draws(seed=5, step=1))[:, :-1]
    weights = difference.exp().clamp(max=5)
    assert weights.max() > 1.01 and (weights == 1).any()
    loss = token_weighted_loss(stats.logprobs, weights, batch.lengths, batch.num_targets)
    reference = torch.autograd.grad(loss, list(policy.parameters()))
    assert max(relative_errors(policy, reference).values()) <= 1e-9
    assert result.metrics["nsp_loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert 1 < result.metrics["token_weight"] < 5 and result.rollouts is None


@pytest.mark.parametrize("selection", ["memory", "copy"])
def test_places_by_memory_and_by_copies_are_those_of_refine_and_need_no_entropies(selection, monkeypatch):
    refine = replace(PLACES, selection=selection, window=16)
    sampled = replace(refine, estimator="rollouts")
    positions = unclipped_gradients(sampled, 3, monkeypatch)[1].rollouts.positions
    policy, result = unclipped_gradients(refine, 1, monkeypatch)
    reference = torch.autograd.grad(naive(policy, make_batch(), positions, refine), list(policy.parameters()))
    assert max(relative_errors(policy, reference).values()) <= 1e-9
    assert "entropy_mean" not in result.metrics


def test_metrics_are_those_of_the_places(monkeypatch):
    sampled = unclipped_gradients(replace(PLACES, estimator="rollouts"), 3, monkeypatch)[1].rollouts
    for micro, refine in product((1, 3), (PLACES, replace(PLACES, estimator="weighted"))):
        policy, result = unclipped_gradients(refine, micro, monkeypatch)
        batch = make_batch()
        stats = next_token_stats(policy, policy.read(batch.tokens, batch.lengths), batch, entropy=False)
        window = following(stats.logprobs.detach(), sampled.positions, refine.rollout_length)
        probability = float(window.sum(-1).exp().mean())
        assert result.metrics["target_probability"] == pytest.approx(probability, rel=1e-9)
        loss = -probability if refine.estimator == "expected" else -float(window.mean())
        assert result.metrics["nsp_loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("refine", [PLACES, replace(PLACES, estimator="weighted")], ids=lambda refine: refine.estimator)
def test_a_detached_prefix_leaves_the_loss_and_the_gradient_of_the_k_tokens_alone(refine, micro, monkeypatch):
    """The reference reads each prefix by itself, stops the gradient there, and reads the k tokens one row at a time."""
    refine = replace(refine, prefix_gradient="detached", ntp_coef=0.0)
    positions = unclipped_gradients(replace(refine, estimator="rollouts"), 3, monkeypatch)[1].rollouts.positions
    policy, result = unclipped_gradients(refine, micro, monkeypatch)
    batch, loss, k = make_batch(), torch.zeros(()), refine.rollout_length
    for row, position in ((number, int(t)) for number in range(len(positions)) for t in positions[number]):
        with torch.no_grad():
            prefix = policy.read(batch.tokens[row : row + 1, : position + 1])
        tokens = batch.tokens[row : row + 1, position + 1 : position + 1 + k]
        read = policy.read(tokens, state=prefix.final_state).hidden_states
        before = torch.cat([prefix.hidden_states[:, -1:], read[:, :-1]], 1)
        window = policy.head(before, tokens).logprobs
        value = window.sum().exp() if refine.estimator == "expected" else window.mean()
        loss = loss - refine.nsp_coef * value / positions.numel()
    reference = torch.autograd.grad(loss, list(policy.parameters()))
    assert max(relative_errors(policy, reference).values()) <= 1e-9
    full = unclipped_gradients(replace(refine, prefix_gradient="full"), micro, monkeypatch)
    assert max(relative_errors(full[0], reference).values()) > 1e-3
    for name, value in result.metrics.items():
        assert name == "grad_norm" or value == pytest.approx(full[1].metrics[name], rel=1e-9)


def test_several_updates_use_the_places_of_the_policy_before_the_first(monkeypatch):
    used = []

    def recorded(logprobs, lengths, refine, update, positions, *more):
        used.append(positions)
        return formula_loss(logprobs, lengths, refine, update, positions, *more)

    formula_loss = step_module.formula_loss
    monkeypatch.setattr(step_module, "formula_loss", recorded)
    batch = make_batch()
    result = train_step(train_state_for(make_policy(), PLACES, mini_batch_size=1), batch, Draws(seed=5, step=1))
    sampled = replace(PLACES, estimator="rollouts")
    one = train_step(train_state_for(make_policy(), sampled), batch, Draws(seed=5, step=1))
    assert torch.equal(torch.cat(used), one.rollouts.positions)
    assert (result.metrics["updates"], result.rollouts) == (3, None)
    assert result.metrics["entropy_mean"] == pytest.approx(one.metrics["entropy_mean"], rel=1e-12)


def test_a_step_raises_the_probability_of_what_it_is_trained_on():
    refine = replace(PLACES, ntp_coef=0.0, nsp_coef=1.0, selection="uniform", rollout_length=1)
    state = train_state_for(make_policy(), refine)
    found = [train_step(state, make_batch(), Draws(seed=5, step=1)).metrics["target_probability"] for _ in range(8)]
    assert found[-1] > 3 * found[0]
