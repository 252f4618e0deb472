"""What a state promises, held of any model: the tests of each family call these."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refine_lab.models import FastWeightLM, State
from refine_lab.types import Batch


def same(a: State, b: State, tolerance: float = 1e-9) -> bool:
    """Row for row, what a row hangs on included, wherever that stands."""
    return torch.equal(a.lengths, b.lengths) and all(
        x.keys() == y.keys() and all(torch.allclose(x[n], y[n], atol=tolerance) for n in x)
        for x, y in ((a.tensors, b.tensors), (by_row(a), by_row(b)))
    )


def by_row(state: State) -> dict[str, torch.Tensor]:
    """What rows share, once for each row."""
    return {} if state.sources is None else {name: x[state.sources] for name, x in state.shared.items()}


def assert_states_are_of_prefixes(policy: FastWeightLM, batch: Batch) -> None:
    """The state at a position is that of the prefix read alone; for three rows of which the shortest has 97 tokens."""
    trace = policy.read(batch.tokens, batch.lengths)
    positions = torch.tensor([[0, 62, 149], [1, 65, 96], [63, 64, 130]])
    states = trace.state_at(positions)
    for row in range(3):
        for column, position in enumerate(positions[row].tolist()):
            alone = policy.read(batch.tokens[row : row + 1, : position + 1]).final_state
            assert same(states.select([row * 3 + column]), alone), (row, position)


def assert_pieces_are_the_whole(policy: FastWeightLM, tokens: torch.Tensor, pieces: Sequence[int]) -> State:
    """Reading a row piece by piece gives the hidden states and the state of reading it at once, which is returned."""
    whole, state, hidden = policy.read(tokens), None, []
    for piece in tokens.split(list(pieces), 1):
        trace = policy.read(piece, state=state)
        state = trace.final_state
        hidden.append(trace.hidden_states)
    assert torch.allclose(torch.cat(hidden, 1), whole.hidden_states, atol=1e-9)
    assert state is not None and same(state, whole.final_state)
    return state


def assert_a_pad_changes_nothing(policy: FastWeightLM, batch: Batch) -> None:
    """A row beside longer ones is read as it is alone, whatever stands behind its end."""
    trace = policy.read(batch.tokens, batch.lengths)
    other = batch.tokens.clone()
    for row, length in enumerate(batch.lengths.tolist()):
        other[row, length:] = 7
        alone = policy.read(batch.tokens[row : row + 1, :length])
        assert torch.allclose(trace.hidden_states[row, :length], alone.hidden_states[0], atol=1e-12)
        assert same(trace.final_state.select([row]), alone.final_state)
    assert same(policy.read(other, batch.lengths).final_state, trace.final_state, 0)
