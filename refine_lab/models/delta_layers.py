"""The base of DeltaNet and GatedDeltaNet: configuration fields and layer.

Modules and tensors are named as in flash-linear-attention. A family defines a layer, a `DeltaRuleAttention` with its
own projections and gates, and the configuration that sets the widths of keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from refine_lab.models.configuration import FastWeightConfig
from refine_lab.models.state import Layer, kept
from refine_lab.models.writes import scaled
from refine_lab.ops.delta_rule import delta_rule
from refine_lab.ops.fla_delta_rule import serves
from refine_lab.ops.fused import head_norm
from refine_lab.ops.precision import unit_length
from refine_lab.ops.short_conv import ConvInputs, causal_conv, fused_conv_silu


class DeltaRuleConfig(FastWeightConfig):
    """The fields that flash-linear-attention's two configurations have in common, with their shared defaults.

    `fuse_*` and `attn_mode` select among kernels of equal results there and have no effect here. Fields that would
    change the result but are not implemented are refused by name: `attn`, `attnres_block_size`, `use_l2warp`, and
    `hidden_act` other than swish. A family defines `key_dim` and `value_dim`, the widths of k and v over all heads.
    """

    ALLOWED = FastWeightConfig.ALLOWED | {
        "attn_mode": ("chunk", "fused_recurrent"),
        "attn": (None,),
        "attnres_block_size": (None,),
        "use_l2warp": (False,),
    }

    attn_mode: str = "chunk"
    expand_v: float = 1.0
    use_gate: bool = False
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    num_heads: int = 16
    attn: Any = None
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    attnres_block_size: int | None = None

    @property
    def value_heads(self) -> int:
        return self.num_heads


class ShortConvolution(nn.Module):
    """A depthwise causal convolution over `width` tokens, without bias."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B T D"]:
        return causal_conv(x, self.weight)


class DeltaRuleAttention(nn.Module):
    """One fast-weight layer: q, k, v through short convolutions, the (gated) delta rule, an output norm and gate.

    A family defines `add_gates`, and overrides `log_gate`, `feature`, `normalise` and `output_gate` if its decay,
    activations and norms differ.
    """

    STATE = frozenset({"recurrent_state"})
    layer_idx: int
    b_proj: nn.Linear

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        width, key_dim, value_dim = config.hidden_size, config.key_dim, config.value_dim
        self.q_proj = nn.Linear(width, key_dim, bias=False)
        self.k_proj = nn.Linear(width, key_dim, bias=False)
        self.v_proj = nn.Linear(width, value_dim, bias=False)
        self.add_gates(config)
        if config.use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, config.conv_size)
            self.k_conv1d = ShortConvolution(key_dim, config.conv_size)
            self.v_conv1d = ShortConvolution(value_dim, config.conv_size)
        if config.use_gate:
            self.g_proj = nn.Linear(width, value_dim, bias=False)
        self.o_norm = nn.RMSNorm(value_dim // config.value_heads, eps=config.norm_eps)
        self.o_proj = nn.Linear(value_dim, width, bias=False)

    @property
    def memory(self) -> dict[str, int]:
        """Returns the parts of the layer's memory and their numbers of heads (see `models.writes`)."""
        return {"recurrent_state": self.config.value_heads}

    def add_gates(self, config: Any) -> None:
        """Creates `b_proj`, the projection to write strengths (all are 1 without it), and what `log_gate` uses."""

    def write_strengths(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        """Returns beta of every token of the layer input `x`: 0 writes nothing, 1 replaces the value stored for its key."""
        beta = self.b_proj(x).sigmoid() if hasattr(self, "b_proj") else x.new_ones(*x.shape[:2], self.config.num_heads)
        return beta * 2 if self.config.allow_neg_eigval else beta

    def log_gate(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"] | None:
        """Returns the log of the state's decay at every token; None means no decay."""
        return None

    @property
    def unit(self) -> bool:
        """Returns whether `normalise` is `unit_length`, which kernels compute themselves."""
        return True

    @property
    def qk_silu(self) -> bool:
        """Returns whether `feature` is silu."""
        return True

    def feature(self, y: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The activation of q and of k; that of v is silu."""
        return F.silu(y)

    def normalise(self, y: Float[Tensor, "B T H d"]) -> Float[Tensor, "B T H d"]:
        """The norm of q and of k, in at least float32."""
        return unit_length(y)

    def output_gate(self, y: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The activation of the output gate."""
        return F.silu(y)

    def forward(self, x: Float[Tensor, "B T D"], state: Layer):
        """Returns outputs [B, T, D] and a function from positions to this layer's state, or None in `hidden_states_only`."""
        (own, _), windows = state, {}
        q, k, v = (self._project(name, x, own, windows) for name in "qkv")
        q, k = (y.unflatten(-1, (self.config.num_heads, -1)) for y in (q, k))
        q, k = (q, k) if self.unit else (self.normalise(q), self.normalise(k))
        v = v.unflatten(-1, (self.config.value_heads, -1))
        beta = scaled(self.layer_idx, "recurrent_state", self.write_strengths(x))
        log_gate = self.log_gate(x)
        memory, form = own.get("recurrent_state"), {"unit": self.unit, "scale": q.shape[-1] ** -0.5}
        o, states = delta_rule(q, k, v, beta, memory, log_gate, **form)
        o = head_norm(self.o_norm, o)
        if self.config.use_gate:
            o = o * self.output_gate(self.g_proj(x)).view_as(o)
        return self.o_proj(o.flatten(2)), kept(partial(self._state_at, states, windows))

    def _project(self, name: str, x: Tensor, own: Mapping[str, Tensor], windows: dict[str, ConvInputs]) -> Tensor:
        """Returns q, k or v [B, T, D], projected, convolved and activated; stores the convolution's inputs in `windows`."""
        y, key, activation = getattr(self, f"{name}_proj")(x), f"conv_state_{name}", self.feature
        if name == "v":
            activation = F.silu
        if self.config.use_short_conv:
            windows[key] = inputs = ConvInputs(own.get(key), y, self.config.conv_size - 1)
            convolution = getattr(self, f"{name}_conv1d")
            if (name == "v" or self.qk_silu) and y.shape[1] > 1 and serves(y.device, gated=False):
                return fused_conv_silu(inputs, convolution.weight)
            y = convolution(inputs.joined)
        return activation(y)

    def _state_at(
        self, states: Any, windows: Mapping[str, ConvInputs], positions: Int[Tensor, "B P"]
    ) -> dict[str, Tensor]:
        parts = {name: inputs.at(positions) for name, inputs in windows.items()}
        return {"recurrent_state": states.at(positions), **parts}
