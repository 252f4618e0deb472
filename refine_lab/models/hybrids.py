"""The hybrids of transformers (Qwen3-Next, Qwen3.5, OLMo-Hybrid), which alternate linear and full attention.

They use transformers' own classes, with its configurations, tensor names and checkpoints; one mixin adapts them to our
interface. Their linear attention, which holds the fast weights, uses our gated delta rule; their full attention is
unchanged, with keys and values as part of the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.host import derived
from refine_lab.models import hybrid_layers as layers
from refine_lab.models.backbone import Backbone
from refine_lab.models.base import FastWeightLM
from refine_lab.models.imports import import_quietly
from refine_lab.models.prefix_cache import PrefixRead
from refine_lab.models.state import State, Trace
from refine_lab.models.writes import MemoryPart
from refine_lab.ops.precision import wide
from refine_lab.validation import require


@dataclass(frozen=True)
class Family:
    """A family's place in transformers: its package, and the names of its classes and of the `forward`s to replace."""

    package: str
    prefix: str
    config: str
    forwards: dict[str, Any]


_COMMON = {
    "GatedDeltaNet": layers.gated_delta_net,
    "RMSNormGated": layers.gated_rms_norm,
    "MLP": layers.gated_mlp,
}
_QWEN = {**_COMMON, "RMSNorm": layers.rms_norm_around_one, "TopKRouter": layers.top_k_router}
_QWEN3_5 = Family("qwen3_5", "Qwen3_5", "Qwen3_5TextConfig", _QWEN)
_QWEN3_5_MOE = Family("qwen3_5_moe", "Qwen3_5Moe", "Qwen3_5MoeTextConfig", _QWEN)

HYBRIDS: dict[str, Family] = {
    "qwen3_next": Family("qwen3_next", "Qwen3Next", "Qwen3NextConfig", _QWEN),
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5": _QWEN3_5,  # with images: its text model
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "qwen3_5_moe": _QWEN3_5_MOE,
    "olmo_hybrid": Family("olmo_hybrid", "OlmoHybrid", "OlmoHybridConfig", {**_COMMON, "RMSNorm": layers.rms_norm}),
}
"""`model_type` of a config.json -> its family."""

_WRONG = (
    "transformers gives wrong results when continuing it from a cache with more than one token at a time "
    "(errors of up to 0.45)"
)
_STUCK = "transformers changes its cache in place, and single tokens read from it pass no gradient into the prefix"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("jamba", "mamba", "falcon_mamba"), _WRONG),
    **dict.fromkeys(("mamba2", "nemotron_h", "falcon_h1", "zamba2", "granitemoehybrid"), _STUCK),
}
"""`model_type` -> why a fast-weight model of transformers is refused."""


OWN_TENSORS = {
    "linear_attention": ("recurrent_state", "conv_state"),
    "full_attention": ("keys", "values", "prefix_lengths"),
}
"""Kind of layer -> the tensors it keeps for each row."""

POSITIVE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "rms_norm_eps"),
)
"""Numeric fields whose sign transformers does not check."""


@cache
def hybrid_family(model_type: str) -> tuple[type, type[FastWeightLM]]:
    """Returns transformers' configuration class and our model class for a `model_type` of `HYBRIDS`.

    The model class has the name of transformers' own, so that plain transformers can load what it saves. Raises
    ImportError if transformers lacks the family.
    """
    family = HYBRIDS[model_type]
    modeling, configuration = (
        import_quietly(f"transformers.models.{family.package}.{part}_{family.package}", "transformers 5.17 or later")
        for part in ("modeling", "configuration")
    )
    theirs, config_class = getattr(modeling, f"{family.prefix}ForCausalLM"), getattr(configuration, family.config)
    body = {"__module__": __name__, "__doc__": HybridLM.__doc__, "config_class": config_class, "family": family}
    return config_class, type(theirs.__name__, (HybridLM, theirs), body)


class HybridLM(FastWeightLM):
    """A hybrid of transformers whose state is a value.

    Linear-attention layers keep `recurrent_state` [R, H, dk, dv] and `conv_state` [R, w, D]. Full-attention layers
    refer to shared `keys` and `values` [S, T, H, d], of which each row sees the first `prefix_lengths` [R], and store
    each row's own tokens separately.
    """

    _input_embed_layer = "embed_tokens"
    STATE_PARTS = {
        "recurrent_state": ("recurrent_state", 1),
        "keys": ("keys_values", 2),
        "values": ("keys_values", 2),
    }
    family: Family
    model: Any

    def __init__(self, config: Any) -> None:
        _check(config)
        super().__init__(config)
        forwards = {self.family.prefix + kind: forward for kind, forward in self.family.forwards.items()}
        module: Any
        for module in self.modules():
            if type(module).__name__ in forwards:
                module.forward = MethodType(forwards[type(module).__name__], module)
            if type(module).__name__ == f"{self.family.prefix}GatedDeltaNet":
                module.write_strengths = MethodType(layers.write_strengths, module)
                module.log_gate = MethodType(layers.log_gate, module)
        self.set_output_embeddings(self.lm_head)
        self.model.read = MethodType(read_hybrid, self.model)
        self.model.forward = MethodType(Backbone.forward, self.model)

    @property
    def memory_parts(self) -> tuple[MemoryPart, ...]:
        kinds = {
            "linear_attention": ("recurrent_state", getattr(self.config, "linear_num_value_heads", 0)),
            "full_attention": ("keys_values", self.config.num_key_value_heads),
        }
        return tuple(MemoryPart(number, *kinds[kind]) for number, kind in enumerate(self.config.layer_types))

    @property
    def longest_context(self) -> int | None:
        """Returns the trained context with rotary positions; without them there is no limit."""
        rotary = (self.config.rope_parameters or {}).get("rope_theta") is not None
        return self.config.max_position_embeddings if rotary else None

    @classmethod
    def is_custom_code(cls) -> bool:
        """Returns False: parameters and checkpoints, including older and fused ones, are transformers' own."""
        return False


def read_hybrid(
    model: Any,
    inputs_embeds: Float[Tensor, "B T D"],
    lengths: Int[Tensor, "B"],
    state: State | None,
    layer_inputs: list[Tensor] | None,
) -> Trace:
    """Implements `Backbone.read` for transformers' model without a head."""
    _check_attention(model.config)  # it may have been switched since
    rows, width = inputs_embeds.shape[:2]
    if state is not None:
        state.expect(rows, OWN_TENSORS[model.config.layer_types[0]])
    reading, x = PrefixRead(state, inputs_embeds), inputs_embeds
    start = derived(torch.zeros_like, lengths) if state is None else state.lengths
    rotary = rotary_embeddings(model, start.unsqueeze(-1) + torch.arange(width, device=x.device), x)
    group = reading.grouping
    packed = rotary if group is None or rotary is None else tuple(map(group.pack, rotary))
    for layer, kind in zip(model.layers, model.config.layer_types, strict=True):
        if layer_inputs is not None:
            layer_inputs.append(x)
        if kind == "linear_attention" or group is None:
            x = layer(x, position_embeddings=rotary, attention_mask=None, past_key_values=reading)
        else:
            y = layer(group.pack(x), position_embeddings=packed, attention_mask=reading.mask, past_key_values=reading)
            x = group.unpack(y, width)
    return reading.trace(model.norm(x), lengths)


def rotary_embeddings(model: Any, positions: Int[Tensor, "B T"], x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns cosines and sines [B, T, d] as transformers computes them for text; in float64 for a float64 model."""
    rotary = model.rotary_emb
    if rotary is None:  # OLMo-Hybrid without positions
        return None
    if rotary.inv_freq.dtype.itemsize < 4:  # the whole model was cast, and the frequencies lost their digits
        rotary = type(rotary)(model.config).to(x.device)
    angles = positions.unsqueeze(-1).to(wide(x)) * rotary.inv_freq.to(wide(x))
    angles = torch.cat([angles, angles], -1)
    cosines, sines = (y * rotary.attention_scaling for y in (angles.cos(), angles.sin()))
    return cosines.to(x.dtype), sines.to(x.dtype)


def _check(config: Any) -> None:
    """Raises ValueError, naming the field, for settings that would be computed incorrectly."""
    if config.get_text_config() is not config:
        raise ValueError(f"it sets text_config, which a {config.model_type} does not have")
    for name in POSITIVE:
        value = getattr(config, name, None)
        require(value is None or value > 0, name, value, "above 0")
    kinds = set(config.layer_types) - set(OWN_TENSORS)
    require(not kinds, "layer_types", sorted(kinds), "a list of 'linear_attention' and 'full_attention'")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"with rope_type {rope!r}, the rotation of earlier keys depends on the total sequence length, which is not known "
            "when the state of a prefix is stored"
        )
    _check_attention(config)


def _check_attention(config: Any) -> None:
    implementation = config._attn_implementation
    require(implementation in (None, "sdpa"), "attn_implementation", implementation, "'sdpa'")
