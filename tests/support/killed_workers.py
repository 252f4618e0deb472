"""Kills one of two workers at random moments, and resumes: `python -m tests.support.killed_workers FOLDER SEED TIMES`.

It forks the workers after the slow imports, as a launcher would start them, one with rank 0 and one with rank 1. The output
is a JSON list: for each kill, the rank, the seconds until the other worker ended, its exit status, the run's error, and
whether the resumed run is the same, bit for bit, as one that was not interrupted.
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
from pathlib import Path
from typing import Any

from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training import __main__ as run_process
from refine_lab.training import parallel  # noqa: F401  before the fork
from tests.factories.durable_runs import assert_same, tiny_config

STEPS = 12


def create(folder: Path) -> Run:
    sizes = dict(batch_size=2, mini_batch_size=2, micro_batch_size=1, steps=STEPS, checkpoint_every=3, eval_every=6)
    with RunWriter.create(tiny_config(folder / "model", **sizes), folder / "runs") as writer:
        return writer.run


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


def killed(folder: Path, chance: random.Random, reference: Run) -> dict[str, Any]:
    run, rank, moment = create(folder), chance.randrange(2), chance.randrange(1, STEPS)
    pids = launch(run)
    metrics = run.path / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < moment:
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
        assert_same(run, reference)
        same = ""
    except AssertionError as error:
        same = str(error)[:500]
    return {**found, "resumed_after": done, "resumed_codes": resumed, "difference": same}


def main(folder: Path, seed: int, times: int) -> list[dict[str, Any]]:
    reference = create(folder)
    assert statuses(launch(reference)) == [0, 0], (reference.path / "log.txt").read_text(encoding="utf-8")
    chance = random.Random(seed)
    return [killed(folder, chance, reference) for _ in range(times)]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
