"""Models in float16 and bfloat16 beside float32: sums that pass 65,504 or lose eight bits are taken in float32."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.factories.hybrids as hybrids
from refine_lab.models import FastWeightLM, load_model
from refine_lab.models.deltanet import DeltaNetAttention, DeltaNetConfig
from refine_lab.models.families import family
from refine_lab.models.gated_deltanet import GatedDeltaNetAttention, GatedDeltaNetConfig
from refine_lab.ops.precision import gated_product, rms_norm
from refine_lab.ops.short_conv import causal_conv

SHIPPED = ("tiny-deltanet", "tiny-lact")
HYBRIDS = ("qwen3_next", "qwen3_5_text", "olmo_hybrid")
FAST_WEIGHTS = {"recurrent_state", *(f"w{i}{kind}" for i in range(3) for kind in ("", "_sum", "_momentum"))}
SIZES = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=53)
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Of a token's hidden state after a whole model; attention whose scores grew 900-fold is the most sensitive part."""


def make(name: str) -> FastWeightLM:
    if name in SHIPPED:
        return load_model(name, device="cpu")[0]
    if name in HYBRIDS:
        return hybrids.make(name, torch.float32)
    config_class, model_class = family("gated_deltanet")
    return model_class(config_class(**SIZES, num_heads=2, head_dim=8)).eval()


def grown(model: FastWeightLM, factor: float) -> FastWeightLM:
    """The model with queries, keys and values so many times as large."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("qkv", "q_proj", "k_proj", "v_proj", "in_proj_qkv", "in_proj_qkvz"):
            assert isinstance(module, nn.Linear)
            module.weight.data *= factor
    return model


def relative(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach().float(), truth.detach().float()
    return float((value - truth).norm() / truth.norm())


def typical(states: Tensor, truth: Tensor) -> float:
    """The median over tokens: where experts are chosen by rounded numbers, a few tokens meet others."""
    return float(((states.float() - truth.float()).norm(dim=-1) / truth.float().norm(dim=-1)).median())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*SHIPPED, "gated_deltanet", *HYBRIDS])
@torch.no_grad()
def test_values_that_grow_thirty_fold_stay_finite_and_near_float32(name, dtype):
    half = grown(make(name), 30).to(dtype)
    exact = copy.deepcopy(half).float()
    tokens, more = torch.randint(50, (2, 300)), torch.randint(50, (2, 5))
    trace, truth = half.read(tokens), exact.read(tokens)
    state = trace.final_state
    pairs = [(trace, truth), (half.read(more, state=state), exact.read(more, state=truth.final_state))]
    for found, expected in pairs:
        assert found.hidden_states.dtype == dtype
        assert found.hidden_states.isfinite().all()
        assert typical(found.hidden_states, expected.hidden_states) < TOLERANCE[dtype]
    tensors = {**state.tensors, **state.shared}
    assert all(x.isfinite().all() for x in tensors.values())
    kept = [x.dtype for key, x in tensors.items() if key.partition(".")[2] in FAST_WEIGHTS]
    assert kept and set(kept) == {torch.float32}


@torch.no_grad()
def test_fast_weights_stay_finite_under_an_autocast_to_float16():
    policy, tokens = grown(make("tiny-lact"), 30), torch.randint(50, (2, 300))
    truth = policy.read(tokens)
    with torch.autocast("cpu", torch.float16):
        trace = policy.read(tokens)
    assert typical(trace.hidden_states, truth.hidden_states) < TOLERANCE[torch.float16]
    assert all(x.isfinite().all() for x in trace.final_state.shared.values())


@pytest.mark.parametrize(
    "layer",
    [
        DeltaNetAttention(DeltaNetConfig(**SIZES, num_heads=1)),
        DeltaNetAttention(DeltaNetConfig(**SIZES, num_heads=1, qk_norm="sum")),
        GatedDeltaNetAttention(GatedDeltaNetConfig(**SIZES, num_heads=1)),
    ],
    ids=["squares", "sums", "gated"],
)
def test_large_keys_keep_their_norm(layer):
    """In float16 the squares of 300, and the sum of 512 of them, are infinite, so that keys of norm 0 came out."""
    keys = torch.full((1, 1, 1, 512), 300.0)
    expected = layer.normalise(keys)
    assert torch.allclose(layer.normalise(keys.half()).float(), expected, rtol=1e-3) and expected.norm() > 0.04


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_convolution_sums_in_float32(dtype):
    x, weight = torch.tensor([4e4, 4e4, -4e4, -4e4]).view(1, 4, 1).to(dtype), torch.ones(1, 1, 4, dtype=dtype)
    assert causal_conv(x, weight).item() == 0  # 80,000 on the method
    small = torch.tensor([1.0, 1e-3, 1e-3, 1e-3]).view(1, 4, 1).to(dtype)
    found = causal_conv(small, weight)
    assert found.dtype == dtype and found.item() == small.sum(dtype=torch.float64).to(dtype).item()


def test_a_norm_takes_values_that_float16_does_not_hold():
    norm = nn.RMSNorm(4).half()
    x = torch.tensor([[1e5, -2e5, 0.0, 1e3]])
    found = rms_norm(norm, x)
    assert found.dtype == torch.float16 and torch.allclose(found.float(), norm.float()(x), rtol=1e-3)


def test_a_product_beyond_float16_goes_through_the_feed_forward_part():
    """400 * 400 is infinite in float16; what the last matrix makes of it is not."""
    down = nn.Linear(64, 8, bias=False)
    down.weight.data *= 0.01
    gate, up = torch.randn(2, 3, 64) * 400
    gate[0], up[0] = gate[0] / 400, up[0] / 400  # an ordinary token beside it
    half = copy.deepcopy(down).half()
    given = [x.half().requires_grad_() for x in (gate, up)]
    wide = [x.detach().float().requires_grad_() for x in given]
    assert (F.silu(given[0]) * given[1]).isinf().any()
    found, truth = gated_product(*given, half), gated_product(*wide, copy.deepcopy(half).float())
    assert found.dtype == torch.float16
    for ours, theirs in zip(found, truth, strict=True):  # token by token
        assert relative(ours, theirs) < 2e-3
    for ours, theirs in zip(
        torch.autograd.grad(found.float().sum(), given), torch.autograd.grad(truth.sum(), wide), strict=True
    ):
        assert relative(ours, theirs) < 2e-3
