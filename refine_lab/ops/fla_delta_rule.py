"""The delta rule on flash-linear-attention's CUDA kernels, with the state after any token.

The kernels return the state at the end of what they read, so the sequence is read segment by segment, and the state
inside a segment is made again from the segment's own keys, values and write strengths: the layers are not re-run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SEGMENT_SIZE = 512
"""Tokens of a segment. One fixed length, so that the kernels are tuned for one shape."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q, k, v [B, T, H, d], beta [B, T, H], initial state [B, H, dk, dv]) -> outputs and final state."""


def fla_kernel(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """`fla.ops.delta_rule.chunk_delta_rule`, in bfloat16 (it rejects float32) with float32 states; outputs as `v` came."""
    from fla.ops.delta_rule import chunk_delta_rule  # binds Triton: imported where it is used, on CUDA only

    halves = (x if x.dtype == torch.float16 else x.bfloat16() for x in (q, k, v, beta))
    kernel: Any = chunk_delta_rule  # fla's decorators hide its signature
    output, state = kernel(*halves, scale=1.0, initial_state=initial_state, output_final_state=True)
    return output.to(v.dtype), state


@dataclass(frozen=True)
class SegmentedStates:
    """What the state after any token is made of: `states` [B, m, H, dk, dv] before each of m segments, keys, values, beta."""

    states: Float[Tensor, "B m H dk dv"]
    keys: Float[Tensor, "B m L H dk"]
    values: Float[Tensor, "B m L H dv"]
    beta: Float[Tensor, "B m L H"]
    kernel: Kernel

    def at(self, positions: Int[Tensor, "B P"]) -> Float[Tensor, "B*P H dk dv"]:
        """The state after the token at each position, rows ordered (row, position)."""
        segments, length = self.keys.shape[1:3]
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(-1) * segments
        index = (rows + positions // length).flatten()
        states, keys, values, beta = (
            x.flatten(0, 1).index_select(0, index) for x in (self.states, self.keys, self.values, self.beta)
        )
        unread = torch.arange(length, device=positions.device) > (positions % length).view(-1, 1)
        beta = beta.masked_fill(unread.unsqueeze(-1), 0)  # writes nothing
        return self.kernel(keys, keys, values, beta, states)[1]


def segmented_delta_rule(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    beta: Float[Tensor, "B T H"],
    initial_state: Float[Tensor, "B H dk dv"] | None = None,
    kernel: Kernel = fla_kernel,
    segment_size: int = SEGMENT_SIZE,
) -> tuple[Float[Tensor, "B T H dv"], SegmentedStates]:
    """As `ops.delta_rule.chunk_delta_rule`, on `kernel`."""
    batch, length, heads, dv = v.shape
    size = min(segment_size, length)
    padded = -length % size
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padded)).unflatten(1, (-1, size)) for x in (q, k, v))
    beta = F.pad(beta, (0, 0, 0, padded)).unflatten(1, (-1, size))
    state = q.new_zeros(batch, heads, q.shape[-1], dv, dtype=torch.float32) if initial_state is None else initial_state
    states, outputs = [], []
    for segment in zip(q.unbind(1), k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
        states.append(state)
        output, state = kernel(*segment, state)
        outputs.append(output)
    return torch.cat(outputs, 1)[:, :length], SegmentedStates(torch.stack(states, 1), k, v, beta, kernel)
