"""Fast weights as a value: the state of a model after some tokens, and the trace it can be taken from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(eq=False)
class State:
    """What a model keeps of the tokens it has read: named tensors, each with one row a sequence.

    A value: no operation changes it in place, so that it can be branched from any number of times. Which tensors there
    are is the model's own affair (a matrix, a convolution window, a cache).
    """

    tensors: Mapping[str, Tensor]
    lengths: Int[Tensor, "B"]

    is_compileable = False  # asked by transformers' `generate`

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The state whose every tensor went through `function`."""
        return State({name: function(x) for name, x in self.tensors.items()}, function(self.lengths))

    def select(self, rows: Int[Tensor, "P"] | Sequence[int]) -> State:
        """The given rows, in the given order."""
        index = torch.as_tensor(rows, device=self.lengths.device)
        return self.map(lambda x: x.index_select(0, index))

    def repeat(self, times: int) -> State:
        """Every row `times` times, copies side by side."""
        return self if times == 1 else self.map(lambda x: x.repeat_interleave(times, 0))

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        """The rows of all states, one state after the other."""
        names = states[0].tensors
        if any(state.tensors.keys() != names.keys() for state in states):
            raise ValueError("states of different models cannot be stacked")
        return State(
            {name: torch.cat([state.tensors[name] for state in states]) for name in names},
            torch.cat([state.lengths for state in states]),
        )

    def detach(self) -> State:
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> State:
        return self.map(lambda x: x.to(device))

    def save(self, path: str | Path) -> None:
        """Write the state as safetensors."""
        tensors = {name: x.detach().contiguous() for name, x in self.tensors.items()}
        save_file({**tensors, "lengths": self.lengths.contiguous()}, path)

    @staticmethod
    def load(path: str | Path) -> State:
        """The state written by `save`. Raises FileNotFoundError or ValueError."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no saved state at {path}")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} holds no saved state: {error}") from error
        if "lengths" not in tensors:
            raise ValueError(f"{path} holds no saved state: it has no tensor 'lengths'")
        lengths = tensors.pop("lengths")
        if lengths.ndim != 1 or any(x.shape[:1] != lengths.shape for x in tensors.values()):
            raise ValueError(f"{path} holds no saved state: its tensors are not of one row a sequence")
        return State(tensors, lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read by the longest row, the name transformers' `generate` asks for it by."""
        return int(self.lengths.max())

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())


@dataclass(frozen=True, eq=False)
class Trace:
    """What one reading of a batch gives: hidden states after the final norm, and the state after any of its tokens."""

    hidden_states: Float[Tensor, "B T D"]
    lengths: Int[Tensor, "B"]
    layers: Sequence[Callable[[Int[Tensor, "B P"]], Mapping[str, Tensor]]]
    start: Int[Tensor, "B"]  # tokens that had been read before this batch

    def state_at(self, positions: Int[Tensor, "B P"]) -> State:
        """The state after each position of each row, B * P rows ordered (row, position); reads nothing again.

        Differentiable: a gradient on the state flows back into the tokens up to the position, and no further.
        Raises ValueError for a position outside its row.
        """
        positions = torch.as_tensor(positions, device=self.lengths.device)
        if positions.ndim != 2 or len(positions) != len(self.lengths):
            raise ValueError(f"positions must have shape [{len(self.lengths)}, P], got {list(positions.shape)}")
        outside = (positions < 0) | (positions >= self.lengths.unsqueeze(-1))
        if outside.any():
            row = int(outside.any(-1).nonzero()[0])
            last = int(self.lengths[row]) - 1
            raise ValueError(f"positions of row {row} must lie in 0..{last}, got {positions[row].tolist()}")
        tensors: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            tensors.update({f"{index}.{name}": x for name, x in layer(positions).items()})
        return State(tensors, (self.start.unsqueeze(-1) + positions + 1).flatten())

    @property
    def final_state(self) -> State:
        """The state after the last real token of every row."""
        return self.state_at((self.lengths - 1).unsqueeze(-1))

    def hidden_at(self, positions: Int[Tensor, "B P"]) -> Float[Tensor, "B P D"]:
        """The hidden states at the given positions."""
        return self.hidden_states.gather(1, positions.unsqueeze(-1).expand(-1, -1, self.hidden_states.shape[-1]))
