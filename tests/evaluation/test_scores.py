"""Scores by hand: cutting rules, LongBench's metrics, RULER's, standard errors, effective lengths."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.evaluation import longbench, niah, ruler_qa, short
from refine_lab.evaluation.cutting import CUTS, cut_figures
from refine_lab.evaluation.harness_tasks import higher_is_better, jackknife
from refine_lab.evaluation.lengths import effective_length, nolima_length
from refine_lab.evaluation.trec import CLASSES


def sample(*references: str) -> dict:
    return {"outputs": list(references)}


def longbench_score(task: str, text: str, *references: str) -> dict[str, float]:
    return longbench.score_sample(task, sample(*references), [text])


# -- the release's cuts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "first_line", "after_newlines"),
    [(" Paris\nno", " Paris", " Paris"), ("\nParis\nno", "", "Paris"), ("\n\n", "", ""), (" \nParis", " ", " ")],
)
def test_answers_are_cut_as_in_the_release(text, first_line, after_newlines):
    assert CUTS["first_line"](text) == first_line
    assert CUTS["first_line_after_newlines"](text) == after_newlines
    assert CUTS["whole"](text) == text


def test_each_task_has_the_releases_cut_and_the_papers_count():
    cuts = {
        "first_line": {"narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa"},
        "first_line_after_newlines": {"trec", "triviaqa", "samsum"},
        "whole": {"qmsum", "multi_news", "lcc", "repobench-p"},
    }
    assert {cut: {name for name, task in longbench.TASKS.items() if task.cut == cut} for cut in CUTS} == cuts
    counts = [56, 184, 136, 96, 184, 104, 192, 152, 200, 120, 488, 320]
    assert [task.paper_count for task in longbench.TASKS.values()] == counts
    assert all(count % 8 == 0 for count in counts)


def test_a_leading_newline_leaves_an_empty_answer_that_is_counted():
    assert cut_figures("first_line", "\nParis") == {"leading_newline": 1, "empty_answer": 1}
    assert cut_figures("first_line_after_newlines", "\nParis") == {"leading_newline": 1, "empty_answer": 0}
    assert cut_figures("whole", " \n") == {"leading_newline": 0, "empty_answer": 1}
    found = longbench_score("hotpotqa", "\nParis", "Paris")
    assert (found["score"], found["score_after_newlines"], found["empty_answer"]) == (0, 1, 1)


# -- LongBench -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "triviaqa"])
def test_word_f1(task):
    assert longbench_score(task, " The Eiffel Tower.\nParis", "an eiffel tower")["score"] == 1
    assert longbench_score(task, " red blue", "blue", "green")["score"] == pytest.approx(2 / 3)
    assert longbench_score(task, " green", "blue", "green")["score"] == 1
    assert longbench_score(task, " the", "A")["score"] == 0, "both are empty after normalisation"


def test_triviaqa_has_an_accuracy_too():
    found = longbench_score("triviaqa", "\n\nNew York City\nQuestion", "new york", "New York City")
    assert (found["score"], found["accuracy"]) == (1, 1)
    assert longbench_score("triviaqa", " York City", "New York City")["accuracy"] == 0
    assert longbench_score("triviaqa", " the", "A")["accuracy"] == 0, "an empty normalised answer is not right"
    assert longbench_score("triviaqa", "", "A")["accuracy"] == 0


@pytest.mark.parametrize("task", ["qmsum", "multi_news", "samsum"])
def test_rouge_l(task):
    # the common subsequence "the cat mat" has 3 of 3 different words of the answer and 3 of 5 of the reference
    assert longbench_score(task, "the cat mat", "the cat sat on the mat")["score"] == pytest.approx(0.75, abs=1e-6)
    assert longbench_score(task, "the cat sat", "the cat sat")["score"] == pytest.approx(1, abs=1e-6)
    assert longbench_score(task, "", "the cat sat")["score"] == 0


def test_rouge_reads_all_lines_of_a_summary_and_one_of_a_dialogue():
    text = "first line here\nsecond line here"
    assert longbench_score("qmsum", text, text.replace("\n", " "))["score"] == pytest.approx(1, abs=1e-6)
    assert longbench_score("samsum", text, "first line here")["score"] == pytest.approx(1, abs=1e-6)


def test_trec_divides_by_the_classes_that_an_answer_names():
    assert len(CLASSES) == len(set(CLASSES)) == 50
    assert longbench_score("trec", " Other location\nQuestion", "Other location")["score"] == 1
    assert longbench_score("trec", " City or Country", "Country")["score"] == 0.5
    assert longbench_score("trec", " Abbreviation", "Expression abbreviated")["score"] == 0
    assert longbench_score("trec", " Place", "City")["score"] == 0
    assert longbench_score("trec", "\nDate", "Date")["score"] == 1


@pytest.mark.parametrize("task", ["lcc", "repobench-p"])
def test_code_similarity_takes_the_first_line_of_code(task):
    assert longbench_score(task, "# a comment\n\nreturn x + 1\nfoo()", "return x + 1")["score"] == 1
    # "return x + 1" and "return x + 2": 11 of 12 letters match
    assert longbench_score(task, "return x + 2", "return x + 1")["score"] == pytest.approx(0.92)
    assert longbench_score(task, "", "return x + 1")["score"] == 0


# -- RULER ---------------------------------------------------------------------------------------------------------------


def test_needles_count_the_share_of_the_values():
    doc = sample("111", "222", "333", "444")
    assert niah.score(doc, [" 111, 333 and\n444."]) == {"score": 0.75}
    assert niah.score(doc, ["999"]) == {"score": 0}


def test_any_matching_reference_counts_as_1_and_the_harness_averages():
    doc = sample("1082", "February 1082")
    found = ruler_qa.score(doc, [" in the year 1082\nFebruary 1082"])
    assert (found["any_match"], found["average_match"]) == (1, 0.5)
    assert found["f1"] == pytest.approx(2 / 4)
    both = ruler_qa.score(doc, [" FEBRUARY 1082"])
    assert (both["any_match"], both["average_match"], both["f1"]) == (1, 1, 1)


def test_only_the_first_line_of_an_answer_is_searched():
    doc = sample("1082")
    found = ruler_qa.score(doc, ["\n1082"])
    assert (found["any_match"], found["any_match_after_newlines"], found["leading_newline"]) == (0, 1, 1)
    assert ruler_qa.score(doc, [" no\n1082"])["any_match"] == 0


def test_an_empty_reference_is_never_found():
    found = ruler_qa.score(sample("", " "), [" anything"])
    assert (found["any_match"], found["average_match"], found["f1"]) == (0, 0, 0)
    assert ruler_qa.score(sample("", "x"), [" anything"])["any_match"] == 0


# -- figures -------------------------------------------------------------------------------------------------------------


def test_higher_is_better_for_scores_and_lower_for_losses_and_counts():
    names = {name for task in longbench.TASKS for name in longbench.metrics_of(task)} | {"any_match_after_newlines"}
    assert {name for name in names if not higher_is_better(name)} == {"leading_newline", "empty_answer"}
    assert not any(map(higher_is_better, ("word_perplexity", "bits_per_byte", "ntp_loss", "loss_change")))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [1.0, 2.0, 4.0, 9.0]
    mean, stderr = jackknife(lambda x: sum(x) / len(x), values)
    assert mean == 4 and stderr == pytest.approx(math.sqrt(38 / 3) / 2)
    again, jackknifed = jackknife(lambda x: math.log(math.exp(sum(x) / len(x))) + 1, values)
    assert again == pytest.approx(5) and jackknifed == pytest.approx(stderr)
    assert jackknife(max, [3.0]) == (3.0, None)


def test_a_perplexity_has_a_standard_error_by_the_delta_method():
    values = [-1.0, -2.0, -2.5, -3.0, -1.5] * 20
    perplexity, stderr = jackknife(lambda x: math.exp(-sum(x) / len(x)), values)
    assert perplexity == pytest.approx(math.exp(2)) and stderr is not None
    spread = math.sqrt(sum((x + 2) ** 2 for x in values) / 99 / 100)
    assert stderr == pytest.approx(perplexity * spread, rel=0.02)


def test_effective_lengths():
    scores = {512: 0.9, 1024: 0.87, 2048: 0.8, 4096: 0.9}
    assert effective_length(scores) == 1024
    assert effective_length({512: 0.85, 1024: 0.99}) is None
    assert nolima_length(scores) == 4096  # 0.85 * 0.9 = 0.765
    assert nolima_length({512: 1.0, 1024: 0.85, 2048: 0.84}) == 1024
    assert nolima_length({512: 0.0, 1024: 0.5}) is None and nolima_length({}) is None


def test_the_average_of_short_tasks_has_six_columns():
    records = [
        {"task": name, "status": "done", "metrics": {metric: {"value": number / 10}, "other": {"value": 9.0}}}
        for number, (name, metric) in enumerate(short.AVERAGED.items())
    ]
    assert set(short.AVERAGED) == {"lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"}
    assert short.short_average(records) == pytest.approx(0.25)
    assert short.short_average(records[1:]) is None
