"""Converts transformers' model inputs for `read`: padding, masks and embeddings; rejects unsupported arguments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from refine_lab.models.state import State, Trace, hidden_states_only
from refine_lab.validation import ConfigError, require

Read = Callable[[Tensor, Tensor, "State | None", "list[Tensor] | None"], Trace]
"""A model's `read_embeddings`: (inputs_embeds, lengths, state, layer_inputs) -> the trace."""


@dataclass(frozen=True, eq=False)
class Packing:
    """The real tokens of a padded batch, moved to the left of their rows, and the inverse mapping."""

    real: Bool[Tensor, "B T"]
    full: bool
    "Whether the batch has no padding."

    @staticmethod
    def of(attention_mask: Any, embedded: Float[Tensor, "B T D"], state: State | None) -> Packing:
        """Returns the packing of a call's last T tokens. Raises ValueError for a mask without one number per token."""
        rows, width = embedded.shape[:2]
        if attention_mask is None:
            return Packing(torch.ones(rows, width, dtype=torch.bool, device=embedded.device), full=True)
        is_tensor = isinstance(attention_mask, Tensor)
        shape = list(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        matrix = is_tensor and attention_mask.ndim == 2
        require(matrix, "attention_mask", shape, "2-D, 1 for a token and 0 for padding")
        columns, least = attention_mask.shape[1], "" if state is None else " or more"
        fits = len(attention_mask) == rows and (columns == width if state is None else columns >= width)
        require(fits, "attention_mask", shape, f"of shape [{rows}, {width}{least}]")
        real = attention_mask[:, -width:].bool()
        if (empty := ~real.any(-1)).any():
            row = f"row {int(empty.nonzero()[0])}"
            sentence = f"attention_mask leaves no token of {row}; a row needs at least one"
            raise ConfigError("attention_mask", row, "at least one token in every row", sentence)
        return Packing(real, full=bool(real.all()))

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        return self.real.sum(-1)

    def pack(self, x: Tensor) -> Tensor:
        """Returns [B, T, ...] with each row's real tokens first, in order."""
        if self.full:
            return x
        order = torch.sort(~self.real, dim=-1, stable=True).indices
        return x.gather(1, _like(order, x))

    def unpack(self, x: Tensor) -> Tensor:
        """Inverts `pack`; a padded column gets the value of the last real token before it.

        Padding changes nothing, so the model's state after it is the one before it. Padding before a row's first token
        gets the first token's value.
        """
        if self.full:
            return x
        return x.gather(1, _like((self.real.cumsum(-1) - 1).clamp(min=0), x))


def _like(index: Int[Tensor, "B T"], x: Tensor) -> Tensor:
    return index.view(*index.shape, *[1] * (x.ndim - 2)).expand(*index.shape, *x.shape[2:])


def read_inputs(
    read: Read,
    embed: nn.Module,
    config: Any,
    input_ids: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
) -> tuple[BaseModelOutputWithPast, Packing]:
    """Returns transformers' output of a model without its head, and the packing of its tokens.

    The arguments are those of transformers' `forward`. `hidden_states` has layers + 1 tensors if requested: the input
    of each layer, then the final hidden states. Raises ValueError, naming the argument, for what is not supported.
    """
    if config.output_attentions if output_attentions is None else output_attentions:
        sentence = "output_attentions must be False: fast weights have no attention weights to return"
        raise ConfigError("output_attentions", True, "False", sentence)
    embedded, state = _embedded(embed, input_ids, inputs_embeds), past_key_values
    if state is not None and not isinstance(state, State):
        raise ValueError(f"past_key_values must be a State of this package, got {type(state).__name__}")
    packing = Packing.of(attention_mask, embedded, state)
    if position_ids is not None:
        _check_positions(position_ids, packing, state)
    all_layers = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    layer_inputs: list[Tensor] | None = [] if all_layers else None
    keep = config.use_cache if use_cache is None else use_cache
    with nullcontext() if keep else hidden_states_only():
        trace = read(packing.pack(embedded), packing.lengths, state, layer_inputs)
    final = packing.unpack(trace.hidden_states)
    past: Any = trace.final_state if keep else None  # a State where transformers has a Cache
    layers = None if layer_inputs is None else (*map(packing.unpack, layer_inputs), final)
    return BaseModelOutputWithPast(last_hidden_state=final, past_key_values=past, hidden_states=layers), packing


def _embedded(embed: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Float[Tensor, "B T D"]:
    if input_ids is not None and inputs_embeds is None:
        name, given, ndim, form = "input_ids", input_ids, 2, "[B, T]"
    elif inputs_embeds is not None and input_ids is None:
        name, given, ndim, form = "inputs_embeds", inputs_embeds, 3, "[B, T, D]"
    else:
        number, field = "neither" if input_ids is None else "both", "exactly one of input_ids and inputs_embeds"
        raise ConfigError(field, number, "given", f"{field} must be given, got {number}")
    allowed = f"of shape {form} with at least one token per row"
    require(given.ndim == ndim and given.shape[1] > 0, name, list(given.shape), allowed)
    return given if input_ids is None else embed(given)


def _check_positions(position_ids: Tensor, packing: Packing, state: State | None) -> None:
    """Raises ValueError for positions that do not count a row's tokens consecutively from the end of its state."""
    rows, width = packing.real.shape
    shape = list(position_ids.shape)
    require(shape in ([1, width], [rows, width]), "position_ids", shape, f"of shape [{rows}, {width}]")
    start = torch.zeros_like(packing.lengths) if state is None else state.lengths
    place = torch.arange(width, device=position_ids.device)
    positions = packing.pack(position_ids.expand(rows, width))
    wrong = (positions != start.unsqueeze(-1) + place) & (place < packing.lengths.unsqueeze(-1))
    if wrong.any():
        row = int(wrong.any(-1).nonzero()[0])
        raise ValueError(
            f"position_ids must count the tokens of row {row} from {int(start[row])} without a gap, got "
            f"{int(positions[row][wrong[row]][0])}: a state knows how many tokens it has read"
        )
