"""The base class of fast-weight language models: reading a batch into a trace, and transformers' `forward` and `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from refine_lab.host import full
from refine_lab.models.activation_checkpointing import checkpoint_activations, runs_again
from refine_lab.models.head import Head, WrappedHead
from refine_lab.models.inputs import read_inputs
from refine_lab.models.state import State, Trace
from refine_lab.models.writes import MemoryPart
from refine_lab.ops.delta_rule import CHUNK_SIZE
from refine_lab.ops.fla_delta_rule import SEGMENT_SIZE
from refine_lab.validation import ConfigError, require

logger = logging.get_logger(__name__)


class FastWeightLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose memory of a prefix is a `State`, never changed in place.

    A subclass defines `read_embeddings` (through a backbone named `model`) and `lm_head`; the rest of transformers'
    interface is built on these two.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    """Device types that the model can run on."""

    RECOMPUTABLE: ClassVar[tuple[str, ...]] = ("mlp", "blocks")
    """Parts that `refine_lab.models.activation_checkpointing` can recompute; transformers' checkpointing uses the last one."""

    FAST_WEIGHTS: ClassVar[tuple[str, ...]] = ("recurrent_state",)
    """Names of the state tensors that are fast weights, one matrix per head."""

    STATE_PARTS: ClassVar[Mapping[str, tuple[str, int]]] = {"recurrent_state": ("recurrent_state", 1)}
    """Name of a state tensor -> the part of the memory that it belongs to (see `models.writes`), and its axis of heads."""

    _is_stateful = True  # a state cannot be cut back to fewer tokens: no assisted generation
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # transformers' Trainer asks: `num_items_in_batch` is an argument of `forward`
    lm_head: nn.Module

    if TYPE_CHECKING:  # what transformers decorates in ways that a type checker does not see through
        generate: Any
        from_pretrained: Any
        to: Any
        model: Any

    def read(
        self,
        input_ids: Int[Tensor, "B T"],
        lengths: Int[Tensor, "B"] | None = None,
        state: State | None = None,
    ) -> Trace:
        """Reads a batch, padded on the right, from `state` (empty by default). `lengths` are the real tokens per row."""
        return self.read_embeddings(self.get_input_embeddings()(input_ids), lengths, state)

    def read_embeddings(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        lengths: Int[Tensor, "B"] | None = None,
        state: State | None = None,
        layer_inputs: list[Tensor] | None = None,
    ) -> Trace:
        """Reads the embeddings of tokens, as `read`; appends the input [B, T, D] of each layer to `layer_inputs`."""
        if lengths is None:
            rows, width = inputs_embeds.shape[:2]
            lengths = full((rows,), width, inputs_embeds.device)
        return self.model.read(inputs_embeds, lengths, state, layer_inputs)

    @property
    def kernel_dtype(self) -> torch.dtype | None:
        """Returns the dtype of kernels that ignore the model's dtype, or None. On CUDA, fla's kernels use bfloat16."""
        return torch.bfloat16 if self.device.type == "cuda" and find_spec("fla") is not None else None

    @property
    def borders(self) -> set[int]:
        """Returns token counts at which a chunk, segment or attention window ends; the parity gate tests around each."""
        return {CHUNK_SIZE} if self.kernel_dtype is None else {CHUNK_SIZE, SEGMENT_SIZE}

    @property
    def later_borders(self) -> set[int]:
        """Returns further token counts after which the arithmetic changes for the first time."""
        return set()

    @property
    def orthogonalises_updates(self) -> bool:
        """Returns whether updates of the fast weights are orthogonalised, which magnifies the rounding of gradients."""
        return False

    @property
    def longest_context(self) -> int | None:
        """Returns the maximum context in tokens, or None: recurrences and windowed attention have no limit."""
        return None

    @classmethod
    def attention_window(cls, config: Any) -> int:
        """Returns how many of the last tokens windowed attention reads under a configuration; 0 for models without one."""
        return 0

    @property
    def memory_parts(self) -> tuple[MemoryPart, ...]:
        """Returns the parts of the memory whose writes `models.writes.scaled_writes` can scale, in the order of the layers.

        Raises ValueError for a family whose kernels take no factor for each write.
        """
        allowed = "DeltaNet, GatedDeltaNet, LaCT or a hybrid of transformers, whose writes can be scaled token by token"
        raise ConfigError("the model's family", self.config.model_type, allowed)

    @property
    def head(self) -> Head | WrappedHead:
        """Returns the module that maps final hidden states to logits or, given ids, to `TokenStats`; see `Head.forward`."""
        if isinstance(self.lm_head, Head):
            return self.lm_head
        return WrappedHead(self.lm_head, self.config.get_text_config().vocab_size)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """transformers' setter, which converts a plain linear layer, such as a resized head, to a `Head`."""
        self.lm_head = Head.of(new_embeddings) if type(new_embeddings) is nn.Linear else new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state comes from the forward, not from a cache made beforehand

    @staticmethod
    def _reorder_cache(past_key_values: State, beam_idx: Int[Tensor, "B"]) -> State:
        """Returns the state of the selected beams, for beam search."""
        return past_key_values.select(beam_idx)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: State | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, "_"] = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """transformers' forward; `past_key_values` takes and returns a `State`.

        Padding (`attention_mask` 0) may occur anywhere in a row and affects nothing: its outputs are those of the
        previous token of the call, or of the row's first token if there is none. `hidden_states` holds layers + 1
        tensors, the last after the final norm. `logits_to_keep` is a number of last columns (0: all) or the columns
        themselves.

        The loss is the mean over the labels that are not -100 and have a preceding token in their row; with
        `num_items_in_batch`, transformers' label count of a whole update, it is their sum divided by that number.

        Raises ValueError, naming the argument, for what is not supported: `output_attentions`, masks that are not 2-D,
        positions with gaps, rows without a token.
        """
        output, packing = read_inputs(
            self.read_embeddings,
            self.get_input_embeddings(),
            self.config,
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden_states = output.last_hidden_state
        assert hidden_states is not None
        kept = logits_to_keep
        if isinstance(logits_to_keep, int):
            require(logits_to_keep >= 0, "logits_to_keep", logits_to_keep, "0 or more")
            kept = slice(-logits_to_keep, None)
        preceded = packing.real.cumsum(-1) > 0
        result = CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(hidden_states, labels, preceded, num_items_in_batch),
            logits=self.head(hidden_states[:, kept]),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result

    def _loss(
        self,
        hidden_states: Float[Tensor, "B T D"],
        labels: Int[Tensor, "B T"],
        preceded: Tensor,
        num_items_in_batch: int | Tensor | None,
    ) -> Float[Tensor, ""]:
        """Returns the next-token loss; `preceded` [B, T] is whether a column holds a token or follows one."""
        targets = labels[:, 1:]
        labelled = targets != -100
        kept = labelled & preceded[:, :-1]
        stats = self.head(hidden_states[:, :-1][kept], targets[kept], entropy=False)
        if num_items_in_batch is None:
            return -stats.logprobs.mean()
        first = labelled.sum() - kept.sum()  # the Trainer counts the first token of a row with pads before it, too
        if first:
            logger.warning_once(
                "A row with pads on its left has a label on its first token, which nothing precedes: it is left out of the "
                "loss. Pad on the right, or set that label to -100, so that labels are counted correctly when one update "
                "accumulates gradients over several forward passes."
            )
        return -stats.logprobs.sum() / (num_items_in_batch - first)

    def prepare_inputs_for_generation(
        self,
        input_ids: Int[Tensor, "B T"],
        next_sequence_length: int | None = None,
        past_key_values: State | None = None,
        inputs_embeds: Float[Tensor, "B _ D"] | None = None,
        position_ids: Int[Tensor, "B _"] | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the arguments of `forward` for the tokens that `past_key_values` has not read; called by `generate`."""
        name, new = "input_ids", input_ids
        if inputs_embeds is not None and is_first_iteration:
            name, new = "inputs_embeds", inputs_embeds
        if next_sequence_length is not None and past_key_values is not None:
            new = new[:, -next_sequence_length:]
        kwargs.pop("tokenizer", None)  # of `stop_strings`, for `generate` alone
        # later positions count from the last column on, which may be a pad
        positions = position_ids[:, -new.shape[1] :] if position_ids is not None and is_first_iteration else None
        return {**kwargs, name: new, "past_key_values": past_key_values, "position_ids": positions, "logits_to_keep": 1}

    # -- activation checkpointing by transformers' own switch ----------------------------------------------------------

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Enables or disables recomputation of blocks, for `gradient_checkpointing_enable` and `..._disable`.

        Raises ValueError for `every_n_layers` other than 1, `offload`, and settings of torch's checkpoint other than
        `use_reentrant=False`.
        """
        if enable:
            settings = dict(getattr(gradient_checkpointing_func, "keywords", {}))
            if settings.pop("use_reentrant", False):
                raise ConfigError("use_reentrant", True, "False: a trace's states outlive the forward")
            if settings or getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
                allowed, value = "use_reentrant=False and no offload", settings or "offload=True"
                raise ConfigError("checkpointing", value, allowed, f"checkpointing must have {allowed}, got {value}")
            require(every_n_layers == 1, "every_n_layers", every_n_layers, "1")
        checkpoint_activations(self, self.RECOMPUTABLE[-1] if enable else "none")

    @property
    def is_activation_checkpointing(self) -> bool:
        """Returns whether any part is recomputed in the backward pass."""
        return any(map(runs_again, self.modules()))

    is_gradient_checkpointing = is_activation_checkpointing  # its name in transformers' Trainer and in PEFT
