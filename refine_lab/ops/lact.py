"""LaCT's fast weights: a SwiGLU network per head, trained on the tokens it reads (Zhang et al., 2025; arXiv 2505.23884).

    f(x) = w1 (silu(w0 x) * (w2 x))

Each chunk is read before it updates the weights: its tokens see the weights after the preceding chunks; then one step
on the chunk's keys and values, with a learning rate per token and matrix, increases sum_t <f(k_t), v_t>. An incomplete
chunk has not changed the weights, so the state after any token consists of its chunk's weights and the chunk's tokens
so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from refine_lab.host import derived, host, indices
from refine_lab.ops.precision import without_float16

Memory = Mapping[str, Tensor]
"""Fast weights of S sources: `w0`, `w2` [S, H, h, d] and `w1` [S, H, d, h].

With pre-norm, it also has `w0_sum`, `w1_sum` and `w2_sum`; with momentum, `w0_momentum`, `w1_momentum` and
`w2_momentum`.
"""

MATRICES = ("w0", "w1", "w2")

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Coefficients (a, b, c) of each iteration, as released (a1600012888/LaCT, ttt_operation.py)."""


def newton_schulz(x: Float[Tensor, "*rows m n"], dtype: torch.dtype | None = None) -> Float[Tensor, "*rows m n"]:
    """Approximates the nearest orthogonal matrix to each x: X <- a X + (b A + c A A) X with A = X X^T, in `dtype`.

    None means the dtype of x, or autocast's dtype where it is on. The release uses bfloat16 whatever the model's dtype.
    """
    y = x if dtype is None else x.to(dtype)
    if tall := y.shape[-2] > y.shape[-1]:
        y = y.mT
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)


@dataclass(frozen=True)
class Rule:
    """The update rule: how a chunk changes the fast weights."""

    chunk_size: int
    use_muon: bool
    prenorm: bool
    muon_dtype: torch.dtype | None = None  # None: that of the arithmetic around it

    def update(
        self,
        memory: Memory,
        norms: Memory,
        keys: Float[Tensor, "S H L d"],
        values: Float[Tensor, "S H L d"],
        rates: Float[Tensor, "S H L r"],
    ) -> Memory:
        """Returns the weights after a complete chunk; `rates` are learning rates for w0, w1, w2 and, last, any momentum gate.

        Post-norm: w <- |w_init| (w + dw) / |w + dw| row by row; pre-norm accumulates the unnormalised sum and
        normalises only the weights that are applied.
        """
        momentum = "w0_momentum" in memory
        gate = rates[..., -1:].mean(2, keepdim=True) if momentum else None
        steps = _ascent(memory, keys, values, rates[..., :-1] if momentum else rates)
        changed: dict[str, Tensor] = {}
        for name, step in steps.items():
            steps[name] = step = step.to(memory[name].dtype)
            if gate is not None:
                steps[name] = step + memory[f"{name}_momentum"] * gate.to(step.dtype)
                changed[f"{name}_momentum"] = steps[name]
        if self.use_muon:
            steps = self._orthogonal(steps)
        for name, step in steps.items():
            total = memory[f"{name}_sum" if self.prenorm else name] + step
            if self.prenorm:
                changed[f"{name}_sum"] = total
            changed[name] = total / (total.norm(dim=-1, keepdim=True) + 1e-5) * norms[name]
        return changed

    def _orthogonal(self, steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Applies Newton-Schulz to all three matrices in one stack; w1 is transposed to the shape of w0 unless it is square."""
        across = steps["w1"].shape[-1] != steps["w1"].shape[-2]  # what is square, neither turns: as the release rounds
        w1 = steps["w1"].mT if across else steps["w1"]
        step0, step1, step2 = newton_schulz(torch.stack([steps["w0"], w1, steps["w2"]]), self.muon_dtype)
        return {"w0": step0, "w1": step1.mT if across else step1, "w2": step2}


def _ascent(memory: Memory, keys: Tensor, values: Tensor, rates: Tensor) -> dict[str, Tensor]:
    """Returns the gradient of sum_t <f(k_t), v_t> for w0, w1 and w2, with every token weighted by its learning rates."""
    w0, w1, w2 = (memory[name].to(keys.dtype) for name in MATRICES)
    rate0, rate1, rate2 = rates.chunk(3, -1)
    gate, hidden = keys @ w0.mT, keys @ w2.mT
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    back = values @ w1
    back_gate = back * hidden * sigmoid * (1 + gate * (1 - sigmoid))
    return {
        "w0": back_gate.mT @ (keys * rate0).to(keys.dtype),
        "w1": values.mT @ (silu * hidden * rate1).to(keys.dtype),
        "w2": (back * silu).mT @ (keys * rate2).to(keys.dtype),
    }


def apply(memory: Memory, queries: Float[Tensor, "S H T d"]) -> Float[Tensor, "S H T d"]:
    """Returns f of every query."""
    w0, w1, w2 = (memory[name].to(queries.dtype) for name in MATRICES)
    gate = queries @ w0.mT
    return (gate * gate.sigmoid() * (queries @ w2.mT)) @ w1.mT


@dataclass(frozen=True)
class ChunkPlan:
    """Assigns each new token of a batch to its chunk; one plan serves all layers, and is computed on the CPU.

    A row that has read `start` tokens holds the last `counts` of them as pending: 1 to C tokens of its open chunk, or 0
    if it has read nothing. Its *stream* consists of these and then the T new tokens; it begins at a chunk border, so
    that level n of every row is positions n C to (n + 1) C - 1 of its stream. Level 0 uses the weights that the row
    came with, `sources` [B] of S; every later level has separate weights for each of its rows.
    """

    start: Int[Tensor, "B"]
    length: int
    chunk_size: int
    sources: Int[Tensor, "B"]
    num_sources: int
    _latest: dict[str, tuple[Tensor, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return self.start.device

    def once(self, name: str, key: Tensor, make: Callable[[Tensor], Any]) -> Any:
        """Returns `make(key)`, which all layers ask for in turn with the same tensor; the latest is stored by name."""
        if name not in self._latest or self._latest[name][0] is not key:
            self._latest[name] = key, make(key)
        return self._latest[name][1]

    @cached_property
    def counts(self) -> Int[Tensor, "B"]:
        return derived(lambda start: torch.where(start > 0, (start - 1) % self.chunk_size + 1, 0), self.start)

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """Returns the minimum and maximum number of pending tokens per row."""
        counts = host(self.counts)
        return int(counts.min()), int(counts.max())

    @property
    def aligned(self) -> bool:
        return self.bounds[0] == self.bounds[1]

    @cached_property
    def rows(self) -> list[Int[Tensor, "_"] | None]:
        """Returns the rows that have tokens at each level, None for all."""
        levels = (self.bounds[1] + self.length - 1) // self.chunk_size + 1
        found: list[Tensor | None] = [None]
        for level in range(1, levels):
            reach = host(self.counts) + self.length > level * self.chunk_size
            found.append(None if bool(reach.all()) else indices(reach.nonzero().squeeze(-1), self.device))
        return found

    @cached_property
    def offsets(self) -> list[int]:
        """Returns how many sources precede each level's own."""
        sizes = [len(self.start) if rows is None else len(rows) for rows in self.rows]
        return [0, *accumulate([self.num_sources, *sizes[1:-1]])][: len(sizes)]

    @cached_property
    def table(self) -> Int[Tensor, "B levels"]:
        """Returns the source of each row at each level, numbered across all levels; -1 where a row has no token."""
        columns = [host(self.sources)]
        for rows, offset in zip(self.rows[1:], self.offsets[1:], strict=True):
            column = torch.full_like(columns[0], -1)
            index = torch.arange(len(column)) if rows is None else host(rows)
            columns.append(column.index_copy(0, index, torch.arange(len(index)) + offset))
        return indices(torch.stack(columns, 1), self.device)

    @cached_property
    def parents(self) -> list[Int[Tensor, "_"]]:
        """Returns, for each row of each level from 1 on, the index of the previous level's weights that it continues from."""
        levels = zip(self.rows[1:], host(self.table).unbind(1), self.offsets, strict=False)
        found = (_take(column, None if rows is None else host(rows)) - offset for rows, column, offset in levels)
        return [indices(x, self.device) for x in found]

    @cached_property
    def slots(self) -> Int[Tensor, "B"]:
        """Returns each row's index among the rows of its source: row b is query block `slots` of source `sources`."""
        sources = host(self.sources)
        order = sources.argsort(stable=True)
        first = torch.searchsorted(sources[order], sources)
        return indices(order.argsort() - first, self.device)

    @cached_property
    def most(self) -> int:
        """Returns the largest number of rows that share a source."""
        return int(host(self.slots).max()) + 1

    @cached_property
    def one_row_each(self) -> bool:
        """Returns whether row b uses source b and no other row does."""
        return self.num_sources == len(self.start) and host(self.sources).tolist() == list(range(self.num_sources))

    @cached_property
    def levels(self) -> Int[Tensor, "B T"]:
        """Returns the level of each new token."""
        return (self.counts.unsqueeze(-1) + torch.arange(self.length, device=self.device)) // self.chunk_size

    def split(self, used: Int[Tensor, "S"], sizes: Sequence[int]) -> list[Int[Tensor, "_"]]:
        """Returns the given sources, in ascending order, divided among memories of these sizes, as indices within each."""
        borders, numbers = [0, *accumulate(sizes)], host(used)
        parts = (numbers[(numbers >= start) & (numbers < stop)] - start for start, stop in pairwise(borders))
        return [indices(part, self.device) for part in parts]

    def open_chunk(self, positions: Int[Tensor, "B P"]) -> tuple[Int[Tensor, "B P L"], Bool[Tensor, "B P L"]]:
        """Returns the places in the stream of the open chunk's tokens up to each position, and which of them are tokens."""
        place = self.counts.unsqueeze(-1) + positions
        count = place % self.chunk_size + 1
        longest = int(((host(self.counts).unsqueeze(-1) + host(positions)) % self.chunk_size).max()) + 1
        column = torch.arange(longest, device=self.device)
        return (place - count + 1).unsqueeze(-1) + column, column < count.unsqueeze(-1)

    def stream(
        self, pending: Float[Tensor, "B H P f"] | None, new: Float[Tensor, "B H T f"]
    ) -> Float[Tensor, "B H stream f"]:
        """Returns pending and new tokens of every row, without a gap between them."""
        if pending is None or self.bounds[1] == 0:
            return new
        if self.aligned:
            return torch.cat([pending[:, :, : self.bounds[1]], new], 2)
        both = torch.cat([pending, new], 2)
        place = torch.arange(self.bounds[1] + self.length, device=new.device)
        counts = self.counts.unsqueeze(-1)
        index = torch.where(place < counts, place, place - counts + pending.shape[2]).clamp_max(both.shape[2] - 1)
        return both.gather(2, index[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))


@dataclass(frozen=True)
class ChunkStates:
    """The tensors from which the state after any token is computed: weights per level; streams of keys, values, rates."""

    plan: ChunkPlan
    memories: list[Memory]
    streams: Mapping[str, Float[Tensor, "B H stream _"]]

    def shared(self, used: Int[Tensor, "S"]) -> dict[str, Tensor]:
        """Returns the weights of the given sources, which must be in ascending order."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.memories[0]}
        sizes = [len(memory["w0"]) for memory in self.memories]
        split = self.plan.once("split", used, lambda used: self.plan.split(used, sizes))
        for memory, size, mine in zip(self.memories, sizes, split, strict=True):
            for name, x in memory.items() if len(mine) else ():
                parts[name].append(x if len(mine) == size else x.index_select(0, mine))
        return {name: x[0] if len(x) == 1 else torch.cat(x) for name, x in parts.items()}

    def pending(self, positions: Int[Tensor, "B P"]) -> dict[str, Float[Tensor, "B*P H _ f"]]:
        """Returns the open chunk's tokens up to and including each position, padded with zeros."""
        index, real = self.plan.once("open_chunk", positions, self.plan.open_chunk)
        found = {}
        row = torch.arange(len(index), device=index.device).view(-1, 1, 1)
        for name, x in self.streams.items():
            tokens = x.transpose(1, 2)  # index_select stores no stream for the backward pass, unlike gather
            place = row * tokens.shape[1] + index.clamp_max(tokens.shape[1] - 1)
            y = tokens.flatten(0, 1).index_select(0, place.flatten()).unflatten(0, index.shape)
            y = y * real[..., None, None].to(x.dtype)
            found[f"pending_{name}"] = y.flatten(0, 1).transpose(1, 2).contiguous()
        return found

    def sources(self, positions: Int[Tensor, "B P"]) -> Int[Tensor, "B P"]:
        """Returns the source of the weights in the state after each position."""
        size = self.plan.chunk_size

        def source(table: Tensor, counts: Tensor, positions: Tensor) -> Tensor:
            return table.gather(1, (counts.unsqueeze(-1) + positions) // size)

        return derived(source, self.plan.table, self.plan.counts, positions)


def lact(
    queries: Float[Tensor, "B H T d"],
    streams: Mapping[str, Float[Tensor, "B H stream _"]],
    memory: Memory,
    norms: Memory,
    plan: ChunkPlan,
    rule: Rule,
    *,
    recompute: bool = False,
) -> tuple[Float[Tensor, "B H T d"], ChunkStates]:
    """Returns f of every query by the weights of its chunk; `streams` are `ChunkPlan.stream` of `kv` [.., 2 d] and of `rates`.

    Everything is computed in the dtype of the arguments, which must be wide enough for sums over a chunk: bfloat16 under
    its autocast, float32 or float64. Autocast to float16 is disabled. With `recompute`, the backward pass computes the
    update of every chunk again, so that one chunk's intermediate values are in memory at once.
    """
    again = recompute and torch.is_grad_enabled()
    step = partial(checkpoint, _next, use_reentrant=False, preserve_rng_state=False) if again else _next
    with without_float16(queries.device):
        size, (fewest, most) = plan.chunk_size, plan.bounds
        memories, pieces, output = [memory], [], torch.zeros_like(queries)
        for level, rows in enumerate(plan.rows):
            if level:
                memory = step(memories[-1], streams, norms, plan, rule, level)
                memories.append(memory)
            begin, end = max(0, level * size - most), min(plan.length, (level + 1) * size - fewest)
            if begin >= end:  # every row came with a complete chunk
                continue
            asked = queries[:, :, begin:end]
            if plan.aligned:
                pieces.append(_apply_shared(memory, asked, plan) if level == 0 else apply(memory, asked))
            else:
                here = (plan.levels[:, begin:end] == level)[:, None, :, None]
                found = _apply_shared(memory, asked, plan) if level == 0 else apply(memory, _take(asked, rows))
                if rows is not None:  # CUDA's autocast leaves index_copy's dtypes as they are
                    found = torch.zeros_like(asked).index_copy(0, rows, found.to(asked.dtype))
                filled = torch.where(here, found, output[:, :, begin:end])
                output = torch.cat([output[:, :, :begin], filled, output[:, :, end:]], 2)
        return torch.cat(pieces, 2) if plan.aligned else output, ChunkStates(plan, memories, streams)


def _next(
    memory: Memory, streams: Mapping[str, Tensor], norms: Memory, plan: ChunkPlan, rule: Rule, level: int
) -> Memory:
    """Returns a level's weights: the previous level's after one step on the chunk that ends there."""
    rows, parents = plan.rows[level], plan.parents[level - 1]
    start = {name: x.index_select(0, parents) for name, x in memory.items()}
    begin = (level - 1) * rule.chunk_size
    kv, rates = (_take(streams[name][:, :, begin : begin + rule.chunk_size], rows) for name in ("kv", "rates"))
    keys, values = kv.chunk(2, -1)
    return rule.update(start, norms, keys, values, rates)


def _take(x: Tensor, rows: Int[Tensor, "_"] | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _apply_shared(memory: Memory, queries: Float[Tensor, "B H T d"], plan: ChunkPlan) -> Float[Tensor, "B H T d"]:
    """Applies the weights that each row came with, with the queries of all rows of a source side by side."""
    heads, length, width = queries.shape[1:]
    if plan.one_row_each:
        return apply(memory, queries)
    index = plan.sources * plan.most + plan.slots
    placed = queries.new_zeros(plan.num_sources * plan.most, heads, length, width).index_copy(0, index, queries)
    placed = placed.unflatten(0, (plan.num_sources, plan.most)).transpose(1, 2).flatten(2, 3)
    found = apply(memory, placed).unflatten(2, (plan.most, length)).transpose(1, 2).flatten(0, 1)
    return found.index_select(0, index)
