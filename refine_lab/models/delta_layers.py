"""The base of DeltaNet and GatedDeltaNet: configuration fields, layer, block and language model.

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
from transformers import PreTrainedConfig

from refine_lab.models.backbone import Backbone, BackboneLM
from refine_lab.models.checks import check_allowed, check_kinds
from refine_lab.models.mlp import GatedMLP
from refine_lab.models.state import Layer, kept
from refine_lab.ops.delta_rule import delta_rule
from refine_lab.ops.precision import rms_norm, wide
from refine_lab.ops.short_conv import causal_conv, window_at

QK_EPS = 1e-6
"""Added under the square root in the norm of q and k, as in fla's kernels."""


class DeltaRuleConfig(PreTrainedConfig):
    """The fields that flash-linear-attention's two configurations have in common, with their shared defaults.

    `fuse_*` and `attn_mode` select among kernels of equal results there and have no effect here. Fields that would
    change the result but are not implemented are refused by name: `attn`, `attnres_block_size`, `use_l2warp`, and
    `hidden_act` other than swish.
    """

    __no_type_check__ = True  # a type checker at run time would refuse the further settings that transformers takes
    keys_to_ignore_at_inference = ["past_key_values"]

    attn_mode: str = "chunk"
    hidden_size: int = 2048
    expand_v: float = 1.0
    use_gate: bool = False
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    num_heads: int = 16
    max_position_embeddings: int = 2048
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    num_hidden_layers: int = 24
    norm_eps: float = 1e-6
    attn: Any = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: Any = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    vocab_size: int = 32000
    attnres_block_size: int | None = None

    def __post_init__(self, **others: Any) -> None:  # transformers makes a dataclass of every configuration
        check_kinds(self)
        check_allowed(
            self,
            {
                "attn_mode": ("chunk", "fused_recurrent"),
                "attn": (None,),
                "attnres_block_size": (None,),
                "use_l2warp": (False,),
                "hidden_act": ("swish",),
            },
        )
        super().__post_init__(**others)

    @property
    def key_dim(self) -> int:
        """Width of q and of k, over all `num_heads` heads."""
        raise TypeError(f"{type(self).__name__} must define key_dim")

    @property
    def value_dim(self) -> int:
        """Width of v, over all `value_heads` heads."""
        raise TypeError(f"{type(self).__name__} must define value_dim")

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

    A family defines `add_gates` and `gates`, and overrides `feature`, `normalise` and `output_gate` if its activations
    and norms differ.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        width, key_dim, value_dim = config.hidden_size, config.key_dim, config.value_dim
        self.q_proj = nn.Linear(width, key_dim, bias=False)
        self.k_proj = nn.Linear(width, key_dim, bias=False)
        self.v_proj = nn.Linear(width, value_dim, bias=False)
        self.add_gates()
        if config.use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, config.conv_size)
            self.k_conv1d = ShortConvolution(key_dim, config.conv_size)
            self.v_conv1d = ShortConvolution(value_dim, config.conv_size)
        if config.use_gate:
            self.g_proj = nn.Linear(width, value_dim, bias=False)
        self.o_norm = nn.RMSNorm(value_dim // config.value_heads, eps=config.norm_eps)
        self.o_proj = nn.Linear(value_dim, width, bias=False)

    def add_gates(self) -> None:
        """Creates the modules and parameters that `gates` uses."""
        raise TypeError(f"{type(self).__name__} must define add_gates")

    def reset_parameters(self) -> None:
        """Initialises the bare parameters that `add_gates` created."""

    def gates(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"] | None]:
        """Returns each token's write strength in 0..1 and the log of the state's decay; None means no decay."""
        raise TypeError(f"{type(self).__name__} must define gates")

    def write_strengths(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        """Returns beta of every token of the layer input `x`: 0 writes nothing, 1 replaces the value stored for its key."""
        return self._scaled(self.gates(x)[0])

    def _scaled(self, beta: Float[Tensor, "B T H"]) -> Float[Tensor, "B T H"]:
        return beta * 2 if self.config.allow_neg_eigval else beta

    def feature(self, y: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The activation of q and of k; that of v is silu."""
        return F.silu(y)

    def normalise(self, y: Float[Tensor, "B T H d"]) -> Float[Tensor, "B T H d"]:
        """Normalises q or k to unit length: x / sqrt(sum x^2 + eps), in at least float32."""
        y = y.to(wide(y))
        return y * torch.rsqrt(y.square().sum(-1, keepdim=True) + QK_EPS)

    def output_gate(self, y: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The activation of the output gate."""
        return F.silu(y)

    def forward(self, x: Float[Tensor, "B T D"], state: Mapping[str, Tensor]):
        """Returns outputs [B, T, D] and a function from positions to this layer's state, or None in `hidden_states_only`."""
        windows: dict[str, Tensor] = {}
        q, k, v = (self._project(name, x, state, windows) for name in "qkv")
        q, k = (self.normalise(self.feature(y).unflatten(-1, (self.config.num_heads, -1))) for y in (q, k))
        v = F.silu(v).unflatten(-1, (self.config.value_heads, -1))
        beta, log_gate = self.gates(x)
        o, states = delta_rule(
            q * q.shape[-1] ** -0.5, k, v, self._scaled(beta), state.get("recurrent_state"), log_gate
        )
        o = rms_norm(self.o_norm, o)
        if self.config.use_gate:
            o = o * self.output_gate(self.g_proj(x)).view_as(o)
        return self.o_proj(o.flatten(2)), kept(partial(self._state_at, states, windows))

    def _project(self, name: str, x: Tensor, state: Mapping[str, Tensor], windows: dict[str, Tensor]) -> Tensor:
        """Returns q, k or v [B, T, D], projected and convolved, and stores the convolution's input in `windows`."""
        y = getattr(self, f"{name}_proj")(x)
        if not self.config.use_short_conv:
            return y
        key, width = f"conv_state_{name}", self.config.conv_size - 1
        before = state[key].to(y) if key in state else y.new_zeros(len(y), width, y.shape[-1])
        windows[key] = torch.cat([before, y], 1)
        return getattr(self, f"{name}_conv1d")(windows[key])

    def _state_at(self, states: Any, windows: Mapping[str, Tensor], positions: Int[Tensor, "B P"]) -> dict[str, Tensor]:
        parts = {name: window_at(x, positions, self.config.conv_size - 1) for name, x in windows.items()}
        return {"recurrent_state": states.at(positions), **parts}


class DeltaRuleBlock(nn.Module):
    """The layer and a SwiGLU, each with a pre-norm and a residual connection."""

    def __init__(self, config: DeltaRuleConfig, attention: type[DeltaRuleAttention]) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Float[Tensor, "B T D"], state: Layer | None):
        mixed, state_at = self.attn(self.attn_norm(x), {} if state is None else state[0])
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state_at


class DeltaRuleModel(Backbone):
    """Embeddings, blocks and final norm."""

    STATE = frozenset({"recurrent_state"})


class DeltaRuleLM(BackboneLM):
    """A language model of delta-rule layers; a family sets its configuration and its layer."""

    attention: type[DeltaRuleAttention]
    OWN_INITIALISATION = (ShortConvolution, DeltaRuleAttention)

    def backbone(self, config: DeltaRuleConfig) -> DeltaRuleModel:
        return DeltaRuleModel(config, partial(DeltaRuleBlock, config, self.attention))
