"""fla's fused norms, SwiGLU and short convolutions under Triton's interpreter against plain torch in float64.

Run by tests/ops/test_triton_interpreter.py in a process of its own, since TRITON_INTERPRET must be set before Triton is
imported. Inputs are rounded to the kernel's dtype first, so that the errors are those of its arithmetic.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refine_lab.models.backbone import Block
from refine_lab.models.deltanet import DeltaNetAttention, DeltaNetConfig
from refine_lab.ops import fused
from refine_lab.ops.fused import add_and_norm, head_norm, pre_norm, swiglu
from refine_lab.ops.short_conv import ConvInputs, causal_conv, fused_conv_silu
from tests.support.interpreted_fla_kernels import values_and_gradients
from tests.support.triton_interpreter import install

pytestmark = pytest.mark.filterwarnings("ignore")

HALF = 5e-3
"""Largest relative error of a tensor that is rounded to bfloat16 once; measured: at most 2.7e-3."""
FULL = 1e-6
"""Of a tensor that stays in float32; measured: at most 2.6e-8."""
EPS = 1e-5


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The kernels on the CPU, in a step in bfloat16."""
    install()
    monkeypatch.setattr(fused, "serves", lambda device, gated: True)
    with torch.autocast("cpu", torch.bfloat16):
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).double()


def normed(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=EPS)


def with_weight(norm: nn.RMSNorm, weight: Tensor) -> nn.RMSNorm:
    """The norm with a weight through which gradients flow."""
    del norm.weight
    norm.weight = weight  # type: ignore[assignment]
    return norm


def compared(found: list[Tensor], expected: list[Tensor], *bounds: float) -> None:
    for number, (a, b, bound) in enumerate(zip(found, expected, bounds, strict=True)):
        error = float((a.double() - b).norm() / b.norm())
        print(f"{number}: {error:.1e}")
        assert error < bound, (number, error)


@pytest.mark.parametrize("width", [48, 640])  # below and above 512: two kernels
def test_the_norm_before_a_layer(width):
    inputs = [normal(2, 7, width), normal(width)]

    def kernel(x, weight):
        return [pre_norm(with_weight(normed(width), weight.float()), x.float())]

    found = values_and_gradients(kernel, inputs)
    expected = values_and_gradients(lambda x, weight: [F.rms_norm(x, (width,), weight, EPS)], inputs)
    compared(found, expected, HALF, HALF, HALF)


@pytest.mark.parametrize("width", [48, 640])
def test_the_sum_with_the_residual_and_its_norm(width):
    """The gradient of the residual is not rounded to bfloat16 on its way through the block."""
    inputs = [normal(2, 7, width, dtype=torch.bfloat16), normal(2, 7, width + 1)[..., :-1], normal(width)]

    def kernel(x, residual, weight):
        norm = with_weight(normed(width), weight.float())
        return add_and_norm(norm, x.bfloat16(), residual.float().contiguous())[::-1]

    def reference(x, residual, weight):
        return residual + x, F.rms_norm(residual + x, (width,), weight, EPS)

    found, expected = values_and_gradients(kernel, inputs), values_and_gradients(reference, inputs)
    compared(found, expected, FULL, HALF, HALF, HALF, HALF)

    found = values_and_gradients(lambda *a: [kernel(*a)[0]], inputs)  # the norm is not used
    expected = values_and_gradients(lambda x, residual, weight: [residual + x + 0 * weight.sum()], inputs)
    compared(found[:3], expected[:3], FULL, HALF, FULL)


def test_the_norm_of_heads():
    inputs = [normal(2, 7, 3, 32, dtype=torch.bfloat16), normal(32)]

    def kernel(x, weight):
        y = head_norm(with_weight(normed(32), weight.float()), x.bfloat16())
        assert y.dtype == torch.bfloat16
        return [y]

    expected = values_and_gradients(lambda x, weight: [F.rms_norm(x, (32,), weight, EPS)], inputs)
    compared(values_and_gradients(kernel, inputs), expected, HALF, HALF, HALF)


def test_swiglu():
    inputs = [normal(2, 7, 48, dtype=torch.bfloat16), normal(2, 7, 49, dtype=torch.bfloat16)[..., 1:]]
    found = values_and_gradients(lambda gate, up: [swiglu(gate.bfloat16(), up.bfloat16(), lambda x: x)], inputs)
    compared(found, values_and_gradients(lambda gate, up: [F.silu(gate) * up], inputs), HALF, HALF, HALF)


def test_the_convolution_of_a_few_tokens_after_a_window():
    inputs = [normal(3, 5, 32, dtype=torch.bfloat16), normal(3, 3, 32, dtype=torch.bfloat16), normal(32, 1, 4)]

    def kernel(x, before, weight):
        return [fused_conv_silu(ConvInputs(before.bfloat16(), x.bfloat16(), 3), weight.float())]

    def reference(x, before, weight):
        return [F.silu(causal_conv(torch.cat([before, x], 1), weight))]

    expected = values_and_gradients(reference, inputs)
    compared(values_and_gradients(kernel, inputs), expected, HALF, HALF, HALF, HALF)


def test_a_block_and_its_gradients(monkeypatch):
    """The kernels round less often than the same block without them; both are compared with float64."""
    torch.manual_seed(0)
    config = DeltaNetConfig(hidden_size=32, num_hidden_layers=1, num_heads=2, intermediate_size=48, vocab_size=11)
    block, x = Block(config, DeltaNetAttention, 0), normal(2, 9, 32)

    def run(block: Block, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y, _ = block(x, ({}, {}))
        (y * normal(2, 9, 32).to(y)).sum().backward()
        gradients = [x.grad, *(p.grad for p in block.parameters())]
        return [y.detach(), *(g.double().clone() for g in gradients if g is not None)]

    fast = run(block, x.float())
    block.zero_grad()
    monkeypatch.setattr(fused, "serves", lambda device, gated: False)
    plain = run(block, x.float())
    with torch.autocast("cpu", enabled=False):
        block.zero_grad()
        exact = run(block.double(), x)
    assert len(fast) == len(plain) == len(exact) == 2 + len([*block.parameters()])
    for a, b, c in zip(fast, plain, exact, strict=True):
        assert (a - c).norm() < max(1.5 * (b - c).norm(), 1e-2 * c.norm())
