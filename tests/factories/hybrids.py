"""What the tests of hybrids and others share."""

from __future__ import annotations

import torch

from refine_lab.models import FastWeightLM
from refine_lab.models.hybrids import hybrid_family

VOCABULARY, K = 53, 5


ROPE = {"rope_type": "default", "rope_theta": 10000.0}


NO_ROPE = {"rope_type": "default", "rope_theta": None}  # as released with OLMo-Hybrid


def configuration(family: str, **fields):
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=4, initializer_range=0.05
    )
    attention = dict(num_attention_heads=4, num_key_value_heads=2)
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=16)
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    own = {"rope_parameters": NO_ROPE} if family == "olmo_hybrid" else {"head_dim": 16, "rope_parameters": ROPE}
    if family in ("qwen3_next", "qwen3_5_moe_text"):
        own |= experts
    return hybrid_family(family)[0](**{**sizes, **attention, **linear, **tokens, **own, **fields})


def make(family: str, dtype: torch.dtype = torch.float64, **fields) -> FastWeightLM:
    """A small random model; its norms' weights are random too, so that each of them is seen in the results."""
    model = hybrid_family(family)[1](configuration(family, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)
