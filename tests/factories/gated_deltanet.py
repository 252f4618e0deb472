"""What the tests of gated deltanet and others share."""

from __future__ import annotations

import torch

from refine_lab.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

SIZES = dict(hidden_size=24, num_heads=2, head_dim=8, num_hidden_layers=2, intermediate_size=40, vocab_size=53)


def make_policy(std: float = 0.2, dtype: torch.dtype = torch.float64, **fields) -> GatedDeltaNetForCausalLM:
    """A small model whose gates reach from nearly 1 to about e^-3."""
    torch.manual_seed(0)
    policy = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**SIZES, initializer_range=std, **fields)).to(dtype)
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.attn.dt_bias.copy_(torch.linspace(-4, 0, len(layer.attn.dt_bias)))
            layer.attn.A_log.copy_(torch.linspace(-1, 1.5, len(layer.attn.A_log)))
    return policy
