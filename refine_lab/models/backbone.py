"""The model of DeltaNet, GatedDeltaNet and LaCT: blocks, the backbone around them, and the language model around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from refine_lab.host import derived
from refine_lab.models.base import FastWeightLM
from refine_lab.models.head import Head
from refine_lab.models.inputs import read_inputs
from refine_lab.models.state import Layer, State, Trace
from refine_lab.models.writes import MemoryPart
from refine_lab.ops.fused import add_and_norm, pre_norm, swiglu


class GatedMLP(nn.Module):
    """SwiGLU of width `intermediate_size`; None: 2/3 * `hidden_ratio` * hidden size, rounded up to a multiple of 256."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        if inner is None:
            inner = -int(width * (config.hidden_ratio or 4) * 2 / 3) // 256 * -256
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return swiglu(self.gate_proj(x), self.up_proj(x), self.down_proj)


class Block(nn.Module):
    """A layer with memory and a SwiGLU, each with a pre-norm and a residual connection."""

    def __init__(self, config: Any, attention: Any, number: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = attention(config)
        self.attn.layer_idx = number  # as in flash-linear-attention and transformers
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Float[Tensor, "B T D"], state: Layer, *shared: Any) -> tuple[Float[Tensor, "B T D"], Any]:
        mixed, states = self.attn(pre_norm(self.attn_norm, x), state, *shared)
        normed, x = add_and_norm(self.mlp_norm, mixed, x)
        return x + self.mlp(normed), states


class Backbone(nn.Module):
    """A model without its head: embeddings, blocks, final norm.

    The family's `attention` takes its input [B, T, D], its layer's part of the state (empty without a state) and what
    `prepare` returns. It returns its output and the object from which `trace` computes states, or None in
    `hidden_states_only`. The class's `STATE` names tensors in the first layer of the family's states.
    """

    def __init__(self, config: Any, attention: Any) -> None:
        super().__init__()
        self.config, self.state_names = config, attention.STATE
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([Block(config, attention, number) for number in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def read(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        lengths: Int[Tensor, "B"],
        state: State | None,
        layer_inputs: list[Tensor] | None,
    ) -> Trace:
        """See `FastWeightLM.read_embeddings`."""
        if state is not None:
            state.expect(len(inputs_embeds), self.state_names)
        start = derived(torch.zeros_like, lengths) if state is None else state.lengths
        shared = self.prepare(start, inputs_embeds.shape[1], state)
        x, parts = inputs_embeds, []
        for index, layer in enumerate(self.layers):
            if layer_inputs is not None:
                layer_inputs.append(x)
            x, part = layer(x, ({}, {}) if state is None else state.layer(index), *shared)
            if part is not None:
                parts.append(part)
        return self.trace(self.norm(x), lengths, start, parts)

    def prepare(self, start: Int[Tensor, "B"], width: int, state: State | None) -> tuple[Any, ...]:
        """Returns what all blocks need to read `width` tokens after the `start` tokens of each row."""
        return ()

    def trace(self, hidden_states: Tensor, lengths: Tensor, start: Tensor, parts: Sequence[Any]) -> Trace:
        """Returns the trace of a forward pass; `parts` are the functions from positions to each layer's part of the state."""
        return Trace(hidden_states, lengths, parts, start)

    def forward(
        self, input_ids: Tensor | None = None, *, return_dict: bool | None = None, **others: Any
    ) -> BaseModelOutputWithPast | tuple:
        """transformers' forward of a model without a head: `last_hidden_state` [B, T, D] after the final norm.

        `others` are the remaining arguments of `read_inputs`.
        """
        output, _ = read_inputs(self.read, self.get_input_embeddings(), self.config, input_ids, **others)
        return output.to_tuple() if return_dict is False else output


class BackboneLM(FastWeightLM):
    """A language model around a `Backbone`."""

    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    attention: ClassVar[type[nn.Module]]
    """The family's layer with memory. Modules with bare parameters initialise them in `reset_parameters`."""

    backbone: ClassVar[type[Backbone]] = Backbone

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.backbone(config, self.attention)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def memory_parts(self) -> tuple[MemoryPart, ...]:
        layers = ((number, layer.attn.memory) for number, layer in enumerate(self.model.layers))
        return tuple(MemoryPart(number, name, heads) for number, memory in layers for name, heads in memory.items())

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif reset := getattr(module, "reset_parameters", None):
            reset()
