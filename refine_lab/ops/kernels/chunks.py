"""The (gated) delta rule's state through all chunks of a row in one launch, with backward pass.

    u_n = u0_n - w_n S_n,      S_{n+1} = g_n S_n + k_n^T u_n

This recurrence is the only sequential part of the rule; the rest is products over all chunks at once. A program keeps
the state of one head and a few of its columns in registers and writes it out before every chunk, so that the state
after any token is one small product away. The backward pass runs through the chunks in reverse and adds the gradient
that flows into each chunk's state. The torch reference is `_through_chunks` of `refine_lab.ops.delta_rule`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from refine_lab.ops.kernels.language import constexpr, jit, tl, triton

COLUMNS = 16
"""Columns of the state per program: few, since one row of 16 heads must fill the device."""

WARPS = 8
"""Warps per program: with fewer, or with float32 products made of several tf32 ones, registers spill (by ptxas, for sm_90)."""


@jit
def _entries(i, j, rows, columns):
    """Returns the offsets of the entries (i, j) of a [rows, columns] matrix, and which of them exist."""
    return i * columns + j, (i < rows) & (j < columns)


@jit
def _layout(length, dk, dv, L: constexpr, K: constexpr, V: constexpr):
    """Returns offsets and masks of this program's part of a state [dk, dv], of values [L, dv], of keys [L, dk] and [dk, L]."""
    i, j, m = tl.arange(0, L), tl.arange(0, K), tl.program_id(1) * V + tl.arange(0, V)
    of_state, in_state = _entries(j[:, None], m[None, :], dk, dv)
    of_value, in_value = _entries(i[:, None], m[None, :], length, dv)
    of_key, in_key = _entries(i[:, None], j[None, :], length, dk)
    of_column, in_column = _entries(i[None, :], j[:, None], length, dk)  # of the transposed keys
    return of_state, in_state, of_value, in_value, of_key, in_key, of_column, in_column


@jit
def _forward(
    first, keys, u0, w, kept, states, updates, chunks, length, dk, dv, L: constexpr, K: constexpr, V: constexpr
):
    group, groups = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    of_state, in_state, of_value, in_value, of_w, in_w, of_key, in_key = _layout(length, dk, dv, L, K, V)
    state = tl.load(first + group * dk * dv + of_state, mask=in_state, other=0.0)
    for n in range(chunks):
        at = n * groups + group
        tl.store(states + at * dk * dv + of_state, state, mask=in_state)
        w_n = tl.load(w + at * length * dk + of_w, mask=in_w, other=0.0)
        k_n = tl.load(keys + at * length * dk + of_key, mask=in_key, other=0.0)
        u = tl.load(u0 + at * length * dv + of_value, mask=in_value, other=0.0)
        u -= tl.dot(w_n, state, input_precision="tf32", out_dtype=state.dtype)
        tl.store(updates + at * length * dv + of_value, u, mask=in_value)
        if kept is not None:
            state *= tl.load(kept + at)
        state += tl.dot(k_n, u, input_precision="tf32", out_dtype=state.dtype)


@jit
def _backward(
    d_states, d_u, keys, w, kept, after, d_u0, d_first, chunks, length, dk, dv, L: constexpr, K: constexpr, V: constexpr
):
    group, groups = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    of_state, in_state, of_value, in_value, of_key, in_key, of_w, in_w = _layout(length, dk, dv, L, K, V)
    grad = tl.zeros([K, V], d_states.dtype.element_ty)  # of the state after the chunk
    for back in range(chunks):
        at = (chunks - 1 - back) * groups + group
        tl.store(after + at * dk * dv + of_state, grad, mask=in_state)
        k_n = tl.load(keys + at * length * dk + of_key, mask=in_key, other=0.0)
        w_n = tl.load(w + at * length * dk + of_w, mask=in_w, other=0.0)
        du = tl.load(d_u + at * length * dv + of_value, mask=in_value, other=0.0)
        du += tl.dot(k_n, grad, input_precision="tf32", out_dtype=grad.dtype)
        tl.store(d_u0 + at * length * dv + of_value, du, mask=in_value)
        if kept is not None:
            grad *= tl.load(kept + at)
        grad += tl.load(d_states + at * dk * dv + of_state, mask=in_state, other=0.0)
        grad -= tl.dot(w_n, du, input_precision="tf32", out_dtype=grad.dtype)
    tl.store(d_first + group * dk * dv + of_state, grad, mask=in_state)


def stages(dk: int) -> int:
    """Returns how many chunks' keys and w are in shared memory at once; with wide heads there is room for one."""
    return 2 if dk <= 128 else 1


def _launch(kernel, tensors: Sequence[Tensor | None], keys: Tensor, dv: int) -> None:
    chunks, groups, length, dk = keys.shape
    sides = [max(16, triton.next_power_of_2(size)) for size in (length, dk)]  # 16: the least that a product takes
    grid = (groups, triton.cdiv(dv, COLUMNS))
    kernel[grid](*tensors, chunks, length, dk, dv, *sides, COLUMNS, num_warps=WARPS, num_stages=stages(dk))


class _ThroughChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, keys, u0, w, kept):
        first, keys, u0, w = (x.contiguous() for x in (first, keys, u0, w))
        states, updates = first.new_empty(len(keys), *first.shape), torch.empty_like(u0)
        _launch(_forward, (first, keys, u0, w, kept, states, updates), keys, u0.shape[-1])
        ctx.save_for_backward(keys, w, kept, states, updates)
        return states, updates

    @staticmethod
    def backward(ctx, grad_states, grad_updates):
        keys, w, kept, states, updates = ctx.saved_tensors
        after, grad_u, grad_first = torch.empty_like(states), torch.empty_like(updates), torch.empty_like(states[0])
        tensors = (grad_states.contiguous(), grad_updates.contiguous(), keys, w, kept, after, grad_u, grad_first)
        _launch(_backward, tensors, keys, updates.shape[-1])
        grad_kept = None if kept is None else (states * after).sum((-1, -2))
        return grad_first, updates @ after.mT, grad_u, -grad_u @ states.mT, grad_kept


def through_chunks(
    state: Float[Tensor, "G dk dv"],
    keys: Float[Tensor, "n G L dk"],
    u0: Float[Tensor, "n G L dv"],
    w: Float[Tensor, "n G L dk"],
    kept: Sequence[Float[Tensor, "G 1 1"]] | None = None,
) -> tuple[Float[Tensor, "n G dk dv"], Float[Tensor, "n G L dv"]]:
    """Returns the state before each of n chunks and each chunk's updates u; `kept` is a chunk's total decay of its first state.

    Float32 or float64, differentiable in every argument. On CUDA, float32 products are tf32, summed in float32.
    """
    gates = None if kept is None else torch.stack(list(kept)).flatten(1)
    return _ThroughChunks.apply(state, keys, u0, w, gates)
