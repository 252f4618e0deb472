"""Two workers that divide an evaluation against one: the same results, and only the first one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra `eval`")

from refine_lab.evaluation.model import RefineLM
from refine_lab.workers import Workers, launched
from tests.factories.evaluation import generations, loaded, request
from tests.support.paths import ROOT
from tests.support.refusals import refused

TEXTS = [f"def area_{i}(width, height):\n    return width *" + " height" * i for i in range(5)]


@dataclass(frozen=True)
class Thread(Workers):
    """A worker in a thread of this process, which exchanges values as JSON through a list."""

    values: list[str] = field(default_factory=lambda: [""] * 2)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=120))

    def gather_json(self, value: Any) -> list[Any]:
        self.values[self.rank] = json.dumps(value)
        self.barrier.wait()
        found = [json.loads(text) for text in self.values]
        self.barrier.wait()  # before the next exchange overwrites them
        return found


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
    expected, first = asked(alone), Thread(0, 2)
    workers = [first, Thread(1, 2, first.values, first.barrier)]
    lms = [RefineLM(*loaded(), batch_size=2, workers=each) for each in workers]
    progress: list[list[tuple[int, int]]] = [[], []]
    for lm, calls in zip(lms, progress, strict=True):
        lm.on_batch = lambda done, total, calls=calls: calls.append((done, total))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(asked, lms))
    assert found == [expected, expected]
    assert type(found[0][0][0]) is tuple and [lm.counts for lm in lms] == [alone.counts] * 2
    assert all(done <= total and total in (6, 5) for calls in progress for done, total in calls)
    assert [len(calls) for calls in progress] == [5, 3], "of 2 batches of contexts, 3 of texts and 3 of prompts"


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
    for name, frame in samples.items():
        pd.testing.assert_frame_equal(frame, samples_of_two[name], check_exact=True)


def test_workers_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with launched("cuda:1") as workers:
        assert workers == Workers()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("device", "cuda:1"), launched("cuda:1"):
        pass
