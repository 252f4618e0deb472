"""Tables of methods: what they say of given results over seeds and prompts, and model text as text."""

from __future__ import annotations

import pandas as pd
import pytest

from refine_lab.data.tasks.scores import SCORES
from refine_lab.experiments.compare import per_prompt, per_seed
from refine_lab.training.answers import side_by_side
from tests.support.compared import ANSWERS
from widgets.figures.method_tables import comparison_table, samples_table


def results(*, seeds: int = 2) -> pd.DataFrame:
    rows = [("base", 0, -1, 0.10)]
    for seed in range(seeds):
        rows += [("sft", 25, seed, 0.4 + 0.1 * seed), ("nested_sft", 125, seed, 0.5), ("nested_refine", 125, seed, 0.6)]
        rows += [("nested_sft_release", 50, seed, 0.2)]
    frame = pd.DataFrame(rows, columns=["method", "updates", "seed", "contains_answer"])
    return frame.assign(exact_match=frame["contains_answer"] / 2, f1=frame["contains_answer"])


def answers() -> pd.DataFrame:
    methods = [
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
            "method": method,
            "seed": seed,
            "updates": 3,
        }
        | {"answer": text, **dict.fromkeys(SCORES, float(n))}
        for method, seed, texts in methods
        for n, text in enumerate(reversed(texts))
    ]
    return pd.DataFrame(rows)


def test_ways_in_percent_with_spread_and_updates():
    table = comparison_table(results()).data
    assert table["method"].tolist() == ["base", "SFT", "nested SFT", "nested REFINE", "nested SFT, one inner update"]
    assert table["contains answer (%)"].tolist() == ["10.0", "45.0 ± 7.1", "50.0 ± 0.0", "60.0 ± 0.0", "20.0 ± 0.0"]
    assert table["exact-match rate (%)"].tolist()[1] == "22.5 ± 3.5"
    assert table["updates"].tolist() == ["0", "25", "125", "125", "50"] and table["runs"].tolist() == [1, 2, 2, 2, 2]


def test_tables_without_rows_are_refused():
    empty = results().iloc[:0]
    for table in (comparison_table, samples_table):
        with pytest.raises(ValueError, match=f"figure {table.__name__} has no data"):
            table(empty)


def test_questions_in_which_the_ways_differ_come_first_with_all_answers_of_the_first_seed():
    table = side_by_side(answers())
    assert table.columns.tolist() == ["question", "references", "base", "sft", "nested_refine"]
    assert table["question"].tolist() == ["which 1?", "which 0?"]
    assert table.iloc[0].tolist() == ["which 1?", "r1 | or", "<b>", "one", "1"]
    shown = samples_table(table)
    assert "&lt;b&gt;" in shown._repr_html_() and "nested REFINE" in shown._repr_html_()
    assert len(side_by_side(answers(), count=1)) == 1


def test_measures_are_means_over_questions_of_a_run():
    table = per_seed(answers())
    assert table["method"].tolist() == ["base", "sft", "sft", "nested_refine"]
    assert table["contains_answer"].tolist() == [0.5] * 4 and table["seed"].tolist() == [-1, 0, 1, 0]


def test_methods_without_the_same_seeds_have_their_means():
    rows = [("none", 0, 0.5), ("sft", 0, 0.4), ("sft", 1, 0.4), ("refine", 0, 0.6), ("refine", 1, 0.8)]
    frame = pd.DataFrame(rows, columns=["method", "seed", "contains_answer"]).assign(updates=4)
    assert comparison_table(frame).data["method"].tolist() == ["baseline (no adaptation)", "SFT", "REFINE"]


def test_questions_without_references_have_no_measures():
    frame = results().assign(contains_answer=float("nan"), exact_match=float("nan"), f1=float("nan"))
    assert list(comparison_table(frame).data) == ["method", "updates", "runs"]


def test_the_table_of_ways_shows_percent_and_nats_and_no_share_beyond_its_ends():
    table = comparison_table(per_prompt(ANSWERS)).data
    assert table["method"].tolist() == ["baseline (no adaptation)", "SFT", "REFINE"]
    assert table.loc[1, "contains answer (%)"] == "50.0 [0.0, 100.0]"
    assert table.loc[2, "loss after (nats)"].startswith("1.167 [")
    assert "exact-match rate (%)" not in table


def test_held_out_results_are_means_and_deviations_over_seeds() -> None:
    rows = [{"method": "base", "ntp_loss": 3.0, "ntp_accuracy": 0.4, "exact recall word-1": 0.95, "note": "x"}]
    rows += [
        {
            "method": method,
            "seed": seed,
            "updates": 20,
            "ntp_loss": 2.0 + seed,
            "ntp_accuracy": 0.5,
            "exact recall word-1": 0.9,
        }
        for method in ("sft", "refine")
        for seed in (0, 1)
    ]
    table = comparison_table(rows).data
    assert table["method"].tolist() == ["base", "SFT", "REFINE"]
    assert table["updates"].tolist() == ["0", "20", "20"]
    assert table["runs"].tolist() == [1, 2, 2]
    assert table["NTP loss (nats)"].tolist() == ["3.0000", "2.5000 ± 0.7071", "2.5000 ± 0.7071"]
    assert table["NTP accuracy (%)"].tolist()[0] == "40.00"
    assert table["exact recall word-1 (%)"].tolist()[1] == "90.00 ± 0.00"
    assert "note" not in table


def test_tables_of_answers_count_different_questions_and_warn_of_few():
    repeated = ANSWERS.assign(question=ANSWERS["question"].replace("q1", "q0"), updates=4)
    for rows in (per_prompt(repeated), per_seed(repeated)):
        table = comparison_table(rows)
        assert set(table.data["distinct questions"]) == {2}
        assert "only 2 distinct questions, fewer than 100" in repr(table) and table.note in table._repr_html_()
    many = pd.concat([ANSWERS.assign(name=f"n{i}", question=f"n{i}") for i in range(100)])
    assert comparison_table(per_prompt(many.drop_duplicates(["method", "seed", "name"]))).note == ""
    assert "distinct questions" not in comparison_table(results()).data


def test_tables_of_recall_count_different_documents_and_warn_of_few():
    recall = results().assign(documents=50, **{"exact recall word-1 at 512": 0.5})
    table = comparison_table(recall)
    assert set(table.data["distinct documents"]) == {50}
    assert table.note.startswith("There are only 50 distinct documents, fewer than 100")
    assert comparison_table(recall.assign(documents=100)).note == ""
    assert "distinct documents" not in comparison_table(results()).data
