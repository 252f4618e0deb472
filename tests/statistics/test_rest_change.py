"""The change of the loss of a held-out remainder: values by hand, and the three verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refine_lab.statistics.blocks import block_bootstrap
from refine_lab.statistics.rest_change import rest_change, rest_difference
from tests.support.refusals import refused


def losses(shift: float, spread: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Losses of 200 tokens before and after; the changes have exactly the mean `shift`."""
    generator = np.random.default_rng(2)
    before, noise = generator.random(200) * 4, generator.standard_normal(200) * spread
    return before, before + shift + noise - noise.mean()


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [
        (-0.1, "a gain beyond noise"),
        (-0.01, "no gain beyond noise"),
        (0.0, "no gain beyond noise"),
        (0.1, "no gain beyond noise, and the loss rises"),
    ],
)
def test_the_verdict_is_where_the_interval_is(shift: float, verdict: str) -> None:
    before, after = losses(shift)
    found = rest_change(before, after, seed=5)
    low, high = found.interval
    assert found.verdict == verdict
    assert ("no gain" in verdict) == (high >= 0) and ("rises" in verdict) == (low > 0)
    assert found.change.value == pytest.approx(shift, abs=1e-12)
    assert (found.before, found.after) == (before.mean(), after.mean())
    assert found.change == block_bootstrap(after - before, seed=5)


def test_the_sentence_has_every_number() -> None:
    found = rest_change(*losses(-0.1), seed=5)
    low, high = found.interval
    numbers = [f"−{abs(value):.4f}" for value in (-0.1, low, high)] + [f"{found.before:.4f}", f"{found.after:.4f}"]
    numbers += ["200 tokens", f"block length {found.change.block_length}", "seed 5", "95%"]
    assert found.sentence.startswith(
        "A gain beyond noise: the loss on the held-out remainder changes by −0.1000 nats per token"
    )
    assert all(number in found.sentence for number in numbers)
    row = found.row()
    assert (row["tokens"], row["low"], row["high"], row["verdict"]) == (200, low, high, "a gain beyond noise")


def test_equal_changes_determine_no_interval_and_no_gain() -> None:
    found = rest_change(np.full(9, 2.0), np.full(9, 1.0))
    assert found.verdict == "no gain beyond noise" and found.change.value == -1
    assert all(map(math.isnan, found.interval)) and "an interval cannot be determined" in found.sentence


def test_equal_differences_of_two_methods_determine_no_verdict() -> None:
    found = rest_difference("SFT", np.full(9, 2.0), "REFINE", np.full(9, 1.0))
    assert found.verdict == "whether the methods differ beyond noise cannot be determined"
    assert "a difference of −1.0000 (an interval cannot be determined)" in found.details


def test_refusals() -> None:
    with refused("losses after adaptation", 3, "4 tokens, as before it"):
        rest_change(np.zeros(4), np.zeros(3))
    with refused("values", "2 values, 1 of them not finite"):
        rest_change(np.zeros(2), np.array([0.0, np.inf]))


def test_few_tokens_are_named_with_what_they_mean_for_the_interval() -> None:
    draw = np.random.default_rng(0)
    before, changes = draw.random(100), -0.5 + 0.1 * draw.standard_normal(100)
    enough, few = (rest_change(before[:count], (before + changes)[:count]) for count in (100, 99))
    assert enough.verdict == few.verdict == "a gain beyond noise" and "Only" not in enough.sentence
    assert few.sentence.endswith(
        "Only 99 tokens are held out: below 100, the interval is often too narrow, and noise can look like a difference."
    )
    pair = rest_difference("SFT", before[:12], "REFINE", (before + changes)[:12])
    assert "alone. Only 12 tokens are held out: below 100," in pair.details
