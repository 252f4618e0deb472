"""Tasks made of recall documents, prompts that are too long, and what splits share."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.data.recall import recall_words
from refine_lab.data.tasks.examples import Example, Task, load_task
from refine_lab.data.tasks.passages import parse
from refine_lab.data.tasks.prompts import cut_middle, encode
from refine_lab.data.tasks.splits import normalised, report
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from tests.support.paths import TEXT
from tests.support.refusals import naming, refused

DATA = DataConfig(sources={str(TEXT): 1.0})
KINDS = ("word-1", "word-4", "word-3-q2-d40", "number-2", "pairs", "pairs-is", "pairs-word", "pairs-number")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), vocab_size=1600)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def recall_task(kind: str, tokenizer: PreTrainedTokenizerFast, **settings: object) -> Task:
    sizes = {"prompt_tokens": 160, "train": 12, "validation": 4, "test": 6, **settings}
    return load_task(TaskConfig(source=f"recall:{kind}", **sizes), tokenizer, DATA)  # type: ignore[arg-type]


def example(name: str, question: str = "", documents: tuple[str, ...] = (), cut: int = 0) -> Example:
    return Example(
        name=name,
        prompt_ids=(1, 2, 3),
        question_start=2,
        answer_ids=(4, 0),
        answers=("four",),
        question=question,
        documents=documents,
        cut=cut,
    )


def key_of(found: Example) -> str:
    return found.question.rsplit(" for ", 1)[-1].rstrip("?")


# -- recall documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_of_a_recall_example_stands_in_its_document(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = recall_task(kind, tokenizer)
    assert (len(task.train), len(task.validation), len(task.test)) == (12, 4, 6)
    for found in (*task.train, *task.validation, *task.test):
        read = str(tokenizer.decode(found.prompt_ids[: found.question_start]))
        asked = str(tokenizer.decode(found.prompt_ids[found.question_start :]))
        assert (read,) == found.documents
        assert found.question in asked
        key = key_of(found)
        (answer,) = found.answers
        assert re.search(rf"\b{key}\b(?: is:?)? {answer}\.", read)
        assert found.answer_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(found.answer_ids[:-1]) == f" {answer}"
        assert found.cut == 0
        if not kind.startswith("pairs"):
            assert len(found.prompt_ids) == 160
            assert asked.startswith("\nQuestion: What is the ") and asked.endswith(f" for {key} is")
        else:
            assert len(found.prompt_ids) <= 160


def test_a_kind_with_several_questions_has_all_but_the_last_answered_in_the_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task, question = recall_task("word-4-q3", tokenizer, prompt_tokens=200), "\nQuestion: What is the secret word for "
    for found in (*task.train, *task.test):
        read, *answered, asked = str(tokenizer.decode(found.prompt_ids)).split(question)
        assert len(answered) == 2 and asked.startswith(f"{key_of(found)}?") and len(found.prompt_ids) == 200
        for each in answered:
            key, again, answer = re.fullmatch(r"(\w+)\?\nAnswer: The secret word for (\w+) is (\w+)\.", each).groups()  # type: ignore[union-attr]
            assert key == again != key_of(found) and f"The secret word for {key} is {answer}." in read
        assert len({text.partition("?")[0] for text in (*answered, asked)}) == 3
    single = recall_task("word-4", tokenizer, prompt_tokens=200)
    assert all(str(tokenizer.decode(found.prompt_ids)).count(question) == 1 for found in single.train)


def test_a_distance_holds_in_every_split(tokenizer: PreTrainedTokenizerFast) -> None:
    task = recall_task("word-3-d40", tokenizer)
    for found in (*task.train, *task.test):
        near = str(tokenizer.decode(found.prompt_ids[found.question_start - 40 : found.question_start]))
        assert "secret word" not in near


def test_recall_splits_share_no_key_and_are_the_same_again(tokenizer: PreTrainedTokenizerFast) -> None:
    task = recall_task("word-4", tokenizer)
    assert task == recall_task("word-4", tokenizer)
    more = recall_task("word-4", tokenizer, train=20, validation=0, test=9)
    assert more.train[:12] == task.train
    assert more.test[:6] == task.test
    keys = {name: {key_of(found) for found in getattr(task, name)} for name in ("train", "validation", "test")}
    words = recall_words(tokenizer)
    for name, split in (("train", "train"), ("validation", "validation"), ("test", "validation")):
        assert keys[name] <= {words.texts[token].strip() for token in words.keys[split]}  # type: ignore[index]
    assert not keys["validation"] & keys["test"]
    assert not task.report.shared
    assert len({found.name for found in (*task.train, *task.validation, *task.test)}) == 22


def test_test_documents_are_cut_from_another_half_of_the_text_than_validation(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [f"line {number} of the text\n" for number in range(4000)]
    path = tmp_path / "lines.txt"
    path.write_text("".join(lines))
    task = load_task(
        TaskConfig(source="recall:word-1", prompt_tokens=160, train=5, validation=5, test=5),
        tokenizer,
        DataConfig(sources={str(path): 1.0}),
    )
    seen = [
        {int(n) for found in split for n in re.findall(r"line (\d{4}) of", found.documents[0])}
        for split in (task.train, task.validation, task.test)
    ]
    assert all(seen)
    assert max(seen[0]) < min(seen[1]) and max(seen[1]) < min(seen[2])


def test_recall_says_what_it_cannot_do(tokenizer: PreTrainedTokenizerFast) -> None:
    with refused("TaskConfig.test", None):
        recall_task("word-1", tokenizer, test=None)
    with refused("a kind of recall document", "words"):
        recall_task("words", tokenizer)
    with naming(ValueError, "'word-9'", 64):
        recall_task("word-9", tokenizer, prompt_tokens=64)


# -- too long prompts ----------------------------------------------------------------------------------------------------


def test_the_middle_is_cut_out_and_the_question_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Read.\n\n" + "one two three four five six\n" * 20 + "\nQuestion: how many?\nAnswer:"
    whole = encode(parse("x", text, ("six",)), tokenizer)
    question = whole.prompt_ids[whole.question_start :]
    assert str(tokenizer.decode(question)).strip() == "Question: how many?\nAnswer:"
    cut = cut_middle(whole, 60)
    assert cut.prompt_ids == whole.prompt_ids[:30] + whole.prompt_ids[-30:]
    assert cut.cut == len(whole.prompt_ids) - 60
    assert cut.prompt_ids[cut.question_start :] == question
    assert (cut.question, cut.documents) == (whole.question, whole.documents)
    least = cut_middle(whole, len(question) + 3)
    assert least.prompt_ids == whole.prompt_ids[:3] + question
    assert least.question_start == 3
    assert cut_middle(whole, len(whole.prompt_ids)) is whole
    with naming(ValueError, "'x'", f"{len(question)} tokens", f"TaskConfig.prompt_tokens is {len(question) - 1}"):
        cut_middle(whole, len(question) - 1)


def test_an_answer_is_its_tokens_after_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    for text, answer in (("Question: who?\nAnswer:", "the lighthouse"), ("say\n", "Word"), ("a:", "(x)")):
        found = encode(parse("x", text, (answer,)), tokenizer)
        space = "" if text.endswith("\n") else " "
        joined = tokenizer.encode(text + space + answer)
        assert joined == [*found.prompt_ids, *found.answer_ids[:-1]]
        assert found.answer_ids[-1] == tokenizer.eos_token_id
    assert encode(parse("x", "no answer", ()), tokenizer).answer_ids == ()
    with naming(ValueError, "'x'", "empty"):
        encode(parse("x", " \n", ()), tokenizer)


# -- what splits share ---------------------------------------------------------------------------------------------------


def test_shared_questions_and_documents_are_found_whatever_their_case_and_signs() -> None:
    splits = {
        "train": [example("a", "Who won?", ("One text.", "Second, text")), example("b", "Who  WON", ("One text.",))],
        "validation": [],
        "test": [example("c", "who won!", ("second text",), cut=3), example("d", "", ("One", ""))],
    }
    found = report(splits)
    (pair,) = found.shared
    assert (pair.first, pair.second) == ("train", "test")
    assert pair.questions == ("Who won?",)
    assert pair.documents == ("Second, text",)
    train, test = found.splits["train"], found.splits["test"]
    assert (train.examples, train.questions, train.different_questions) == (2, 2, 1)
    assert (train.documents, train.different_documents) == (3, 2)
    assert (test.examples, test.questions, test.documents, test.cut) == (2, 1, 2, 1)
    assert str(found) == (
        "train: 2 examples, 2 questions (1 distinct), 3 documents (2 distinct). "
        "test: 2 examples, 1 question, 2 documents, 1 cut in the middle. "
        "train and test share 1 question and 1 document, among them 'Who won?', 'Second, text'."
    )
    assert str(report({**splits, "test": [example("e", "when?", ("Another",))]}, dropped=1)).endswith(
        "1 prompt over the limit left out. No question and no document is shared between splits."
    )


def test_a_report_quotes_three_and_shortens_them() -> None:
    documents = tuple(f"{number} " + "long " * 40 for number in range(5))
    found = report({"train": [example("a", "", documents)], "test": [example("b", "", documents)]})
    (pair,) = found.shared
    assert len(pair.documents) == 5
    assert str(pair).count("...'") == 3
    assert len(str(pair)) < 400


def test_signs_alone_are_a_text_of_their_own() -> None:
    assert normalised("  The  Cat, sat. ") == "the cat sat"
    assert normalised("ﬁne CAFÉ") == "fine café"
    assert normalised("???") != normalised("!!!")


def test_two_splits_that_share_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [f'{{"prompt": "Text {n % 2}.\\n\\nQuestion: what {n}?\\nAnswer:", "answer": "yes"}}\n' for n in range(4)]
    path.write_text("".join(rows))
    config = TaskConfig(source=str(path), train=3, test=1)
    with naming(ValueError, path, "train and test", "1 document", "'Text 0.'", "TaskConfig.shared"):
        load_task(config, tokenizer, DATA)
    task = load_task(replace(config, shared="allow"), tokenizer, DATA)
    assert [len(pair.documents) for pair in task.report.shared] == [1]
    assert "share 1 document" in str(task.report)
