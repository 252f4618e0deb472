"""DeltaNet (Yang et al., 2024; arXiv 2406.06484) with flash-linear-attention's configuration, modules and tensor names.

It differs from the base in `delta_layers` as follows: the state never decays, `use_beta` False fixes the write strength
at 1, and q and k may use activations and norms other than silu and l2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from refine_lab.models.backbone import BackboneLM
from refine_lab.models.configuration import whole_width
from refine_lab.models.delta_layers import DeltaRuleAttention, DeltaRuleConfig
from refine_lab.ops.precision import UNIT_EPS, wide
from refine_lab.validation import ConfigError

QK_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda y: F.elu(y) + 1,
    "identity": lambda y: y,
}
"""`qk_activation` -> the activation of q and k."""


class DeltaNetConfig(DeltaRuleConfig):
    """The fields of `fla.models.DeltaNetConfig`, with its defaults; `use_output_norm` False is not implemented and refused."""

    model_type = "delta_net"
    ALLOWED = DeltaRuleConfig.ALLOWED | {
        "use_output_norm": (True,),
        "qk_norm": ("l2", "sum"),
        "qk_activation": tuple(QK_ACTIVATIONS),
    }

    expand_k: float = 1.0
    use_beta: bool = True
    use_output_norm: bool = True
    qk_norm: str = "l2"
    qk_activation: str = "silu"

    def check(self) -> None:
        for name in ("expand_k", "expand_v"):
            width = self.hidden_size * getattr(self, name)
            if not whole_width(width) or round(width) % self.num_heads:
                field, allowed = f"hidden_size * {name}", f"a multiple of num_heads {self.num_heads}"
                product = f"{self.hidden_size} * {getattr(self, name)} = {width}"
                raise ConfigError(field, width, allowed, f"{field} must be {allowed}, got {product}")

    @property
    def key_dim(self) -> int:
        return round(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        return round(self.hidden_size * self.expand_v)


class DeltaNetAttention(DeltaRuleAttention):
    """The delta-rule layer without decay."""

    def add_gates(self, config: Any) -> None:
        if config.use_beta:
            self.b_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)

    @property
    def unit(self) -> bool:
        return self.config.qk_norm == "l2"

    @property
    def qk_silu(self) -> bool:
        return self.config.qk_activation == "silu"

    def feature(self, y: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return QK_ACTIVATIONS[self.config.qk_activation](y)

    def normalise(self, y: Float[Tensor, "B T H d"]) -> Float[Tensor, "B T H d"]:
        if self.config.qk_norm == "sum":
            return F.normalize(y.to(wide(y)), p=1, dim=-1, eps=UNIT_EPS)
        return super().normalise(y)


class DeltaNetForCausalLM(BackboneLM):
    """DeltaNet with a language-model head."""

    config_class = DeltaNetConfig
    attention = DeltaNetAttention
