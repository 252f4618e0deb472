"""Fast weights as a value: a model's state after some tokens, and the trace from which states are taken."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from refine_lab.host import derived, fetch, host, indices, to_device
from refine_lab.runs.durable import replacing
from refine_lab.validation import ConfigError, require

_KEEPS_STATES = ContextVar("keeps_states", default=True)
Part = TypeVar("Part")


@contextmanager
def hidden_states_only() -> Iterator[None]:
    """Disables states for forward passes in this context, so that each layer's memory is freed before the next one runs.

    Hidden states are unaffected. `Trace.state_at` of such a pass raises RuntimeError.
    """
    token = _KEEPS_STATES.set(False)
    try:
        yield
    finally:
        _KEEPS_STATES.reset(token)


def keeps_states() -> bool:
    """Returns whether forward passes keep what their states are computed from (see `hidden_states_only`).

    Code that torch.compile traces always keeps it.
    """
    return torch.compiler.is_compiling() or _KEEPS_STATES.get()


def kept(part: Part) -> Part | None:
    """Returns `part`, or None if forward passes keep no states."""
    return part if keeps_states() else None


@dataclass(eq=False)
class State:
    """A model's memory of the tokens it has read: named tensors, each with one row per sequence.

    A state is a value: no operation changes it in place, so it can be branched from any number of times. Each model
    defines its own tensors (a matrix, a convolution window, a cache). What several rows have in common (the fast
    weights of one chunk, the cache of one prefix) is stored once in `shared`, and `sources` gives the row of it that
    each row uses: branching copies the rows but never what they share.
    """

    tensors: Mapping[str, Tensor]
    lengths: Int[Tensor, "B"]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    sources: Int[Tensor, "B"] | None = None  # None where nothing is shared

    is_compileable = False  # asked by transformers' `generate`

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """Applies `function` to every tensor."""
        return replace(self._rows(function), shared={name: function(x) for name, x in self.shared.items()})

    def select(self, rows: Int[Tensor, "P"] | Sequence[int]) -> State:
        """Returns the given rows, in the given order; shared tensors are kept whole."""
        index = indices(rows, self.lengths.device)
        return self._rows(lambda x, index: x.index_select(0, index), index)

    def repeat(self, times: int) -> State:
        """Repeats every row `times` times, with adjacent copies; shared tensors are not copied."""
        return self if times == 1 else self._rows(lambda x: x.repeat_interleave(times, 0))

    def _rows(self, take: Callable[..., Tensor], *index: Tensor) -> State:
        tensors = {name: take(x, *index) for name, x in self.tensors.items()}
        sources = None if self.sources is None else derived(take, self.sources, *index)
        return State(tensors, derived(take, self.lengths, *index), self.shared, sources)

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        """Concatenates the rows of several states; shorter tensors are padded with zeros at the end."""
        first = states[0]
        for state in states:
            if state.tensors.keys() != first.tensors.keys() or state.shared.keys() != first.shared.keys():
                raise ValueError("states of different models cannot be stacked")
        tensors = {name: _cat([state.tensors[name] for state in states]) for name in first.tensors}
        shared = {name: _cat([state.shared[name] for state in states]) for name in first.shared}
        sources, offset = [], 0
        for state in states:
            if state.sources is not None:
                sources.append(derived(partial(torch.add, other=offset), state.sources))
                offset += len(next(iter(state.shared.values())))
        lengths = derived(_joined, *(state.lengths for state in states))
        return State(tensors, lengths, shared, derived(_joined, *sources) if sources else None)

    def detach(self) -> State:
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> State:
        return self.map(lambda x: to_device(x, device))

    def save(self, path: str | Path) -> None:
        """Writes the state as safetensors; of shared tensors, only the rows that are used."""
        state = self.detach()
        tensors = {name: x.contiguous() for name, x in state.tensors.items()} | {"lengths": state.lengths.contiguous()}
        if state.sources is not None:
            used, sources = torch.unique(state.sources, return_inverse=True)
            tensors |= {SHARED + name: x.index_select(0, used) for name, x in state.shared.items()}
            tensors["sources"] = sources
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary)

    @staticmethod
    def load(path: str | Path) -> State:
        """Reads the state written by `save`. Raises FileNotFoundError or ValueError."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no saved state at {path}")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} does not contain a saved state: {error}") from error
        if "lengths" not in tensors:
            raise ValueError(f"{path} does not contain a saved state: it has no tensor 'lengths'")
        lengths, sources = tensors.pop("lengths"), tensors.pop("sources", None)
        shared = _within(SHARED, tensors)
        tensors = {name: x for name, x in tensors.items() if not name.startswith(SHARED)}
        rows = [*tensors.values()] if sources is None else [*tensors.values(), sources]
        if lengths.ndim != 1 or any(x.shape[:1] != lengths.shape for x in rows):
            raise ValueError(f"{path} does not contain a saved state: its tensors do not have one row per sequence")
        if bool(shared) != (sources is not None) or any(
            sources is not None and not 0 <= int(sources.min()) <= int(sources.max()) < len(x) for x in shared.values()
        ):
            raise ValueError(f"{path} does not contain a saved state: its rows refer to shared tensors that it lacks")
        return State(tensors, lengths, shared, sources)

    def expect(self, rows: int, names: Collection[str]) -> None:
        """Raises ValueError unless the state has `rows` rows, and tensors of these names in its first layer."""
        require(self.rows == rows, "the rows of a state", self.rows, str(rows))
        own, _ = self.layer(0)
        if missing := set(names) - own.keys():
            raise ValueError(
                f"the state belongs to a different model: its first layer has {sorted(own)}, not {sorted(missing)}"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of tokens read by the longest row; transformers' `generate` uses this name."""
        return int(host(self.lengths).max())

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for part in (self.tensors, self.shared) for x in part.values())

    def layer(self, index: int) -> Layer:
        """Returns one layer's part, with its own tensor names."""
        return _within(f"{index}.", self.tensors), _within(f"{index}.", self.shared)


Layer = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""A layer's part of a state: its tensors with one row per sequence, and those that rows share."""

SHARED = "shared:"


def _within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with the prefix, named without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates all rows, after padding each part with zeros to the largest size."""
    largest = torch.Size(map(max, zip(*(x.shape[1:] for x in parts), strict=True)))
    filled = []
    for x in parts:
        behind = [size for have, most in zip(x.shape[1:], largest, strict=True) for size in (most - have, 0)]
        filled.append(x if x.shape[1:] == largest else F.pad(x, behind[::-1]))  # pad counts from the last dimension
    return torch.cat(filled)


@dataclass(frozen=True, eq=False)
class Sharing:
    """What the states of a trace share: the source of each position, and each layer's tensors for given sources."""

    sources: Callable[[Int[Tensor, "B P"]], Int[Tensor, "B P"]]
    layers: Sequence[Callable[[Int[Tensor, "S"]], Mapping[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class Trace:
    """The result of reading a batch: hidden states after the final norm, and access to the state after any token."""

    hidden_states: Float[Tensor, "B T D"]
    lengths: Int[Tensor, "B"]
    layers: Sequence[Callable[[Int[Tensor, "B P"]], Mapping[str, Tensor]]]
    start: Int[Tensor, "B"]  # tokens that had been read before this batch
    sharing: Sharing | None = None  # for models whose states share something
    states_kept: bool = field(default_factory=keeps_states)

    def state_at(self, positions: Int[Tensor, "B P"]) -> State:
        """Returns the state after each position of each row, B * P rows ordered (row, position), without re-reading.

        It is differentiable: a gradient on the state flows back into the tokens up to the position, and no further.

        Raises ValueError for a position outside its row, and RuntimeError for a trace computed inside `hidden_states_only`.
        """
        if not self.states_kept:
            raise RuntimeError(
                "this trace was computed inside hidden_states_only, which keeps no states: compute it outside that context"
            )
        positions = indices(positions, self.lengths.device)
        matrix = positions.ndim == 2 and len(positions) == len(self.lengths)
        require(matrix, "positions", list(positions.shape), f"of shape [{len(self.lengths)}, P]")
        fetch(positions, self.lengths)
        for row, (found, length) in enumerate(zip(host(positions).tolist(), host(self.lengths).tolist(), strict=True)):
            if found and not 0 <= min(found) <= max(found) < length:
                raise ConfigError(f"positions of row {row}", found, f"from 0 to {length - 1}")
        lengths = derived(lambda start, places: (start.unsqueeze(-1) + places + 1).flatten(), self.start, positions)
        tensors = _named(self.layers, positions)
        if self.sharing is None:
            return State(tensors, lengths)
        used, sources = torch.unique(host(self.sharing.sources(positions)).flatten(), return_inverse=True)
        used, sources = (indices(x, positions.device) for x in (used, sources))
        return State(tensors, lengths, _named(self.sharing.layers, used), sources)

    @property
    def final_state(self) -> State:
        """The state after the last real token of every row."""
        return self.state_at(self.last)

    @property
    def last(self) -> Int[Tensor, "B 1"]:
        """The position of the last real token of every row."""
        return derived(lambda lengths: (lengths - 1).unsqueeze(-1), self.lengths)

    def hidden_at(self, positions: Int[Tensor, "B P"]) -> Float[Tensor, "B P D"]:
        """Returns the hidden states at the given positions."""
        return self.hidden_states.gather(1, positions.unsqueeze(-1).expand(-1, -1, self.hidden_states.shape[-1]))


def _named(layers: Sequence[Callable[[Tensor], Mapping[str, Tensor]]], index: Tensor) -> dict[str, Tensor]:
    """Returns every layer's tensors for `index`, prefixed with the layer's number."""
    return {f"{number}.{name}": x for number, layer in enumerate(layers) for name, x in layer(index).items()}
