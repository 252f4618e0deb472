"""Kills one of two workers at random moments, and resumes: `python -m tests.support.killed_workers FOLDER SEED TIMES KIND`.

The workers train (KIND is "train") or answer prompts (it is the value of `reset`, "prompt" or "never"). The program forks
them after the slow imports, as a launcher would start them, one with rank 0 and one with rank 1. The output is a JSON list:
for each kill, the rank, the seconds until the other worker ended, its exit status, the run's error, and whether the resumed
run is the same, bit for bit, as one that was not interrupted.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training import __main__ as run_process
from refine_lab.training import parallel  # noqa: F401  before the fork
from refine_lab.training.inputs import inputs_of, resume_or_create
from refine_lab.training.loading import load_prompts
from tests.factories.durable_runs import answering_config, assert_same, assert_same_answers, tiny_config

STEPS = 12
"""Batches of a training; also prompts that are answered in batches of one or, if weights are not reset, two."""


def create(folder: Path, kind: str) -> Run:
    if kind == "train":
        sizes = dict(batch_size=2, mini_batch_size=2, micro_batch_size=1, steps=STEPS, checkpoint_every=3, eval_every=6)
        with RunWriter.create(tiny_config(folder / "model", **sizes), folder / "runs") as writer:
            return writer.run
    sizes = dict(batch_size=2, mini_batch_size=2) if kind == "never" else {}
    config = answering_config(folder / "model", reset=kind, **sizes)
    config = replace(config, task=replace(config.task, test=STEPS))
    inputs = inputs_of(config.model, load_prompts(config)[2].test)
    return resume_or_create([config], folder / "runs", inputs, fresh=True)[0]


def advanced(run: Run, moment: int) -> bool:
    """Returns whether a training has written as many lines, or this many of the answered batches have been written."""
    if (run.path / "answers").is_dir():
        return len([*(run.path / "answers").iterdir()]) >= moment
    metrics = run.path / "metrics.jsonl"
    return metrics.exists() and metrics.read_bytes().count(b"\n") >= moment


def launch(run: Run) -> list[int]:
    """Forks two workers; returns their process ids, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        if pid := os.fork():
            pids.append(pid)
            continue
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        code = 3
        try:
            with (run.path / "log.txt").open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = run_process.main([str(run.path)])
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return pids


def statuses(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def killed(folder: Path, kind: str, chance: random.Random, reference: Run) -> dict[str, Any]:
    run, rank, moment = create(folder, kind), chance.randrange(2), chance.randrange(1, reference.done)
    pids = launch(run)
    while not advanced(run, moment):
        time.sleep(0.005)
    time.sleep(chance.random() * 0.05)
    began = time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    codes = statuses([pids[rank], pids[1 - rank]])
    found = {
        "rank": rank,
        "seconds": time.monotonic() - began,
        "codes": codes,
        "state": run.state,
        "error": run.status.error,
    }
    done = run.done
    resumed = statuses(launch(run))
    try:
        (assert_same if kind == "train" else assert_same_answers)(run, reference)
        same = ""
    except AssertionError as error:
        same = str(error)[:500]
    return {**found, "resumed_after": done, "resumed_codes": resumed, "difference": same}


def main(folder: Path, seed: int, times: int, kind: str) -> list[dict[str, Any]]:
    reference = create(folder, kind)
    assert statuses(launch(reference)) == [0, 0], (reference.path / "log.txt").read_text(encoding="utf-8")
    chance = random.Random(seed)
    return [killed(folder, kind, chance, reference) for _ in range(times)]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
