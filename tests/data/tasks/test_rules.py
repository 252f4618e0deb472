"""Which part of the generated text is the answer, how long it may be, and whose rule that is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.config import DataConfig, TaskConfig, TrainConfig, from_json, to_json
from refine_lab.data.tasks.examples import Task, load_task
from refine_lab.data.tasks.passages import parse
from refine_lab.data.tasks.prompts import encode
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.experiments.configs import method_configs, with_source
from refine_lab.explore.session import Session
from refine_lab.models import FastWeightLM, load_model
from refine_lab.models.decoding import greedy
from refine_lab.recipes import named
from refine_lab.training.answers import answer
from refine_lab.training.evaluation import answer_measures
from tests.support.refusals import refused

FIRST = AnswerRule(strip_leading=False)
OWN = AnswerRule()
ALL = AnswerRule(lines="all")
Loaded = tuple[FastWeightLM, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model("tiny-deltanet", device="cpu")


def load(source: Path | str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Task:
    sizes = {"train": 0, "test": None, "prompt_tokens": 100_000, **settings}
    return load_task(TaskConfig(source=str(source), **sizes), tokenizer, DataConfig())


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


# -- the rule itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "first", "own", "whole"),
    [
        (" one \ntwo\n", "one", "one", "one \ntwo"),
        ("\n\n one\n\ntwo", "", "one", "one\n\ntwo"),
        ("  \n \t\n  one", "", "one", "one"),
        ("\r\none\r\ntwo", "", "one", "one\r\ntwo"),
        ("\n\n", "", "", ""),
        ("", "", "", ""),
    ],
)
def test_what_counts_of_a_text(text: str, first: str, own: str, whole: str) -> None:
    assert (FIRST.cut(text), OWN.cut(text), ALL.cut(text)) == (first, own, whole)


@pytest.mark.parametrize("rule", [FIRST, OWN, ALL, AnswerRule(lines="all", strip_leading=False)])
def test_an_answer_has_ended_where_nothing_after_it_changes_it(rule: AnswerRule) -> None:
    for text in ("one", "one\n", "\n", " \n one", "\none\n", "\n\none\ntwo", ""):
        same = all(rule.cut(text + more) == rule.cut(text) for more in ("x", "\n", "\nx", "\n\nx"))
        assert rule.ended(text) == (same and rule.lines == "first")


def test_a_rule_has_room_for_a_token() -> None:
    with refused("AnswerRule.max_tokens", 0, "at least 1"):
        AnswerRule(max_tokens=0)


# -- decoding ------------------------------------------------------------------------------------------------------------


def test_a_leading_newline_does_not_end_an_answer_of_ones_own(loaded: Loaded) -> None:
    """The shipped model goes on with a newline here."""
    policy, tokenizer = loaded
    prompt = encode(parse("x", "if x:", ()), tokenizer)
    text = str(tokenizer.decode(greedy(policy, [prompt.prompt_ids], 64)[0].tolist()))
    assert text.startswith("\n") and text.strip()
    assert answer(policy, tokenizer, [prompt], FIRST) == [""]
    (said,) = answer(policy, tokenizer, [prompt], replace(OWN, max_tokens=64))
    assert said == text.strip().partition("\n")[0].strip() != ""


def test_all_lines_go_on_to_the_end(loaded: Loaded) -> None:
    policy, tokenizer = loaded
    prompt = encode(parse("x", "if x:", ()), tokenizer)
    text = str(tokenizer.decode(greedy(policy, [prompt.prompt_ids], 40)[0].tolist()))
    (said,) = answer(policy, tokenizer, [prompt], AnswerRule(max_tokens=40, lines="all", strip_leading=False))
    assert said == text.strip() and "\n" in said
    assert Session("cpu").answer("tiny-deltanet", _array(prompt.prompt_ids), replace(ALL, max_tokens=40)).count("\n")


def test_empty_lines_take_no_room_of_the_answer(loaded: Loaded) -> None:
    policy, tokenizer = loaded
    prompt = encode(parse("x", "if x:", ()), tokenizer)
    tokens = greedy(policy, [prompt.prompt_ids], 20)[0].tolist()
    texts = [str(tokenizer.decode(tokens[:n])) for n in range(1, 21)]
    empty = sum(OWN.empty(text) for text in texts)
    assert 0 < empty < 20 and all(OWN.empty(text) for text in texts[:empty])
    for most in (1, 2, 3):
        (said,) = answer(policy, tokenizer, [prompt], AnswerRule(max_tokens=most))
        assert said == OWN.cut(str(tokenizer.decode(tokens[: empty + most]))) != ""


def test_a_model_that_writes_empty_lines_alone_comes_to_an_end() -> None:
    rule = AnswerRule(max_tokens=3)
    assert [rule.full(tokens, tokens) for tokens in range(1, 7)] == [False] * 5 + [True]
    assert [rule.full(tokens, 0) for tokens in range(1, 4)] == [False, False, True]
    assert not rule.empty(" ") and rule.empty(" \n ") and not FIRST.empty("\n")


def _array(ids: tuple[int, ...]) -> Any:
    return torch.tensor(ids, dtype=torch.int32).numpy()


def test_measures_are_of_the_answers_as_the_rule_cuts_them(loaded: Loaded) -> None:
    policy, tokenizer = loaded
    prompt = encode(parse("x", "if x:", ("?",)), tokenizer)
    (said,) = answer(policy, tokenizer, [prompt], OWN)
    right = replace(prompt, answers=(said,))
    for rule, score in ((OWN, 1.0), (FIRST, 0.0)):
        assert answer_measures(policy, tokenizer, [right], rule)["exact_match"] == score


# -- whose rule ----------------------------------------------------------------------------------------------------------


def test_recall_and_ruler_keep_their_rule_and_files_have_their_own(loaded: Loaded, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "mine.jsonl", [{"prompt": "a", "answer": "b"}])
    assert load(file, loaded[1]).rule == AnswerRule(max_tokens=2, lines="first", strip_leading=True)
    asked = load(file, loaded[1], lines="all", strip_leading=False, answer_tokens=9).rule
    assert asked == AnswerRule(max_tokens=9, lines="all", strip_leading=False)
    for source in ("recall:word-4", "ruler:x.json"):
        assert TaskConfig(source=source).settled().strip_leading is False
        assert TaskConfig(source=source, strip_leading=True).settled().strip_leading is True
    recorded = json.loads(to_json(method_configs("posttrain", [0], task=str(file))[0]))["task"]
    assert (recorded["lines"], recorded["strip_leading"]) == ("first", True)
    recorded = json.loads(to_json(method_configs("per_prompt", [0], prompts=str(file))[0]))["task"]
    assert (recorded["lines"], recorded["strip_leading"]) == ("first", True)


def test_recipes_are_answered_as_before() -> None:
    """Recorded results: the first line as it stands, four tokens of the embedded facts, RULER's 32 of its questions."""
    configs = [config for name in named("posttrain") for config in method_configs(name, [0])]
    tasks = {config.task for config in configs}
    tasks |= {config.task for name in named("ttt") for config in method_configs(name, [0])}
    found = {(task.form, task.lines, task.strip_leading, task.answer_tokens) for task in tasks if task}
    assert found == {("recall", "first", False, 4), ("ruler", "first", False, 32)}


def test_configurations_from_before_the_rule_open_with_the_old_one() -> None:
    (config, *_) = method_configs("posttrain", [0])
    old = json.loads(to_json(config))
    for name in ("lines", "strip_leading", "test_source"):
        del old["task"][name]
    old["task"]["answer_column"] = "answer"
    assert from_json(json.dumps(old)) == config, "runs of the embedded task are taken up"
    old["task"] |= {"source": "mine.jsonl", "answer_column": "answers"}
    task = from_json(json.dumps(old)).task
    assert task is not None and (task.lines, task.strip_leading, task.answer_column) == ("first", False, "answers")
    assert isinstance(from_json(to_json(config)), TrainConfig)


# -- how long an answer may be -------------------------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_an_answer_has_the_room_that_the_longest_reference_needs(loaded: Loaded, tmp_path: Path) -> None:
    _, tokenizer = loaded
    answers = ["one", ["two", "a much longer answer than the others of this file"], []]
    file = jsonl(tmp_path / "mine.jsonl", [{"prompt": f"p {n}", "answer": a} for n, a in enumerate(answers)])
    longest = len(tokenizer.encode(" a much longer answer than the others of this file", add_special_tokens=False))
    task = load(file, tokenizer)
    assert task.rule.max_tokens == longest + 1
    assert f"An answer has at most {longest + 1} tokens, as the longest reference answer needs." in str(task.report)
    assert "1 of 3 prompts have no reference answer in column 'answer'" in str(task.report)
    assert load(file, tokenizer, test=1).rule.max_tokens == 2
    assert load(file, tokenizer, test=1, validation=1).rule.max_tokens == longest + 1, "validation is answered too"


def test_it_warns_where_no_reference_fits(loaded: Loaded, tmp_path: Path) -> None:
    long = "a longer answer"
    rows = [{"prompt": f"p {n}", "answer": answer} for n, answer in enumerate(["one", ["two", long], long, [long]])]
    file = jsonl(tmp_path / "mine.jsonl", rows)
    with pytest.warns(
        UserWarning, match="For 2 of 4 prompts, no reference answer fits into 1 tokens: raise answer_tokens"
    ):
        task = load(file, loaded[1], answer_tokens=1)
    assert "For 2 of 4 prompts, no reference answer fits into 1 tokens." in str(task.report)
    load(file, loaded[1], answer_tokens=8)  # no warning, which would be an error here


def test_the_recipes_number_is_for_the_recipes_own_form(loaded: Loaded, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "mine.jsonl", [{"prompt": "a"}])
    for made in (
        lambda recipe, source, **more: method_configs(recipe, [0], task=source, **more)[0],
        lambda recipe, source, **more: method_configs(recipe.replace("paper_posttrain", "paper").replace(
            "posttrain", "per_prompt"), [0], prompts=source, **more)[0],
    ):  # fmt: skip
        for source, more, tokens in (
            (str(file), {}, None),
            (str(file), {"answer_tokens": 6}, 6),
            ("ruler:dev.json", {}, None),
            ("recall:word-2", {}, 4),
        ):
            assert made("posttrain", source, **more).task.answer_tokens == tokens
        assert made("paper_posttrain", "ruler:dev.json").task.answer_tokens == 32
    assert load(file, loaded[1]).rule.max_tokens == 32, "without any reference"


@pytest.mark.parametrize(
    "name", ["refine_ruler_qa/ruler_hotpotqa_delta_net_4096_200_test", "refine_longbench/qasper_16384"]
)
def test_right_answers_fit_for_the_papers_files(name: str, shared_data: Path, loaded: Loaded, quiet: None) -> None:
    """Of four tokens, the embedded recipe's, they did not: for 144 of 200 questions of HotpotQA."""
    column = "answers" if "longbench" in name else "answer"
    config = method_configs(
        "per_prompt", [0], prompts=str(shared_data / f"{name}.parquet"), answer_column=column, over_limit="cut_middle"
    )[0]
    task = load_task(config.task, loaded[1], config.data)
    assert "fits into" not in str(task.report) and task.rule.max_tokens == {"answer": 39, "answers": 195}[column]
    told = str(load_task(replace(config.task, answer_tokens=4), loaded[1], config.data).report)
    wrong = {"answer": "144 of 200", "answers": "154 of 191"}[column]
    assert f"For {wrong} prompts, no reference answer fits into 4 tokens." in told


# -- the column of the answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_of_answers_that_was_named_must_be_there(loaded: Loaded, tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "a", "gold": "b"}, {"prompt": "c", "gold": "d"}]
    file = jsonl(tmp_path / "mine.jsonl", rows)
    if suffix == "parquet":
        file = tmp_path / "mine.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    for column in ("target", "answer"):
        with refused("TaskConfig.answer_column", column, "'prompt', 'gold'"):
            load(file, loaded[1], answer_column=column)
    assert load(file, loaded[1], answer_column="gold").test[0].answers == ("b",)
    task = load(file, loaded[1])
    assert task.test[0].answers == ()
    assert "No prompt has a reference answer in column 'answer'; answers are not scored." in str(task.report)


def test_the_rule_is_that_of_the_source_of_the_tests(tmp_path: Path) -> None:
    own = str(tmp_path / "own.jsonl")
    for source, test_source, strip in (
        ("recall:word-4", own, True),
        ("ruler:dev.json", own, True),
        (own, "recall:word-4", False),
        (own, None, True),
    ):
        assert TaskConfig(source=source, test_source=test_source).settled().strip_leading is strip
    recipe = TaskConfig(source="recall:word-4", answer_tokens=4)
    assert with_source(recipe, None, test_source=own).answer_tokens is None
    assert with_source(recipe, "recall:word-1").answer_tokens == 4


def test_it_warns_where_every_reference_has_several_lines(tmp_path: Path, loaded: Loaded) -> None:
    answers = ("one\ntwo", ["one", "a\nb"])
    path = jsonl(tmp_path / "lines.jsonl", [{"prompt": f"Question: {n}?", "answer": x} for n, x in enumerate(answers)])
    reason = "but only the first line of a generated answer is used"
    sentence = f"For 1 of 2 prompts, every reference answer has several lines, {reason}"
    with pytest.warns(UserWarning, match=f"{sentence}: set lines to 'all'"):
        assert sentence in str(load(path, loaded[1]).report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sentence not in str(load(path, loaded[1], lines="all").report)
