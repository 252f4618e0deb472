"""The (gated) delta rule, parallel over chunks, with the state after any token.

    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,      o_t = S_t^T q_t

The gate a_t = exp(log_gate_t) in (0, 1] is one number per head: the stored state decays, then the token writes (Yang et
al., 2024; arXiv 2412.06464, equation 10). Without a gate (a = 1) it is the delta rule (arXiv 2406.06484, section 3).

Within a chunk, S_t = e^{G_t} S_0 + sum_{s <= t} e^{G_t - G_s} k_s u_s^T, where G is the running sum of the log gates
and the pseudo-values u solve a triangular system. The forward pass already has S_0, k, u and G, so the state after
*any* token costs one small product and no re-reading. Every exponent is a sum of log gates over some tokens and hence
at most 0: a strong decay underflows to 0 and never overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refine_lab.ops.fla_delta_rule import Gates, Keys, SegmentedStates, States, Values, segmented_delta_rule, serves
from refine_lab.ops.kernels import chosen
from refine_lab.ops.precision import unit_length, wide

CHUNK_SIZE = 64

SHORT = 16
"""Up to this many tokens, CUDA uses plain torch too: fla's kernels pad to 64 tokens and round to bfloat16 (not measured)."""


@dataclass(frozen=True)
class ChunkedStates:
    """The tensors from which the state after any token is computed: chunk-first, n chunks of L tokens, G = B * H.

    `states` [n, G, dk, dv] before each chunk, `keys` [n, G, L, dk], `updates` [n, G, L, dv], and `decay` [n, G, L]: the
    log gates summed from the chunk's first token on, or None without a gate.
    """

    states: Float[Tensor, "n G dk dv"]
    keys: Float[Tensor, "n G L dk"]
    updates: Float[Tensor, "n G L dv"]
    heads: int
    decay: Float[Tensor, "n G L"] | None = None

    def at(self, positions: Int[Tensor, "B P"]) -> Float[Tensor, "B*P H dk dv"]:
        """Returns the state after the token at each position, with rows ordered (row, position)."""
        rows, targets = positions.shape
        length = self.keys.shape[2]
        group = torch.arange(rows * self.heads, device=positions.device).view(rows, 1, self.heads)
        chunk = (positions // length).unsqueeze(-1)
        index = (chunk * rows * self.heads + group).flatten()  # of (row, position, head)
        keys, updates, states = (x.flatten(0, 1).index_select(0, index) for x in (self.keys, self.updates, self.states))
        last = (positions % length).unsqueeze(-1)
        seen = torch.arange(length, device=positions.device) <= last
        seen = seen.unsqueeze(2).expand(rows, targets, self.heads, length).reshape(-1, length, 1)
        if self.decay is None:
            weight = seen
        else:
            decay = self.decay.flatten(0, 1).index_select(0, index)
            until = decay.gather(1, last.expand(-1, -1, self.heads).reshape(-1, 1))
            weight = _exp((until - decay).unsqueeze(-1), seen, states.dtype)
            states = states * until.exp().to(states.dtype).unsqueeze(-1)
        with torch.autocast(states.device.type, enabled=False):  # a state stays in float32
            states = torch.baddbmm(states, keys.transpose(1, 2), updates * weight)
        return states.view(rows * targets, self.heads, *states.shape[1:])


def log_decay(
    a: Float[Tensor, "B T H"], a_log: Float[Tensor, "H"], dt_bias: Float[Tensor, "H"]
) -> Float[Tensor, "B T H"]:
    """Returns GatedDeltaNet's log gate, -exp(a_log) softplus(a + dt_bias), in at least float32 whatever the weights' dtype."""
    a, a_log, dt_bias = (x.to(wide(a)) for x in (a, a_log, dt_bias))
    return -a_log.exp() * F.softplus(a + dt_bias)


def delta_rule(
    q: Keys,
    k: Keys,
    v: Values,
    beta: Gates,
    initial_state: States | None = None,
    log_gate: Gates | None = None,
    *,
    unit: bool = False,
    scale: float = 1.0,
) -> tuple[Values, ChunkedStates | SegmentedStates]:
    """Computes the rule with fla's kernels where they can run (`fla_delta_rule.serves`), and in plain torch elsewhere.

    With `unit`, q and k are divided by their lengths (`unit_length`), in fla's kernels without a copy in float32. q is
    then multiplied by `scale`.
    """
    short = q.shape[1] <= SHORT or chosen("chunks", q)
    if not short and serves(q.device, gated=log_gate is not None):
        return segmented_delta_rule(q, k, v, beta, initial_state, log_gate, unit=unit, scale=scale)
    with torch.autocast(q.device.type, enabled=False):
        q, k = (unit_length(q), unit_length(k)) if unit else (q, k)
        q, k, v, beta = (x.to(wide(q)) for x in (q if scale == 1.0 else q * scale, k, v, beta))
        return chunk_delta_rule(q, k, v, beta, initial_state, log_gate)


def chunk_delta_rule(
    q: Keys, k: Keys, v: Values, beta: Gates, initial_state: States | None = None, log_gate: Gates | None = None
) -> tuple[Values, ChunkedStates]:
    """Returns the outputs of the (gated) delta rule and the tensors its states are computed from; scale q before the call.

    `log_gate` is at most 0; None means no gate and costs nothing. A token with beta 0 and log gate 0 leaves the state
    unchanged. If there are more value heads than key heads, H must be a multiple of Hk, and each key head serves H / Hk
    consecutive value heads. Differentiable in every argument. References: `fla.ops.delta_rule.naive`,
    `fla.ops.gated_delta_rule.naive`.
    """
    batch, length, heads, dv = v.shape
    if q.shape[2] != heads:
        q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    if length == 1:
        return _one_token(q, k, v, beta, initial_state, log_gate)
    size = min(CHUNK_SIZE, 1 << (length - 1).bit_length())  # a power of two, as the inverse asks for
    q, k, v, beta = (_chunk_first(x, size) for x in (q, k, v, beta.unsqueeze(-1)))
    decay = None
    state = k.new_zeros(batch * heads, k.shape[-1], dv) if initial_state is None else initial_state.flatten(0, 1).to(k)
    # (I + tril(beta k k^T, -1)) [u0 w] = beta [v k];  u = u0 - w S;  o = q S + tril(q k^T) u;  S' = S + k^T u
    k_beta = k * beta
    overlap, scores = k_beta @ k.transpose(-1, -2), q @ k.transpose(-1, -2)
    reading, writing, kept = k_beta, k, None
    if log_gate is None:
        scores = scores.tril()
    else:  # every product of two tokens decays from one to the other, every S from the chunk's start
        # in float64: the decay between two near tokens is a small difference of large sums
        decay = _chunk_first(log_gate.double().unsqueeze(-1), size).squeeze(-1).cumsum(-1)
        between, since = DecayBetween.apply(decay, k.dtype), decay.to(k.dtype).exp().unsqueeze(-1)
        overlap, scores = overlap * between, scores * between
        q, reading, writing = q * since, k_beta * since, k * between[..., -1, :].unsqueeze(-1)
        kept = since[:, :, -1:].unbind(0)
    solution = UnitLowerInverse.apply(overlap.tril(-1)) @ torch.cat([v * beta, reading], -1)
    states, updates = _through_chunks(state, writing, solution[..., :dv], solution[..., dv:], kept)
    outputs = q @ states + scores @ updates
    outputs = outputs.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, dv)
    return outputs[:, :length], ChunkedStates(states, k, updates, heads, decay)


def _through_chunks(
    state: Float[Tensor, "G dk dv"],
    keys: Float[Tensor, "n G L dk"],
    u0: Float[Tensor, "n G L dv"],
    w: Float[Tensor, "n G L dk"],
    kept: Sequence[Tensor] | None,
) -> tuple[Float[Tensor, "n G dk dv"], Float[Tensor, "n G L dv"]]:
    """Returns the state before each chunk and each chunk's u; `kept` [G, 1, 1] is a chunk's decay of its first state."""
    if chosen("chunks", keys):
        from refine_lab.ops.kernels.chunks import through_chunks  # binds Triton

        return through_chunks(state, keys, u0, w, kept)
    states, updates = [], []
    for n, (k_n, u_n, w_n) in enumerate(zip(keys.transpose(-1, -2).unbind(0), u0.unbind(0), w.unbind(0), strict=True)):
        states.append(state)
        updates.append(torch.baddbmm(u_n, w_n, state, alpha=-1))
        state = torch.baddbmm(state if kept is None else state * kept[n], k_n, updates[-1])
    return torch.stack(states), torch.stack(updates)


def _one_token(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor | None, log_gate: Tensor | None):
    """Applies the rule to one token, with a fraction of the operations of a chunk; rollouts consist of such steps."""
    batch, _, heads, dv = v.shape
    q, k, v, beta = (x.reshape(batch * heads, 1, -1) for x in (q, k, v, beta))
    state = k.new_zeros(batch * heads, k.shape[-1], dv) if initial_state is None else initial_state.flatten(0, 1).to(k)
    if log_gate is not None:
        state = state * log_gate.to(k.dtype).exp().view(-1, 1, 1)
    update = beta * torch.baddbmm(v, k, state, alpha=-1)
    output = torch.baddbmm((q * k).sum(-1, keepdim=True) * update, q, state)
    return output.view(batch, 1, heads, dv), ChunkedStates(state[None], k[None], update[None], heads)


class DecayBetween(torch.autograd.Function):
    """exp(G_t - G_s) for s <= t and 0 elsewhere, [n, G, L, L]; stores only one such tensor, at half of autograd's cost."""

    @staticmethod
    def forward(ctx, decay, dtype):
        ordered = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device).tril()
        between = _exp(decay.unsqueeze(-1) - decay.unsqueeze(-2), ordered, dtype)
        ctx.save_for_backward(between)
        return between

    @staticmethod
    def backward(ctx, grad):
        (between,) = ctx.saved_tensors
        grad = grad * between
        grad.diagonal(dim1=-2, dim2=-1).zero_()  # G_t - G_t is 0 for any gate: only noise, and the largest of all
        return grad.sum(-1, dtype=torch.float64) - grad.sum(-2, dtype=torch.float64), None


def _exp(exponents: Float[Tensor, "*shape"], where: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Returns exp where the mask is true, else 0; masks before exp, since it may overflow and 0 * inf has no gradient."""
    return exponents.masked_fill(~where, float("-inf")).to(dtype).exp()


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 of a strictly lower triangular A [..., L, L], L a power of two, by products of blocks.

    Diagonal blocks of 8 are inverted by (I - A)(I + A^2)(I + A^4), which is exact since A^8 = 0; blocks are then joined
    in pairs: the lower left of [[P, 0], [C, Q]]^-1 is -Q^-1 C P^-1. On a busy two-core machine this is many times
    faster than one triangular solve per chunk, and equally exact: powers of at most 8 rows cannot grow far.
    """

    @staticmethod
    def forward(ctx, lower):
        size = lower.shape[-1]
        width = min(8, size)
        a = _diagonal_blocks(lower, width)
        a2 = a @ a
        identity = torch.eye(width, dtype=a.dtype, device=a.device)
        inverse = (identity - a) @ (identity + a2) @ (identity + a2 @ a2)
        while width < size:
            corner = _diagonal_blocks(lower, 2 * width)[..., width:, :width]
            upper, under = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
            joined = lower.new_zeros(*corner.shape[:-2], 2 * width, 2 * width)
            joined[..., :width, :width], joined[..., width:, width:] = upper, under
            joined[..., width:, :width] = -under @ corner @ upper
            inverse, width = joined, 2 * width
        inverse = inverse.squeeze(-3)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ grad @ transposed).tril(-1)


def _diagonal_blocks(x: Float[Tensor, "*rows L L"], width: int) -> Float[Tensor, "*rows blocks width width"]:
    blocks = x.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))  # [..., block, row, block, column]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _chunk_first(x: Float[Tensor, "B T H d"], size: int) -> Float[Tensor, "n B*H L d"]:
    batch, length, heads, width = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -length % size))
    x = x.view(batch, -1, size, heads, width).permute(1, 0, 3, 2, 4).reshape(-1, batch * heads, size, width)
    return x.contiguous()  # also for one row, where it is a view: `at` would copy all of it to take a chunk
