"""Losses: the clipped policy loss of the rollouts and the next-token loss of the sequence (paper, equations 2 and 10).

Every value is a sum divided by `num_tokens`, which the caller sets to the token count of a whole optimizer update: the
micro-batches' values add up to the update's token mean, for losses and metrics alike.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound of a log-ratio before exp, as in verl: an infinite ratio would turn a clipped gradient of 0 into NaN."""


def policy_loss(
    logprobs: Float[Tensor, "R K"],
    old_logprobs: Float[Tensor, "R K"],
    advantages: Float[Tensor, "R"],
    clip_eps: float,
    dual_clip: float,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The clipped policy-gradient loss (eq. 10; Schulman et al., 2017), with a rollout's advantage on all its tokens.

        ratio = pi / pi_old
        loss  = max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),  where A < 0 at most -A dual_clip (Ye et al., 2020)

    Returns the loss and the metrics `clip_fraction` (fraction of tokens that are clipped, so that no gradient flows) and
    `ratio_mean`. With one update per batch the old logprobs equal the logprobs: the ratio is 1, and the gradient is
    that of -A logprob.

    Without clipping, the expected gradient over tokens drawn from pi_old is that of -E_pi[A] at each state, since
    E_old[pi / pi_old A grad log pi] = E_pi[A grad log pi]. The states (prefix and earlier tokens of the rollout) remain
    distributed as under pi_old; they are not corrected by a product of earlier ratios, as in PPO and GRPO.
    """
    ratio = _log_ratio(logprobs, old_logprobs.detach()).exp()
    weights = -advantages.detach().unsqueeze(-1)
    unclipped = weights * ratio
    clipped = torch.maximum(unclipped, weights * ratio.clamp(1 - clip_eps, 1 + clip_eps))
    losses = torch.where(weights > 0, torch.minimum(clipped, weights * dual_clip), clipped)
    metrics = {
        "clip_fraction": (losses != unclipped).to(losses.dtype).detach().sum() / num_tokens,
        "ratio_mean": ratio.detach().sum() / num_tokens,
    }
    return losses.sum() / num_tokens, metrics


def kl_loss(
    logprobs: Float[Tensor, "R K"],
    old_logprobs: Float[Tensor, "R K"],
    reference_logprobs: Float[Tensor, "R K"],
    num_tokens: int,
) -> Float[Tensor, ""]:
    """KL(pi || pi_ref) on tokens drawn from pi_old, with unbiased value and gradient.

        value    = r (exp(d) - d - 1),     r = pi / pi_old,  d = log pi_ref - log pi     (Schulman's k3, weighted by r)
        gradient = r (-d) grad log pi

    The gradient is that of the weighted value with r differentiated too, since grad [r (e^d - d - 1)] = r grad log pi
    (e^d - d - 1) + r (1 - e^d) grad log pi = r (-d) grad log pi, and E_old[r (-d) grad log pi] = grad KL(pi || pi_ref).
    It is implemented explicitly because the exponentials cancel only in exact arithmetic. k3 alone has the gradient (1
    - e^d) grad log pi, whose expectation is grad KL(pi_ref || pi), and without r it treats tokens of pi_old as if pi
    had drawn them (DeepSeek-V3.2, arXiv 2512.02556, equation 7). With one update per batch r is 1, and its gradient is
    that of log pi.

    The sum runs over the divergences at each state that a rollout visits. The states remain distributed as under
    pi_old: the dependence of later states on earlier tokens, which also enters the divergence of whole rollouts, is
    left out, as in GRPO. Log-ratios are clamped to 20 in magnitude, and a clamped ratio passes no gradient.
    """
    ratio = _log_ratio(logprobs, old_logprobs.detach()).exp()
    difference = _log_ratio(reference_logprobs.detach(), logprobs.detach())
    value = ratio.detach() * (difference.exp() - difference - 1)
    surrogate = -difference * ratio
    return (value + (surrogate - surrogate.detach())).sum() / num_tokens


def entropy_loss(entropies: Float[Tensor, "R K"], num_tokens: int) -> Float[Tensor, ""]:
    """The negative mean entropy of the policy on the rollout tokens; with a positive coefficient it encourages exploration.

    Each entropy is an exact sum over the vocabulary, not an estimate, so its gradient at a state is exact whatever
    policy drew the tokens, and no ratio is needed. The states remain distributed as under pi_old, and the gradient
    through the distribution of visited states is left out.
    """
    return -entropies.sum() / num_tokens


def ntp_loss(logprobs: Float[Tensor, "B S"], lengths: Int[Tensor, "B"], num_tokens: int) -> Float[Tensor, ""]:
    """The next-token loss -log p(x_{i+1} | x_{<=i}) (eq. 2), summed and divided by `num_tokens`.

    `logprobs[b, i]` belongs to the token at i + 1; entries from `lengths[b] - 1` on have no next token and are ignored.
    """
    return -mask_last(logprobs, lengths).sum() / num_tokens


def mask_last(values: Shaped[Tensor, "B S"], lengths: Int[Tensor, "B"]) -> Shaped[Tensor, "B S"]:
    """Returns `values` with 0 at each row's last token and beyond, which have no next token."""
    has_next = torch.arange(values.shape[1], device=values.device) < (lengths - 1).unsqueeze(1)
    return torch.where(has_next, values, 0)


def _log_ratio(above: Tensor, below: Tensor) -> Tensor:
    return (above - below).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
