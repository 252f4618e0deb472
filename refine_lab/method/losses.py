"""Losses: the clipped policy loss of the rollouts and the next-token loss of the sequence (paper, equations 2 and 10).

Every value is a sum divided by a `num_tokens` the caller gives, the tokens of a whole optimizer update: what the
micro-batches of an update return adds up to its token mean, loss and metrics alike.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound of a log-ratio before exp, verl's: an infinite ratio would turn a clipped gradient of 0 into NaN."""


def policy_loss(
    logprobs: Float[Tensor, "R K"],
    old_logprobs: Float[Tensor, "R K"],
    advantages: Float[Tensor, "R"],
    clip_eps: float,
    dual_clip: float,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The clipped policy-gradient loss (eq. 10; Schulman et al., 2017), the advantage of a rollout on all its tokens.

        ratio = pi / pi_old
        loss  = max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)),  where A < 0 at most -A dual_clip (Ye et al., 2020)

    Returns the loss and `clip_fraction` (tokens on which a clip holds, so that no gradient flows) and `ratio_mean`.
    With one update a batch the old logprobs are the logprobs themselves: the ratio is 1, the gradient that of
    -A logprob.

    Where no clip holds, the expected gradient over tokens drawn from pi_old is that of -E_pi[A] at each state, since
    E_old[pi / pi_old A grad log pi] = E_pi[A grad log pi]. The states (prefix and earlier tokens of the rollout) stay
    distributed as pi_old visits them; no product of earlier ratios corrects for them, as in PPO and GRPO.
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
    """KL(pi || pi_ref) on tokens drawn from pi_old: its value and its gradient, both without bias.

        value    = r (exp(d) - d - 1),     r = pi / pi_old,  d = log pi_ref - log pi     (Schulman's k3, weighted by r)
        gradient = r (-d) grad log pi

    The gradient is that of the weighted value with r differentiated too, since
    grad [r (e^d - d - 1)] = r grad log pi (e^d - d - 1) + r (1 - e^d) grad log pi = r (-d) grad log pi, and
    E_old[r (-d) grad log pi] = grad KL(pi || pi_ref). It is written out here because the exponentials cancel only in exact
    arithmetic. k3 alone has the gradient (1 - e^d) grad log pi, whose expectation is grad KL(pi_ref || pi), and without r
    it counts the tokens of pi_old as if pi had drawn them (DeepSeek-V3.2, arXiv 2512.02556, equation 7).
    With one update a batch r is 1, and its gradient that of log pi.

    The sum goes over the divergences at each state that a rollout visits. The states stay distributed as pi_old visits
    them: the dependence of later states on earlier tokens, which the divergence of whole rollouts has besides, is left out,
    as in GRPO. Log-ratios are held within 20, and a ratio that is held there passes no gradient.
    """
    ratio = _log_ratio(logprobs, old_logprobs.detach()).exp()
    difference = _log_ratio(reference_logprobs.detach(), logprobs.detach())
    value = ratio.detach() * (difference.exp() - difference - 1)
    surrogate = -difference * ratio
    return (value + (surrogate - surrogate.detach())).sum() / num_tokens


def entropy_loss(entropies: Float[Tensor, "R K"], num_tokens: int) -> Float[Tensor, ""]:
    """The negative mean entropy of the policy on the rollout tokens: added with a coefficient, it rewards spread.

    Each entropy is a sum over the whole vocabulary and no estimate, so that its gradient is the exact one at its state,
    whatever policy drew the tokens: no ratio belongs to it. The states stay distributed as pi_old visits them, and the
    gradient through which states the policy visits is left out.
    """
    return -entropies.sum() / num_tokens


def ntp_loss(logprobs: Float[Tensor, "B S"], lengths: Int[Tensor, "B"], num_tokens: int) -> Float[Tensor, ""]:
    """The next-token loss -log p(x_{i+1} | x_{<=i}) (eq. 2), whose sum is divided by `num_tokens`.

    `logprobs[b, i]` is that of the token at i + 1; entries from `lengths[b] - 1` on have no next token to count.
    """
    has_next = torch.arange(logprobs.shape[1], device=logprobs.device) < (lengths - 1).unsqueeze(1)
    return -torch.where(has_next, logprobs, 0).sum() / num_tokens


def _log_ratio(above: Tensor, below: Tensor) -> Tensor:
    return (above - below).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
