"""fla's kernels of the delta rule under Triton's interpreter against the torch rule in float64, forward and backward.

Run by tests/ops/test_triton_interpreter.py in a process of its own, since TRITON_INTERPRET must be set before Triton is
imported. Inputs are rounded to the kernel's dtype first, so that the errors are those of its arithmetic.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refine_lab.ops.delta_rule import chunk_delta_rule
from refine_lab.ops.fla_delta_rule import fla_kernel, segmented_delta_rule
from tests.support.triton_interpreter import install, to_bits, to_float32

pytestmark = pytest.mark.filterwarnings("ignore")  # numpy's about exp of what is masked

ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest relative error of a tensor; measured with 70 tokens: at most 1.7e-6, 9.5e-4 and 7.6e-3."""

NAMES = ("q", "k", "v", "beta", "state", "gate")


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    install()


def inputs_of(dtype: torch.dtype, length: int, key_heads: int, heads: int, dk: int, dv: int, gated: bool):
    """Random inputs of one row in float64, as the kernel reads them; states and gates are float32 there."""
    generator = torch.Generator().manual_seed(length + dk)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(length, key_heads, dk), dim=-1) for _ in range(2))
    beta, state = normal(length, heads).sigmoid(), normal(heads, dk, dv)
    beta = beta.float() if gated else beta.to(dtype)
    inputs = [(q * dk**-0.5).to(dtype), k.to(dtype), normal(length, heads, dv).to(dtype), beta, state.float()]
    inputs += [-F.softplus(normal(length, heads)).float()] if gated else []
    return [x.double() for x in inputs]


def values_and_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, the final state, and the gradients of a loss on both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    generator, values = torch.Generator().manual_seed(1), function(*leaves)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in values]
    loss = sum((x.double() * w).sum() for x, w in zip(values, weights, strict=True))
    return [*(x.detach() for x in values), *torch.autograd.grad(loss, leaves)]


def torch_rule(q, k, v, beta, state, gate=None) -> tuple[Tensor, Tensor]:
    outputs, states = chunk_delta_rule(q, k, v, beta, state, gate)
    return outputs, states.at(torch.tensor([[q.shape[1] - 1]]))


def kernel(dtype: torch.dtype):
    def call(q, k, v, beta, state, gate=None) -> tuple[Tensor, Tensor]:
        if dtype == torch.float32:  # training never asks for it; it shows that the algorithm is exact
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            ungated: Any = chunk_gated_delta_rule
            same = dict(beta=beta.float(), g=gate.float(), scale=1.0, output_final_state=True)
            return ungated(q.float(), k.float(), v.float(), **same, initial_state=state.float())
        narrow = (x.to(dtype) for x in (q, k, v))
        return fla_kernel(*narrow, beta, gate, state.float())

    return call


def compared(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for name, a, b in zip(("outputs", "final state", *NAMES), found, expected, strict=False):
        error = float((a.double() - b).norm() / b.norm())
        print(f"{name}: {error:.1e}")
        assert error < bound, (name, error)


@pytest.mark.parametrize(
    ("dtype", "gated"),
    [
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float16, True),
    ],
    ids=lambda x: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else "gated" if x else "ungated",
)
@pytest.mark.parametrize("shape", ((70, 2, 2, 16, 32), (129, 1, 2, 32, 16)), ids=("odd", "grouped"))
def test_the_delta_rule(dtype, gated, shape):
    """Lengths that fill no chunk; key heads that serve several value heads, which only the gated kernel takes."""
    length, key_heads, heads, dk, dv = shape
    inputs = inputs_of(dtype, length, key_heads if gated else heads, heads, dk, dv, gated)
    found = values_and_gradients(kernel(dtype), inputs)
    compared(found, values_and_gradients(torch_rule, inputs), ERRORS[dtype])


def test_states_inside_segments():
    """What training calls: a state inside a segment, by the kernel from the segment's beginning."""
    inputs = inputs_of(torch.bfloat16, 100, 1, 2, 16, 16, True)
    positions = torch.tensor([[0, 31, 32, 70, 99]])

    def segments(q, k, v, beta, state, gate):
        narrow = (x.to(torch.bfloat16) for x in (q, k, v))
        _, states = segmented_delta_rule(*narrow, beta, state.float(), gate, segment_size=64)
        return states.at(positions)

    def reference(q, k, v, beta, state, gate):
        return chunk_delta_rule(q, k, v, beta, state, gate)[1].at(positions)

    found, expected = segments(*inputs), reference(*inputs)
    assert float((found.double() - expected).norm() / expected.norm()) < ERRORS[torch.bfloat16]


def test_bfloat16_is_rounded_to_nearest_even():
    numbers = torch.tensor([1.0, -2.5, 3.1415926, 1e-30, 65535.0, float("inf"), 1.00390625, 1.01171875, 0.0])
    bits = to_bits(numbers.numpy())
    assert to_float32(bits).tolist() == numbers.bfloat16().float().tolist()
    assert to_float32(to_bits(torch.tensor(float("nan")).numpy())) != 0  # not a number stays none
