"""RULER's questions made from published files: what a prompt holds, and that no two splits share a paragraph."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.data.tasks.examples import Task, load_task
from refine_lab.data.tasks.published import divide, read_published
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from tests.factories.tasks_ruler import article, squad
from tests.support.paths import TEXT
from tests.support.refusals import naming, refused


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), vocab_size=1200)


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Task:
    sizes = {"train": 6, "test": 3, "prompt_tokens": 400, **settings}
    return load_task(TaskConfig(source=f"ruler:{path}", **sizes), tokenizer, DataConfig())


def hotpotqa(folder: Path, context: Mapping[int, list[str]]) -> Path:
    """A question each, with the paragraphs named."""
    path = folder / "hotpotqa.json"
    asked = [
        {
            "question": f"who is {n}?",
            "answer": f"it is {n}",
            "context": [[name, ["One. ", f"Two of {name}."]] for name in names],
        }
        for n, names in context.items()
    ]
    path.write_text(json.dumps(asked))
    return path


# -- prompts -------------------------------------------------------------------------------------------------------------


def test_squad_prompts_hold_the_paragraph_that_answers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = squad(tmp_path, [article(title) for title in ("ant", "bee", "cow", "dog")])
    task = load(path, tokenizer)
    assert (len(task.train), len(task.validation), len(task.test)) == (6, 0, 3)
    for found in (*task.train, *task.test):
        prompt = str(tokenizer.decode(found.prompt_ids))
        assert len(found.prompt_ids) <= 400
        assert prompt.startswith("Answer the question based on the given documents. Only give me the answer")
        assert prompt.endswith(f"\n\nQuestion: {found.question} Answer:")
        assert str(tokenizer.decode(found.prompt_ids[found.question_start :])).lstrip().startswith("Question:")
        *_, title, number = found.question.rstrip("?").split()
        assert found.answers == (f"{title}{number}",) * 2
        assert any(document.startswith(f"{title}{number} is it and so on") for document in found.documents)
        assert tokenizer.decode(found.answer_ids) == f" {title}{number}<|endoftext|>"
    assert not task.report.shared
    assert [found.name for found in task.test] == ["squad-test-0", "squad-test-1", "squad-test-2"]


def test_prompts_are_filled_with_documents_as_long_as_there_are_any(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = squad(tmp_path, [article(title, paragraphs=8) for title in ("ant", "bee", "cow", "dog")])
    few, many, all_there_are = (
        [len(found.documents) for found in load(path, tokenizer, prompt_tokens=tokens).train]
        for tokens in (300, 500, 4000)
    )
    assert 1 <= min(few) <= max(few) < min(many)
    assert all_there_are == [16] * 6  # two articles of each split, in prompts that the answers still stand in
    report = load(path, tokenizer, prompt_tokens=4000).report
    assert "The median length of the train prompts is" in str(report)


def test_the_answer_stands_in_prompts_that_all_paragraphs_but_just_fit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = squad(tmp_path, [article(title, paragraphs=12) for title in ("ant", "bee")])
    whole = max(len(found.prompt_ids) for found in load(path, tokenizer, prompt_tokens=4000, train=20).train)
    for less in (1, 40, 80):
        for found in load(path, tokenizer, prompt_tokens=whole - less, train=20).train:
            *_, title, number = found.question.rstrip("?").split()
            assert any(document.startswith(f"{title}{number} is it") for document in found.documents)


def test_hotpotqa_prompts_hold_all_paragraphs_of_the_question(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = hotpotqa(tmp_path, {n: [f"a{n}", f"b{n}"] for n in range(12)})
    task = load(path, tokenizer)
    for found in (*task.train, *task.test):
        number = found.question.removeprefix("who is ").removesuffix("?")
        assert found.answers == (f"it is {number}",)
        assert {f"a{number}\nOne. Two of a{number}.", f"b{number}\nOne. Two of b{number}."} <= set(found.documents)
        assert len(found.documents) > 2


def test_prompts_are_the_same_whatever_was_drawn_before(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = squad(tmp_path, [article(title) for title in ("ant", "bee", "cow", "dog")])
    random.seed(3)
    first = load(path, tokenizer)
    random.seed(4)
    assert load(path, tokenizer) == first


def test_no_document_is_drawn_from_the_global_random(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The global state itself cannot be compared: beartype draws from it.
    monkeypatch.setattr(random, "sample", lambda _, count: [] if count == 0 else pytest.fail(f"{count} are drawn"))
    path = squad(tmp_path, [article(title) for title in ("ant", "bee", "cow", "dog")])
    assert min(len(found.documents) for found in load(path, tokenizer).train) > 1


def test_questions_whose_paragraphs_do_not_fit_are_left_out_and_told(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    articles = [article(title) for title in ("ant", "bee", "cow")] + [article("eel", words=300)]
    task = load(squad(tmp_path, articles), tokenizer)
    assert not [found for found in (*task.train, *task.test) if "eel" in found.question]
    assert "8 prompts over the limit left out." in str(task.report)
    with naming(ValueError, "24 questions", "train 30"):
        load(squad(tmp_path, articles), tokenizer, train=30)


# -- division ------------------------------------------------------------------------------------------------------------


def test_articles_that_share_a_paragraph_or_a_question_stay_together(tmp_path: Path) -> None:
    ant, bee, cow, dog = (article(title) for title in ("ant", "bee", "cow", "dog"))
    bee["paragraphs"][1]["context"] = ant["paragraphs"][2]["context"].upper()
    dog["paragraphs"][0]["qas"][1]["question"] = cow["paragraphs"][3]["qas"][0]["question"]
    published = read_published(squad(tmp_path, [ant, bee, cow, dog]))
    parts = divide(published, {"train": 16, "validation": 0, "test": 16})
    assert {name: {unit["title"] for unit in units} for name, units in parts.items()} in (
        {"train": {"ant", "bee"}, "validation": set(), "test": {"cow", "dog"}},
        {"train": {"cow", "dog"}, "validation": set(), "test": {"ant", "bee"}},
    )


def test_questions_of_hotpotqa_that_hang_together_by_others_stay_together(tmp_path: Path) -> None:
    chain = {n: [f"a{n}", f"a{n + 1}"] for n in range(6)}
    alone = {n: [f"x{n}", f"y{n}"] for n in range(10, 14)}
    published = read_published(hotpotqa(tmp_path, {**chain, **alone}))
    parts = divide(published, {"train": 5, "validation": 1, "test": 2})
    questions = {name: sorted(unit["question"] for unit in units) for name, units in parts.items()}
    assert questions["train"] == [f"who is {n}?" for n in range(6)]
    assert len(questions["validation"]) >= 1
    assert len(questions["test"]) >= 2
    assert sum(map(len, questions.values())) == 10
    with naming(ValueError, "hotpotqa.json", "10 questions", "5 groups", "6", "train 7", "test 4"):
        divide(published, {"train": 7, "validation": 0, "test": 4})


def test_paragraphs_left_over_are_evened_out(tmp_path: Path) -> None:
    published = read_published(squad(tmp_path, [article(f"t{n}") for n in range(12)]))
    parts = divide(published, {"train": 40, "validation": 0, "test": 8})
    assert {name: len(units) for name, units in parts.items()} == {"train": 6, "validation": 0, "test": 6}


# -- the files as published ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tokens", "train", "test"),
    [
        ("squad_v2_dev_half/dev-v2.0.json", 4096, 24, 12),
        ("hotpotqa_dev_subset/hotpot_dev_distractor_first200.json", 8192, 20, 8),
    ],
)
def test_published_files_make_prompts_that_share_nothing(
    name: str, tokens: int, train: int, test: int, shared_data: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = load(shared_data / name, tokenizer, prompt_tokens=tokens, train=train, test=test, validation=4)
    assert (len(task.train), len(task.validation), len(task.test)) == (train, 4, test)
    found = (*task.train, *task.validation, *task.test)
    assert tokens / 3 < min(len(one.prompt_ids) for one in found) <= max(len(one.prompt_ids) for one in found) <= tokens
    assert not task.report.shared
    for one in found:
        text = " ".join(one.documents).lower()
        assert one.answers[0].lower() in text or one.answers[0] in ("yes", "no")


# -- what is said of others ----------------------------------------------------------------------------------------------


def test_other_files_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with naming(FileNotFoundError, tmp_path / "none.json"):
        load(tmp_path / "none.json", tokenizer)
    path = tmp_path / "other.json"
    first = article("ant")
    del first["paragraphs"][0]["qas"][0]["is_impossible"]  # SQuAD 1.1
    for content in ('{"data": ', '{"rows": []}', "[3]", '[{"question": "x"}]', json.dumps({"data": [first]})):
        path.write_text(content)
        with naming(ValueError, path, "SQuAD v2.0", "HotpotQA"):
            load(path, tokenizer)
    with refused("TaskConfig.test", None):
        load(squad(tmp_path, [article("ant")]), tokenizer, test=None)


def test_without_lm_eval_it_says_what_to_install(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"] or ["lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with naming(ValueError, "pip install 'lm_eval==0.4.13'"):
        load(squad(tmp_path, [article("ant"), article("bee")]), tokenizer)
