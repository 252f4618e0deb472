"""Prompts from files: the paper's own, and what is said of files that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.data.tasks.examples import Task, load_task
from refine_lab.data.tasks.passages import parse
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from tests.support.paths import TEXT
from tests.support.refusals import naming, refused

RULER = (
    "Answer the question based on the given passages. Only the answer.\n\nThe following are given passages.\n"
    "Document 1:\nFirst title\nFirst body.\n\nDocument 2:\nSecond body,\n\nof two parts.\n\n"
    "Answer the question based on the given passages. Only the answer.\n\nQuestion: Which is second?\nAnswer:"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), vocab_size=1200)


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Task:
    sizes = {"train": 0, "test": None, "prompt_tokens": 100_000, **settings}
    return load_task(TaskConfig(source=str(path), **sizes), tokenizer, DataConfig())


def jsonl(folder: Path, rows: list[Any], name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"text {n}\nQuestion: what of {n}?\nAnswer:", "answer": f"{n}"} for n in range(count)]


# -- passages and questions ----------------------------------------------------------------------------------------------


def test_passages_and_question_are_told_apart() -> None:
    found = parse("x", RULER, ("it",))
    assert found.documents == ("First title\nFirst body.", "Second body,\n\nof two parts.")
    assert found.question == "Which is second?"
    assert found.text[found.question_start :] == "Question: Which is second?\nAnswer:"


def test_without_passages_all_before_the_question_is_one_document() -> None:
    found = parse("x", "An article.\nQuestion: what of it\n\nQuestion: really?\n\nAnswer:", ())
    assert found.documents == ("An article.\nQuestion: what of it",)
    assert found.question == "really?"
    plain = parse("x", "Go on, the Question: is in the middle", ())
    assert plain.question == ""
    assert plain.documents == (plain.text,)
    assert plain.question_start == len(plain.text)


def test_a_prompt_without_question_is_all_document(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (found,) = load(jsonl(tmp_path, [{"prompt": "a lamp in the house"}]), tokenizer).test
    assert found.question_start == len(found.prompt_ids)
    assert (found.answers, found.answer_ids, found.question) == ((), (), "")


# -- the paper's files ---------------------------------------------------------------------------------------------------

PAPER = {
    "refine_ruler_qa/ruler_squadqa_delta_net_4096_200_test": "answer",
    "refine_ruler_qa/ruler_squadqa_delta_net_8192_200_test": "answer",
    "refine_ruler_qa/ruler_hotpotqa_delta_net_4096_200_test": "answer",
    "refine_ruler_qa/ruler_hotpotqa_delta_net_8192_200_test": "answer",
    "refine_longbench/hotpotqa_16384": "answers",
    "refine_longbench/multifieldqa_en_16384": "answers",
    "refine_longbench/qasper_16384": "answers",
}


@pytest.mark.parametrize(("name", "column"), PAPER.items())
def test_each_of_the_papers_files_is_read_as_it_is(
    name: str, column: str, shared_data: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = shared_data / f"{name}.parquet"
    first = load(path, tokenizer, answer_column=column, test=8).test
    table = pq.read_table(path).slice(0, 8).to_pylist()
    for found, row in zip(first, table, strict=True):
        assert tokenizer.decode(found.prompt_ids) == row["prompt"]
        assert list(found.answers) == row[column]
        asked = str(tokenizer.decode(found.prompt_ids[found.question_start :])).lstrip()
        assert asked.startswith(f"Question: {found.question}")
        assert asked.removeprefix(f"Question: {found.question}").split() == ["Answer:"]
        assert "Only give me" not in "".join(found.documents) or len(found.documents) == 1


def test_a_split_of_one_of_the_papers_files_shares_paragraphs(
    shared_data: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = shared_data / "refine_ruler_qa" / "ruler_hotpotqa_delta_net_4096_200_test.parquet"
    task = load(path, tokenizer, train=160, test=40, shared="allow")
    assert (len(task.train), len(task.test)) == (160, 40)
    assert [(len(pair.questions), len(pair.documents)) for pair in task.report.shared] == [(0, 32)]
    assert "train and test share 32 documents, among them 'Matt Busby" in str(task.report)
    assert task.test[0].name == "ruler_hotpotqa_delta_net_4096_200_test-0"


# -- counts and limits ---------------------------------------------------------------------------------------------------


def test_rows_are_taken_in_order_test_validation_train(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = jsonl(tmp_path, numbered(10))
    task = load(path, tokenizer, train=4, validation=2, test=3)
    answers = [[found.answers[0] for found in split] for split in (task.test, task.validation, task.train)]
    assert answers == [["0", "1", "2"], ["3", "4"], ["5", "6", "7", "8"]]
    assert [found.name for found in task.train] == [f"prompts-{n}" for n in (5, 6, 7, 8)]
    rest = load(path, tokenizer, train=4, validation=1)
    assert [found.answers[0] for found in rest.test] == ["0", "1", "2", "3", "4"]
    assert [found.answers[0] for found in rest.train] == ["6", "7", "8", "9"]
    with naming(ValueError, path, "10 prompts", "TaskConfig.train 8", "validation 0", "test 3"):
        load(path, tokenizer, train=8, test=3)
    with naming(ValueError, path, "10 prompts", "TaskConfig.train 11"):
        load(path, tokenizer, train=11)


def test_parquet_and_jsonl_are_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{**row, "answer": [row["answer"], "or so"]} for row in numbered(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    one = load(jsonl(tmp_path, rows), tokenizer, train=2)
    other = load(tmp_path / "prompts.parquet", tokenizer, train=2)
    assert one == other
    assert one.test[0].answers == ("0", "or so")


def test_longer_prompts_are_refused_cut_or_left_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = numbered(6)
    for number in (1, 4):
        rows[number]["prompt"] = "a lamp in the house\n" * (40 + number) + rows[number]["prompt"]
    path = jsonl(tmp_path, rows)
    longest = len(load(path, tokenizer).test[4].prompt_ids)
    with naming(ValueError, "2 of 6 prompts", "TaskConfig.prompt_tokens 64", longest, "'prompts-4'", "'drop'"):
        load(path, tokenizer, prompt_tokens=64)
    assert len(load(path, tokenizer, prompt_tokens=64, test=1).test) == 1  # those in use alone count
    cut = load(path, tokenizer, prompt_tokens=64, over_limit="cut_middle")
    assert [found.cut > 0 for found in cut.test] == [False, True, False, False, True, False]
    assert max(len(found.prompt_ids) for found in cut.test) == 64
    assert cut.report.splits["test"].cut == 2
    dropped = load(path, tokenizer, prompt_tokens=64, over_limit="drop", train=1)
    assert [found.name for found in dropped.test] == ["prompts-0", "prompts-2", "prompts-3"]
    assert [found.name for found in dropped.train] == ["prompts-5"]
    assert "2 prompts over the limit left out." in str(dropped.report)
    with naming(ValueError, path, "4 prompts", "64 tokens", "test 5"):
        load(path, tokenizer, prompt_tokens=64, over_limit="drop", test=5)


# -- a file to train on and another to test with ---------------------------------------------------------------------------


def test_train_and_test_come_from_a_file_each(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = numbered(12)
    source, test = jsonl(tmp_path, rows[:7], "train.jsonl"), jsonl(tmp_path, rows[7:], "test.jsonl")
    task = load(source, tokenizer, test_source=str(test), train=4, validation=2)
    assert [found.name for found in task.validation] == ["train-0", "train-1"]
    assert [found.name for found in task.train] == ["train-2", "train-3", "train-4", "train-5"]
    assert [found.name for found in task.test] == [f"test-{n}" for n in range(5)], "all of the other file"
    assert "No question and no document is shared between splits." in str(task.report)
    few = load(source, tokenizer, test_source=str(test), train=7, test=3)
    assert (len(few.train), len(few.test)) == (7, 3)
    with naming(ValueError, source, "7 prompts", "TaskConfig.train 6", "validation 2"):
        load(source, tokenizer, test_source=str(test), train=6, validation=2)
    with naming(ValueError, test, "5 prompts", "test 6"):
        load(source, tokenizer, test_source=str(test), train=4, test=6)
    with naming(FileNotFoundError, tmp_path / "none.jsonl", "TaskConfig.source or test_source"):
        load(source, tokenizer, test_source=str(tmp_path / "none.jsonl"), train=4)
    with refused("TaskConfig.test_source", str(source)):
        load(source, tokenizer, test_source=str(source), train=4)


def test_two_files_that_share_a_question_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = numbered(8)
    source, test = jsonl(tmp_path, rows[:5], "train.jsonl"), jsonl(tmp_path, rows[4:], "test.jsonl")
    with naming(ValueError, source, "train and test", "1 question and 1 document", "'what of 4?'"):
        load(source, tokenizer, test_source=str(test), train=5)
    assert len(load(source, tokenizer, test_source=str(test), train=4).test) == 4, (
        "rows that are not in use do not count"
    )
    allowed = load(source, tokenizer, test_source=str(test), train=5, shared="allow")
    assert [len(pair.questions) for pair in allowed.report.shared] == [1]


def test_the_papers_test_file_is_answered_beside_a_file_to_train_on(
    shared_data: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = shared_data / "refine_ruler_qa"
    source, test = (folder / f"ruler_{name}_delta_net_4096_200_test.parquet" for name in ("squadqa", "hotpotqa"))
    task = load(source, tokenizer, test_source=str(test), train=40, test=20, shared="allow")
    assert (len(task.train), len(task.test)) == (40, 20)
    assert not task.report.shared


# -- files that are not as they should be --------------------------------------------------------------------------------


def test_a_column_that_is_called_otherwise_is_pointed_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "x", "answers": ["y"]}])
    for settings in ({}, {"train": 1}):
        with refused("TaskConfig.answer_column", "answer") as error:
            load(path, tokenizer, **settings)
        assert "'answers'?" in str(error.value)
    with refused("TaskConfig.prompt_column", "text", "'prompt', 'answers'"):
        load(path, tokenizer, prompt_column="text")
    alone = jsonl(tmp_path, [{"prompt": "x"}], "alone.jsonl")
    assert load(alone, tokenizer).test[0].answers == ()
    with refused("TaskConfig.answer_column", "answer", "'prompt'"):
        load(alone, tokenizer, train=1)


@pytest.mark.parametrize(
    ("rows", "settings", "facts"),
    [
        ([{"prompt": 3, "answer": "x"}], {}, ["'prompt'", "row 1", "3"]),
        ([{"prompt": " ", "answer": "x"}], {}, ["'prompt'", "row 1", "' '"]),
        ([{"prompt": "x", "answer": 3}], {}, ["'answer'", "row 1", "3"]),
        ([{"prompt": "x", "answer": ["y", None]}], {}, ["'answer'", "row 1", "['y', None]"]),
        ([{"prompt": "x", "answer": []}], {"train": 1}, ["'answer'", "'prompts-0'"]),
        ([["x"]], {}, ["line 1", "list"]),
    ],
)
def test_a_cell_that_holds_no_text_is_named(
    rows: list[Any], settings: dict[str, Any], facts: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with naming(ValueError, *facts):
        load(jsonl(tmp_path, rows), tokenizer, **settings)


def test_files_that_are_none(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with naming(FileNotFoundError, tmp_path / "missing.jsonl", "TaskConfig.source or test_source"):
        load(tmp_path / "missing.jsonl", tokenizer)
    with refused("TaskConfig.source", "words"):
        load(Path("words"), tokenizer)
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and no more")
    with naming(ValueError, tmp_path / "half.parquet", "not a Parquet file"):
        load(tmp_path / "half.parquet", tokenizer)
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "x"}\n{"prompt": \n')
    with naming(ValueError, tmp_path / "bad.jsonl", "line 2", "JSON"):
        load(tmp_path / "bad.jsonl", tokenizer)
