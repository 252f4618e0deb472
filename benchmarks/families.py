"""REFINE against SFT for every family: random models of tiny-deltanet's size, rows of 1,024 tokens, as in `step_cost`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import REPEATS, arguments, write
from benchmarks.step_cost import SHAPES, measure
from refine_lab.models import FastWeightLM
from refine_lab.models.families import family

SIZE: dict[str, Any] = dict(hidden_size=128, num_hidden_layers=4, intermediate_size=384, vocab_size=2048)
SIZE |= dict(tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None)
LACT = dict(num_attn_heads=4, num_lact_heads=2, lact_chunk_size=64, window_size=64)
LINEAR = dict(linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32)
HYBRID = LINEAR | dict(num_attention_heads=4, num_key_value_heads=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, shared_expert_intermediate_size=128)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deltanet": ("delta_net", dict(num_heads=2)),
    "gated-deltanet": ("gated_deltanet", dict(num_heads=2, head_dim=64, expand_v=1.0)),
    "gated-deltanet, values twice as wide": ("gated_deltanet", dict(num_heads=2, head_dim=64, expand_v=2.0)),
    "lact": ("lact_swiglu", LACT | dict(use_momentum=False)),
    "lact with momentum and Muon": ("lact_swiglu", LACT | dict(use_muon=True)),
    "qwen3-next": ("qwen3_next", HYBRID | EXPERTS | dict(head_dim=32)),
    "qwen3.5": ("qwen3_5_text", HYBRID | dict(head_dim=32)),
    "olmo-hybrid": ("olmo_hybrid", HYBRID),
}
"""Name -> `model_type`, and what its configuration has beside the size."""
LENGTH = 1024


def make(name: str) -> FastWeightLM:
    """A random model of that family."""
    model_type, fields = FAMILIES[name]
    config_class, model_class = family(model_type)
    torch.manual_seed(0)
    return model_class(config_class(**SIZE, **fields))


def main() -> None:
    chosen = arguments(__doc__, REPEATS, model=None)
    repeats = chosen.repeats or 7
    figures = {}
    for name in FAMILIES:
        print(name)
        figures[name] = measure(make(name), LENGTH, SHAPES[LENGTH], repeats, paper=False)
    for name, found in figures.items():
        print(f"{name:40s} REFINE / SFT {found['refine_over_sft']:.2f}")
    write(chosen.json, figures, repeats=repeats, num_chunks=8, rollout_length=5)


if __name__ == "__main__":
    main()
