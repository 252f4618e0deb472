"""Estimators without rollouts: next-sequence losses that are functions of the next-token log-probabilities.

`logprobs[b, i]` is log p(x_{i+1} | x_{<=i}) of one forward pass, in nats. A loss is a sum divided by a count of the whole
optimizer update, as in `refine_lab.method.losses`. docs/method.md derives how these losses relate to REFINE's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.method.losses import mask_last, ntp_loss
from refine_lab.refine_config import EXPECTED_REWARDS
from refine_lab.types import Batch
from refine_lab.validation import require

LARGEST_WEIGHT = 5.0
"""gamma: the largest weight of a token in LongCE (Fang et al., arXiv 2410.23771)."""


def formula_loss(
    logprobs: Float[Tensor, "B S"],
    lengths: Int[Tensor, "B"],
    refine: RefineConfig,
    update: Batch,
    positions: Int[Tensor, "B C"] | None = None,
    difference: Float[Tensor, "B S"] | None = None,
    window: Float[Tensor, "B C K"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The next-sequence loss of `refine.estimator` on some rows of an optimizer `update`, and its metrics.

    `expected` and `weighted` use `positions`, and `longce` the long-short `difference` of every token. `window`, if given,
    replaces the log-probabilities that `following` takes from `logprobs`: the values are the same, but the gradient is
    not. The metrics are `nsp_loss` and either `target_probability`, the mean of p(next k tokens | prefix) over positions,
    or `token_weight`, the mean weight of a token.
    """
    if not refine.has_places:
        assert refine.estimator == "dft" or difference is not None
        weights = dft_weights(logprobs) if difference is None else longce_weights(difference)
        loss = token_weighted_loss(logprobs, weights, lengths, update.num_targets)
        mean = mask_last(weights, lengths).sum() / update.num_targets
        return loss, {"nsp_loss": loss.detach(), "token_weight": mean}
    if window is None:
        assert positions is not None
        window = following(logprobs, positions, refine.rollout_length)
    num_positions = len(update.lengths) * refine.num_chunks
    if refine.estimator == "expected":
        loss = expected_loss(window, refine.reward, num_positions)
    else:
        loss = weighted_loss(window, num_positions * refine.rollout_length)
    probability = expected_reward(window.detach(), "exact").sum() / num_positions
    return loss, {"nsp_loss": loss.detach(), "target_probability": probability}


def following(
    logprobs: Float[Tensor, "B S"], positions: Int[Tensor, "B C"], rollout_length: int
) -> Float[Tensor, "B C K"]:
    """log p(x_{t+j} | x_{<t+j}) for j = 1..k after each position t, [B, C, K], with the reference tokens as context."""
    index = positions.unsqueeze(-1) + torch.arange(rollout_length, device=positions.device)
    return logprobs.gather(1, index.flatten(1)).view(index.shape)


def expected_reward(logprobs: Float[Tensor, "B C K"], reward: str) -> Float[Tensor, "B C"]:
    """The expectation of a reward over rollouts at temperature 1, [B, C]; `logprobs` as `following` returns them.

        exact    prod_j p(x_{t+j} | x_{<t+j}) = p(x_{t+1..t+k} | x_{<=t})
        binary   mean_j p(x_{t+j} | x_{<t+j})

    The first is the expectation of the reward `exact`. The second is that of `binary` only for k = 1. For a longer rollout it
    is an approximation: token j is compared after the reference tokens before it, not after the rollout's own. Raises
    ConfigError for any other reward, whose expectation has no such formula.
    """
    require(reward in EXPECTED_REWARDS, "reward", reward, " or ".join(map(repr, EXPECTED_REWARDS)))
    return logprobs.sum(-1).exp() if reward == "exact" else logprobs.exp().mean(-1)


def expected_loss(logprobs: Float[Tensor, "B C K"], reward: str, num_positions: int) -> Float[Tensor, ""]:
    """-E[r] at each position, summed and divided by `num_positions`: the policy loss with neither rollouts nor variance.

    Unless `prefix_gradient` is "detached", the gradient flows through the k tokens into the whole prefix. The expected
    gradient of `policy_loss` on rollouts with the reward `exact`, leave-one-out baselines and no division by the spread
    is this one divided by k, since that loss is a mean over tokens, each of which carries the advantage of its whole
    rollout.
    """
    return -expected_reward(logprobs, reward).sum() / num_positions


def weighted_loss(logprobs: Float[Tensor, "B C K"], num_tokens: int) -> Float[Tensor, ""]:
    """-log p of each of the k tokens after each position, summed and divided by `num_tokens`.

    Added to the next-token loss of all tokens, it gives these tokens a larger weight.
    """
    return -logprobs.sum() / num_tokens


def longce_weights(difference: Float[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """min(exp(d), 5), [B, S]: the weight of each token in LongCE (Fang et al., arXiv 2410.23771). No gradient.

    d is the long-short difference: the log-probability of the token given the whole prefix minus that given only a short
    context.
    """
    return difference.detach().exp().clamp(max=LARGEST_WEIGHT)


def dft_weights(logprobs: Float[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """p, [B, S]: the weight of each token in DFT (Wu et al., arXiv 2508.05629). No gradient.

    The gradient of the weighted loss -p log p is then that of -p, since grad p = p grad log p.
    """
    return logprobs.detach().exp()


def token_weighted_loss(
    logprobs: Float[Tensor, "B S"], weights: Float[Tensor, "B S"], lengths: Int[Tensor, "B"], num_tokens: int
) -> Float[Tensor, ""]:
    """-w log p of every token that has a predecessor in its row, summed and divided by `num_tokens`.

    It takes the place of the next-token loss in LongCE and DFT, whose recipes set `ntp_coef` to 0.
    """
    return ntp_loss(weights * logprobs, lengths, num_tokens)
