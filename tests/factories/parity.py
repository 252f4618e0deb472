"""What the tests of parity and others share."""

from __future__ import annotations

import torch

from refine_lab.models import FastWeightLM
from refine_lab.models.families import family

DELTA = dict(hidden_size=24, num_heads=2, num_hidden_layers=2, intermediate_size=40)
LACT = dict(hidden_size=24, num_attn_heads=3, num_lact_heads=2, num_hidden_layers=2, intermediate_size=40)
LACT |= dict(lact_chunk_size=64, window_size=48)
HYBRID = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
HYBRID |= dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)


FAMILIES: dict[str, tuple[str, dict]] = {
    "deltanet": ("delta_net", DELTA),
    "gated-deltanet": ("gated_deltanet", {**DELTA, "head_dim": 8, "num_v_heads": 4}),
    "lact": ("lact_swiglu", {**LACT, "use_momentum": False}),
    "lact-momentum": ("lact_swiglu", LACT),
    "lact-prenorm": ("lact_swiglu", {**LACT, "ttt_prenorm": True}),
    "lact-muon": ("lact_swiglu", {**LACT, "use_muon": True}),
    "lact-prenorm-muon": ("lact_swiglu", {**LACT, "ttt_prenorm": True, "use_muon": True}),
    "qwen3-next": ("qwen3_next", {**HYBRID, **EXPERTS, "head_dim": 8}),
    "qwen3.5": ("qwen3_5_text", {**HYBRID, "head_dim": 8}),
    "olmo-hybrid": ("olmo_hybrid", HYBRID),
}


def make(name: str, dtype: torch.dtype) -> FastWeightLM:
    """A small random model of a family; LaCT's fast weights move a lot within a chunk."""
    model_type, fields = FAMILIES[name]
    config_class, model_class = family(model_type)
    tokens = dict(vocab_size=53, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = model_class(config_class(**fields, **tokens, initializer_range=0.05))
    for layer in model.model.layers if model_type == "lact_swiglu" else ():
        torch.nn.init.constant_(layer.attn.lr_proj.bias, 3.0)
    return model.to(dtype).eval()
