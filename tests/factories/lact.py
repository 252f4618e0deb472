"""What the tests of lact and others share."""

from __future__ import annotations

import torch

from refine_lab.models.lact import LaCTConfig, LaCTForCausalLM

CHUNK, WINDOW = 16, 11


def make_lact(seed: int = 0, **fields) -> LaCTForCausalLM:
    """A small random model whose fast weights move a lot within a chunk."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=24, num_attn_heads=3, num_lact_heads=2, num_hidden_layers=2, intermediate_size=40)
    sizes |= dict(vocab_size=53, lact_chunk_size=CHUNK, window_size=WINDOW, initializer_range=0.2)
    policy = LaCTForCausalLM(LaCTConfig(**{**sizes, **fields})).double()
    for layer in policy.model.layers:
        torch.nn.init.constant_(layer.attn.lr_proj.bias, 3.0)
        torch.nn.init.normal_(layer.attn.qk_offset, std=0.3)
    return policy
