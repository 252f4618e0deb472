"""Two workers that answer prompts against one, in forked processes and under `torchrun` itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refine_lab.experiments.runs import ttt_runs
from refine_lab.runs.queue import run_in_turn
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training.loading import load_prompts
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.workers import Workers
from tests.factories.durable_runs import STEPS, answering_config, assert_same_answers, tiny_config, tiny_model
from tests.support.paths import ROOT
from tests.support.refusals import refused

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        folder = tmp_path_factory.mktemp("home")
        tiny_model(folder / "model")
        yield folder


@pytest.fixture(scope="module")
def found(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.two_answering", str(tmp_path_factory.mktemp("answers"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_same(case: dict[str, Any]) -> None:
    assert case["state"] == "finished" and case["same_texts"] and case["same_files"] and case["difference"] < 1e-6, case


def test_two_workers_give_the_answers_of_one(found: dict[str, Any]) -> None:
    counts = {name: (case["answers"], case["updates"], case["step"]) for name, case in found["compared"].items()}
    assert counts == {"prompt": (7, 14, 7), "never": (6, 3, 3), "never, SFT": (6, 6, 3), "none": (7, 0, 7)}
    for case in found["compared"].values():
        assert_same(case)
    assert found["compared"]["prompt"]["difference"] == 0, "prompts that are adapted to alone need no exchange"


def test_updates_that_are_shared_need_the_sum_of_gradients(found: dict[str, Any]) -> None:
    assert found["broken"]["difference"] > 1e-5


def test_a_worker_stops_both_and_the_run_continues_with_another_number(found: dict[str, Any]) -> None:
    assert found["resumed"].keys() == {"prompt", "never"}
    for name, case in found["resumed"].items():
        assert case["stopped"] and case["first"] == {"prompt": 2, "never": 1}[name]
        assert_same(case)


def test_a_worker_that_stops_in_a_batch_changes_no_place(found: dict[str, Any]) -> None:
    assert len(found["interrupted"]) == 4
    for name, case in found["interrupted"].items():
        assert case["stopped"] and case["reason"] == f"worker {name[-1]} has had enough", (name, case)
        assert_same(case)


def test_workers_divide_an_evaluation(found: dict[str, Any]) -> None:
    case = found["evaluated"]
    assert case["same"] and case["readings"] == [[3, 5], [2, 5]]
    assert case["measures"].keys() >= {"ntp_loss", "key_loss", "key_tokens", "answer_loss", "contains_answer"}


def made(configs: list[TTTRunConfig], folder: Path) -> list[Run]:
    policy, _, task = load_prompts(configs[-1])
    return ttt_runs(configs, policy, task.test, folder)


def test_the_processes_of_a_configuration_answer_its_prompts(home: Path, tmp_path: Path) -> None:
    model = home / "model"
    configs = [
        answering_config(model),
        answering_config(model, processes=2),
        answering_config(model, processes=2, ttt=None),
    ]
    runs = made(configs, tmp_path)
    run_in_turn(runs, detach=False, log=lambda line: None)  # one after the other, by one process and its workers
    alone, both, unchanged = runs
    assert [run.status.state for run in runs] == ["finished"] * 3
    assert len(alone.answers()) == 3 and len(alone.updates()) == 6 and len(unchanged.answers()) == 3
    assert_same_answers(both, alone)


def launched(run: Run) -> subprocess.CompletedProcess[str]:
    """Executes a run by `torchrun` with two workers, as docs/scale.md says."""
    program = Path(sys.executable).with_name("torchrun")
    command = [str(program), "--standalone", "--nproc-per-node", "2", "-m", "refine_lab.training", str(run.path)]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, cwd=ROOT)


def test_torchrun_trains_and_answers(home: Path, tmp_path: Path) -> None:
    config = tiny_config(home / "model", batch_size=2, mini_batch_size=2)
    with RunWriter.create(config, tmp_path) as writer:
        trained = writer.run
    done = launched(trained)
    assert done.returncode == 0, done.stderr[-3000:]
    assert trained.status.state == "finished" and len(trained.metrics()) == STEPS
    assert [step for step, _ in trained.checkpoints()][-1] == STEPS

    config = answering_config(trained.path, reset="never", batch_size=2, mini_batch_size=2)
    (answered,) = made([config], tmp_path)
    done = launched(answered)
    assert done.returncode == 0, done.stderr[-3000:]
    assert answered.status.state == "finished" and len(answered.answers()) == 2


def test_processes_must_divide_an_update_that_they_share(home: Path) -> None:
    config = answering_config(home / "model", processes=3)
    shared = dict(reset="never", batch_size=4, mini_batch_size=4)
    with refused("TTTRunConfig.mini_batch_size", 4):
        replace(config, **shared)
    replace(config, **shared, processes=2)
    replace(config, **shared, ttt=None)


def test_values_of_a_single_worker_are_gathered_as_they_are() -> None:
    value = [(1, 2), float("inf")]
    (found,) = Workers().gather_json(value)
    assert found is value
    assert Workers().map(lambda item: item * 2, range(3)) == [0, 2, 4]
