"""Post-training as it runs: the three methods, records that an interruption does not change, answers that are kept."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from refine_lab.config import from_json, to_json
from refine_lab.experiments import posttrain
from refine_lab.experiments.compare import per_seed
from refine_lab.experiments.configs import method_configs, release_configs
from refine_lab.experiments.estimate import estimated_seconds
from refine_lab.experiments.posttrain import answer_test_prompts, task_runs
from refine_lab.experiments.stored_scores import stored_scores
from refine_lab.recipes import by_memory
from refine_lab.runs.answers import AnswerLog
from refine_lab.runs.child import StopSignal
from refine_lab.runs.run import Run
from refine_lab.training.inputs import resume_or_create
from refine_lab.training.loading import load_training_task
from refine_lab.training.trainer import train
from tests.factories.posttraining import StopAfter, checkpoint, config_of, prompts, trained  # noqa: F401
from tests.support.refusals import naming, refused

CLOCKS = ["time", "seconds", "tokens_per_second"]


@pytest.mark.parametrize("method", ["sft", "nested_sft", "nested_refine"])
def test_a_run_that_was_interrupted_is_the_one_that_was_not(checkpoint, prompts, tmp_path, method):
    config = config_of(checkpoint, prompts, method)
    whole = trained(config, tmp_path / "whole")
    resumed = trained(config, tmp_path / "resumed", stop_after=3)
    for of in (Run.metrics, Run.evaluations):
        a, b = (of(run).drop(columns=CLOCKS, errors="ignore") for run in (whole, resumed))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    pd.testing.assert_frame_equal(whole.rollouts(), resumed.rollouts(), check_exact=True)
    weights = [load_file(run.path / "checkpoints" / "step-6" / "model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_a_run_records(checkpoint, prompts, tmp_path):
    run = trained(config_of(checkpoint, prompts, "nested_refine"), tmp_path)
    metrics, evaluations = run.metrics(), run.evaluations()
    assert metrics["updates"].tolist() == [3, 6, 9, 12, 15, 18]
    wanted = {"ntp_loss", "nsp_loss", "reward_mean", "answer_loss", "answer_accuracy", "answer_grad_norm", "grad_norm"}
    assert wanted <= set(metrics)
    assert evaluations["step"].tolist() == [0, 3, 6]
    assert {"answer_loss", "answer_accuracy", "contains_answer", "exact_match"} <= set(evaluations)
    assert len(run.rollouts()) == 6 * 4 * 3
    assert evaluations["answer_loss"].iloc[-1] < evaluations["answer_loss"].iloc[0], "it learns the three answers"


def test_without_validation_nothing_is_evaluated(checkpoint, prompts, tmp_path):
    config = config_of(checkpoint, prompts, "sft")
    run = trained(replace(config, task=replace(config.task, validation=0)), tmp_path)
    assert run.evaluations().empty and len(run.metrics()) == 6


def test_answers_are_kept_and_not_asked_again(checkpoint, prompts, tmp_path, monkeypatch):
    run = trained(config_of(checkpoint, prompts, "sft"), tmp_path)
    task = load_training_task([run.config])
    first = answer_test_prompts([run], task)
    assert first["method"].tolist() == ["base"] * 6 + ["sft"] * 6
    assert first["updates"].tolist() == [0] * 6 + [6] * 6
    for part in (run.path / "answers" / "test").iterdir():
        part.unlink()
    asked = []
    real = posttrain.answer
    monkeypatch.setattr(
        posttrain, "answer", lambda *a, **k: asked.extend(example.name for example in a[2]) or real(*a, **k)
    )
    again = answer_test_prompts([run], task)
    assert asked == [example.name for example in task.test], "the base model's are there still"
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), again.drop(columns="seconds"))
    assert per_seed(again)["seed"].tolist() == [posttrain.NO_SEED, 0]


def test_a_run_that_was_trained_on_answers_again(checkpoint, prompts, tmp_path):
    """Answers belong to the checkpoint that gave them; those of an earlier version have no step but a time."""
    config = config_of(checkpoint, prompts, "sft")
    (run,) = resume_or_create([config], tmp_path)
    task = load_training_task([config])
    train(run.path, StopAfter(run.path, 2))
    early = answer_test_prompts([run], task)
    assert early["updates"].tolist() == [0] * 6 + [2] * 6
    log = AnswerLog(run.path / "answers" / "test")
    assert log.read()["step"].tolist() == [2] * 6
    train(run.path, StopSignal(run.path))
    assert stored_scores([run, run], ["a", "b"])[0].keys() & {"exact_match"} == set()  # no answers of this checkpoint
    late = answer_test_prompts([run], task)
    assert late["updates"].tolist() == [0] * 6 + [6] * 6
    assert log.rows == 12 and log.read()["step"].tolist() == [6] * 6
    for path in log.folder.glob("*.parquet"):
        path.unlink()
    fresh = answer_test_prompts([run], task)
    pd.testing.assert_frame_equal(late.drop(columns="seconds"), fresh.drop(columns="seconds"))
    assert stored_scores([run, run], ["a", "b"])[0]["exact_match"]["score"].tolist()

    older = log.read().drop(columns="step").assign(answer="as stored")
    rows = [row | {"references": [*row["references"]]} for row in older.to_dict("records")]
    (path,) = log.folder.glob("*.parquet")
    path.unlink()
    log.write(rows)
    assert set(answer_test_prompts([run], task)["answer"][6:]) == {"as stored"}
    (path,) = log.folder.glob("*.parquet")
    os.utime(path, (0, 0))
    again = answer_test_prompts([run], task)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), fresh.drop(columns="seconds"))


def test_runs_with_the_same_configuration_are_resumed(checkpoint, prompts, tmp_path):
    config = config_of(checkpoint, prompts, "nested_sft")
    (first,) = resume_or_create([config], tmp_path)
    (again,), (other,) = resume_or_create([config], tmp_path), resume_or_create([replace(config, seed=1)], tmp_path)
    assert first.path == again.path != other.path
    assert from_json(to_json(config)) == config


def test_an_estimate_counts_every_run_that_has_not_finished(checkpoint, prompts, tmp_path):
    configs = [config_of(checkpoint, prompts, method) for method in ("sft", "nested_sft")]
    task = load_training_task(configs)
    run, finished = task_runs(configs, task, tmp_path)
    train(finished.path, StopSignal(finished.path))
    one, many = estimated_seconds([run], task), estimated_seconds([run] * 1000, task)
    assert 0 < one < many / 10 and estimated_seconds([finished], task) == 0


def test_the_ways_differ_in_what_comes_before_the_answers_alone():
    configs = method_configs("posttrain", [0, 3], lr=3e-5, test=20, num_chunks=4, answer_tokens=3)
    assert [(config.method, config.seed) for config in configs] == [
        (method, seed) for seed in (0, 3) for method in ("sft", "nested_sft", "nested_refine")
    ]
    sft, nested, refine = configs[:3]
    assert (sft.updates_per_batch, nested.updates_per_batch, refine.updates_per_batch) == (1, 5, 5)
    assert replace(nested, nested=False) == sft == replace(refine, nested=False, refine=None)
    assert {(c.lr, c.task.test, c.task.answer_tokens) for c in configs} == {(3e-5, 20, 3)}
    assert refine.refine.num_chunks == 4


def test_the_releases_single_update_is_a_method_of_its_own():
    (config,) = release_configs(method_configs("posttrain", [1], steps=2))
    assert (config.method, config.updates_per_batch) == ("nested_sft_release", 2)
    released = method_configs("posttrain", [1], updates="release", steps=2)
    assert config in released and release_configs(released) == []
    assert [c.method for c in released] == ["sft", "nested_sft_release", "nested_refine"]
    with refused("mini_batch_size", 16):
        release_configs(method_configs("posttrain_searched", [1]))
    assert [c.method for c in method_configs("posttrain", [0])] == ["sft", "nested_sft", "nested_refine"]


@pytest.mark.parametrize(
    "arguments, field, value",
    [
        (dict(recipe="postrain", seeds=[0]), "recipe", "postrain"),
        (dict(recipe="posttrain", seeds=[0, 0]), "seeds", [0, 0]),
        (dict(recipe="posttrain", seeds=[0], methods=["nested"]), "method", "nested"),
        (dict(recipe="posttrain", seeds=[0], reward="bleu"), "reward", "bleu"),
        (dict(recipe="posttrain", seeds=[0], batch_size=6), "batch_size", 6),
        (dict(recipe="posttrain", seeds=[0], over_limit="cut"), "TaskConfig.over_limit", "cut"),
        (dict(recipe="posttrain", seeds=[0], steps=0), "steps", 0),
    ],
)  # fmt: skip
def test_bad_values_are_named(arguments, field, value):
    with refused(field, value):
        method_configs(**arguments)


def test_a_file_that_was_written_anew_is_another_task(checkpoint, prompts, tmp_path):
    """Its name is the same, and so are the names of its prompts: neither runs nor answers of the old one are taken."""
    mine = tmp_path / "mine.jsonl"
    mine.write_text(prompts.read_text())
    config = config_of(checkpoint, mine, "sft")
    task = load_training_task([config])
    (first,) = task_runs([config], task, tmp_path / "runs")
    assert task_runs([config], task, tmp_path / "runs")[0].path == first.path
    mine.write_text(prompts.read_text().replace("number", "figure"))
    (other,) = task_runs([config], load_training_task([config]), tmp_path / "runs")
    assert other.path != first.path
    with naming(ValueError, first.path, "mine.jsonl"):
        train(first.path, StopSignal(first.path))


def test_prompts_too_short_for_the_method_are_refused_before_anything_is_trained(checkpoint, prompts, tmp_path):
    mine = tmp_path / "mine.jsonl"
    short = json.dumps({"prompt": "Question: what?\nAnswer:", "answer": "this"})
    mine.write_text(prompts.read_text() + short + "\n")
    configs = [config_of(checkpoint, mine, method) for method in ("sft", "nested_refine")]
    configs = [replace(config, task=replace(config.task, train=21)) for config in configs]
    assert len(load_training_task(configs[:1]).train) == 21
    with naming(ValueError, "1 of 21 prompts", "num_chunks", "'mine-30'"):
        load_training_task(configs)


def first_is_right(inputs):
    return (inputs.rollout_ids[:, 0] == inputs.target_ids[:, 0]).float()


def surprising(inputs):
    return -inputs.logprobs


def test_functions_of_ones_own_train_on_prompts(checkpoint, prompts, tmp_path):
    config = config_of(checkpoint, prompts, "nested_refine")
    config = replace(config, refine=replace(config.refine, reward="custom", selection="custom"), steps=1)
    task = load_training_task([config])
    (run,) = task_runs([config], task, tmp_path, first_is_right, surprising)
    train(run.path, StopSignal(run.path))
    assert run.state == "finished"
    assert set(run.rollouts()["reward"].unique()) <= {0.0, 1.0}
    assert "def surprising(" in (run.path / "selection.py").read_text(encoding="utf-8")
    assert [found.path for found in task_runs([config], task, tmp_path, first_is_right, surprising)] == [run.path]
    assert [found.path for found in task_runs([config], task, tmp_path, first_is_right, first_is_right)] != [run.path]


@pytest.mark.parametrize("selection", ["memory", "copy"])
def test_prompts_are_rolled_out_by_memory_with_several_updates(checkpoint, prompts, tmp_path, selection):
    config = config_of(checkpoint, prompts, "nested_refine")
    refine = by_memory(replace(config.refine, window=16), selection)
    run = trained(replace(config, refine=refine, steps=2), tmp_path)
    assert run.metrics()["updates"].tolist() == [3, 6]
    assert len(run.rollouts()) == 2 * 4 * 3
