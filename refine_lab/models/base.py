"""What every fast-weight language model shares: reading a batch to a trace, transformers' `forward` and `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from refine_lab.models.state import State, Trace
from refine_lab.ops.head import token_stats


class FastWeightLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose memory of a prefix is a `State`, never changed in place.

    A subclass gives `read` and `lm_head`; the rest of transformers' interface follows from these two.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    """Types of device that it runs on."""

    RECOMPUTABLE: ClassVar[tuple[str, ...]] = ("mlp", "blocks")
    """Parts that `refine_lab.models.recompute` may run twice."""

    _is_stateful = True  # a state cannot be cut back to fewer tokens: no assisted generation
    _input_embed_layer = "embeddings"
    lm_head: torch.nn.Linear

    if TYPE_CHECKING:  # what transformers decorates in ways that a type checker does not see through
        generate: Any
        from_pretrained: Any
        to: Any

    def read(
        self,
        input_ids: Int[Tensor, "B T"],
        lengths: Int[Tensor, "B"] | None = None,
        state: State | None = None,
    ) -> Trace:
        """Read a batch, padded on the right, from `state` (the empty one by default). `lengths`: its real tokens a row."""
        raise TypeError(f"{type(self).__name__} must define read")

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """The weight that turns a final hidden state into logits."""
        return self.lm_head.weight

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state comes from the forward, not from a cache made beforehand

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B _"] | Bool[Tensor, "B _"] | None = None,
        past_key_values: State | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """transformers' forward; `past_key_values` takes and returns a `State`.

        Pads (`attention_mask` 0) may stand on either side and enter nothing. `hidden_states` holds the final layer's
        only. `labels` equal to -100 are left out of the loss.
        """
        rows, width = input_ids.shape
        order, lengths, packed = None, torch.full((rows,), width, device=input_ids.device), input_ids
        if attention_mask is not None and not (real := attention_mask[:, -width:].bool()).all():
            order, lengths = torch.sort(~real, dim=-1, stable=True).indices, real.sum(-1)
            packed = input_ids.gather(1, order)
            if (empty := lengths == 0).any():
                raise ValueError(
                    f"attention_mask leaves no token of row {int(empty.nonzero()[0])}; a row needs at least one"
                )
        trace = self.read(packed, lengths, past_key_values)
        hidden_states = trace.hidden_states
        if order is not None:
            back = order.argsort(-1).unsqueeze(-1).expand_as(hidden_states)
            hidden_states = hidden_states.gather(1, back)
        kept = self.config.use_cache if use_cache is None else use_cache
        final_state: Any = trace.final_state if kept else None  # a State where transformers has a Cache
        output = CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(hidden_states, labels),
            logits=self.lm_head(hidden_states[:, -logits_to_keep:]),
            past_key_values=final_state,
            hidden_states=(hidden_states,) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(self, hidden_states: Float[Tensor, "B T D"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        targets = labels[:, 1:]
        kept = targets != -100
        stats = token_stats(hidden_states[:, :-1][kept], self.head_weight, targets[kept], entropy=False)
        return -stats.logprobs.mean()

    def prepare_inputs_for_generation(
        self,
        input_ids: Int[Tensor, "B T"],
        next_sequence_length: int | None = None,
        past_key_values: State | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if next_sequence_length is not None and past_key_values is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }
