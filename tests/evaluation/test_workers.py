"""Two workers that divide an evaluation against one: the same results, and only the first one writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.config import TrainConfig
from refine_lab.evaluation import run as evaluation
from refine_lab.evaluation.benchmark import Missing
from refine_lab.evaluation.catalogue import BENCHMARKS
from refine_lab.evaluation.config import EvaluationConfig
from refine_lab.evaluation.model import RefineLM
from refine_lab.evaluation.run import evaluate
from refine_lab.models import load_model
from refine_lab.models.hub import Place, locate
from refine_lab.models.loading import load_tokenizer
from refine_lab.runs.writer import RunWriter
from refine_lab.validation import ConfigError
from refine_lab.workers import SharedError, Workers, launched
from tests.factories.evaluation import generations, loaded, request
from tests.support.paths import ROOT
from tests.support.refusals import refused

TEXTS = [f"def area_{i}(width, height):\n    return width *" + " height" * i for i in range(5)]


@dataclass(frozen=True)
class Thread(Workers):
    """A worker in a thread of this process, which exchanges values as JSON through a list."""

    values: list[str] = field(default_factory=lambda: [""] * 2)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=120))

    def _texts(self, text: str) -> list[str]:
        self.values[self.rank] = text
        self.barrier.wait()
        found = [*self.values]
        self.barrier.wait()  # before the next exchange overwrites them
        return found

    def wait(self) -> None:
        self.gather_json(None, "waiting")


def both(function: Callable[[Workers], Any]) -> list[Any]:
    """What the function returns or raises in each of two workers."""
    first = Thread(0, 2)

    def caught(workers: Workers) -> Any:
        try:
            return function(workers)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(caught, [first, Thread(1, 2, first.values, first.barrier)]))


def asked(lm: RefineLM) -> list[Any]:
    """The answers to every kind of request; two continuations share a context, and a text is asked about twice."""
    pairs = [(context, text) for context in TEXTS[:3] for text in (" height", " a width")]
    texts = [*TEXTS, TEXTS[0]]
    return [
        lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs]),
        lm.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts]),
        lm.generate_until(generations(*texts)),
    ]


def test_two_workers_divide_the_requests_of_the_harness() -> None:
    alone = RefineLM(*loaded(), batch_size=2)
    expected = asked(alone)
    progress: list[list[tuple[int, int]]] = [[], []]

    def asked_by(workers: Workers) -> tuple[Any, Any]:
        lm = RefineLM(*loaded(), batch_size=2, workers=workers)
        lm.on_batch = lambda done, total: progress[workers.rank].append((done, total))
        return asked(lm), lm.counts

    found = both(asked_by)
    assert found == [(expected, alone.counts)] * 2
    assert type(found[0][0][0][0]) is tuple
    assert all(done <= total and total in (6, 5) for calls in progress for done, total in calls)
    assert [len(calls) for calls in progress] == [5, 3], "of 2 batches of contexts, 3 of texts and 3 of prompts"


@pytest.fixture(autouse=True)
def _models_are_loaded_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()  # transformers cannot load in two threads at once

    def loaded_alone(name: str, **settings: Any) -> RefineLM:
        with lock:
            return RefineLM(name, **settings)

    monkeypatch.setattr(evaluation, "RefineLM", loaded_alone)


def config_of(model: str = "tiny-deltanet", **changes: Any) -> EvaluationConfig:
    settings = {"tasks": ("rewards", "recall"), "lengths": (256,), "limit": 3, "batch_size": 1, "device": "cpu"}
    return EvaluationConfig(model=model, **{**settings, **changes})


def evaluated(config: EvaluationConfig, out: Path) -> list[Any]:
    """What two workers return or raise, and what they report."""
    return both(lambda workers: evaluate(config, out, lambda line: None, workers))


def test_a_task_that_cannot_run_in_one_worker_ends_both_and_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = BENCHMARKS["rewards"]

    def missing(lm: RefineLM, setting: Any) -> Any:
        if lm.workers.rank == 1 or lm.workers.count == 1:
            raise Missing("the hub has not answered")
        return benchmark.measure(lm, setting)

    monkeypatch.setitem(BENCHMARKS, "rewards", replace(benchmark, measure=missing))
    for error in evaluated(config_of(), tmp_path / "two"):
        assert isinstance(error, SharedError)
        assert "worker 1 of 2" in str(error) and "rewards at 256 tokens: the hub has not answered" in str(error)
    assert [*(tmp_path / "two" / "units").glob("*")] == []
    units = evaluate(config_of(), tmp_path / "one", lambda line: None)["units"]
    assert [unit["status"] for unit in units] != ["done", "done"], "a single process skips the task"


def test_all_workers_take_the_checkpoint_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunWriter.create(TrainConfig(recipe="test", refine=None), tmp_path) as writer:
        for step in (4, 6):
            with writer.checkpoint(step) as folder:
                load_model("tiny-deltanet")[0].save_pretrained(folder)
                load_tokenizer("tiny-deltanet").save_pretrained(folder)
    model, checkpoints = str(writer.path), writer.path / "checkpoints"
    local, earlier = threading.local(), Place(checkpoints / "step-4")
    monkeypatch.setattr(evaluation, "locate", lambda name: earlier if local.first else locate(name))

    def place(workers: Workers) -> str:
        local.first = workers.first
        return evaluation.located(config_of(model), workers)[1]

    assert both(place) == [str(checkpoints / "step-4")] * 2


def test_other_settings_and_other_models_are_refused_by_all_workers(tmp_path: Path) -> None:
    config = config_of(tasks=("recall",))
    assert [result["units"][0]["status"] for result in evaluated(config, tmp_path)] == ["done", "done"]
    first, second = evaluated(replace(config, limit=2), tmp_path)
    assert isinstance(first, ConfigError) and isinstance(second, SharedError) and str(first) == str(second)
    assert "limit 3, not 2" in str(first)

    def differing(workers: Workers) -> Any:
        return evaluate(replace(config, seed=workers.rank), tmp_path / "new", lambda line: None, workers)

    for error in both(differing):
        assert str(error) == "seed must be the same for all workers, got 0 in worker 0, 1 in worker 1"
    assert not (tmp_path / "new").exists()


def run(out: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    tasks = "niah_single_1,recall,rewards,long_ppl,unseen_rest"
    options = [
        "--tasks",
        tasks,
        "--lengths",
        "256",
        "--limit",
        "3",
        "--ttt",
        "sft",
        "--ttt-steps",
        "1",
        "--device",
        "cpu",
    ]
    command = [*launcher, "-m", "refine_lab.evaluation", "--model", "tiny-deltanet", *options, "--out", str(out)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environ, cwd=ROOT)


def content(folder: Path) -> tuple[Any, dict[str, pd.DataFrame]]:
    """The records without their times, and the samples of each unit."""
    units = json.loads((folder / "results.json").read_text())["units"]
    samples = {path.name: pd.read_parquet(path) for path in sorted((folder / "samples").iterdir())}
    return [{name: value for name, value in unit.items() if name != "seconds"} for unit in units], samples


@pytest.mark.process
def test_torchrun_divides_an_evaluation(tmp_path: Path) -> None:
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    one, two = (
        run(tmp_path / "one", sys.executable),
        run(tmp_path / "two", torchrun, "--standalone", "--nproc-per-node", "2"),
    )
    for done in (one, two):
        assert done.returncode in (0, 1) and done.stdout.count("written to") == 1, done.stderr[-3000:]
        assert done.stdout.count("[1/5] ") == 1
    (units, samples), (units_of_two, samples_of_two) = content(tmp_path / "one"), content(tmp_path / "two")
    assert units == units_of_two and sum(unit["status"] == "done" for unit in units) >= 4
    assert samples.keys() == samples_of_two.keys()
    cause = re.search(r"Root Cause.*?rank +: (\d)", two.stderr, re.DOTALL)
    assert two.returncode == 0 or (cause is not None and cause[1] == "0"), "the first worker's status is that of all"
    for name, frame in samples.items():
        pd.testing.assert_frame_equal(frame, samples_of_two[name], check_exact=True)


def test_workers_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with launched("cuda:1") as workers:
        assert workers == Workers()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("device", "cuda:1"), launched("cuda:1"):
        pass
