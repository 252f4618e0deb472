"""LaCT (Zhang et al., 2025; arXiv 2505.23884) with the configuration and tensor names of the released `lact_swiglu` models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import initialization

from refine_lab.host import derived
from refine_lab.models.backbone import Backbone, BackboneLM
from refine_lab.models.configuration import FastWeightConfig, number, whole
from refine_lab.models.state import Layer, Sharing, State, Trace, kept
from refine_lab.models.writes import scaled
from refine_lab.ops.fused import head_norm
from refine_lab.ops.lact import MATRICES, ChunkPlan, ChunkStates, Memory, Rule, lact
from refine_lab.ops.precision import autocasts_to, rms_norm, wide
from refine_lab.ops.rotary import rotary_angles, rotate
from refine_lab.ops.short_conv import after_window, window_at
from refine_lab.ops.window_attention import Packing, window_attention
from refine_lab.validation import ConfigError

BASE_RATE = 0.001
"""Learning rate of the fast weights where `lr_proj` outputs 0 (released layer_lact_swiglu.py)."""

QK_EPS = 1e-5
"""Epsilon of the norms that use flash-linear-attention's default: q, k and the fast weights' output."""


class LaCTConfig(FastWeightConfig):
    """The fields of the released `LaCTSWIGLUConfig` (a1600012888/LaCT, lact_llm), with its defaults, plus three of ours.

    `fuse_*`, `last_layer_fuse_norm` and `use_fused_kernel` select among kernels of equal results there and have no
    effect here. Neither has `fp32_states`: fast weights and their sums are at least float32, whatever the model's
    dtype.

    Three fields are ours. `muon_dtype`: None runs Newton-Schulz in the surrounding dtype, "bfloat16" as the release
    does. `initial_rates` of w0, w1 and w2 and `initial_scale` initialise fresh weights: the released 0.001 suits chunks
    of 2,048 tokens, and short chunks need a rate a thousand times larger before storing a fact pays off (docs/log.md).
    """

    model_type = "lact_swiglu"
    ALLOWED = FastWeightConfig.ALLOWED | {
        "lr_parameterization": ("mamba",),
        "ttt_loss_type": ("dot_product",),
        "elementwise_affine": (True,),
        "muon_dtype": (None, "bfloat16"),
    }

    num_attn_heads: int = 32
    num_lact_heads: int = 4
    inter_multi: float = 1
    qkv_bias: bool = False
    attn_qk_norm: bool = False
    lact_chunk_size: int = 2048
    use_muon: bool = False
    lr_dim: int = 1
    qkv_silu: bool = True
    no_v_silu: bool = False
    lr_parameterization: str = "mamba"
    learnable_ttt_scale: bool = True
    use_momentum: bool = True
    ttt_loss_type: str = "dot_product"
    ttt_prenorm: bool = False
    ttt_nope: bool = False
    w0_w2_low_rank: Any = -1  # a rank; 0 and below are none
    window_size: int = 2048
    rope_theta: float = 10000.0
    initializer_range: float = 0.006
    elementwise_affine: bool = True
    last_layer_fuse_norm: bool = True
    fw_init_gain: float = 0.5
    use_fused_kernel: bool = False
    fp32_states: bool = False
    muon_dtype: str | None = None
    initial_rates: Any = (BASE_RATE,) * 3
    initial_scale: Any = 0.0  # bias of `ttt_scale_proj`

    def check(self) -> None:
        rates = self.initial_rates
        positive = isinstance(rates, (list, tuple)) and len(rates) == 3 and all(number(x) and x > 0 for x in rates)
        self.require(positive, "initial_rates", "three numbers above 0")
        self.require(number(self.initial_scale), "initial_scale", "a number")
        self.require(whole(self.w0_w2_low_rank), "w0_w2_low_rank", "a whole number")
        for name in ("num_attn_heads", "num_lact_heads"):
            if self.hidden_size % getattr(self, name):
                raise ConfigError(f"hidden_size {self.hidden_size}", getattr(self, name), f"a multiple of {name}")
        even = f"such that a head's width, hidden_size {self.hidden_size} / num_attn_heads, is even"
        self.require(self.hidden_size // self.num_attn_heads % 2 == 0, "num_attn_heads", even)
        width = self.hidden_size // self.num_lact_heads
        fits = self.lr_dim == 1 or self.lr_dim == width == self.fast_width
        self.require(fits, "lr_dim", f"1 or, with inter_multi 1, {width}")

    @property
    def fast_width(self) -> int:
        """Returns the hidden width of a head's fast weights."""
        return int(self.hidden_size // self.num_lact_heads * self.inter_multi)


class LowRankFastWeight(nn.Module):
    """Low-rank initial weights w_left w_right + I / 2 for each head."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.w_left = nn.Parameter(torch.empty(heads, rows, rank))
        self.w_right = nn.Parameter(torch.empty(heads, rank, columns))

    def initialise(self, gain: float) -> None:
        nn.init.normal_(self.w_left, std=gain * self.w_left.shape[-1] ** -0.5)
        nn.init.normal_(self.w_right, std=gain * self.w_right.shape[-1] ** -0.5)

    def forward(self) -> Float[Tensor, "H rows columns"]:
        product = self.w_left.to(wide(self.w_left)) @ self.w_right.to(wide(self.w_right))
        return product + 0.5 * torch.eye(*product.shape[1:], device=product.device, dtype=product.dtype)


class LaCTAttention(nn.Module):
    """One layer's memory: attention to a window, and fast weights for earlier tokens."""

    STATE = frozenset({"pending_kv", "window_k"})
    layer_idx: int

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, inner = config.hidden_size, config.num_lact_heads, config.fast_width
        per_head, rank = width // heads, config.w0_w2_low_rank
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        if config.attn_qk_norm:
            self.q_norm = nn.RMSNorm(width, eps=QK_EPS)
            self.k_norm = nn.RMSNorm(width, eps=QK_EPS)
        self.o_proj = nn.Linear(width, width, bias=False)
        if rank > 0:
            self.w0 = LowRankFastWeight(heads, inner, per_head, rank)
            self.w2 = LowRankFastWeight(heads, inner, per_head, rank)
        else:
            self.w0 = nn.Parameter(torch.empty(heads, inner, per_head))
            self.w2 = nn.Parameter(torch.empty(heads, inner, per_head))
        self.w1 = nn.Parameter(torch.empty(heads, per_head, inner))
        self.lr_proj = nn.Linear(width, 3 * heads * config.lr_dim)
        self.qk_scale = nn.Parameter(torch.ones(width, 2))
        self.qk_offset = nn.Parameter(torch.zeros(width, 2))
        if config.learnable_ttt_scale:
            self.ttt_scale_proj = nn.Linear(width, heads)
        self.ttt_norm = nn.RMSNorm(per_head, eps=QK_EPS)
        if config.use_momentum:
            self.momentum_proj = nn.Sequential(nn.Linear(width, heads), nn.Sigmoid())

    def reset_parameters(self) -> None:
        """Initialises the fast weights; the model initialises the linear layers."""
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)
        for weight in (self.w0, self.w2):
            if isinstance(weight, LowRankFastWeight):
                weight.initialise(self.config.fw_init_gain)
            else:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        nn.init.normal_(self.w1, std=self.w1.shape[-1] ** -0.5)
        config = self.config
        rates = torch.tensor(config.initial_rates, dtype=torch.float64).expm1().log() - math.log(math.expm1(BASE_RATE))
        initialization.copy_(self.lr_proj.bias, rates.repeat_interleave(config.lr_dim).repeat(config.num_lact_heads))
        if config.learnable_ttt_scale:
            nn.init.constant_(self.ttt_scale_proj.bias, config.initial_scale)

    @property
    def memory(self) -> dict[str, int]:
        """Returns the parts of the layer's memory and their numbers of heads (see `models.writes`)."""
        return {"fast_weights": self.config.num_lact_heads, "window": self.config.num_attn_heads}

    @property
    def rule(self) -> Rule:
        config = self.config
        muon_dtype = None if config.muon_dtype is None else getattr(torch, config.muon_dtype)
        return Rule(config.lact_chunk_size, config.use_muon, config.ttt_prenorm, muon_dtype)

    def forward(self, x: Float[Tensor, "B T D"], state: Layer, plan: ChunkPlan, angles: Tensor):
        """Returns outputs [B, T, D] and this layer's `LayerStates`, or None in `hidden_states_only`."""
        own, shared = state
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.config.attn_qk_norm:
            q, k = head_norm(self.q_norm, q).to(q.dtype), head_norm(self.k_norm, k).to(k.dtype)
        attended, windows = self._attend(q, k, v, own, plan, angles)
        recalled, chunks = self._recall(x, q, k, v, own, shared, plan, angles)
        return self.o_proj(attended + recalled), kept(LayerStates(chunks, windows, self.config.window_size - 1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, own: Mapping[str, Tensor], plan: ChunkPlan, angles: Tensor):
        """Returns the window's output, and its keys and values with the `window_size` - 1 before them."""
        q, k, v = (y.unflatten(-1, (self.config.num_attn_heads, -1)) for y in (q, k, v))
        q, k, v = rotate(q, angles), rotate(k, angles), scaled(self.layer_idx, "window", v)
        new, width = {"window_k": k.flatten(2), "window_v": v.flatten(2)}, self.config.window_size - 1
        windows = {name: after_window(own.get(name), y, width) for name, y in new.items()}
        keys, values = (y.unflatten(-1, (self.config.num_attn_heads, -1)) for y in windows.values())
        size = self.config.window_size

        def packing() -> Packing:
            return plan.once("packing", plan.start, lambda start: Packing.of(start, plan.length, size))

        return window_attention(q, keys, values, plan.start, size, packing).flatten(2), windows

    def _recall(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Mapping[str, Tensor],
        shared: Memory,
        plan: ChunkPlan,
        angles: Tensor,
    ) -> tuple[Float[Tensor, "B T D"], ChunkStates]:
        """Returns the fast weights' output and their states.

        From the scale of q and k on, the dtype is at least float32, but autocast's where that is bfloat16: its products
        of matrices round q, k and v to it in any case.
        """
        heads, narrow = self.config.num_lact_heads, autocasts_to(x.device, torch.bfloat16)
        scale, offset = (y.to(torch.bfloat16 if narrow else wide(y)) for y in (self.qk_scale, self.qk_offset))
        q, k = (y * scale[:, i] + offset[:, i] for i, y in enumerate((q, k)))
        q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
        if self.config.qkv_silu:
            q, k, v = F.silu(q), F.silu(k), v if self.config.no_v_silu else F.silu(v)
        q, k = (y / (y.norm(dim=-1, keepdim=True) + 1e-5).to(y.dtype) for y in (q, k))
        if not self.config.ttt_nope:  # turned with the heads of the attention
            split = (self.config.num_attn_heads, -1)
            q, k = (
                rotate(y.flatten(2).unflatten(-1, split), angles).flatten(2).unflatten(-1, (heads, -1)) for y in (q, k)
            )
        kv = torch.cat([k, v.to(k.dtype)], -1).transpose(1, 2)
        streams = {"kv": kv, "rates": self._rates(x).transpose(1, 2)}
        streams = {name: plan.stream(own.get(f"pending_{name}"), y) for name, y in streams.items()}
        initial, norms = self._initial()
        memory = shared or initial
        found, chunks = lact(q.transpose(1, 2), streams, memory, norms, plan, self.rule, recompute=x.is_cuda)
        found = rms_norm(self.ttt_norm, found.transpose(1, 2))
        if self.config.learnable_ttt_scale:
            found = found * F.silu(self.ttt_scale_proj(x)).unsqueeze(-1)
        return found.flatten(2), chunks

    def write_strengths(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        """Returns the mean learning rate with which each token of the layer input `x` is written to w0, w1 and w2."""
        rates = self._rates(x)
        return (rates[..., :-1] if self.config.use_momentum else rates).mean(-1)

    def _rates(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H r"]:
        """Returns every token's learning rates for w0, w1 and w2 and, with momentum, its gate; at least float32."""
        y = self.lr_proj(x)
        y = y.to(wide(y)) + math.log(math.expm1(BASE_RATE))
        rates = scaled(self.layer_idx, "fast_weights", F.softplus(y).unflatten(-1, (self.config.num_lact_heads, -1)))
        if self.config.use_momentum:
            rates = torch.cat([rates, self.momentum_proj(x).unsqueeze(-1).to(rates.dtype)], -1)
        return rates

    def _initial(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the weights before any token, as those of one source, and the norms of their rows."""
        weights = {name: w() if isinstance(w := getattr(self, name), LowRankFastWeight) else w for name in MATRICES}
        # copied: the state is no view of a parameter
        weights = {name: w.to(wide(self.w1), copy=True).unsqueeze(0) for name, w in weights.items()}
        norms = {name: w.norm(dim=-1, keepdim=True) for name, w in weights.items()}
        memory = dict(weights)
        if self.config.ttt_prenorm:
            memory |= {f"{name}_sum": w for name, w in weights.items()}
        if self.config.use_momentum:
            memory |= {f"{name}_momentum": torch.zeros_like(w) for name, w in weights.items()}
        return memory, norms


class LayerStates(NamedTuple):
    """This layer's part of the state after any token."""

    chunks: ChunkStates
    windows: Mapping[str, Tensor]
    width: int

    def own(self, positions: Int[Tensor, "B P"]) -> dict[str, Tensor]:
        windows = {name: window_at(x, positions, self.width) for name, x in self.windows.items()}
        return self.chunks.pending(positions) | windows


class LaCTModel(Backbone):
    """Embeddings, blocks and final norm."""

    def prepare(
        self, start: Int[Tensor, "B"], width: int, state: State | None
    ) -> tuple[ChunkPlan, Float[Tensor, "B T d"]]:
        """Returns the batch's division into chunks, and the rotary angles of its positions."""
        if state is None or state.sources is None:
            sources, num_sources = derived(torch.zeros_like, start), 1
        else:
            sources, num_sources = state.sources, len(next(iter(state.shared.values())))
        config = self.config
        positions = start.unsqueeze(-1) + torch.arange(width, device=start.device)
        angles = rotary_angles(positions, config.hidden_size // config.num_attn_heads, config.rope_theta)
        return ChunkPlan(start, width, config.lact_chunk_size, sources, num_sources), angles

    def trace(self, hidden_states: Tensor, lengths: Tensor, start: Tensor, parts: Sequence[LayerStates]) -> Trace:
        own, sharing = [part.own for part in parts], None
        if parts:
            sharing = Sharing(parts[0].chunks.sources, [part.chunks.shared for part in parts])
        return Trace(hidden_states, lengths, own, start, sharing)


class LaCTForCausalLM(BackboneLM):
    """LaCT with a language-model head."""

    config_class = LaCTConfig
    FAST_WEIGHTS = MATRICES
    STATE_PARTS = (
        {f"{name}{kind}": ("fast_weights", 1) for name in MATRICES for kind in ("", "_sum", "_momentum")}
        | {"pending_kv": ("fast_weights", 1), "pending_rates": ("fast_weights", 1)}
        | {"window_k": ("window", 2), "window_v": ("window", 2)}
    )
    attention = LaCTAttention
    backbone = LaCTModel

    @property
    def kernel_dtype(self) -> None:
        """None, since LaCT uses none of fla's kernels."""

    @property
    def borders(self) -> set[int]:
        own = (self.config.lact_chunk_size, self.config.window_size)
        return super().borders | {border for border in own if border > 2}

    @classmethod
    def attention_window(cls, config: LaCTConfig) -> int:
        return config.window_size

    @property
    def later_borders(self) -> set[int]:
        """Returns twice the chunk size, where nonzero momenta and sums first enter the fast weights."""
        return {2 * self.config.lact_chunk_size} if self.config.lact_chunk_size > 2 else set()

    @property
    def orthogonalises_updates(self) -> bool:
        return self.config.use_muon
