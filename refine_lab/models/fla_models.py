"""Other flash-linear-attention models that use its cache, on CUDA; a state costs at most one segment of re-reading.

The layers' kernels return only the state at the end of their input. A batch is therefore read in segments of `SEGMENT`
tokens, and the state at each border is kept as a value. The state after a token is obtained by re-reading from the
preceding border: at most one segment per target, in pieces of 256, 128, ... tokens, where all targets that need a piece
of some size form one batch. These batches contain no padding, so every state is exact, whatever a layer does with
masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from refine_lab.host import derived, full
from refine_lab.models.base import FastWeightLM
from refine_lab.models.imports import import_quietly
from refine_lab.models.state import State, Trace, keeps_states

SEGMENT = 512
PIECES = (512, 256, 128, 64, 32, 16, 8, 4, 3, 2, 1)
"""Sizes of the segments in which a sequence is re-read.

There are few of them, so that kernels are autotuned only once; with the size 3, no odd remainder ends in a segment of one
token.
"""

Tensors = Mapping[str, Tensor]

FLA_MODELS: dict[str, tuple[str, str]] = {
    "comba": ("Comba", "recurrent [N, H, K, V]; conv q, k, v [N, D, W]"),
    "gated_deltaproduct": ("GatedDeltaProduct", "recurrent [N, H, K, V]; conv q, k, v [N, D, W]"),
    "gla": ("GLA", "recurrent [N, H, V, K]; conv q, k, v [N, D, W] where there are"),
    "gsa": ("GSA", "recurrent (keys, values) [N, H, K, M], [N, H, M, V]; conv q, k, v where there are"),
    "hgrn2": ("HGRN2", "recurrent [N, H, K, V]; conv q, f, i [N, D, W] where there are"),
    "kda": ("KDA", "recurrent [N, H, K, V]; conv q, k, v [N, D, W]"),
    "mesa_net": ("MesaNet", "recurrent (kk, kv) [N, H, K, K], [N, H, K, V]; conv q, k [N, D, W]"),
    "rwkv7": ("RWKV7", "recurrent [N, H, K, V]; conv and ffn: the token before [N, D]"),
}
"""`model_type` -> prefix of fla's classes, and the tensors in its cache (flash-linear-attention 0.6.0, fla/layers)."""

_ATTENTION = (
    "its layers keep keys and values, or positions, and fla keeps a single position counter for the whole batch even if its "
    "rows differ in length"
)
_ONE_TOKEN = "fla can continue it from a cache only one token at a time, and modifies the cache in place"
_NO_GRADIENT = "a kernel of fla drops the gradient of its final state"
_UNCHECKED = "its state has not been checked here"
FLA_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("abc", "bitnet", "deltaformer", "forgetting_transformer", "mla", "moba", "nsa",
         "parallax", "path_attn", "raven", "retnet", "rodimus", "stickbreaking_attn", "transformer", "wall_transformer",
         "yoco"), _ATTENTION),
    **dict.fromkeys(("log_linear_mamba2", "mamba", "mamba2", "mamba3", "samba"), _ONE_TOKEN),
    **dict.fromkeys(("hgrn", "rwkv6"), _NO_GRADIENT),
    **dict.fromkeys(
        ("cat", "cyclic_flow_attention", "lightnet", "linear_attn", "mom", "precond_gated_deltanet", "precond_kda"),
        _UNCHECKED),
}  # fmt: skip
"""`model_type` of fla's other models -> why it is refused."""

KINDS = ("recurrent_state", "conv_state", "ffn_state")


@cache
def fla_family(model_type: str) -> tuple[type, type[FastWeightLM]]:
    """Returns fla's configuration class and our model class, named as fla's, for a `model_type` of `FLA_MODELS`.

    Raises ImportError if fla is not installed.
    """
    prefix, _ = FLA_MODELS[model_type]
    module = _fla(f"fla.models.{model_type}")
    config_class, theirs = getattr(module, f"{prefix}Config"), getattr(module, f"{prefix}ForCausalLM")
    body = {"__module__": __name__, "__doc__": FlaLM.__doc__, "config_class": config_class}
    return config_class, type(theirs.__name__, (FlaLM, theirs), body)


def _fla(module: str) -> Any:
    return import_quietly(module, "flash-linear-attention 0.6.0 or later")


@dataclass(frozen=True, eq=False)
class SegmentedTrace(Trace):
    """A trace whose states are recomputed from the preceding border, at the cost of at most one segment per target."""

    read_again: Callable[[Int[Tensor, "B P"]], Tensors] | None = None

    def state_at(self, positions: Int[Tensor, "B P"]) -> State:
        bare = super().state_at(positions)  # checks the positions; there are no layers to ask
        assert self.read_again is not None
        return State(self.read_again(torch.as_tensor(positions, device=self.lengths.device)), bare.lengths)


class FlaLM(FastWeightLM):
    """A model of flash-linear-attention whose state is a value; the state's tensors are those of fla's cache."""

    devices = ("cuda",)
    model: Any

    def __init__(self, config: Any) -> None:
        if getattr(config, "attn", None) is not None:
            refusal = f"{type(self).__name__} with attention layers (attn {config.attn}) is not supported"
            raise ValueError(f"{refusal}: {_ATTENTION}")
        super().__init__(config)
        if isinstance(getattr(self, "lm_head", None), nn.Linear):  # fla's class has made it
            self.set_output_embeddings(self.lm_head)

    def read_embeddings(self, inputs_embeds, lengths=None, state=None, layer_inputs=None) -> Trace:
        """See `FastWeightLM.read_embeddings`. Raises RuntimeError for embeddings that are not on CUDA."""
        rows, width = inputs_embeds.shape[:2]
        if inputs_embeds.device.type not in self.devices:
            raise RuntimeError(
                f"{type(self).__name__} runs on CUDA only, as fla's kernels do, got {inputs_embeds.device}"
            )
        if state is not None:
            state.expect(rows, ())  # which tensors there are is each model's own
        if lengths is None:
            lengths = full((rows,), width, inputs_embeds.device)
        start = derived(torch.zeros_like, lengths) if state is None else state.lengths
        hidden, borders, inputs = [], [{} if state is None else dict(state.tensors)], []
        for segment in inputs_embeds.split(SEGMENT, 1):
            outputs, after, layers = self._run(segment, borders[-1], layer_inputs is not None)
            hidden.append(outputs)
            borders = [*borders, after] if keeps_states() else [after]
            inputs.append(layers)
        if layer_inputs is not None:
            layer_inputs += [torch.cat(parts, 1) for parts in zip(*inputs, strict=True)]
        read_again = partial(self._read_again, inputs_embeds, borders)
        return SegmentedTrace(torch.cat(hidden, 1), lengths, (), start, read_again=read_again)

    def _run(
        self, segment: Float[Tensor, "N t D"], before: Tensors, layers: bool = False
    ) -> tuple[Float[Tensor, "N t D"], dict[str, Tensor], tuple[Tensor, ...]]:
        """Returns hidden states, the cache tensors after `segment` and, if requested, the inputs of its layers.

        `before`, empty at the start of a sequence, is not changed.
        """
        if before and segment.shape[1] == 1 and torch.is_grad_enabled() and self.config.model_type == "mesa_net":
            raise ValueError("mesa_net passes no gradient through a single token read from a state: read at least two")
        asked = dict(use_cache=True, return_dict=True, output_hidden_states=layers)
        with self._kernels_with_gradients():
            output = self.model(inputs_embeds=segment, past_key_values=to_cache(before), **asked)
        inputs = tuple(output.hidden_states[:-1]) if layers else ()  # the last is the final norm's
        return output.last_hidden_state, from_cache(output.past_key_values, len(segment)), inputs

    @contextmanager
    def _kernels_with_gradients(self) -> Iterator[None]:
        """Selects kernels with a backward pass by `training`, which decides in fla between chunked and recurrent ones."""
        before = self.model.training
        self.model.train(torch.is_grad_enabled())
        try:
            yield
        finally:
            self.model.train(before)

    def _read_again(
        self, inputs_embeds: Float[Tensor, "B T D"], borders: Sequence[Tensors], positions: Int[Tensor, "B P"]
    ) -> dict[str, Tensor]:
        """Returns the tensors after each position, with B * P rows ordered (row, position)."""
        rows = [row for row, per_row in enumerate(positions.tolist()) for _ in per_row]
        plans = [plan(position + 1) for position in positions.flatten().tolist()]
        states: dict[str, Tensor] = {}
        for border in sorted({plan.border for plan in plans}):
            these = [i for i, plan in enumerate(plans) if plan.border == border]
            index = torch.tensor([rows[i] for i in these], device=inputs_embeds.device)
            _put(states, these, {name: x.index_select(0, index) for name, x in borders[border].items()}, len(plans))
        place = [plan.border * SEGMENT for plan in plans]
        fresh = {i for i, plan in enumerate(plans) if not borders[plan.border]}
        for size in PIECES:
            due = [i for i, plan in enumerate(plans) if size in plan.pieces]
            for chosen in ([i for i in due if i in fresh], [i for i in due if i not in fresh]):
                if chosen:
                    segment = torch.stack([inputs_embeds[rows[i], place[i] : place[i] + size] for i in chosen])
                    index = torch.tensor(chosen, device=inputs_embeds.device)
                    first = chosen[0] in fresh
                    before = {} if first else {name: x.index_select(0, index) for name, x in states.items()}
                    _put(states, chosen, self._run(segment, before)[1], len(plans))
            fresh.difference_update(due)
            for i in due:
                place[i] += size
        return states


@dataclass(frozen=True)
class LayerPlan:
    """How to compute the state after some tokens: the border to start from and the piece sizes (largest first)."""

    border: int
    pieces: tuple[int, ...]


def plan(tokens: int) -> LayerPlan:
    """Returns the cheapest plan; one that would end in a single token starts a segment earlier if possible."""
    border, rest = divmod(tokens, SEGMENT)
    if rest == 1 and border:
        border, rest = border - 1, rest + SEGMENT
    pieces, odd = [], rest % 2 == 1 and rest > 1
    rest -= 3 * odd
    for size in PIECES:
        if size == 3:
            pieces += [3] * odd
        elif rest >= size:
            pieces.append(size)
            rest -= size
    return LayerPlan(border, tuple(pieces))


def _put(states: dict[str, Tensor], rows: Sequence[int], new: Tensors, total: int) -> None:
    """Replaces some rows of every tensor out of place; missing tensors start as zeros."""
    for name, x in new.items():
        index = torch.tensor(rows, device=x.device)
        old = states[name] if name in states else x.new_zeros(total, *x.shape[1:])
        states[name] = old.index_copy(0, index, x)


# -- fla's cache ---------------------------------------------------------------------------------------------------------


def to_cache(tensors: Tensors) -> Any:
    """Returns fla's cache with copies of the named tensors, since single-token decoding changes some in place."""
    layers: list[dict[str, Any]] = []
    for name, x in tensors.items():
        number, kind, *part = name.split(".")
        while len(layers) <= int(number):
            layers.append(dict.fromkeys((*KINDS, "attn_state")))
        layers[int(number)][kind] = (*(layers[int(number)][kind] or ()), x.clone()) if part else x.clone()
    return _fla("fla.models.utils").Cache.from_legacy_cache(tuple(layers))


def from_cache(cache: Any, rows: int) -> dict[str, Tensor]:
    """Returns the tensors of fla's cache, named by layer, kind and index, each with one row per sequence.

    Raises ValueError, naming the layer, for a state that does not consist of such tensors.
    """
    named: dict[str, Tensor] = {}
    for number in range(len(cache)):
        for kind, value in cache[number].items():
            if value is None:
                continue
            several = isinstance(value, (tuple, list))
            parts = {f"{kind}.{place}": x for place, x in enumerate(value)} if several else {kind: value}
            for name, x in parts.items():
                if kind not in KINDS or not isinstance(x, Tensor) or x.shape[:1] != (rows,):
                    shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                    raise ValueError(f"layer {number} keeps {name} {shape}, not a tensor of {rows} rows of {KINDS}")
                named[f"{number}.{name}"] = x
    return named
