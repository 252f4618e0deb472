"""Two models on one document, with numbers by hand: differences, losses and intervals, likely tokens, pairs of rollouts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from refine_lab.explore.reading import DocumentReading
from refine_lab.explore.rollout_pairs import pair_rollouts, recorded_pairs
from refine_lab.explore.side_by_side import ReadingPair, likely_tokens
from refine_lab.runs.run import Run
from refine_lab.runs.schema import ROLLOUT_TYPES, write_rollouts
from refine_lab.statistics.blocks import block_bootstrap
from tests.support.paths import TESTS
from tests.support.refusals import naming, refused

NAN = float("nan")
LOGPROBS = {"a": [NAN, -1.0, -2.0, -3.0, -4.0, -2.0], "b": [NAN, -1.5, -1.0, -3.0, -3.0, -2.0]}
RUN = TESTS / "fixtures" / "runs" / "20261129-202148-recorded-refine-s0"


def reading(logprobs: list[float], **values: Any) -> DocumentReading:
    count = len(logprobs)
    given = {
        "token_ids": np.arange(count, dtype=np.int32),
        "entropies": np.full(count, 1.0),
        "logprobs": np.array(logprobs),
        "ranks": np.ones(count, dtype=np.int32),
        "alternatives": np.tile(np.array([7, 8, 9], dtype=np.int32), (count, 1)),
        "probabilities": np.tile(np.array([0.5, 0.2, 0.1], dtype=np.float32), (count, 1)),
    }
    return DocumentReading(**(given | values))


def pair(a: DocumentReading, b: DocumentReading, key: tuple[int, ...] = ()) -> ReadingPair:
    chosen = np.isin(np.arange(len(a.logprobs)), key)
    return ReadingPair(token_ids=a.token_ids, a=a, b=b, key_tokens=chosen, key_model="A")


def test_losses_perplexities_and_their_differences() -> None:
    found = pair(reading(LOGPROBS["a"]), reading(LOGPROBS["b"]), key=(3, 4))
    np.testing.assert_array_equal(found.changes()["logprob"], [NAN, -0.5, 1.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(found.changes()["entropy"], np.zeros(6))
    table = found.measures().set_index("measure")
    assert table.loc["loss", ["A", "B", "difference"]].tolist() == pytest.approx([2.4, 2.1, -0.3])
    ratio = [math.exp(2.4), math.exp(2.1), math.exp(-0.3)]
    assert table.loc["perplexity", ["A", "B", "difference"]].tolist() == pytest.approx(ratio)
    key = [math.exp(3.5), math.exp(3.0), math.exp(-0.5)]
    assert table.loc["LongPPL", ["A", "B", "difference"]].tolist() == pytest.approx(key)
    assert table["tokens"].tolist() == [5, 5, 2]
    low, high = block_bootstrap(np.array([0.5, -1.0, 0.0, -1.0, 0.0])).interval()
    assert table.loc["loss", ["low", "high"]].tolist() == pytest.approx([low, high])
    assert table.loc["perplexity", ["low", "high"]].tolist() == pytest.approx([math.exp(low), math.exp(high)])
    assert found.loss.verdict == "No difference beyond noise on this document"
    assert (
        "the same 2 key tokens for both models: the tokens that A predicts at least 1 nat better" in found.key_details()
    )
    assert "This choice favours A" in found.key_details()


def test_the_better_model_is_named_and_equal_ones_have_no_interval_but_zero() -> None:
    draw = np.random.default_rng(0)
    losses = draw.normal(3, 1, 200)
    worse, better = (reading([NAN, *(-losses - shift - draw.normal(0, 0.1, 200))]) for shift in (0.5, 0.0))
    assert pair(worse, better).loss.verdict == "B predicts this document better"
    assert pair(better, worse).loss.verdict == "A predicts this document better"
    assert "below 100" not in pair(worse, better).details()
    few = [reading(each.logprobs[:40]) for each in (worse, better)]
    sentence = "Only 39 tokens are compared: below 100, the interval is often too narrow, and noise can look like a difference."
    assert pair(*few).details().endswith(f"training seeds. {sentence}")
    same = pair(better, better)
    assert same.loss.verdict == "A and B predict every token of this document identically"
    assert same.measures()[["difference", "low", "high"]].to_numpy().tolist() == [[0, 0, 0], [1, 1, 1]]
    assert "this document has no key token" in same.key_details()
    short = pair(reading([NAN, -2.0]), reading([NAN, -1.0]))  # one loss determines no interval
    assert short.loss.verdict == "Whether the difference is beyond noise cannot be determined from this document"
    assert "is −1.0000 nats per token (95% interval cannot be determined; paired" in short.details()


def test_long_short_differences_are_compared_in_the_same_windows() -> None:
    one, other, later = ([NAN, NAN, 1.0, 2.0], [NAN, NAN, 1.5, 1.0], [NAN, NAN, NAN, 1.0])
    readings = [reading([NAN, -1, -1, -1], long_short=np.array(values)) for values in (one, other, later)]
    np.testing.assert_array_equal(pair(*readings[:2]).changes()["long_short"], [NAN, NAN, 0.5, -1.0])
    assert "long_short" not in pair(readings[0], readings[2]).changes()
    assert "long_short" not in pair(readings[0], reading([NAN, -1, -1, -1])).changes()


def test_likely_tokens_and_where_the_other_model_has_them() -> None:
    alternatives = np.tile(np.array([8, 7, 5], dtype=np.int32), (6, 1))
    found = pair(reading(LOGPROBS["a"]), reading(LOGPROBS["b"], alternatives=alternatives))
    table = likely_tokens(found, 2)
    assert table["id_a"].tolist() == [7, 8, 9] and table["elsewhere_a"].tolist() == [2, 1, 0]
    assert table["id_b"].tolist() == [8, 7, 5] and table["elsewhere_b"].tolist() == [2, 1, 0]
    assert table["p_a"].tolist() == pytest.approx([0.5, 0.2, 0.1])
    for token in (0, 6):
        with refused("a token", token):
            likely_tokens(found, token)


def rollouts(*rows: tuple[int, int, int, list[int], list[int]]) -> pd.DataFrame:
    """Rows of sequence, position, sample index, prefix and rollout; the reference is 1, 2, 3."""
    names = ["sequence_id", "position", "sample_index", "prefix_ids", "rollout_ids"]
    frame = pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows])
    numbers = {"step": 1, "reward": 0.5, "binary": 0.25, "logprobs": [[-1.0, -2.0, -0.5]] * len(rows)}
    return frame.assign(**numbers, target_ids=[[1, 2, 3]] * len(rows))


def test_rollouts_are_paired_by_prefix_and_sample_index() -> None:
    a = rollouts((4, 9, 0, [5, 6], [1, 2, 3]), (4, 9, 1, [5, 6], [1, 7, 3]), (4, 20, 0, [8], [1, 1, 1]))
    b = rollouts(
        (90, 9, 1, [5, 6], [1, 8, 3]),
        (90, 9, 0, [5, 6], [1, 2, 3]),
        (90, 20, 0, [7], [1, 1, 1]),
        (90, 9, 2, [5, 6], [0]),
    )
    found = pair_rollouts(a, b)
    assert found["sample_index"].tolist() == [0, 1]  # position 20 has another prefix, sample 2 no partner
    assert found["rollout_ids_b"].tolist() == [[1, 2, 3], [1, 8, 3]]
    assert found["changed"].tolist() == [[False] * 3, [False, True, False]]
    assert found["same"].tolist() == [3, 1]
    assert found["logprob_a"].tolist() == [-3.5, -3.5]
    assert (found["sequence_id_a"].tolist(), found["sequence_id_b"].tolist()) == ([4, 4], [90, 90])
    assert pair_rollouts(a, rollouts((4, 8, 0, [5, 6], [1, 2, 3]))).empty
    longer = pair_rollouts(a, rollouts((4, 9, 0, [5, 6], [1, 2])))
    assert longer["changed"].tolist() == [[False, False, True]] and longer["same"].tolist() == [2]
    twice = pair_rollouts(*[rollouts((1, 9, 0, [5], [1, 2, 3]), (2, 9, 0, [5], [4, 4, 4]))] * 2)
    assert twice["rollout_ids_a"].tolist() == twice["rollout_ids_b"].tolist() == [[1, 2, 3], [4, 4, 4]]


def test_recorded_rollouts_of_two_steps(tmp_path: Path) -> None:
    folder = tmp_path / RUN.name
    shutil.copytree(RUN, folder)
    run = Run(folder)
    for sentence, steps in (
        ("rolled out from different prefixes", (1, 2)),
        ("must be one with recorded rollouts", (1, 9)),
    ):
        with naming(ValueError, run.name, sentence):
            recorded_pairs(run, *steps)
    again = run.rollouts([1])
    changed = [list(row) for row in again["rollout_ids"]]
    changed[2][1] += 1
    rows = again.assign(rollout_ids=changed, sequence_id=again["sequence_id"] + 100)  # the same texts, read again
    write_rollouts(folder / "rollouts", [(5, {name: rows[name] for name in ROLLOUT_TYPES})])
    found = recorded_pairs(run, 1, 5)
    assert len(found) == len(again) == 4
    assert found["same"].tolist() == [len(changed[0])] * 2 + [1, len(changed[0])]
    assert (found["sequence_id_b"] - found["sequence_id_a"] == 100).all()
    assert not recorded_pairs(run, 1, 1, Run(RUN))["changed"].map(any).any()
