"""The delta rule, parallel over chunks, with the state after any token (Yang et al., 2024; arXiv 2406.06484, section 3).

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,      o_t = S_t^T q_t

Within a chunk, S_t = S_0 + sum_{s <= t} k_s u_s^T for pseudo-values u that solve a triangular system. The forward has
S_0, k and u at hand, so the state after *any* token costs one small product and no re-reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.ops.fla_delta_rule import SegmentedStates, segmented_delta_rule

CHUNK_SIZE = 64


@dataclass(frozen=True)
class ChunkedStates:
    """What the state after any token is made of: chunk-first tensors, n chunks of L tokens, G = B * H.

    `states` [n, G, dk, dv] before each chunk, `keys` [n, G, L, dk], `updates` [n, G, L, dv].
    """

    states: Float[Tensor, "n G dk dv"]
    keys: Float[Tensor, "n G L dk"]
    updates: Float[Tensor, "n G L dv"]
    heads: int

    def at(self, positions: Int[Tensor, "B P"]) -> Float[Tensor, "B*P H dk dv"]:
        """The state after the token at each position, rows ordered (row, position)."""
        rows, targets = positions.shape
        length = self.keys.shape[2]
        group = torch.arange(rows * self.heads, device=positions.device).view(rows, 1, self.heads)
        chunk = (positions // length).unsqueeze(-1)
        index = (chunk * rows * self.heads + group).flatten()  # of (row, position, head)
        keys, updates, states = (x.flatten(0, 1).index_select(0, index) for x in (self.keys, self.updates, self.states))
        seen = torch.arange(length, device=positions.device) <= (positions % length).unsqueeze(-1)
        seen = seen.unsqueeze(2).expand(rows, targets, self.heads, length).reshape(-1, length, 1)
        states = torch.baddbmm(states, keys.transpose(1, 2), updates * seen)
        return states.view(rows * targets, self.heads, *states.shape[1:])


def delta_rule(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    beta: Float[Tensor, "B T H"],
    initial_state: Float[Tensor, "B H dk dv"] | None = None,
) -> tuple[Float[Tensor, "B T H dv"], ChunkedStates | SegmentedStates]:
    """The delta rule where it runs best: fla's kernels on CUDA where it is installed, plain torch elsewhere."""
    if q.is_cuda and find_spec("fla") is not None:
        return segmented_delta_rule(q, k, v, beta, initial_state)
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        return chunk_delta_rule(q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype), initial_state)


def chunk_delta_rule(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    beta: Float[Tensor, "B T H"],
    initial_state: Float[Tensor, "B H dk dv"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Tensor, "B T H dv"], ChunkedStates]:
    """Outputs of the delta rule and what its states are made of; q is used as it is (scale it before).

    A token with beta 0 leaves the state as it was. Differentiable in every argument. Reference:
    `fla.ops.delta_rule.naive.delta_rule_recurrence`.
    """
    batch, length, heads, dv = v.shape
    if length == 1:
        return _one_token(q, k, v, beta, initial_state)
    size = min(chunk_size, 1 << (length - 1).bit_length())  # a power of two, as the inverse asks for
    q, k, v, beta = (_chunk_first(x, size) for x in (q, k, v, beta.unsqueeze(-1)))
    # (I + tril(beta k k^T, -1)) [u0 w] = beta [v k];  u = u0 - w S
    k_beta = k * beta
    overlap = k_beta @ k.transpose(-1, -2)
    solution = UnitLowerInverse.apply(overlap.tril(-1)) @ torch.cat([v * beta, k_beta], -1)
    u0, w = solution[..., :dv], solution[..., dv:]
    state = k.new_zeros(batch * heads, k.shape[-1], dv) if initial_state is None else initial_state.flatten(0, 1).to(k)
    states, updates = [], []
    for k_n, u_n, w_n in zip(k.transpose(-1, -2).unbind(0), u0.unbind(0), w.unbind(0), strict=True):
        states.append(state)
        updates.append(torch.baddbmm(u_n, w_n, state, alpha=-1))
        state = torch.baddbmm(state, k_n, updates[-1])
    states, updates = torch.stack(states), torch.stack(updates)
    outputs = q @ states + (q @ k.transpose(-1, -2)).tril() @ updates
    outputs = outputs.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, dv)
    return outputs[:, :length], ChunkedStates(states, k, updates, heads)


def _one_token(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor | None):
    """The rule itself: the same for a chunk of one token, with a fraction of the operations; rollouts are made of it."""
    batch, _, heads, dv = v.shape
    q, k, v, beta = (x.reshape(batch * heads, 1, -1) for x in (q, k, v, beta))
    state = k.new_zeros(batch * heads, k.shape[-1], dv) if initial_state is None else initial_state.flatten(0, 1).to(k)
    update = beta * torch.baddbmm(v, k, state, alpha=-1)
    output = torch.baddbmm((q * k).sum(-1, keepdim=True) * update, q, state)
    return output.view(batch, 1, heads, dv), ChunkedStates(state[None], k[None], update[None], heads)


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 of strictly lower triangular A [..., L, L], L a power of two, in products of blocks.

    Diagonal blocks of 8 are inverted by (I - A)(I + A^2)(I + A^4), which is exact since A^8 = 0; then blocks join two by
    two: the lower left of [[P, 0], [C, Q]]^-1 is -Q^-1 C P^-1. On two cores many times quicker than one triangular solve
    a chunk when the machine is busy, and as exact: powers of at most 8 rows cannot grow far.
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
