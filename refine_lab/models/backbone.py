"""The backbone of DeltaNet, GatedDeltaNet and LaCT (embeddings, blocks, final norm), and the language model around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from refine_lab.models.base import FastWeightLM
from refine_lab.models.head import Head
from refine_lab.models.inputs import Call, read_inputs
from refine_lab.models.state import State, Trace


class Backbone(nn.Module):
    """A model without its head: embeddings, blocks, final norm.

    A family defines its blocks and `STATE`. A block takes its input [B, T, D], its layer's part of the state (or None)
    and what `prepare` returns. It returns its output and the object from which `trace` computes states, None in
    `hidden_states_only`.
    """

    STATE: ClassVar[frozenset[str]]
    """Names of tensors in the first layer of this family's states."""

    def __init__(self, config: Any, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([block() for _ in range(config.num_hidden_layers)])
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
            state.expect(len(inputs_embeds), self.STATE)
        start = torch.zeros_like(lengths) if state is None else state.lengths
        shared = self.prepare(start, inputs_embeds.shape[1], state)
        x, parts = inputs_embeds, []
        for index, layer in enumerate(self.layers):
            if layer_inputs is not None:
                layer_inputs.append(x)
            x, part = layer(x, None if state is None else state.layer(index), *shared)
            if part is not None:
                parts.append(part)
        return self.trace(self.norm(x), lengths, start, parts)

    def prepare(self, start: Int[Tensor, "B"], width: int, state: State | None) -> tuple[Any, ...]:
        """Returns what all blocks need to read `width` tokens after the `start` tokens of each row."""
        return ()

    def trace(self, hidden_states: Tensor, lengths: Tensor, start: Tensor, parts: Sequence[Any]) -> Trace:
        """Returns the trace of a reading; `parts` are the functions from positions to each layer's part of the state."""
        return Trace(hidden_states, lengths, parts, start)

    def forward(
        self, input_ids: Tensor | None = None, *, return_dict: bool | None = None, **others: Any
    ) -> BaseModelOutputWithPast | tuple:
        """transformers' forward of a model without a head: `last_hidden_state` [B, T, D] after the final norm.

        `others` are the remaining fields of `Call`.
        """
        call = Call(input_ids=input_ids, **others)
        output, _ = read_inputs(self.read, self.get_input_embeddings(), self.config, call)
        return output.to_tuple() if return_dict is False else output


class BackboneLM(FastWeightLM):
    """A language model around a `Backbone`."""

    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    OWN_INITIALISATION: ClassVar[tuple[type, ...]]
    """Modules of the family that initialise their own parameters in `reset_parameters`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.backbone(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def backbone(self, config: Any) -> Backbone:
        """Returns the model without its head."""
        raise TypeError(f"{type(self).__name__} must define backbone")

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, self.OWN_INITIALISATION):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
