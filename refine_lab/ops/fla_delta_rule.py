"""The (gated) delta rule on flash-linear-attention's CUDA kernels, with the state after any token.

The kernels return only the state at the end of their input, so the sequence is read segment by segment. A state inside
a segment is recomputed from the segment's own keys, values, write strengths and gates, without running the layers
again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from packaging.version import Version
from torch import Tensor

SEGMENT_SIZE = 2048
"""Tokens per segment. Every segment costs the same number of kernel launches, and a state inside one reads at most this many
tokens again. fla does not tune its kernels by the number of tokens.
"""

REFUSED_FROM, REFUSED_BELOW = Version("3.4"), Version("3.7.1")
"""Versions of Triton with which fla 0.6.0 refuses the backward pass of a gate on Hopper, because its gradients are
wrong there (fla-org/flash-linear-attention issue 640, `chunk_bwd_dqkwg` in fla/ops/common/chunk_o.py).
"""

Keys = Float[Tensor, "B T Hk dk"]
Values = Float[Tensor, "B T H dv"]
Gates = Float[Tensor, "B T H"]
States = Float[Tensor, "B H dk dv"]

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, bool, float], tuple[Tensor, Tensor]]
"""(q, k, v [B, T, H, d], beta, log gate or None [B, T, H], initial state [B, H, dk, dv], unit, scale) -> outputs, final state.

With `unit`, the kernel divides q and k by their lengths; it multiplies q by `scale`.
"""


def serves(device: torch.device, *, gated: bool) -> bool:
    """Returns whether fla's kernels can compute the rule on a device: on CUDA where fla is installed.

    A gate is not served on Hopper with a Triton whose gradients are wrong (`refuses_gate`), and a warning says so the
    first time. Forward and backward passes are decided together, so that logprobs with and without gradients come from
    the same arithmetic.
    """
    if device.type != "cuda" or find_spec("fla") is None:
        return False
    if not gated or torch.version.hip is not None:  # AMD's numbers of capability are no NVIDIA generations
        return True
    version = import_module("triton").__version__
    refused = refuses_gate(torch.cuda.get_device_capability(device), version)
    if refused:
        _warn_once(version)
    return not refused


@cache
def refuses_gate(capability: tuple[int, int], triton: str) -> bool:
    """Returns whether fla refuses the backward pass of a gate for this compute capability and version of Triton."""
    return capability[0] == 9 and REFUSED_FROM <= Version(triton) < REFUSED_BELOW


@cache
def _warn_once(triton: str) -> None:
    warnings.warn(
        f"the gated delta rule runs in plain torch, slower than fla's kernel, because fla refuses that kernel's backward on "
        f"Hopper with Triton {triton}: install Triton {REFUSED_BELOW} or later",
        stacklevel=3,
    )


def fla_kernel(
    q: Keys,
    k: Keys,
    v: Values,
    beta: Gates,
    log_gate: Gates | None,
    initial_state: States,
    unit: bool = False,
    scale: float = 1.0,
) -> tuple[Values, States]:
    """Calls fla's `chunk_delta_rule` or, with a gate, `chunk_gated_delta_rule`, in bfloat16 with float32 states.

    The outputs have the dtype of `v`. The first kernel rejects float32. The second accepts it but is tuned for 16 bits;
    its gate and write strength are float32, as in fla's own layer (its recurrent kernel has no backward pass). fla's
    GatedDeltaNet uses states [dv, dk] (`state_v_first`); ours are [dk, dv], the default of both kernels.
    """
    from fla.ops.delta_rule import chunk_delta_rule  # binds Triton: imported where it is used, on CUDA only
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    half = v.dtype if v.dtype == torch.float16 else torch.bfloat16
    qkv = (x.to(half) for x in (q, k, v))
    kernel: Any = chunk_delta_rule if log_gate is None else chunk_gated_delta_rule  # without their signatures
    gates: dict[str, Any] = (
        {"beta": beta.to(half)} if log_gate is None else {"g": log_gate.float(), "beta": beta.float()}
    )
    gates |= {"scale": scale, "use_qk_l2norm_in_kernel": unit}
    output, state = kernel(*qkv, **gates, initial_state=initial_state, output_final_state=True)
    return output.to(v.dtype), state


@dataclass(frozen=True)
class SegmentedStates:
    """The tensors from which the state after any token is computed.

    `states` [B, m, H, dk, dv] holds the state before each of m segments; the other fields hold what each segment read.
    """

    states: Float[Tensor, "B m H dk dv"]
    keys: Float[Tensor, "B m L Hk dk"]
    values: Float[Tensor, "B m L H dv"]
    beta: Float[Tensor, "B m L H"]
    log_gate: Float[Tensor, "B m L H"] | None
    kernel: Kernel
    unit: bool

    def at(self, positions: Int[Tensor, "B P"]) -> Float[Tensor, "B*P H dk dv"]:
        """Returns the state after the token at each position, with rows ordered (row, position)."""
        segments, length = self.keys.shape[1:3]
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(-1) * segments
        index = (rows + positions // length).flatten()
        states, keys, values = (_rows(x, index) for x in (self.states, self.keys, self.values))
        unread = (torch.arange(length, device=positions.device) > (positions % length).view(-1, 1)).unsqueeze(-1)
        beta = _rows(self.beta, index).masked_fill(unread, 0)  # unread tokens write nothing and let nothing decay
        gate = None if self.log_gate is None else _rows(self.log_gate, index).masked_fill(unread, 0)
        return self.kernel(keys, keys, values, beta, gate, states, self.unit, 1.0)[1]


def _rows(x: Float[Tensor, "B m *rest"], index: Int[Tensor, "R"]) -> Float[Tensor, "R *rest"]:
    """Returns the segments with the given indices, counted over all rows."""
    return x.flatten(0, 1).index_select(0, index)


def segmented_delta_rule(
    q: Keys,
    k: Keys,
    v: Values,
    beta: Gates,
    initial_state: States | None = None,
    log_gate: Gates | None = None,
    kernel: Kernel = fla_kernel,
    segment_size: int = SEGMENT_SIZE,
    *,
    unit: bool = False,
    scale: float = 1.0,
) -> tuple[Values, SegmentedStates]:
    """Computes `ops.delta_rule.delta_rule` segment by segment with `kernel`."""
    batch, length, heads, dv = v.shape
    size = min(segment_size, length)

    def split(x: Tensor) -> Tensor:
        missing = -length % size  # a padding of nothing would copy
        return (F.pad(x, (*(0, 0) * (x.ndim - 2), 0, missing)) if missing else x).unflatten(1, (-1, size))

    q, k, v, beta = map(split, (q, k, v, beta))
    log_gate = None if log_gate is None else split(log_gate)
    gates = [None] * q.shape[1] if log_gate is None else log_gate.unbind(1)
    state = q.new_zeros(batch, heads, q.shape[-1], dv, dtype=torch.float32) if initial_state is None else initial_state
    states, outputs = [], []
    for segment in zip(q.unbind(1), k.unbind(1), v.unbind(1), beta.unbind(1), gates, strict=True):
        states.append(state)
        output, state = kernel(*segment, state, unit, scale)
        outputs.append(output)
    found = SegmentedStates(torch.stack(states, 1), k, v, beta, log_gate, kernel, unit)
    return torch.cat(outputs, 1)[:, :length], found
