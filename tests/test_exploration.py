"""An exploration: one document, and every "what if" about it, with the model asked no more than it must be."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from refine_lab.draws import Draws
from refine_lab.explore.client import Worker
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.session import Session
from refine_lab.selection import select_positions, selection_probabilities

TEXT = "def area(width, height):\n    return width * height\n\n" * 12


class Here(Worker):
    """A worker in this process: the real session, whose calls are counted."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.session, self.asked = Session("cpu"), []

    def submit(self, method: str, on_step: Callable[[Any], object] | None = None, **arguments: Any) -> Future[Any]:
        self.asked.append((method, arguments))
        future: Future[Any] = Future()
        try:
            future.set_result(getattr(self.session, method)(**arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def explored() -> Exploration:
    exploration = Exploration(Here())
    exploration.read(TEXT).result()
    return exploration


def rolled(exploration: Exploration) -> list[dict[str, Any]]:
    """The arguments of every request for rollouts."""
    return [arguments for method, arguments in exploration.worker.asked if method == "rollouts"]  # type: ignore[attr-defined]


def test_reading(explored: Exploration) -> None:
    assert explored.document is not None
    assert explored.tokenizer.decode(explored.document.token_ids) == TEXT
    assert explored.document.reading.entropies.shape == explored.document.token_ids.shape
    for text, sentence in (
        ("", "a document's tokens must be from 2 to 65536, got 0"),
        ("x" * 2_000_000, "from 2 to 65536"),
    ):
        with pytest.raises(ValueError, match=sentence):
            explored.read(text)
    assert explored.document.text == TEXT  # what was there stays
    assert len(explored.tokens_of("a lone \ud800 surrogate")) > 2


def test_positions_are_those_of_the_method(explored: Exploration) -> None:
    explored.set(num_chunks=4, tau=0.5, margin=5, seed=3)
    assert explored.document is not None
    about = torch.tensor(explored.document.reading.entropies, dtype=torch.float64).roll(-1)[None]
    about[0, -1] = 0
    lengths = torch.tensor([about.shape[1]])
    expected = selection_probabilities(about, lengths, explored.method)
    np.testing.assert_array_equal(explored.probabilities(), expected[0].numpy())
    assert explored.targets() == select_positions(expected, lengths, [0], Draws(seed=3), 4)[0].tolist()
    size = about.shape[1] // 4
    assert explored.chunk_borders() == [0, size, 2 * size, 3 * size]
    explored.set(selection="argmax", smoothing_kernel=1)
    first, last = 4, about.shape[1] - 1 - 5
    assert explored.targets()[1] == size + int(about[0, size : 2 * size].argmax())
    assert all(first <= position <= last for position in explored.targets())


def test_what_is_cached_answers_every_what_if(explored: Exploration) -> None:
    explored.set(group_size=4, rollout_length=6)
    made = explored.roll_out([10, 50, 10]).result()
    assert [each.position for each in made] == [10, 50]
    assert rolled(explored)[0]["positions"] == [10, 50]
    whole = explored.frame()
    assert whole["position"].tolist() == [10] * 4 + [50] * 4
    for changes in ({"reward": "hybrid"}, {"group_by": "sequence"}, {"rollout_length": 2}, {"group_size": 3}):
        explored.set(**changes)
        explored.roll_out([50, 10]).result()
        frame = explored.frame([50])
        n, k = explored.method.group_size, explored.method.rollout_length
        assert len(frame) == n
        expected = [ids[:k] for ids in whole[whole["position"] == 50]["rollout_ids"][:n]]
        assert frame["rollout_ids"].tolist() == expected
    assert len(rolled(explored)) == 1  # nothing of it asked the model
    explored.set(rollout_length=7)
    with pytest.raises(ValueError, match="rollouts must be those of at least one position"):
        explored.frame()
    explored.roll_out([10, 51]).result()
    assert rolled(explored)[1]["positions"] == [10, 51]
    explored.set(temperature=0.5)
    explored.roll_out([10]).result()
    assert rolled(explored)[2]["temperature"] == 0.5
    assert not explored.can_start(len(explored.document.token_ids) - 7)  # type: ignore[union-attr]
    assert explored.can_start(len(explored.document.token_ids) - 8)  # type: ignore[union-attr]


def test_a_reward_of_ones_own_and_refusals() -> None:
    def longest(rollout_ids, target_ids, hidden_states, target_hidden_states, logprobs):
        return -logprobs.sum(-1)

    explored = Exploration(Here(), rewards={"longest": longest})
    with pytest.raises(ValueError, match="no document has been read yet"):
        explored.targets()
    explored.read(TEXT).result()
    explored.set(reward="longest")
    explored.roll_out([20]).result()
    frame = explored.frame()
    assert frame["reward"].tolist() == pytest.approx([-sum(row) for row in frame["logprobs"]], abs=1e-4)
    before = explored.method
    for changes, sentence in (
        (
            {"reward": "nope", "num_chunks": 3},
            "reward must be one of 'cosine', 'binary', 'hybrid', 'longest', got 'nope'",
        ),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"seed": 1.5}, "seed must be a whole number of at least 0, got 1.5"),
    ):
        with pytest.raises(ValueError, match=sentence):
            explored.set(**changes)
    assert (explored.method, explored.reward) == (before, "longest")
    with pytest.raises(ValueError, match="a position must be from 0"):
        explored.roll_out([10_000]).result()
    with pytest.raises(ValueError, match="the name of a reward of your own must be another than cosine"):
        Exploration(Here(), rewards={"cosine": longest})


def test_another_document_forgets_the_rollouts_of_the_first(explored: Exploration) -> None:
    explored.roll_out([10]).result()
    explored.read(TEXT + "x = 1\n").result()
    with pytest.raises(ValueError, match="rollouts must be those of at least one position"):
        explored.frame()
