"""The sentence above differences from a reference: what it says in each case, and what it says that it does not say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from refine_lab.recipes.methods import KNOWN
from tests.support.compared import ANSWERS, PER_SEED, answers_of
from tests.support.refusals import refused
from widgets.core.glossary import TERMS
from widgets.figures.conclusions import conclusion
from widgets.figures.method_sentences import method_sentence, method_sentences

NONE = pd.DataFrame()


def test_a_shown_difference_with_its_interval_and_what_stays_open() -> None:
    draw = np.random.default_rng(0)
    scores = {
        name: (draw.random((3, 150)) < share).astype(float).tolist() for name, share in (("sft", 0.3), ("refine", 0.7))
    }
    found = conclusion(answers_of(scores), ["contains_answer", "loss_after"])
    assert found.sentence == (
        "In contains answer, REFINE is best (69.8 %): better than SFT (26.2 %) by 43.6 points (95 % interval +36.3 to "
        "+50.8). Other models, texts and training lengths may give other results."
    )
    row = found.data.iloc[0]
    assert (row["SFT"], row["value"], row["difference"]) == ("26.2", "69.8", "+43.6 [+36.3, +50.8]")
    assert row["interval over"] == "seeds and questions" and (row["seeds"], row["distinct questions"]) == (3, 150)
    assert found.data["measure"].tolist() == ["contains answer (%)", "loss after (nats)"] and found.note == ""
    assert found.sentence in repr(found)
    less = conclusion(answers_of(scores), "loss_after").sentence  # 2 - score
    assert less.startswith(
        "In loss after, REFINE is best (1.302 nats): better than SFT (1.738 nats) by 0.436 nats (95 %"
    )
    assert "(95 % interval −0.508 to −0.363)" in less and "measured on the text adapted to" in less
    assert found.methods.keys() == {"SFT", "REFINE"} and found.methods["SFT"] in found._repr_html_()
    html = found._repr_html_()
    assert html.index("font-weight: 600") < html.index(found.head) < html.index(found.details)


def test_shown_differences_are_those_of_the_shown_means() -> None:
    """Shares of 400 questions in quarters of a point, as in 75.75 − 63.00; those of 3 questions never end."""
    right = {"sft": 252, "refine": 281, "expected": 303}
    scores = {name: [[float(i < count) for i in range(400)]] * 2 for name, count in right.items()}
    found = conclusion(answers_of(scores), reference="sft")
    assert "(75.75 %): better than SFT (63.00 %) by 12.75 points" in found.head
    assert "the second, REFINE (70.25 %), by 5.50 points" in found.head
    thirds = conclusion(answers_of({"sft": [[1, 1, 0], [1, 0, 0]], "refine": [[1, 1, 1], [1, 0, 0]]})).data.iloc[0]
    assert (thirds["SFT"], thirds["value"]) == ("50.0", "66.7") and thirds["difference"].startswith("+16.7")
    worse = conclusion(answers_of(scores), reference="expected").data
    assert worse["difference"].str.startswith("−").all() and not worse["difference"].str.contains("-").any()
    for table in (found.data, worse):
        for row in table.to_dict("records"):
            value, against = float(row["value"]), float(row["SFT"] if "SFT" in row else row["expected match"])
            assert float(row["difference"].split()[0].replace("−", "-")) == pytest.approx(value - against, abs=1e-9)


def test_an_interval_with_0_shows_no_difference_and_no_equality() -> None:
    found = conclusion(ANSWERS)
    assert found.head.startswith(
        "In contains answer, REFINE has the best mean (83.3 %): not shown to differ from the second, SFT ("
    )
    assert "SFT (50.0 %; +33.3 points, 95 % interval −100.0 to +100.0)" in found.head
    assert "there are only two seeds, so the variation between seeds is known only roughly." in found.details.lower()
    assert "Methods that are not shown to differ need not be equal." in found.details
    assert (
        "only 3 distinct questions" in found.note
        and "intervals over seeds" not in found.note
        and "corrected by Holm for the 2 comparisons" in found.note
    )


def test_a_difference_is_claimed_only_if_its_corrected_p_value_is_below_5_percent() -> None:
    """REFINE's interval excludes 0; of three comparisons, its corrected p-value is three times as large."""
    draw = np.random.default_rng(13)
    scores = {
        name: (draw.random((3, 60)) < share).astype(float).tolist()
        for name, share in (("sft", 0.5), ("refine", 0.68), ("expected", 0.52), ("dft", 0.49))
    }
    found = conclusion(answers_of(scores))
    row = found.data.set_index("method").loc["REFINE"]
    low, p = float(row["difference"].split("[")[1].split(",")[0]), float(row["p (Holm)"])
    assert low > 0 and p > 0.05, "an interval without 0 beside a corrected p-value that shows nothing"
    change, interval = row["difference"].rstrip("]").replace(", ", " to ").split(" [")
    said = f"not shown to differ from SFT ({row['SFT']} %; {change} points, 95 % interval {interval})"
    assert said in found.head
    assert "better" not in found.sentence and "worse" not in found.sentence
    assert "only if its p-value, corrected for the number of comparisons, is below 0.05." in found.details
    alone = conclusion(answers_of({name: scores[name] for name in ("sft", "refine")}))
    assert "REFINE is best" in alone.head and "corrected" not in alone.sentence, "a single comparison"


def test_why_there_is_no_interval() -> None:
    single = conclusion(NONE, "contains_answer", per_seed=PER_SEED[PER_SEED["seed"] == 0])
    assert single.head == (
        "In contains answer, no difference can be claimed, because there is one seed and no scores of single questions "
        "are recorded: nested minus SFT is +10.0 points (60.0 % against 50.0 %)."
    )
    assert "best" not in single.head and "because" not in single.details, "the reason is said once"
    two = conclusion(NONE, "contains_answer", per_seed=PER_SEED[PER_SEED["seed"] < 2]).sentence
    assert "because there are only 2 seeds and no scores" in two
    questions = conclusion(answers_of({"sft": [[0, 1, 0, 0, 1]], "refine": [[1, 1, 0, 1, 1]]})).sentence
    assert (
        "There is one seed, and the interval is over questions alone; another seed may give another result."
        in questions
    )
    same = conclusion(answers_of({"sft": [[0, 1], [0, 1]], "refine": [[0, 1], [0, 1]]})).sentence
    assert same.startswith("In contains answer, SFT and REFINE have the same mean (50.0 %).")
    assert "There is no interval because all scores differ by the same amount or not at all" in same


def test_a_method_that_is_not_compared_is_named_with_the_reason() -> None:
    apart = ANSWERS[ANSWERS["method"] != "none"].copy()
    apart.loc[apart["method"] == "refine", "seed"] += 10
    assert conclusion(apart).sentence == (
        "In contains answer, nothing is compared with SFT. REFINE is not compared: it has no seed in common with SFT."
    )
    both = conclusion(pd.concat([apart, ANSWERS[ANSWERS["method"] == "none"]])).sentence
    assert both.startswith("In contains answer, SFT has the best mean (50.0 %): not shown to differ from baseline (no")
    assert both.endswith(" REFINE is not compared: it has no seed in common with SFT.")


def test_other_names_and_another_reference() -> None:
    labels = {"none": "a <b>", "sft": "run 1", "refine": "run 2"}
    found = conclusion(ANSWERS, reference="refine", labels=labels)
    assert (
        found.head.startswith("In contains answer, run 2 has the best mean (83.3 %): not shown")
        and "<b>" not in found._repr_html_()
    )
    assert found.data["method"].tolist() == ["a <b>", "run 1"]
    with refused("reference", "dft", "none, sft, refine"):
        conclusion(ANSWERS, reference="dft")
    with pytest.raises(ValueError, match="no two methods have one of these measures"):
        conclusion(ANSWERS, "exact_match")


def test_the_best_method_is_compared_with_the_second_and_numbers_are_those_of_the_table() -> None:
    """DFT lacks the second seed: its pairs, and the reference's mean in them, are those of the first seed alone."""
    draw = np.random.default_rng(0)
    shares = {"sft": 0.2, "refine": 0.7, "expected": 0.72, "dft": 0.3}
    scores = {name: (draw.random((2, 120)) < share).astype(float).tolist() for name, share in shares.items()}
    answers = answers_of(scores)
    whole = conclusion(answers)
    best, second = ("expected match", "REFINE")
    rows = whole.data.set_index("method")
    assert whole.head.startswith(
        f"In contains answer, {best} has the best mean ({rows.loc[best, 'value']} %): better than SFT ("
    )
    assert f"not shown to differ from the second, {second} ({rows.loc[second, 'value']} %; +" in whole.head
    assert "The best two were picked by the same scores that compare them" in whole.details
    part = conclusion(answers[(answers["method"] != "dft") | (answers["seed"] == 0)], reference="expected")
    row = part.data.set_index("method").loc["DFT"]
    other = part.data.set_index("method").loc["SFT"]
    assert row["expected match"] != other["expected match"]
    assert (
        f"DFT is worse by {row['difference'].split()[0][1:]} points ({row['value']} % against {row['expected match']} %;"
        in (part.details)
    )
    assert "For DFT: there is one seed, and the interval is over questions alone" in part.details
    assert (
        "For REFINE and SFT: there are only two seeds" in part.details
        or "For SFT and REFINE: there are" in part.details
    )


def test_every_method_has_a_sentence() -> None:
    known = {*(name for names in KNOWN.values() for name in names), "base"}
    assert [name for name in known if not method_sentence(name)] == []
    assert method_sentence("refine: lr 0.001") == method_sentence("refine") == TERMS["REFINE"]
    assert method_sentence("nested_sft_release").endswith(f"{TERMS['nested']} {TERMS['one inner update']}")
    assert [*method_sentences(["sft: lr 1", "sft: lr 2", "unknown"])] == ["SFT"]
