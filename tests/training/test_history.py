"""No prompt that a model was trained on is asked in a test: runs, chains of runs, copies, older runs, and other files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refine_lab.config import DataConfig, TaskConfig, TrainConfig
from refine_lab.data.tokenizer import tokenizer_sample, train_tokenizer
from refine_lab.experiments.configs import method_configs
from refine_lab.experiments.posttrain import task_runs
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_lab.runs.checkpoints import MANIFEST
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.training.history import HISTORY, history_of
from refine_lab.training.inputs import resume_or_create
from refine_lab.training.loading import load_prompts, load_training_task
from refine_lab.training.trainer import train
from tests.factories.tasks_ruler import article, squad
from tests.support.paths import TEXT
from tests.support.refusals import naming, refused

VOCABULARY = 600


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(tokenizer_sample({str(TEXT): 10**6}), VOCABULARY).save_pretrained(folder)
    sizes = dict(hidden_size=16, num_heads=1, num_hidden_layers=1, intermediate_size=16, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    DeltaNetForCausalLM(DeltaNetConfig(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def file_of(path: Path, numbers: range) -> Path:
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": f"Text {n}.\nQuestion: what is {n}?\nAnswer:", "answer": f"it is {n}"} for n in numbers]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def trained(model: Path | str, task: TaskConfig, runs: Path, **changes: Any) -> Run:
    """A run of plain SFT with one batch of two examples."""
    sizes: dict[str, Any] = {"steps": 1, "batch_size": 2, "mini_batch_size": 2, "device": "cpu"}
    config = TrainConfig(recipe="test", model=str(model), refine=None, task=task.settled(), **sizes, **changes)
    (run,) = task_runs([config], load_training_task([config]), runs)
    train(run.path, StopSignal(run.path))
    return run


def asked(model: Path | str, prompts: Path | str | None = None, **settings: Any) -> tuple[list[str], str]:
    """The questions that test-time training of `model` answers, and what is said of the task."""
    config = method_configs("per_prompt", [0], model=str(model), prompts=prompts and str(prompts), **settings)[-1]
    _, _, task = load_prompts(config)
    return [example.question for example in task.test], str(task.report)


def questions(*numbers: int) -> list[str]:
    return [f"what is {n}?" for n in numbers]


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a file of twelve rows: 0 to 2 test it, 3 validates, 4 to 8 are trained on."""
    folder = tmp_path_factory.mktemp("first")
    source = file_of(folder / "data" / "mine.jsonl", range(12))
    task = TaskConfig(source=str(source), train=5, validation=1, test=3, prompt_tokens=60)
    return trained(base, task, folder / "runs")


def source_of(run: Run) -> Path:
    assert run.config.task is not None
    return Path(run.config.task.source)


# -- a run's own task ----------------------------------------------------------------------------------------------------


def test_a_run_answers_its_own_test_prompts(first: Run) -> None:
    found, said = asked(first.path)
    assert found == questions(0, 1, 2)
    assert "left out" not in said and "changed" not in said
    config = method_configs("per_prompt", [0], model=str(first.path))[-1]
    assert (config.task, config.data) == (first.config.task, first.config.data)
    found, said = asked(first.path, count=2)
    assert found == questions(0, 1) and "The first 2 of 3 test prompts are answered." in said
    assert asked(first.path, prompt_tokens=60, answer_tokens=7)[0] == questions(0, 1, 2)
    for settings in ({"count": 4}, {"prompt_tokens": 50}, {"over_limit": "drop"}, {"answer_column": "prompt"}):
        with refused(*settings.keys(), *settings.values()):
            asked(first.path, **settings)


def test_ttt_after_post_training_on_ruler_asks_no_trained_question(base: Path, tmp_path: Path) -> None:
    """The prompts are divided once: by the run."""
    source = squad(tmp_path, [article(title) for title in ("ant", "bee", "cow", "dog", "elk", "fox")])
    run = trained(base, TaskConfig(source=f"ruler:{source}", train=8, test=4, prompt_tokens=400), tmp_path / "runs")
    task = load_training_task([run.config])
    trained_on = {example.question for example in task.train}
    own = [example.question for example in task.test]
    moved = tmp_path / "elsewhere.json"
    shutil.copy(source, moved)
    for prompts in (None, f"ruler:{source}", f"ruler:{moved}"):
        assert asked(run.path, prompts)[0] == own, "also under another path"
    assert not trained_on & set(own)
    with refused("prompt_tokens", 500):
        asked(run.path, f"ruler:{moved}", prompt_tokens=500)
    other = json.loads(source.read_text())
    other["data"] = [*other["data"][:-1], article("gnu")]
    (tmp_path / "other.json").write_text(json.dumps(other))
    found, said = asked(run.path, f"ruler:{tmp_path / 'other.json'}", prompt_tokens=400, count=20)
    assert len(found) == 20 and not trained_on & set(found)
    assert f"prompts that the model of {run.name} was trained on are left out." in said


def test_a_recall_task_is_inherited_with_its_text(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    task = TaskConfig(source="recall:word-1", train=3, test=2, prompt_tokens=160, answer_tokens=4)
    run = trained(
        "tiny-deltanet", task, tmp_path / "runs", data=DataConfig(sources={str(TEXT): 1.0}, sequence_length=160)
    )
    own = [example.question for example in load_training_task([run.config]).test]
    assert asked(run.path)[0] == asked(run.path, "recall:word-1")[0] == own
    config = method_configs("per_prompt", [0], model=str(run.path))[0]
    assert config.task.answer_tokens == 4 and config.data == run.config.data


def test_a_longer_recall_prompt_is_no_trained_one(base: Path, tmp_path: Path) -> None:
    task = TaskConfig(source="recall:word-1", train=3, test=2, prompt_tokens=160, answer_tokens=4)
    run = trained("tiny-deltanet", task, tmp_path / "runs")
    longer = method_configs("per_prompt", [0], model=str(run.path), prompt_tokens=300, count=3)[-1]
    assert (longer.task.prompt_tokens, longer.task.test) == (300, 3)
    _, _, found = load_prompts(longer)
    assert len(found.test) == 3 and all(len(example.prompt_ids) > 160 for example in found.test)
    trained_on = {example.question for example in load_training_task([run.config]).train}
    assert not trained_on & {example.question for example in found.test}


def test_a_moved_file_of_a_run_is_read_where_it_is(base: Path, tmp_path: Path) -> None:
    source = squad(tmp_path, [article(title) for title in ("ant", "bee", "cow", "dog")])
    run = trained(base, TaskConfig(source=f"ruler:{source}", train=6, test=3, prompt_tokens=400), tmp_path / "runs")
    own = asked(run.path)[0]
    moved = source.rename(tmp_path / "moved.json")
    found, said = asked(run.path, f"ruler:{moved}", shared="allow")
    assert found == own and "changed" not in said


def test_what_a_text_begins_with_is_inherited(base: Path, tmp_path: Path) -> None:
    source = file_of(tmp_path / "train.jsonl", range(9))
    task = TaskConfig(source=str(source), train=4, test=3, prompt_tokens=60)
    run = trained(base, task, tmp_path / "runs", data=DataConfig(add_bos=True))
    config = method_configs("per_prompt", [0], model=str(run.path))[-1]
    _, _, found = load_prompts(config)
    assert config.data.add_bos is True and [example.begins for example in found.test] == [1, 1, 1]
    assert "changed" not in str(found.report)


def test_the_source_of_the_tests_decides_which_prompts_are_the_runs_own(base: Path, tmp_path: Path) -> None:
    test = file_of(tmp_path / "test.jsonl", range(6, 12))
    task = TaskConfig(source="recall:word-1", test_source=str(test), train=3, test=3, prompt_tokens=160)
    run = trained("tiny-deltanet", task, tmp_path / "runs")
    assert asked(run.path)[0] == questions(6, 7, 8)
    other = method_configs("per_prompt", [0], model=str(run.path), prompts="recall:word-1", count=2)[-1]
    assert (other.task.source, other.task.test_source, other.task.test) == ("recall:word-1", None, 2)


def test_a_run_with_a_test_file_answers_that_file(base: Path, tmp_path: Path) -> None:
    source, test = file_of(tmp_path / "train.jsonl", range(6)), file_of(tmp_path / "test.jsonl", range(6, 12))
    task = TaskConfig(source=str(source), test_source=str(test), train=4, test=3, prompt_tokens=60)
    run = trained(base, task, tmp_path / "runs")
    assert asked(run.path)[0] == questions(6, 7, 8)
    assert asked(run.path, test)[0] == questions(*range(6, 12))
    assert asked(run.path, source)[0] == questions(4, 5)


def test_models_of_several_seeds_answer_the_same_prompts(base: Path, first: Run, tmp_path: Path) -> None:
    assert first.config.task is not None
    for seed, task in ((0, first.config.task), (1, first.config.task), (2, replace(first.config.task, train=4))):
        shutil.copytree(trained(base, task, tmp_path / "made", seed=seed).path, tmp_path / f"run-s{seed}")
    pattern = f"{tmp_path}/run-s{{seed}}"
    configs = method_configs("per_prompt", [0, 1], model=pattern)
    assert {config.task for config in configs} == {first.config.task}
    with naming(ValueError, "seeds 0 and 2"):
        method_configs("per_prompt", [0, 2], model=pattern)


# -- files of prompts ----------------------------------------------------------------------------------------------------


def test_of_a_file_the_rows_that_were_trained_on_are_left_out(first: Run, tmp_path: Path) -> None:
    copied = tmp_path / "other.jsonl"
    shutil.copy(source_of(first), copied)
    rest = questions(0, 1, 2, 3, 9, 10, 11)
    for prompts in (source_of(first), copied):
        found, said = asked(first.path, prompts)
        assert found == rest
        assert f"5 prompts that the model of {first.name} was trained on are left out." in said
    assert asked(first.path, copied, count=6)[0] == rest[:6], "others take their place"
    with naming(ValueError, copied, "7 prompts", first.name):
        asked(first.path, copied, count=8)
    found, said = asked(first.path, copied, shared="allow")
    assert found == questions(*range(12))
    assert f"The model of {first.name} was trained on 5 of the 12 prompts to be answered, 'what is 4?'," in said
    with naming(ValueError, first.name, "all 5 prompts"):
        asked(first.path, file_of(tmp_path / "trained.jsonl", range(4, 9)))
    assert asked(first.path, file_of(tmp_path / "new.jsonl", range(20, 22)))[0] == questions(20, 21)


def test_rows_are_the_same_whatever_their_case_signs_and_spaces(first: Run, tmp_path: Path) -> None:
    prompts = ("Another text.\nQuestion:  What is 4\nAnswer:", "WHAT is 5", "What is 5, then")
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts))
    found, said = asked(first.path, path)
    assert (
        found == [""]
        and "2 prompts that" in said
        and "has a reference answer in column 'answer'; answers are not scored." in said
    )


# -- where runs come from ------------------------------------------------------------------------------------------------


def test_a_chain_of_runs_is_followed_back(first: Run, tmp_path: Path) -> None:
    """The second run is on another file; the third, on text, has no task."""
    other = file_of(tmp_path / "data" / "other.jsonl", range(6, 30))
    task = TaskConfig(source=str(other), train=4, test=2, prompt_tokens=60, shared="allow")
    second = trained(first.path, task, tmp_path / "runs")  # tests 6 and 7, trains on 8 to 11
    data = DataConfig(sources={str(TEXT): 1.0}, sequence_length=64)
    (third,) = resume_or_create(
        [replace(second.config, model=str(second.path), task=None, data=data)], tmp_path / "runs"
    )
    train(third.path, StopSignal(third.path))
    assert [each.run for each in history_of(str(third.path)).trained] == [second.name, first.name]
    found, said = asked(third.path)
    assert found == questions(6, 7)
    names = f"{second.name} after {first.name}"
    assert f"The model of {names} was trained on 2 of the 2 prompts to be answered, 'what is 6?', 'what is 7?'." in said
    assert asked(third.path, source_of(first))[0] == questions(0, 1, 2, 3)
    assert asked(third.path, other)[0] == questions(*range(12, 30))


def test_post_training_refuses_test_questions_that_its_model_was_trained_on(first: Run, tmp_path: Path) -> None:
    other = file_of(tmp_path / "other.jsonl", range(3, 20))
    task = TaskConfig(source=str(other), train=4, test=2, prompt_tokens=60)
    facts = (first.name, "1 of the 2 prompts", "'what is 4?'", "TaskConfig.shared")
    with naming(ValueError, *facts):
        trained(first.path, task, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    (run,) = resume_or_create([replace(first.config, model=str(first.path), task=task)], tmp_path / "started")
    with naming(ValueError, *facts):
        train(run.path, StopSignal(run.path))


@pytest.mark.parametrize("kind", ["folder", "renamed", "run"])
def test_copies_of_a_checkpoint_know_what_they_were_trained_on(kind: str, first: Run, tmp_path: Path) -> None:
    _, checkpoint = first.latest_checkpoint() or (0, Path())
    copy = tmp_path / {"folder": checkpoint.name, "renamed": "my-model", "run": "my-run"}[kind]
    shutil.copytree(first.path if kind == "run" else checkpoint, copy)
    assert asked(copy)[0] == questions(0, 1, 2)
    assert asked(copy, source_of(first))[0] == questions(0, 1, 2, 3, 9, 10, 11)


# -- what is not known ---------------------------------------------------------------------------------------------------


def older(run: Run, folder: Path) -> Path:
    """A copy of the run as one from before checkpoints kept what they were trained on."""
    shutil.copytree(run.path, folder)
    for path in (*folder.rglob(HISTORY), *folder.rglob(MANIFEST)):
        path.unlink()
    values = json.loads((folder / "config.json").read_text())
    for name in ("lines", "strip_leading", "test_source"):
        del values["task"][name]
    values["task"] |= {"answer_column": "answer", "answer_tokens": 4}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_an_older_run_is_read_from_its_configuration(first: Run, tmp_path: Path) -> None:
    run = older(first, tmp_path / "old")
    assert asked(run)[0] == questions(0, 1, 2)
    assert asked(run, source_of(first))[0] == questions(0, 1, 2, 3, 9, 10, 11)
    (known,) = history_of(str(run)).trained
    assert (known.task.lines, known.task.strip_leading, known.task.answer_column) == ("first", False, None)


def test_an_older_run_without_a_record_of_its_prompts_leaves_out_those_that_it_names(
    first: Run, tmp_path: Path
) -> None:
    run = older(first, tmp_path / "old")
    (run / "inputs.json").unlink()
    found, said = asked(run, source_of(first))
    assert found == questions(0, 1, 2, 3, 9, 10, 11) and "trained on have changed since" not in said
    assert "the run old has no record of its prompts, which may have changed since" in said


def test_it_is_said_where_an_older_run_cannot_tell(first: Run, base: Path, tmp_path: Path) -> None:
    source = file_of(tmp_path / "data" / "mine.jsonl", range(12))
    task = replace(first.config.task, source=str(source))  # type: ignore[type-var]
    run = trained(base, task, tmp_path / "runs")
    old = older(run, tmp_path / "old")
    file_of(source, range(1, 13))
    unknown = "It is not known whether the model was trained on any of these prompts: the prompts that the run old was"
    changed = "The prompts have changed since {} was trained on them: these are not its test prompts."
    assert changed.format("old") in asked(old)[1] and f"{unknown} trained on have changed since;" in asked(old)[1]
    found, said = asked(run.path)
    assert found == questions(1, 2, 3) and changed.format(run.name) in said and unknown not in said
    assert asked(run.path, source)[0] == questions(1, 2, 3, 9, 10, 11, 12), "the record of the rows holds"
    source.unlink()
    new = file_of(tmp_path / "new.jsonl", range(2))
    assert f"{unknown} trained on cannot be loaded: there is no file" in asked(old, new)[1]
    assert unknown not in asked(run.path, new)[1]


def test_it_is_said_where_a_folder_has_no_record(base: Path, first: Run, tmp_path: Path) -> None:
    new = file_of(tmp_path / "new.jsonl", range(2))
    clause = f"on any of these prompts: the folder '{base}' has no record of its training."
    assert clause in asked(base, new)[1]
    assert clause in asked(first.path)[1], "its run started there"
    assert "not known" not in asked("tiny-deltanet", new)[1]
    assert history_of("org/name").unknown == () and history_of("new:anything").trained == ()
    assert history_of("/no/such/folder").unknown == ("the folder '/no/such/folder' no longer exists",)


def test_a_damaged_record_is_named(first: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(first.path, copy)
    (path,) = copy.rglob(HISTORY)
    path.with_name(MANIFEST).unlink()
    for text in ("{", "[]", '{"trained": [{"run": "x"}], "unknown": []}'):
        path.write_text(text)
        with naming(ValueError, path):
            asked(copy)
