"""What the tests of transformers contract and others share."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.factories.gated_deltanet import make_policy as make_gated_deltanet
from tests.factories.hybrids import make as make_hybrid
from tests.factories.lact import make_lact
from tests.factories.step import make_policy as make_deltanet

FAMILIES = {
    "delta_net": make_deltanet,
    "gated_deltanet": make_gated_deltanet,
    "lact_swiglu": make_lact,
    **{name: lambda name=name: make_hybrid(name) for name in ("qwen3_next", "qwen3_5_text", "olmo_hybrid")},
}


VOCABULARY = 53


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
