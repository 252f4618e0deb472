"""Reads batches of token rows in pieces: the state after each prompt, and the log-probabilities of continuations.

A piece bounds the memory that a long prompt needs. Rows are padded on the right only, so that no padding enters a state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import State, Trace, hidden_states_only
from refine_lab.ops.head import TokenStats

PIECE_TOKENS = 4096
"""Number of tokens of each row that are read at once."""

Tokens = Sequence[int]


@dataclass(frozen=True, eq=False)
class Piece:
    """One piece of a batch: its first `rows` rows, from column `start`, and the trace of their tokens."""

    rows: int
    start: int
    lengths: Int[Tensor, "R"]
    trace: Trace

    @cached_property
    def state(self) -> State:
        """Returns the state after the last token that each row has in this piece."""
        return self.trace.final_state


def longest_first(rows: Sequence[Tokens]) -> list[int]:
    """Returns the indices of the rows by decreasing length; rows of equal length keep their order."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]))


def padded(rows: Sequence[Tokens]) -> Int[Tensor, "B T"]:
    """Returns the rows as a tensor, padded with zeros on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def pieces(policy: FastWeightLM, rows: Sequence[Tokens]) -> Iterator[Piece]:
    """Reads rows ordered by decreasing length in pieces of `PIECE_TOKENS` tokens; rows that have ended are left out."""
    tokens, lengths = padded(rows).to(policy.device), torch.tensor([len(row) for row in rows], device=policy.device)
    state: State | None = None
    for start in range(0, tokens.shape[1], PIECE_TOKENS):
        alive = int((lengths > start).sum())
        here = (lengths[:alive] - start).clamp(max=PIECE_TOKENS)
        part = tokens[:alive, start : start + PIECE_TOKENS]
        before = state if state is None or state.rows == alive else state.select(range(alive))
        trace = policy.read(part, here, before)
        piece = Piece(alive, start, here, trace)
        yield piece
        state = piece.state if start + PIECE_TOKENS < tokens.shape[1] else None


@dataclass(frozen=True, eq=False)
class Read:
    """Prompts that have been read: the state after each, and the hidden state that predicts the token after it."""

    state: State
    hidden: Float[Tensor, "B 1 D"]

    def select(self, rows: Sequence[int]) -> Read:
        """Returns the given rows, in the given order."""
        index = torch.tensor(list(rows), device=self.hidden.device)
        return Read(self.state.select(index), self.hidden.index_select(0, index))


@torch.no_grad()
def read_prompts(policy: FastWeightLM, prompts: Sequence[Tokens]) -> Read:
    """Reads each prompt once, with at least one token each, and returns the results in the order of `prompts`."""
    order = longest_first(prompts)
    states: list[State] = []
    hidden: list[Tensor] = []
    for piece in pieces(policy, [prompts[i] for i in order]):
        state, last = piece.state, piece.trace.hidden_at((piece.lengths - 1).unsqueeze(-1))
        if states:  # keep only the rows of the previous piece that ended in it
            before, known = states.pop(), hidden.pop()
            if before.rows > piece.rows:
                states.append(before.select(range(piece.rows, before.rows)))
                hidden.append(known[piece.rows :])
        states.append(state)
        hidden.append(last)
    whole = State.stack(states[::-1]) if len(states) > 1 else states[0]
    places = sorted(range(len(order)), key=order.__getitem__)
    return Read(whole, torch.cat(hidden[::-1])).select(places)


@torch.no_grad()
def continuation_stats(
    policy: FastWeightLM, read: Read, continuations: Sequence[Tokens], owners: Sequence[int]
) -> list[tuple[float, bool]]:
    """Returns, for each continuation, its log-probability in nats and whether greedy decoding would produce it.

    Continuation i follows the prompt in row `owners[i]` of `read` and has at least one token.
    """
    after = read.select(owners)
    targets = padded(continuations).to(policy.device)
    lengths = torch.tensor([len(row) for row in continuations], device=policy.device)
    before = after.hidden
    if targets.shape[1] > 1:  # the last token is predicted and not read
        with hidden_states_only():
            trace = policy.read(targets[:, :-1], (lengths - 1).clamp(min=1), after.state)
        before = torch.cat([before, trace.hidden_states], 1)
    stats: TokenStats = policy.head(before, targets, entropy=False)
    real = torch.arange(targets.shape[1], device=policy.device) < lengths.unsqueeze(-1)
    sums = (stats.logprobs.double() * real).sum(-1).tolist()
    greedy = (stats.is_top1.bool() | ~real).all(-1).tolist()
    return list(zip(sums, greedy, strict=True))


@torch.no_grad()
def text_logprobs(policy: FastWeightLM, rows: Sequence[Tokens]) -> list[Float[Tensor, "_"]]:
    """Returns the log-probability in nats of each token of each row but the first, float64 on the CPU."""
    order = longest_first(rows)
    found: list[list[Tensor]] = [[] for _ in rows]
    last: Tensor | None = None
    for piece in pieces(policy, [rows[i] for i in order]):
        hidden = piece.trace.hidden_states
        first = 0 if last is None else piece.start  # column of the first target of this piece
        known = hidden if last is None else torch.cat([last[: piece.rows], hidden], 1)
        for row in range(piece.rows):
            stop = piece.start + int(piece.lengths[row])
            targets = torch.tensor(rows[order[row]][max(first, 1) : stop], device=policy.device)
            if len(targets):
                stats: TokenStats = policy.head(known[row, : len(targets)], targets, entropy=False)
                found[order[row]].append(stats.logprobs.double().cpu())
        last = hidden[:, -1:]
    return [torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64) for parts in found]
