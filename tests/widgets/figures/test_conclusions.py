"""The sentence above differences from a reference: what it says in each case, and what it says that it does not say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.support.compared import ANSWERS, PER_SEED, answers_of
from tests.support.refusals import refused
from widgets.figures.conclusions import conclusion

NONE = pd.DataFrame()


def test_a_shown_difference_with_its_interval_and_what_stays_open() -> None:
    draw = np.random.default_rng(0)
    scores = {
        name: (draw.random((3, 150)) < share).astype(float).tolist() for name, share in (("sft", 0.3), ("refine", 0.7))
    }
    found = conclusion(answers_of(scores), ["contains_answer", "loss_after"])
    assert found.sentence == (
        "Compared with SFT (26.2 %) in contains answer, REFINE is better by 43.6 points (95 % interval +36.3 to +50.8); "
        "this does not say whether this also holds for other models, text and training lengths."
    )
    row = found.data.iloc[0]
    assert (row["SFT"], row["value"], row["difference"]) == ("26.2", "69.8", "+43.6 [+36.3, +50.8]")
    assert row["interval over"] == "seeds and questions" and (row["seeds"], row["distinct questions"]) == (3, 150)
    assert found.data["measure"].tolist() == ["contains answer (%)", "loss after (nats)"] and found.note == ""
    assert found.sentence in repr(found) and found.sentence in found._repr_html_()
    less = conclusion(answers_of(scores), "loss_after").sentence  # 2 - score
    assert "REFINE is better by 0.436 nats (95 % interval −0.508 to −0.363)" in less
    assert "nor" not in less and "measured on the text adapted to" in less


def test_an_interval_with_0_shows_no_difference_and_no_equality() -> None:
    found = conclusion(ANSWERS)
    assert "REFINE is not shown to differ (+33.3 points; 95 % interval −100.0 to +100.0)" in found.sentence
    assert "how much seeds vary, which two of them show only roughly" in found.sentence
    assert found.sentence.endswith("nor that methods without a shown difference are equal.")
    assert "only 3 distinct questions" in found.note and "corrected by Holm for the 2 comparisons" in found.note


def test_why_there_is_no_interval() -> None:
    single = conclusion(NONE, "contains_answer", per_seed=PER_SEED[PER_SEED["seed"] == 0]).sentence
    assert "nested differs by +10.0 points (no interval)" in single
    assert "there is no interval because there is one seed and no scores of single questions are recorded" in single
    two = conclusion(NONE, "contains_answer", per_seed=PER_SEED[PER_SEED["seed"] < 2]).sentence
    assert "because there are only 2 seeds and no scores" in two
    questions = conclusion(answers_of({"sft": [[0, 1, 0, 0, 1]], "refine": [[1, 1, 0, 1, 1]]})).sentence
    assert "what another seed would give, since there is one and the interval is over questions alone" in questions
    same = conclusion(answers_of({"sft": [[0, 1], [0, 1]], "refine": [[0, 1], [0, 1]]})).sentence
    assert "an interval is missing where all scores differ by the same amount or not at all" in same


def test_a_method_that_is_not_compared_is_named_with_the_reason() -> None:
    apart = ANSWERS[ANSWERS["method"] != "none"].copy()
    apart.loc[apart["method"] == "refine", "seed"] += 10
    assert conclusion(apart).sentence == (
        "In contains answer, nothing is compared with SFT. REFINE is not compared: it has no seed in common with SFT."
    )
    both = conclusion(pd.concat([apart, ANSWERS[ANSWERS["method"] == "none"]])).sentence
    assert both.startswith("Compared with SFT (50.0 %) in contains answer, baseline (no adaptation) is not")
    assert both.endswith(" REFINE is not compared: it has no seed in common with SFT.")


def test_other_names_and_another_reference() -> None:
    labels = {"none": "a <b>", "sft": "run 1", "refine": "run 2"}
    found = conclusion(ANSWERS, reference="refine", labels=labels)
    assert found.sentence.startswith("Compared with run 2 (83.3 %)") and "<b>" not in found._repr_html_()
    assert found.data["method"].tolist() == ["a <b>", "run 1"]
    with refused("reference", "dft", "none, sft, refine"):
        conclusion(ANSWERS, reference="dft")
    with pytest.raises(ValueError, match="no two methods have one of these measures"):
        conclusion(ANSWERS, "exact_match")
