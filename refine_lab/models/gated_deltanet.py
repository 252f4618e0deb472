"""GatedDeltaNet (Yang et al., 2024; arXiv 2412.06464) with flash-linear-attention's configuration, modules and tensor names.

It differs from the base in `delta_layers` as follows: the state decays at every token by a data-dependent gate per
head, the head width is a field, several value heads may share a key head, and the output gate may be a sigmoid. The
recurrent state is [dk, dv] here, as for DeltaNet; flash-linear-attention's own cache stores this model's as [dv, dk].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

from refine_lab.models.backbone import BackboneLM
from refine_lab.models.configuration import whole_width
from refine_lab.models.delta_layers import DeltaRuleAttention, DeltaRuleConfig
from refine_lab.ops.delta_rule import log_decay
from refine_lab.validation import ConfigError


class GatedDeltaNetConfig(DeltaRuleConfig):
    """The fields of `fla.models.GatedDeltaNetConfig`, with its defaults."""

    model_type = "gated_deltanet"
    ALLOWED = DeltaRuleConfig.ALLOWED | {"output_gate_activation": ("swish", "silu", "sigmoid")}

    expand_v: float = 2.0
    use_gate: bool = True
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    num_hidden_layers: int = 21
    output_gate_activation: str = "swish"

    def check(self) -> None:
        self.require(self.value_heads % self.num_heads == 0, "num_v_heads", f"a multiple of num_heads {self.num_heads}")
        if not whole_width(width := self.head_dim * self.expand_v):
            sentence = f"head_dim * expand_v must be a whole number, got {self.head_dim} * {self.expand_v} = {width}"
            raise ConfigError("head_dim * expand_v", width, "a whole number", sentence)

    @property
    def key_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        return self.value_heads * round(self.head_dim * self.expand_v)

    @property
    def value_heads(self) -> int:
        return self.num_heads if self.num_v_heads is None else self.num_v_heads


class GatedDeltaNetAttention(DeltaRuleAttention):
    """The delta-rule layer with decay: log gate -exp(A_log) softplus(a_proj(x) + dt_bias)."""

    def add_gates(self, config: Any) -> None:
        width, heads = config.hidden_size, config.value_heads
        self.a_proj = nn.Linear(width, heads, bias=False)
        self.b_proj = nn.Linear(width, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def log_gate(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        return log_decay(self.a_proj(x), self.A_log, self.dt_bias)

    def output_gate(self, y: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return y.sigmoid() if self.config.output_gate_activation == "sigmoid" else F.silu(y)

    def reset_parameters(self) -> None:
        """Initialises as fla does: exp(A_log) uniform in 0..16; softplus(dt_bias) log-uniform in 0.001..0.1."""
        initialization.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(0, 16).log())
        rate = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
        initialization.copy_(self.dt_bias, rate.expm1().log())  # softplus inverted


class GatedDeltaNetForCausalLM(BackboneLM):
    """GatedDeltaNet with a language-model head."""

    config_class = GatedDeltaNetConfig
    attention = GatedDeltaNetAttention
