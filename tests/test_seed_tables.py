"""The tables over seeds: what they say of given results, and model text as text."""

from __future__ import annotations

import pandas as pd
import pytest

from refine_lab.posttraining import MEASURES, per_run
from refine_lab.tasks.answers import side_by_side
from widgets.seed_tables import differences_table, samples_table, ways_table


def results(*, seeds: int = 2) -> pd.DataFrame:
    rows = [("base", 0, -1, 0.10)]
    for seed in range(seeds):
        rows += [("sft", 25, seed, 0.4 + 0.1 * seed), ("nested_sft", 125, seed, 0.5), ("nested_refine", 125, seed, 0.6)]
        rows += [("nested_sft_release", 50, seed, 0.2)]
    frame = pd.DataFrame(rows, columns=["way", "updates", "seed", "recall"])
    return frame.assign(exact_match=frame["recall"] / 2, f1=frame["recall"])


def answers() -> pd.DataFrame:
    ways = [
        ("base", -1, ["<b>", "two"]),
        ("sft", 0, ["one", "two"]),
        ("sft", 1, ["x", "x"]),
        ("nested_refine", 0, ["1", "two"]),
    ]
    rows = [
        {
            "name": f"q{n}",
            "question": f"which {n}?",
            "references": [f"r{n}", "or"],
            "way": way,
            "seed": seed,
            "updates": 3,
        }
        | {"answer": text, **dict.fromkeys(MEASURES, float(n))}
        for way, seed, texts in ways
        for n, text in enumerate(reversed(texts))
    ]
    return pd.DataFrame(rows)


def test_ways_in_percent_with_spread_and_updates():
    table = ways_table(results()).data
    assert table["method"].tolist() == ["base", "SFT", "nested SFT", "nested REFINE", "nested SFT, one inner update"]
    assert table["recall (%)"].tolist() == ["10.0", "45.0 ± 7.1", "50.0 ± 0.0", "60.0 ± 0.0", "20.0 ± 0.0"]
    assert table["exact match (%)"].tolist()[1] == "22.5 ± 3.5"
    assert table["updates"].tolist() == ["0", "25", "125", "125", "50"] and table["runs"].tolist() == [1, 2, 2, 2, 2]


def test_differences_in_points_with_intervals():
    """REFINE - SFT: 20 and 10 points, mean 15, t(0.975, 1) = 12.7062, half 12.7062 * 7.0711 / sqrt 2 = 63.5."""
    table = differences_table(results()).data
    assert table["difference"].tolist() == [
        "nested REFINE – SFT",
        "nested REFINE – nested SFT",
        "nested REFINE – nested SFT, one inner update",
        "nested SFT – SFT",
    ]
    assert table["recall (points)"].tolist() == [
        "+15.0 (-48.5 to +78.5)",
        "+10.0",
        "+40.0",
        "+5.0 (-58.5 to +68.5)",
    ]
    assert differences_table(results(seeds=1)).data["recall (points)"].tolist()[0] == "+20.0"


def test_tables_without_rows_are_refused():
    empty = results().iloc[:0]
    for table in (ways_table, differences_table, samples_table):
        with pytest.raises(ValueError, match=f"figure {table.__name__} has no data"):
            table(empty)
    with pytest.raises(ValueError, match="it compares ways that were run with the same seeds"):
        differences_table(results()[results()["way"] == "base"])


def test_questions_in_which_the_ways_differ_come_first_with_all_answers_of_the_first_seed():
    table = side_by_side(answers())
    assert table.columns.tolist() == ["question", "references", "base", "sft", "nested_refine"]
    assert table["question"].tolist() == ["which 1?", "which 0?"]
    assert table.iloc[0].tolist() == ["which 1?", "r1 | or", "<b>", "one", "1"]
    shown = samples_table(table)
    assert "&lt;b&gt;" in shown._repr_html_() and "nested REFINE" in shown._repr_html_()
    assert len(side_by_side(answers(), count=1)) == 1


def test_measures_are_means_over_questions_of_a_run():
    table = per_run(answers())
    assert table["way"].tolist() == ["base", "sft", "sft", "nested_refine"]
    assert table["recall"].tolist() == [0.5] * 4 and table["seed"].tolist() == [-1, 0, 1, 0]


def test_ways_without_the_same_seeds_are_not_compared():
    rows = [("none", 0, 0.5), ("sft", 0, 0.4), ("sft", 1, 0.4), ("refine", 0, 0.6), ("refine", 1, 0.8)]
    frame = pd.DataFrame(rows, columns=["way", "seed", "recall"]).assign(updates=4)
    assert differences_table(frame).data["difference"].tolist() == ["REFINE – SFT"]
    assert ways_table(frame).data["method"].tolist() == ["baseline (no adaptation)", "SFT", "REFINE"]


def test_questions_without_references_have_no_measures():
    frame = results().assign(recall=float("nan"), exact_match=float("nan"), f1=float("nan"))
    assert list(ways_table(frame).data) == ["method", "updates", "runs"]
    assert list(differences_table(frame).data) == ["difference", "seeds"]
