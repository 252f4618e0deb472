"""Replacement `forward`s for transformers' hybrids: linear attention with an explicit state, and higher precision.

transformers binds fla's or causal-conv1d's kernels when a model's module is imported, whatever the device, updates the
cache in place, and computes norms and routing in float32 even for a float64 model. Each function here replaces the
`forward` of one kind of module, with the same parameters and the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers.activations import ACT2FN

from refine_lab.models.prefix_cache import PrefixRead
from refine_lab.models.writes import scaled
from refine_lab.ops.delta_rule import delta_rule, log_decay
from refine_lab.ops.precision import gated_product, unit_length, wide
from refine_lab.ops.short_conv import after_window, causal_conv, window_at

# -- linear attention ----------------------------------------------------------------------------------------------------


def gated_delta_net(
    layer: Any, hidden_states: Float[Tensor, "B T D"], cache_params: PrefixRead, **_: Any
) -> Float[Tensor, "B T D"]:
    """The gated delta rule of Qwen3-Next, Qwen3.5 and OLMo-Hybrid (Yang et al., 2024; arXiv 2412.06464).

    q, k and v pass through one short convolution; S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T.
    """
    before = cache_params.before(layer.layer_idx)
    mixed, gate, b, a = _projections(layer, hidden_states)
    size = layer.conv_kernel_size - 1
    inputs = after_window(before.get("conv_state"), mixed, size)
    mixed = ACT2FN[layer.activation](causal_conv(inputs, layer.conv1d.weight)).to(mixed.dtype)
    q, k, v = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
    q, k = (unit_length(x.unflatten(-1, (layer.num_k_heads, -1))) for x in (q, k))
    v = v.unflatten(-1, (layer.num_v_heads, -1))
    beta = scaled(layer.layer_idx, "recurrent_state", _strengths(layer, b))
    log_gate = log_decay(a, layer.A_log, layer.dt_bias)
    scale = layer.head_k_dim**-0.5
    o, states = delta_rule(q * scale, k, v, beta, before.get("recurrent_state"), log_gate=log_gate)
    cache_params.keep(layer.layer_idx, partial(_state_at, states, inputs, size))
    norm, project = (layer.norm, layer.out_proj) if hasattr(layer, "out_proj") else (layer.o_norm, layer.o_proj)
    return project(norm(o, gate.reshape(o.shape)).to(mixed.dtype).flatten(2))


def write_strengths(layer: Any, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
    """Returns beta of every token of the layer input `x`, as `DeltaRuleAttention.write_strengths`."""
    return _strengths(layer, _projections(layer, x)[2])


def log_gate(layer: Any, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
    """Returns the log of the state's decay at every token of the layer input `x`."""
    return log_decay(_projections(layer, x)[3], layer.A_log, layer.dt_bias)


def _strengths(layer: Any, b: Float[Tensor, "B T H"]) -> Float[Tensor, "B T H"]:
    return b.sigmoid() * (2 if getattr(layer, "allow_neg_eigval", False) else 1)


def _projections(layer: Any, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns q, k and v concatenated [B, T, D], and output gate, beta and decay before their activations."""
    if hasattr(layer, "in_proj_qkvz"):  # Qwen3-Next: two projections, grouped by key head
        q, k, v, gate, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
        return torch.cat([y.flatten(2) for y in (q, k, v)], -1), gate, b, a
    if hasattr(layer, "in_proj_qkv"):  # Qwen3.5
        return layer.in_proj_qkv(x), layer.in_proj_z(x), layer.in_proj_b(x), layer.in_proj_a(x)
    mixed = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], -1)  # OLMo-Hybrid
    return mixed, layer.g_proj(x), layer.b_proj(x), layer.a_proj(x)


def _state_at(states: Any, inputs: Tensor, size: int, positions: Int[Tensor, "B P"]) -> Mapping[str, Tensor]:
    return {"recurrent_state": states.at(positions), "conv_state": window_at(inputs, positions, size)}


# -- norms, feed-forward parts and routing ---------------------------------------------------------------------------------


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """OLMo's norm: x / sqrt(mean x^2 + eps) * weight."""
    return (norm.weight * _normalised(x, norm.variance_epsilon)).to(x.dtype)


def rms_norm_around_one(norm: Any, x: Tensor) -> Tensor:
    """Qwen's norm: x / sqrt(mean x^2 + eps) * (1 + weight)."""
    return (_normalised(x, norm.eps) * (1.0 + norm.weight.to(wide(x)))).to(x.dtype)


def gated_rms_norm(norm: Any, x: Tensor, gate: Tensor) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight * silu(gate)."""
    y = norm.weight * _normalised(x, norm.variance_epsilon).to(x.dtype)
    return (y * F.silu(gate.to(wide(gate)))).to(x.dtype)


def _normalised(x: Tensor, eps: float) -> Tensor:
    x = x.to(wide(x))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """down_proj(act_fn(gate_proj x) * up_proj x), with the product kept within the range of float16."""
    return gated_product(mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj, mlp.act_fn)


def top_k_router(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits [tokens, experts], and the weights and indices of the `top_k` most probable experts."""
    logits = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
    weights, experts = logits.softmax(-1, dtype=wide(logits)).topk(router.top_k, dim=-1)
    if getattr(router, "norm_topk_prob", True):  # Qwen3.5's has no such field and does it always
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights.to(logits.dtype), experts
