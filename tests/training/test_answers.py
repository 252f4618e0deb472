"""How answers are scored, written and kept."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.data.tasks.examples import Example, load_task
from refine_lab.data.tasks.passages import parse
from refine_lab.data.tasks.prompts import encode
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.data.tasks.scores import contains_answer, exact_match, f1
from refine_lab.models import FastWeightLM, Trace, load_model
from refine_lab.models.decoding import greedy
from refine_lab.runs.answers import COLUMNS, AnswerLog
from refine_lab.training.answers import answer, answer_row
from tests.support.paths import TEXT

RULER = AnswerRule(max_tokens=4, strip_leading=False)

# -- scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "references", "exact", "contained", "words"),
    [
        ("The Cat.", ["cat"], 1.0, 1.0, 1.0),
        ("a cat sat", ["cat"], 0.0, 1.0, 2 / 3),  # words cat, sat: precision 1/2, recall 1
        ("dog", ["cat", "the dog!"], 1.0, 0.0, 1.0),  # "the dog!" is not contained in "dog"
        ("cat", ["the black cat"], 0.0, 0.0, 2 / 3),  # precision 1, recall 1/2 of black, cat
        ("cat cat mat", ["cat mat mat"], 0.0, 0.0, 2 / 3),  # cat once and mat once in common, 2 of 3 both ways
        ("Paris\nor London", ["London"], 0.0, 1.0, 0.5),  # words paris, or, london: all that is given counts
        (" 1.1 million", ["1.1 Million"], 1.0, 1.0, 1.0),
        ("", ["x"], 0.0, 0.0, 0.0),
        ("", ["A"], 0.0, 0.0, 0.0),  # SQuAD's rule leaves nothing of these references: they are compared as they stand
        ("", ["The", "?!"], 0.0, 0.0, 0.0),
        ("the", ["A"], 0.0, 0.0, 0.0),
        ("?", ["?!"], 0.0, 0.0, 0.0),
        (" A", ["A"], 1.0, 1.0, 1.0),
        ("?!", ["x", "?!"], 1.0, 1.0, 1.0),
        ("the", ["dog"], 0.0, 0.0, 0.0),
        ("anything", ["x", " ", "thing"], 0.0, 1.0, 0.0),  # an empty reference is none
    ],
)
def test_scores_by_hand(answer: str, references: list[str], exact: float, contained: float, words: float) -> None:
    assert exact_match(answer, references) == exact
    assert contains_answer(answer, references) == contained
    assert f1(answer, references) == pytest.approx(words)


def test_an_answer_without_references_has_no_score() -> None:
    for score in (exact_match, contains_answer, f1):
        assert math.isnan(score("x", []))
        assert math.isnan(score("x", [" "]))


def test_contains_answer_is_any_reference_not_their_mean() -> None:
    assert contains_answer("it was 1082", ["February 1082", "1082", "in 1082"]) == 1.0


# -- answers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> tuple[FastWeightLM, PreTrainedTokenizerBase]:
    return load_model("tiny-deltanet", device="cpu")


@pytest.fixture(scope="module")
def examples(
    loaded: tuple[FastWeightLM, PreTrainedTokenizerBase], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Example, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        data, config = DataConfig(sources={str(TEXT): 1.0}), TaskConfig(prompt_tokens=160, train=0, test=6)
        return load_task(config, loaded[1], data).test


def test_answers_are_the_greedy_tokens_up_to_the_end_of_the_line(
    loaded: tuple[FastWeightLM, PreTrainedTokenizerBase], examples: tuple[Example, ...]
) -> None:
    policy, tokenizer = loaded
    short = [encode(parse(f"{i}", text, ()), tokenizer) for i, text in enumerate(("if x:", "The house and"))]
    asked = [*examples, *short]
    for tokens in (8, 1):
        rule = AnswerRule(max_tokens=tokens, strip_leading=False)
        texts = [str(tokenizer.decode(greedy(policy, [e.prompt_ids], tokens)[0].tolist())) for e in asked]
        expected = [text.partition("\n")[0].strip() for text in texts]
        for size in (1, 3, 8):
            assert answer(policy, tokenizer, asked, rule, micro_batch_size=size) == expected
        assert expected[len(examples)] == ""  # a newline at once
        assert tokens == 1 or len(set(expected)) > 4


def test_an_answer_ends_with_the_end_of_text_token(
    loaded: tuple[FastWeightLM, PreTrainedTokenizerBase], examples: tuple[Example, ...]
) -> None:
    policy, tokenizer = loaded
    tokens = greedy(policy, [examples[0].prompt_ids], 4)[0].tolist()
    (whole,) = answer(policy, tokenizer, examples[:1], RULER)
    other = copy.deepcopy(tokenizer)
    other.eos_token = str(tokenizer.convert_ids_to_tokens(tokens[1]))
    assert answer(policy, other, examples[:1], RULER) == [str(tokenizer.decode(tokens[:1])).strip()] != [whole]


def test_nothing_is_read_beyond_the_end_of_the_line(
    loaded: tuple[FastWeightLM, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tokenizer = loaded
    read, widths = policy.read, []

    def counted(tokens: torch.Tensor, *arguments: Any, **named: Any) -> Trace:
        widths.append(tokens.shape[1])
        return read(tokens, *arguments, **named)

    monkeypatch.setattr(policy, "read", counted)
    prompt = encode(parse("x", "if x:", ()), tokenizer)
    assert answer(policy, tokenizer, [prompt], AnswerRule(max_tokens=8, strip_leading=False)) == [""]
    assert widths == [len(prompt.prompt_ids)]
    assert answer(policy, tokenizer, [], RULER) == []


def test_a_trained_model_recalls(
    loaded: tuple[FastWeightLM, PreTrainedTokenizerBase], examples: tuple[Example, ...]
) -> None:
    found = answer(*loaded, examples, RULER)
    assert sum(contains_answer(said, one.answers) for said, one in zip(found, examples, strict=True)) >= 5


# -- the log -------------------------------------------------------------------------------------------------------------


def rows(*numbers: int, **more: Any) -> list[dict[str, Any]]:
    example = Example(
        name="",
        prompt_ids=(1, 2, 3),
        question_start=2,
        answer_ids=(4, 0),
        answers=("four",),
        question="2 + 2?",
        documents=("sums",),
        cut=1,
    )
    made = [answer_row(example, "Four.", method="sft", seed=1, seconds=0.5) for _ in numbers]
    return [{**row, **more, "name": f"n{number}"} for row, number in zip(made, numbers, strict=True)]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "answers")
    assert log.done == frozenset()
    assert list(log.read().columns) == list(COLUMNS)
    log.write(rows(0, 1, steps=2))
    log.write([])
    log.write(rows(2, entropy=0.25))
    assert sorted(path.name for path in log.folder.iterdir()) == ["0-1.parquet", "2-2.parquet"]
    assert log.done == {"n0", "n1", "n2"}
    assert log.rows == 3
    read = log.read()
    assert read["name"].tolist() == ["n0", "n1", "n2"]
    first = read.iloc[0].to_dict()
    assert list(first.pop("references")) == ["four"]
    told = {
        "name": "n0",
        "method": "sft",
        "seed": 1,
        "prompt_tokens": 3,
        "cut": 1,
        "question": "2 + 2?",
        "answer": "Four.",
    }
    scored = {"exact_match": 1.0, "contains_answer": 1.0, "f1": 1.0, "seconds": 0.5}
    assert {name: first[name] for name in COLUMNS if name != "references"} == told | scored
    assert first["steps"] == 2 and math.isnan(first["entropy"])
    assert AnswerLog(log.folder).read().equals(read)


def test_what_was_answered_again_counts_once(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path)
    log.write(rows(0, 1))
    log.write(rows(1, 2, answer="five"))
    assert log.read()[["name", "answer"]].to_numpy().tolist() == [["n0", "Four."], ["n1", "five"], ["n2", "five"]]


def test_a_damaged_file_costs_its_own_answers_alone(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path)
    for start in (0, 2, 4):
        log.write(rows(start, start + 1))
    whole = (tmp_path / "2-3.parquet").read_bytes()
    (tmp_path / "2-3.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / ".6-7.parquet.99.tmp").write_bytes(whole[:50])
    (tmp_path / "notes.parquet").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2-3\.parquet is damaged; its answers are treated as missing"):
        assert log.done == {"n0", "n1", "n4", "n5"}
    with pytest.warns(UserWarning, match="is damaged"):
        assert log.read()["name"].tolist() == ["n0", "n1", "n4", "n5"]
    log.write(rows(2, 3))
    assert (tmp_path / "6-7.parquet").exists()
    with pytest.warns(UserWarning, match="is damaged"):
        assert log.done == {f"n{number}" for number in range(6)}


@pytest.mark.parametrize("count", range(7))
def test_a_log_is_cut_back_to_its_first_rows(tmp_path: Path, count: int) -> None:
    log = AnswerLog(tmp_path)
    for numbers in ((0, 1, 2), (3,), (4, 5)):
        log.write(rows(*numbers))
    log.cut(count)
    assert log.rows == count
    assert log.read()["name"].tolist() == [f"n{number}" for number in range(count)]
    log.write(rows(9))
    assert log.rows == count + 1


def test_rows_of_the_wrong_form_leave_nothing_behind(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path)
    (row,) = rows(0)
    with pytest.raises(ValueError, match=r"must have the columns name, .*'f1' is missing"):
        log.write([{name: value for name, value in row.items() if name != "f1"}])
    with pytest.raises(ValueError, match="an answer contains a value whose type does not match its column"):
        log.write([{**row, "cut": "some"}])
    assert list(tmp_path.iterdir()) == []


def test_an_example_without_references_is_kept_without_scores(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path)
    (row,) = rows(0)
    log.write([{**row, "references": [], "contains_answer": math.nan}])
    assert pq.read_table(tmp_path / "0-0.parquet").schema.field("references").type == pa.list_(pa.string())
    assert pd.isna(log.read()["contains_answer"].iloc[0])
