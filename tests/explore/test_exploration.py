"""An exploration: one document, and every "what if" about it, with the model asked no more than it must be."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from refine_lab.config import BUILT_IN_SELECTIONS
from refine_lab.explore import exploration
from refine_lab.explore.client import Worker
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.session import Session
from refine_lab.method.copies import copied_tokens
from refine_lab.method.memory import gains
from refine_lab.method.selection import select_positions, selection_probabilities
from refine_lab.models import load_model
from refine_lab.rng import Draws
from tests.support.refusals import naming, refused

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
    for text in ("", "x" * 2_000_000):
        with refused("a document's tokens", allowed="from 2 to 65536"):
            explored.read(text)
    assert explored.document.text == TEXT  # what was there stays
    assert len(explored.tokens_of("a lone \ud800 surrogate")) > 2


def rare_first(inputs):
    return -inputs.logprobs


def test_positions_by_memory_copies_and_a_function() -> None:
    exploration = Exploration(Here(), selections={"rare first": rare_first})
    exploration.read(TEXT * 20).result()
    assert exploration.document is not None
    reading, length = exploration.document.reading, len(exploration.document.token_ids)
    assert reading.long_short is not None and np.nansum(reading.long_short) > 0
    exploration.set(num_chunks=2, margin=0, tau=0.5, window=4)
    tokens, lengths = torch.from_numpy(reading.token_ids).long()[None], torch.tensor([length])
    columns = {"logprobs": reading.logprobs, "long_short": np.nan_to_num(reading.long_short)}
    about = {name: torch.from_numpy(np.append(values[1:], 0.0))[None] for name, values in columns.items()}
    scores = {
        "memory": gains(about["long_short"], 5),
        "copy": copied_tokens(tokens, lengths, 4, 5),
        "rare first": -about["logprobs"],
    }
    for name, expected in scores.items():
        exploration.set(selection=name)
        assert exploration.selection == name
        wanted = selection_probabilities(expected, lengths, exploration.refine)
        np.testing.assert_array_equal(exploration.probabilities(), wanted[0].numpy())
    assert exploration.refine.selection == "custom"
    with refused("selection", "custom"):
        exploration.set(selection="custom")
    assert exploration.selection == "rare first"
    exploration.set(selection="uniform")
    assert exploration.selection == exploration.refine.selection == "uniform"
    with refused("the name of a custom selection", "copy"):
        Exploration(Here(), selections={"copy": rare_first})


def test_positions_are_those_of_the_method(explored: Exploration) -> None:
    explored.set(num_chunks=4, tau=0.5, margin=5, seed=3)
    assert explored.document is not None
    about = torch.tensor(explored.document.reading.entropies, dtype=torch.float64).roll(-1)[None]
    about[0, -1] = 0
    lengths = torch.tensor([about.shape[1]])
    expected = selection_probabilities(about, lengths, explored.refine)
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
    whole = explored.frame([10, 50])
    assert whole["position"].tolist() == [10] * 4 + [50] * 4
    for changes in ({"reward": "hybrid"}, {"group_by": "sequence"}, {"rollout_length": 2}, {"group_size": 3}):
        explored.set(**changes)
        explored.roll_out([50, 10]).result()
        frame = explored.frame([50])
        n, k = explored.refine.group_size, explored.refine.rollout_length
        assert len(frame) == n
        expected = [ids[:k] for ids in whole[whole["position"] == 50]["rollout_ids"][:n]]
        assert frame["rollout_ids"].tolist() == expected
    assert len(rolled(explored)) == 1  # nothing of it asked the model
    explored.set(rollout_length=7)
    with naming(ValueError, "position 10", "roll"):
        explored.frame([10])
    explored.roll_out([10, 51]).result()
    assert rolled(explored)[1]["positions"] == [10, 51]
    explored.set(temperature=0.5)
    explored.roll_out([10]).result()
    assert rolled(explored)[2]["temperature"] == 0.5
    assert not explored.can_start(len(explored.document.token_ids) - 7)  # type: ignore[union-attr]
    assert explored.can_start(len(explored.document.token_ids) - 8)  # type: ignore[union-attr]


def test_a_reward_of_ones_own_and_refusals() -> None:
    def longest(inputs):
        return -inputs.logprobs.sum(-1)

    explored = Exploration(Here(), rewards={"longest": longest})
    with pytest.raises(ValueError, match="no document has been read yet"):
        explored.targets()
    explored.read(TEXT).result()
    explored.set(reward="longest")
    explored.roll_out([20]).result()
    frame = explored.frame([20])
    assert frame["reward"].tolist() == pytest.approx([-sum(row) for row in frame["logprobs"]], abs=1e-4)
    before = explored.refine
    changes: dict[str, Any]
    for field, value, changes in (
        ("reward", "nope", {"reward": "nope", "num_chunks": 3}),
        ("RefineConfig.tau", 0.0, {"tau": 0.0}),
        ("seed", -1, {"seed": -1}),
        ("seed", 1.5, {"seed": 1.5}),
    ):
        with refused(field, value):
            explored.set(**changes)
    assert (explored.refine, explored.reward) == (before, "longest")
    with refused("a position", [10_000]):
        explored.roll_out([10_000]).result()
    with refused("the name of a custom reward", "cosine"):
        Exploration(Here(), rewards={"cosine": longest})


def test_another_document_forgets_the_rollouts_of_the_first(explored: Exploration) -> None:
    explored.roll_out([10]).result()
    explored.read(TEXT + "x = 1\n").result()
    with naming(ValueError, "position 10", "roll"):
        explored.frame([10])


def settings_at_random(count: int) -> list[dict[str, Any]]:
    """Settings of every kind that the explorer has, drawn at random."""
    draw = np.random.default_rng(7)

    def one() -> dict[str, Any]:
        return {
            "reward": str(draw.choice(["cosine", "binary", "hybrid"])),
            "group_by": str(draw.choice(["prefix", "sequence"])),
            "rollout_length": int(draw.integers(1, 12)),
            "group_size": int(draw.integers(2, 12)),
            "temperature": float(draw.choice([0.5, 1.0, 1.5])),
            "num_chunks": int(draw.integers(1, 5)),
            "selection": str(draw.choice(BUILT_IN_SELECTIONS)),
            "tau": float(draw.choice([0.3, 1.0])),
            "smoothing_kernel": int(draw.integers(1, 9)),
            "seed": int(draw.integers(0, 3)),
        }

    return [one() for _ in range(count)]


def seen(exploration: Exploration, settings: dict[str, Any], clicked: list[int]) -> pd.DataFrame:
    """Everything that is shown of the rollouts under some settings, after they were asked for."""
    exploration.set(**settings)
    exploration.roll_out([*exploration.targets(), *clicked]).result()
    return exploration.frame(clicked=clicked)


@pytest.mark.parametrize("model", ["tiny-deltanet", pytest.param("tiny-lact", marks=pytest.mark.slow)])
def test_what_is_seen_does_not_depend_on_what_was_asked_before(model: str) -> None:
    """Twenty random settings and back, and the same settings asked first of all: every number is the same bit for bit."""
    start = {"rollout_length": 5, "group_size": 8, "num_chunks": 4, "temperature": 1.0, "seed": 0}
    start |= {"reward": "hybrid", "group_by": "prefix", "selection": "entropy", "tau": 1.0, "smoothing_kernel": 5}
    visited, clicks = Exploration(Here(), model), np.random.default_rng(3)
    visited.read(TEXT).result()
    before, clicked = seen(visited, start, [60]), [60]
    assert before["clicked"].sum() == 8 and (~before["clicked"]).sum() == 32
    middle: list[tuple[dict[str, Any], pd.DataFrame]] = []
    for settings in settings_at_random(20):
        clicked.append(int(clicks.integers(0, 100)))
        seen(visited, settings, clicked[-2:])
        middle.append((settings, visited.frame()))
    pd.testing.assert_frame_equal(seen(visited, start, [60]), before, check_exact=True)
    asked = len(rolled(visited))
    visited.roll_out(visited.targets()).result()
    assert len(rolled(visited)) == asked, "what was rolled out is found again"
    for settings, frame in [(start, before[~before["clicked"]]), *middle[::5]]:
        fresh = Exploration(Here(), model)  # another session, which was asked for nothing before
        fresh.read(TEXT).result()
        pd.testing.assert_frame_equal(seen(fresh, settings, []), frame, check_exact=True)


def test_more_and_longer_rollouts_begin_with_those_that_were_there(explored: Exploration) -> None:
    few = seen(explored, {"rollout_length": 5, "group_size": 8}, [])
    long = seen(explored, {"rollout_length": 12, "group_size": 16, "num_chunks": 8}, [])
    explored.set(rollout_length=5)
    at = few["position"].unique().tolist()
    explored.roll_out(at).result()
    many = explored.frame(at)
    pd.testing.assert_frame_equal(
        many[many["sample_index"] < 8].drop(columns="advantage").reset_index(drop=True), few.drop(columns="advantage")
    )
    explored.set(rollout_length=12)
    explored.roll_out(at).result()
    longer = explored.frame(at)
    assert [ids[:5] for ids in longer["rollout_ids"]] == many["rollout_ids"].tolist()
    assert [values[:5] for values in longer["logprobs"]] == many["logprobs"].tolist()
    assert [values[:5] for values in longer["cosines"]] == many["cosines"].tolist()
    assert len(long) == 16 * 8


def test_the_oldest_rollouts_of_other_seeds_are_dropped(explored: Exploration, monkeypatch: pytest.MonkeyPatch) -> None:
    explored.read(TEXT).result()
    seen(explored, {"rollout_length": 5, "group_size": 8, "num_chunks": 4, "seed": 0}, [])
    one = sum(each.nbytes for made in explored._kept.values() for each in made)
    frames = {0: explored.frame()}
    assert one >= 4 * 8 * 5 * 128 * 4  # hidden states alone: positions, n, k, D and the bytes of a number
    monkeypatch.setattr(exploration, "MOST_KEPT", 2 * one)
    for seed in (1, 2):
        explored.set(seed=seed)
        explored.roll_out(explored.targets()).result()
    assert {seed for _, _, seed in explored._kept} == {1, 2}
    monkeypatch.setattr(exploration, "MOST_KEPT", 1)
    explored.set(seed=0)
    assert not any(map(explored.covers, explored.targets()))
    explored.roll_out(explored.targets()).result()
    assert {seed for _, _, seed in explored._kept} == {0}  # those of the current seed are never dropped
    pd.testing.assert_frame_equal(explored.frame(), frames[0])


def test_clicked_positions_change_no_number_of_the_selected_ones(explored: Exploration) -> None:
    explored.set(group_size=4, num_chunks=3, group_by="sequence")
    alone = seen(explored, {}, [])
    assert alone["position"].unique().tolist() == explored.targets()
    both = seen(explored, {}, [70, 30, explored.targets()[1]])
    pd.testing.assert_frame_equal(both[~both["clicked"]], alone, check_exact=True)
    assert both[both["clicked"]]["position"].tolist() == [30] * 4 + [70] * 4, "a selected one is none of them"
    assert both[both["clicked"]]["advantage"].isna().all(), (
        "the selected positions are one group, to which they do not belong"
    )
    explored.set(group_by="prefix")
    groups = explored.frame(clicked=[30]).groupby("position")["advantage"].mean()
    assert groups.abs().max() < 1e-5


def test_a_run_that_went_on_is_read_anew(tmp_path: Path) -> None:
    """What is explored are the weights that the name stands for when the document is read, in every session alike."""
    policy, tokenizer = load_model("tiny-deltanet")
    tokenizer.save_pretrained(tmp_path)

    def save(factor: float, time: int) -> None:
        with torch.no_grad():
            policy.lm_head.weight.mul_(factor)
        policy.save_pretrained(tmp_path)
        os.utime(tmp_path / "model.safetensors", (time, time))

    save(1.0, 1_000)
    one = Exploration(Here(), str(tmp_path))
    first = one.read(TEXT).result().reading
    save(0.5, 2_000)
    other = Exploration(Here(), str(tmp_path))  # a session that begins later, as after the death of a worker
    later = other.read(TEXT).result().reading
    assert not np.array_equal(later.entropies[1:], first.entropies[1:])
    other.document = one.document
    with pytest.raises(ValueError, match="the weights have changed since this document was read: read it again"):
        other.roll_out([10]).result()
    one.roll_out([10]).result()  # of the weights that it has read with
    again = one.read(TEXT).result().reading
    np.testing.assert_array_equal(again.entropies, later.entropies)


class Later(Here):
    """Makes rollouts only when `answer` is called; a cancelled request is answered with None."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[Future[Any], dict[str, Any]]] = []

    def submit(self, method: str, on_step: Callable[[Any], object] | None = None, **arguments: Any) -> Future[Any]:
        if method != "rollouts":
            return super().submit(method, on_step, **arguments)
        self.asked.append((method, arguments))
        self.waiting.append((Future(), arguments))
        return self.waiting[-1][0]

    def cancel(self, future: Future[Any]) -> None:
        future.set_result(None)

    def answer(self) -> None:
        for future, arguments in self.waiting:
            if not future.done():
                future.set_result(self.session.rollouts(**arguments))


def test_pending_rollouts_are_not_requested_twice_and_superseded_ones_are_cancelled() -> None:
    worker = Later()
    explored = Exploration(worker)
    explored.read(TEXT).result()
    explored.set(group_size=4)
    first = explored.roll_out([30, 40])
    explored.set(group_size=2)  # a smaller n: the pending request makes them
    assert explored.cancel([30]) == 0
    second = explored.roll_out([30, 50])
    assert [arguments["positions"] for arguments in rolled(explored)] == [[30, 40], [50]]
    explored.set(seed=1)
    third = explored.roll_out([30])
    assert explored.cancel([30, 50]) == 2, "both are of another seed"
    assert first.result(0) == second.result(0) == []
    worker.answer()
    assert [made.position for made in third.result(0)] == [30]
    assert explored.covers(30) and not explored.covers(40)
    explored.set(seed=0)
    assert not explored.covers(30)
    assert explored.cancel() == 0, "nothing is pending"
