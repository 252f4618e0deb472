"""Whole training steps on fla's kernels under Triton's interpreter, against the torch rule in float64.

Run by tests/ops/test_triton_interpreter.py in a process of its own. The models are small: a step takes a minute or more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.method.step import StepResult, train_step
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM, FastWeightLM, delta_layers
from refine_lab.models.fla_models import FLA_MODELS, FlaLM
from refine_lab.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from refine_lab.ops import delta_rule as rule
from refine_lab.ops import fused
from refine_lab.ops.fla_delta_rule import fla_kernel, segmented_delta_rule
from refine_lab.ops.precision import autocast
from refine_lab.rng import Draws
from tests.factories.fla_models import small
from tests.factories.hybrids import make as hybrid
from tests.factories.lact import make_lact
from tests.factories.step import VOCABULARY, make_batch, train_state_for
from tests.support.triton_interpreter import install

pytestmark = pytest.mark.filterwarnings("ignore")

METHOD = RefineConfig(num_chunks=2, margin=5, rollout_length=3)
LENGTHS = (70,)

EXACT = 1e-5
"""Largest relative error of gradients on kernels in float32; measured: below 2e-6."""
ROUNDED = 3e-2
"""The same on kernels in bfloat16; measured: 1e-2."""


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    install()


def deltanet() -> FastWeightLM:
    sizes = dict(hidden_size=32, num_heads=2, num_hidden_layers=2, intermediate_size=48, vocab_size=VOCABULARY)
    return DeltaNetForCausalLM(DeltaNetConfig(**sizes, initializer_range=0.05))


def gated_deltanet() -> FastWeightLM:
    sizes = dict(hidden_size=32, head_dim=16, num_heads=1, num_v_heads=2, num_hidden_layers=2, intermediate_size=48)
    return GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**sizes, vocab_size=VOCABULARY, initializer_range=0.05))


def lact() -> FastWeightLM:
    return make_lact(1, vocab_size=VOCABULARY, initializer_range=0.05)


def in_float32(q, k, v, beta, log_gate, state, unit, scale) -> tuple[Tensor, Tensor]:
    """The gated kernel without rounding, which training never asks for: its errors are those of the algorithm."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    kernel: Any = chunk_gated_delta_rule
    settings = {"scale": scale, "use_qk_l2norm_in_kernel": unit, "output_final_state": True}
    return kernel(q, k, v, g=log_gate, beta=beta, initial_state=state, **settings)


def step_of(policy: Any, dtype: str = "float32") -> tuple[StepResult, Tensor]:
    """A step on one row, and the gradient of all parameters before clipping."""
    train_state = train_state_for(policy, METHOD, batch_size=1, mini_batch_size=1, max_grad_norm=1e9, dtype=dtype)
    result = train_step(train_state, make_batch(LENGTHS), Draws(seed=0, step=1))
    assert "skipped_updates" not in result.metrics
    return result, torch.cat([p.grad.double().flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("make", "kernel", "bound"),
    [
        pytest.param(deltanet, fla_kernel, ROUNDED, id="delta_net"),
        pytest.param(gated_deltanet, fla_kernel, ROUNDED, id="gated_deltanet-bfloat16"),
        pytest.param(gated_deltanet, in_float32, EXACT, id="gated_deltanet-float32"),
        pytest.param(partial(hybrid, "qwen3_next", torch.float32), in_float32, EXACT, id="qwen3_next"),
        pytest.param(partial(hybrid, "qwen3_5_text", torch.float32), in_float32, EXACT, id="qwen3_5"),
        pytest.param(partial(hybrid, "olmo_hybrid", torch.float32), in_float32, EXACT, id="olmo_hybrid"),
    ],
)
def test_a_step_on_the_kernels_is_that_on_the_torch_rule(make: Callable[[], FastWeightLM], kernel, bound, monkeypatch):
    torch.manual_seed(0)
    policy = make().float()
    expected, expected_gradient = step_of(copy.deepcopy(policy).double())
    calls: list[int] = []

    def counted(*inputs: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return kernel(*inputs)

    monkeypatch.setattr(rule, "serves", lambda device, gated: True)
    monkeypatch.setattr(rule, "segmented_delta_rule", partial(segmented_delta_rule, kernel=counted))
    found, gradient = step_of(policy)
    assert calls
    compare(found, gradient, expected, expected_gradient, bound)


@pytest.mark.parametrize("make", [deltanet, gated_deltanet, lact])
def test_a_step_in_bfloat16_on_all_kernels(make: Callable[[], FastWeightLM], monkeypatch):
    """Also those of norms, SwiGLU and short convolutions (see `ops.fused`)."""
    torch.manual_seed(0)
    policy = make().float()
    expected, expected_gradient = step_of(copy.deepcopy(policy).double())
    for module in (rule, fused, delta_layers):
        monkeypatch.setattr(module, "serves", lambda device, gated: True)
    calls: list[int] = []
    norm = fused.fused_rms_norm
    monkeypatch.setattr(fused, "fused_rms_norm", lambda *inputs: (calls.append(1), norm(*inputs))[1])
    found, gradient = step_of(policy, "bfloat16")
    assert calls
    compare(found, gradient, expected, expected_gradient, ROUNDED)


def compare(found: StepResult, gradient: Tensor, expected: StepResult, expected_gradient: Tensor, bound: float) -> None:
    """Asserts equal rollouts, and relative errors of gradients and losses below `bound`."""
    assert found.rollouts is not None and expected.rollouts is not None
    assert torch.equal(found.rollouts.positions, expected.rollouts.positions)
    assert torch.equal(found.rollouts.tokens, expected.rollouts.tokens)
    error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    print(f"gradients: {error:.1e}")
    assert error < bound
    for name in ("ntp_loss", "nsp_loss"):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=bound, abs=bound), name


@pytest.mark.parametrize("model_type", FLA_MODELS)
def test_a_step_of_flas_own_layers(model_type, monkeypatch):
    """Its next-token loss is that of a plain reading, and its gradient reaches all parameters."""
    monkeypatch.setattr(FlaLM, "devices", ("cpu",))
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2 if model_type in ("hgrn2", "rwkv7") else 1}  # what they share needs two
    dtype = "bfloat16" if model_type == "gated_deltaproduct" else "float32"  # it refuses float32
    plain = {"fuse_swiglu": dtype == "float32"}  # its backward pass knows autocast on CUDA alone
    policy, batch = small(model_type, vocab_size=VOCABULARY, **layers, **plain), make_batch(LENGTHS)
    with torch.no_grad(), autocast(policy.device, dtype):
        loss = float(policy(batch.tokens, labels=batch.tokens).loss)
    result, _ = step_of(policy, dtype)
    assert result.metrics["ntp_loss"] == pytest.approx(loss, rel=1e-4 if dtype == "float32" else 2e-2)
    assert not [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
