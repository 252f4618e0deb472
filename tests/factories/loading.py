"""What the tests of loading and others share."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from refine_lab.data.tokenizer import train_tokenizer
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM

TEXTS = ["def f(x):\n    return x + 1\n", "the cat sat on the mat. "] * 20


SIZES = dict(hidden_size=32, num_heads=2, num_hidden_layers=2, intermediate_size=48, bos_token_id=0, eos_token_id=0)


def save_small_model(folder: Path, seed: int = 0, **fields) -> Path:
    """A checkpoint with a tokenizer, saved as any other."""
    torch.manual_seed(seed)
    config = DeltaNetConfig(
        **{**SIZES, "vocab_size": 400, "initializer_range": 0.3, "tie_word_embeddings": True, **fields}
    )
    DeltaNetForCausalLM(config).save_pretrained(folder)
    train_tokenizer(TEXTS, 400).save_pretrained(folder)
    return folder


def change(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def same_tensors(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert not [name for name, x in expected.items() if not torch.equal(found[name], x.to(found[name].dtype))]
