"""The feed-forward layer of a block, as in flash-linear-attention's models."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from refine_lab.ops.precision import gated_product


class GatedMLP(nn.Module):
    """SwiGLU of width `intermediate_size`; None: 2/3 * `hidden_ratio` * hidden size, rounded up to a multiple of 256."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        sizes: Any = config  # every family's configuration has these fields
        width, inner = sizes.hidden_size, sizes.intermediate_size
        if inner is None:
            inner = -int(width * (sizes.hidden_ratio or 4) * 2 / 3) // 256 * -256
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return gated_product(self.gate_proj(x), self.up_proj(x), self.down_proj)
