"""DeltaNet (Yang et al., 2024; arXiv 2406.06484) with flash-linear-attention's configuration, modules and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import isfinite
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import State, Trace
from refine_lab.ops.delta_rule import delta_rule
from refine_lab.ops.short_conv import causal_conv, window_at


class DeltaNetConfig(PreTrainedConfig):
    """The fields of `fla.models.DeltaNetConfig`, with its defaults.

    `fuse_*` and `attn_mode` choose among kernels of equal results there and change nothing here; what would change the
    result and is not built (`attn`, `attnres_block_size`, `use_l2warp`, `hidden_act` other than swish,
    `use_output_norm` False) is refused by name.
    """

    __no_type_check__ = True  # a type checker at run time would refuse the further settings that transformers takes
    model_type = "delta_net"
    keys_to_ignore_at_inference = ["past_key_values"]

    attn_mode: str = "chunk"
    hidden_size: int = 2048
    expand_k: float = 1.0
    expand_v: float = 1.0
    use_gate: bool = False
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    use_beta: bool = True
    use_output_norm: bool = True
    num_heads: int = 16
    qk_norm: str = "l2"
    qk_activation: str = "silu"
    max_position_embeddings: int = 2048
    hidden_ratio: int | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    num_hidden_layers: int = 24
    norm_eps: float = 1e-6
    attn: Any = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
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
        self._check()
        super().__post_init__(**others)

    def _check(self) -> None:
        self._check_kinds()
        allowed: Mapping[str, tuple[Any, ...]] = {
            "attn_mode": ("chunk", "fused_recurrent"),
            "attn": (None,),
            "attnres_block_size": (None,),
            "use_l2warp": (False,),
            "use_output_norm": (True,),
            "hidden_act": ("swish",),
            "qk_norm": ("l2", "sum"),
            "qk_activation": ("silu", "relu", "elu", "identity"),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"DeltaNetConfig.{name} must be one of {values}, got {value!r}")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"DeltaNetConfig.pad_token_id must lie below vocab_size {self.vocab_size}, got {self.pad_token_id}"
            )
        for name in ("expand_k", "expand_v"):
            width = self.hidden_size * getattr(self, name)
            if width != round(width) or round(width) % self.num_heads:
                raise ValueError(
                    f"hidden_size * {name} must be a multiple of num_heads {self.num_heads}, "
                    f"got {self.hidden_size} * {getattr(self, name)} = {width}"
                )

    def _check_kinds(self) -> None:
        """Refuse, by name, a field of another type than its own or a size that is none."""
        whole = "hidden_size conv_size num_heads num_hidden_layers vocab_size max_position_embeddings intermediate_size"
        optional = "hidden_ratio intermediate_size pad_token_id bos_token_id"
        for name, default in vars(DeltaNetConfig).items():
            value = getattr(self, name)
            if value is None and name in optional.split():
                continue
            if name in whole.split():
                fits, allowed = _whole(value) and value > 0, "a positive whole number"
            elif name in ("expand_k", "expand_v", "norm_eps", "hidden_ratio"):
                fits, allowed = _number(value) and value > 0, "a positive number"
            elif name == "initializer_range":
                fits, allowed = _number(value) and value >= 0, "a number that is not negative"
            elif name in ("pad_token_id", "bos_token_id"):
                fits, allowed = _whole(value), "a token's number or None"
            elif name.startswith(("use_", "fuse_", "allow_", "tie_")) and isinstance(default, bool):
                fits, allowed = isinstance(value, bool), "True or False"
            else:
                continue
            if not fits:
                raise ValueError(f"DeltaNetConfig.{name} must be {allowed}, got {value!r}")


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> TypeGuard[float]:
    return (isinstance(value, float) and isfinite(value)) or _whole(value)


class ShortConvolution(nn.Module):
    """A depthwise causal convolution over `width` tokens, without bias."""

    def __init__(self, channels: int, width: int, activation: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B T D"]:
        y = causal_conv(x, self.weight)
        return F.silu(y) if self.activation else y


class DeltaNetAttention(nn.Module):
    """One layer's fast weights: q, k, v through short convolutions, the delta rule, an output norm."""

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        key_dim, value_dim = round(width * config.expand_k), round(width * config.expand_v)
        self.q_proj = nn.Linear(width, key_dim, bias=False)
        self.k_proj = nn.Linear(width, key_dim, bias=False)
        self.v_proj = nn.Linear(width, value_dim, bias=False)
        if config.use_beta:
            self.b_proj = nn.Linear(width, config.num_heads, bias=False)
        if config.use_short_conv:
            silu = config.qk_activation == "silu"
            self.q_conv1d = ShortConvolution(key_dim, config.conv_size, silu)
            self.k_conv1d = ShortConvolution(key_dim, config.conv_size, silu)
            self.v_conv1d = ShortConvolution(value_dim, config.conv_size, True)
        if config.use_gate:
            self.g_proj = nn.Linear(width, value_dim, bias=False)
        self.o_norm = nn.RMSNorm(value_dim // config.num_heads, eps=config.norm_eps)
        self.o_proj = nn.Linear(value_dim, width, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], state: Mapping[str, Tensor]):
        """Outputs [B, T, D] and the function from positions to this layer's part of the state."""
        windows: dict[str, Tensor] = {}
        q, k, v = (self._mix(name, x, state, windows) for name in "qkv")
        if self.config.qk_norm == "l2":  # the kernels' own: x / sqrt(sum x^2 + eps)
            q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        else:
            q, k = (F.normalize(y, p=1, dim=-1, eps=1e-6) for y in (q, k))
        beta = self.b_proj(x).sigmoid() if self.config.use_beta else torch.ones_like(q[..., 0])
        if self.config.allow_neg_eigval:
            beta = beta * 2
        o, states = delta_rule(q * q.shape[-1] ** -0.5, k, v, beta, state.get("recurrent_state"))
        o = self.o_norm(o)
        if self.config.use_gate:
            o = o * F.silu(self.g_proj(x)).view_as(o)
        return self.o_proj(o.flatten(2)), partial(self._state_at, states, windows)

    def _mix(self, name: str, x: Tensor, state: Mapping[str, Tensor], windows: dict[str, Tensor]) -> Tensor:
        """q, k or v [B, T, H, d]: projected, convolved, activated. Keeps the convolution's input in `windows`."""
        y = getattr(self, f"{name}_proj")(x)
        activation = "silu" if name == "v" else self.config.qk_activation
        if self.config.use_short_conv:
            key, width = f"conv_state_{name}", self.config.conv_size - 1
            before = state[key].to(y) if key in state else y.new_zeros(len(y), width, y.shape[-1])
            windows[key] = torch.cat([before, y], 1)
            y = getattr(self, f"{name}_conv1d")(windows[key])
        if activation == "silu" and not self.config.use_short_conv:
            y = F.silu(y)
        elif activation == "relu":
            y = F.relu(y)
        elif activation == "elu":
            y = F.elu(y) + 1
        return y.unflatten(-1, (self.config.num_heads, -1))

    def _state_at(self, states: Any, windows: Mapping[str, Tensor], positions: Int[Tensor, "B P"]) -> dict[str, Tensor]:
        parts = {name: window_at(x, positions, self.config.conv_size - 1) for name, x in windows.items()}
        return {"recurrent_state": states.at(positions), **parts}


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        if inner is None:  # fla's: two thirds of the ratio, rounded up to a multiple of 256
            inner = -int(width * (config.hidden_ratio or 4) * 2 / 3) // 256 * -256
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DeltaNetBlock(nn.Module):
    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = DeltaNetAttention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Float[Tensor, "B T D"], state: Mapping[str, Tensor]):
        mixed, state_at = self.attn(self.attn_norm(x), state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state_at


class DeltaNetModel(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DeltaNetBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)


class DeltaNetForCausalLM(FastWeightLM):
    """DeltaNet with a language-model head."""

    config_class = DeltaNetConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config)
        self.model = DeltaNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

    def read(
        self,
        input_ids: Int[Tensor, "B T"],
        lengths: Int[Tensor, "B"] | None = None,
        state: State | None = None,
    ) -> Trace:
        rows, width = input_ids.shape
        if lengths is None:
            lengths = torch.full((rows,), width, device=input_ids.device)
        start = torch.zeros_like(lengths) if state is None else state.lengths
        x, layers = self.model.embeddings(input_ids), []
        for index, layer in enumerate(self.model.layers):
            x, state_at = layer(x, {} if state is None else state.layer(index)[0])
            layers.append(state_at)
        return Trace(self.model.norm(x), lengths, layers, start)
