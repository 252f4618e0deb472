"""Attention inside a fast-weight model, with keys and values as part of a state; shared prefixes are stored once.

Each row of a state refers to a source (the keys and values of one prefix, in `State.shared`), sees its first
`prefix_lengths` tokens, and has its own tokens after them. When a batch is read, the rows of one source are placed side
by side after its prefix and a mask restricts what each row sees, so that no branch needs a copy of its prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refine_lab.host import derived
from refine_lab.models.state import Sharing, State, Trace, keeps_states
from refine_lab.models.writes import write_factors

Parts = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Grouping:
    """Rows by source: row r is in slot `place[r]` of S sources times M slots; unused slots stay empty."""

    place: Int[Tensor, "R"]
    sources: int
    slots: int
    regular: bool  # every slot taken, in order: grouping is a view

    @staticmethod
    def of(sources: Int[Tensor, "R"], number: int) -> Grouping:
        """Returns the grouping of rows with the given `sources`, each in 0..number - 1."""
        counts = torch.bincount(sources, minlength=number)
        order = sources.argsort(stable=True)
        first = counts.cumsum(0) - counts
        rows = torch.arange(len(sources), device=sources.device)
        slots = int(counts.max())
        place = torch.empty_like(rows).scatter(0, order, rows - first[sources[order]]) + sources * slots
        return Grouping(place, number, slots, number * slots == len(rows) and bool((place == rows).all()))

    def pack(self, x: Tensor) -> Tensor:
        """[R, n, ...] -> [S, M * n, ...], zeros in empty slots."""
        if not self.regular:
            x = x.new_zeros(self.sources * self.slots, *x.shape[1:]).index_copy(0, self.place, x)
        return x.reshape(self.sources, -1, *x.shape[2:])

    def unpack(self, x: Tensor, tokens: int) -> Tensor:
        """[S, M * n, ...] -> [R, n, ...] for n = `tokens`."""
        x = x.reshape(-1, tokens, *x.shape[2:])
        return x if self.regular else x.index_select(0, self.place)


def _nothing(_: Tensor) -> dict[str, Tensor]:
    return {}


class PrefixRead:
    """One forward pass over a batch as its layers see it, passed to transformers' attention in place of a cache.

    Layers get their part of the previous state from it and store in it the function that returns their state after any
    token. Nothing is changed in place.
    """

    def __init__(self, state: State | None, inputs_embeds: Float[Tensor, "B T D"]) -> None:
        self.state, self.width = state, inputs_embeds.shape[1]
        self.states_kept = keeps_states()  # bound here: blocks that run again in the backward do so outside the context
        self.factors = write_factors()  # bound here for the same reason
        self.grouping: Grouping | None = None
        self.mask: Bool[Tensor, "S 1 _ _"] | None = None
        self._layers: dict[int, tuple[Callable[[Tensor], Parts], Callable[[Tensor], Parts]]] = {}
        if state is None or state.sources is None:
            self._sources = torch.arange(len(inputs_embeds), device=inputs_embeds.device)
            return
        self._sources = state.sources
        self.grouping = Grouping.of(state.sources, len(next(iter(state.shared.values()))))
        name = next(name for name in state.tensors if name.endswith(".prefix_lengths"))
        self._prefix_lengths = state.tensors[name]
        self._own_lengths = state.lengths - self._prefix_lengths
        self.mask = self._who_sees_whom(*state.layer(int(name.partition(".")[0])))

    def before(self, layer: int) -> Parts:
        """Returns the layer's own tensors in the state before the batch; empty without a state."""
        return {} if self.state is None else self.state.layer(layer)[0]

    def keep(self, layer: int, own: Callable[[Tensor], Parts], shared: Callable[[Tensor], Parts] = _nothing) -> None:
        """Stores the functions that return a layer's own and shared tensors, unless states are not kept."""
        if self.states_kept:
            self._layers[layer] = own, shared

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Returns all keys and values that the layer's queries may see, [S, H, N, d], given the batch's new ones."""
        values = self._scaled(layer_idx, values)
        new = {"keys": keys.transpose(1, 2), "values": values.transpose(1, 2)}
        if self.state is None or self.grouping is None:
            self.keep(layer_idx, partial(_hang, new), partial(_take, new))
            return keys, values
        own, shared = self.state.layer(layer_idx)
        read = {name: self.grouping.unpack(x, self.width) for name, x in new.items()}
        self.keep(layer_idx, partial(self._grow, own, read), partial(_take, shared))
        seen = (torch.cat([shared[n].to(x), self.grouping.pack(own[n]).to(x), x], 1) for n, x in new.items())
        keys, values = (x.transpose(1, 2) for x in seen)
        return keys, values

    def _scaled(self, layer_idx: int, values: Float[Tensor, "S H N d"]) -> Float[Tensor, "S H N d"]:
        """Returns the values of the batch's tokens, multiplied by their factors if there are any (see `models.writes`)."""
        factor = self.factors.get((layer_idx, "keys_values"))
        if factor is None:
            return values
        packed = factor if self.grouping is None else self.grouping.pack(factor)
        return values * packed.transpose(1, 2).unsqueeze(-1).to(values.dtype)

    def trace(self, hidden_states: Tensor, lengths: Tensor) -> Trace:
        start = derived(torch.zeros_like, lengths) if self.state is None else self.state.lengths
        layers = [self._layers[i] for i in range(len(self._layers))]
        own, shared = [x for x, _ in layers], [x for _, x in layers]
        sharing = Sharing(self._source_of, shared) if any(x is not _nothing for x in shared) else None
        return Trace(hidden_states, lengths, own, start, sharing)

    def _source_of(self, positions: Int[Tensor, "B P"]) -> Int[Tensor, "B P"]:
        return self._sources.unsqueeze(-1).expand_as(positions)

    def _who_sees_whom(self, own: Parts, shared: Parts) -> Bool[Tensor, "S 1 _ _"]:
        """Returns the attention mask: a token sees its row's prefix, its row's own tokens, and the batch up to itself.

        A token of an empty slot, or beyond its row's end, sees at least itself, since attention over no keys is
        undefined.
        """
        assert self.grouping is not None
        group, width, device = self.grouping, self.width, self._sources.device
        prefix, behind = (group.pack(x.unsqueeze(1)) for x in (self._prefix_lengths, self._own_lengths))  # [S, M]
        size, owned = shared["keys"].shape[1], own["keys"].shape[1]
        same = torch.eye(group.slots, dtype=torch.bool, device=device)
        in_prefix = torch.arange(size, device=device) < prefix.unsqueeze(-1)  # [S, M, T]
        in_own = (torch.arange(owned, device=device) < behind.unsqueeze(-1)).unsqueeze(1) & same.unsqueeze(-1)
        earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        in_batch = same[:, None, :, None] & earlier[:, None, :]  # [M, K, M, K]
        rows = (group.sources, group.slots, width)
        parts = (
            in_prefix.unsqueeze(2).expand(*rows, size),
            in_own.flatten(2).unsqueeze(2).expand(*rows, group.slots * owned),
            in_batch.flatten(2).expand(*rows, group.slots * width),
        )
        return torch.cat(parts, -1).flatten(1, 2).unsqueeze(1)

    def _grow(self, own: Parts, read: Parts, positions: Int[Tensor, "B P"]) -> dict[str, Tensor]:
        """Appends the batch up to each position to the rows' own tokens, padded with zeros."""
        owned, count = own["keys"].shape[1], positions.shape[1]
        lengths = (self._own_lengths.unsqueeze(-1) + positions + 1).unsqueeze(-1)
        place = torch.arange(int(lengths.max()), device=positions.device).expand(len(positions), count, -1)
        behind = self._own_lengths.view(-1, 1, 1)
        index = torch.where(place < behind, place, place - behind + owned).clamp(max=owned + self.width - 1)
        rows = torch.arange(len(positions), device=positions.device).view(-1, 1, 1)
        real = (place < lengths).flatten(0, 1)[..., None, None]
        grown = {}
        for name, x in read.items():
            all_tokens = torch.cat([own[name].to(x), x], 1)
            grown[name] = all_tokens[rows, index].flatten(0, 1) * real
        return {**grown, "prefix_lengths": self._prefix_lengths.repeat_interleave(count, 0)}


def _hang(read: Parts, positions: Int[Tensor, "B P"]) -> dict[str, Tensor]:
    """Returns the state after a forward pass from no state: all tokens are shared, and rows have none of their own."""
    empty = {name: x.new_zeros(positions.numel(), 0, *x.shape[2:]) for name, x in read.items()}
    return {**empty, "prefix_lengths": positions.flatten() + 1}


def _take(shared: Parts, index: Int[Tensor, "S"]) -> dict[str, Tensor]:
    """Selects the sources in `index`, sorted and unique; if it has all of them, returns the tensors themselves."""
    return {name: x if len(x) == len(index) else x.index_select(0, index) for name, x in shared.items()}
