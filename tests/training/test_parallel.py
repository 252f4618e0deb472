"""Two workers against one: the same gradients, weights, rollouts and records; and what happens when one is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from refine_lab.config import RefineConfig, TrainConfig
from refine_lab.method.custom import reward_source
from refine_lab.method.step import split
from refine_lab.runs import checkpoints
from refine_lab.runs.process import follow, resume, start
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter
from refine_lab.training import parallel, trainer
from refine_lab.training.lost_workers import Watch
from refine_lab.workers import Workers, _buckets, sharded_like, whole
from tests.factories.durable_runs import STEPS, tiny_config, tiny_model
from tests.factories.step import make_batch
from tests.support.paths import ROOT
from tests.support.refusals import naming, refused

EXACT = 1e-10


def program(module: str, *arguments: object, seconds: float) -> Any:
    """What a program of `tests.support` prints, as JSON."""
    command = [sys.executable, "-m", f"tests.support.{module}", *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("home")
        tiny_model(folder / "model")
        yield folder


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return program("two_workers", "some", seconds=300)


def assert_exact(differences: dict[str, Any]) -> None:
    """Asserts that two workers have trained as one did."""
    assert all(name.startswith(("DDP", "FSDP2")) for name in differences)
    for name, case in differences.items():
        if "bfloat16" in name:
            assert case["gradients"] < 1e-6 and 0 < case["weights"] < 0.05, (name, case)
            continue
        assert max(case[part] for part in ("gradients", "weights", "metrics")) < EXACT, (name, case)
        assert case["same_tokens"] and (case["rollouts"] == 80) == ("SFT" not in name and "Muon" not in name), name


@pytest.mark.process
@pytest.mark.slow
def test_two_workers_make_the_updates_of_one(found: dict[str, Any]) -> None:
    assert len(found["compared"]) == 18
    assert_exact(found["compared"])


@pytest.mark.long
def test_two_workers_make_the_updates_of_one_with_every_model_and_method() -> None:
    differences = program("two_workers", "all", seconds=3600)["compared"]
    assert len(differences) == 4 * (2 * 8 + 1)
    assert_exact(differences)


@pytest.mark.process
@pytest.mark.slow
def test_a_missing_sum_and_a_missing_gradient_are_seen(found: dict[str, Any]) -> None:
    for name in ("without the sum of gradients", "without the head's gradient"):
        assert found["broken"][name]["weights"] > 1e-3, name
    refusal = found["broken"]["only the blocks sharded"]
    assert refusal.endswith("cannot be sharded: 'model.embeddings.weight' belongs to no block, norm or head")


@pytest.mark.process
@pytest.mark.slow
def test_a_loss_that_is_not_finite_for_one_worker_is_skipped_by_both(found: dict[str, Any]) -> None:
    cases = found["not finite"]
    assert len(cases) == 6 and all(case["unchanged"] and not case["rollouts"] for case in cases.values()), cases
    skipped = {name: case["skipped"] for name, case in cases.items()}
    assert skipped == dict.fromkeys(cases, 1.0)


@pytest.mark.process
def test_a_run_continues_with_another_number_of_workers(home: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(home / "model")
    found = program("two_workers", tmp_path, seconds=600)
    assert found.keys() == {"one", "two", "two, one, two", "sharded", "sharded, one, sharded"}
    for name, each in found.items():
        assert each["state"] == "finished" and each["files"] and each["names"] and each["same_rollouts"], (name, each)
        assert each["checkpoints"][-1] == STEPS
        assert each["identical"] or ("sharded" in name and each["weights"] < 1e-6 and each["metrics"] < 1e-5), (
            name,
            each,
        )


def assert_ends_and_resumes(home: Path, folder: Path, seed: int, times: int, kind: str = "train") -> None:
    (folder / "model").symlink_to(home / "model")
    found = program("killed_workers", folder, seed, times, kind, seconds=120 + 90 * times)
    assert len(found) == times
    for each in found:
        assert each["seconds"] < 60 and each["codes"][0] == -9 and each["codes"][1] > 0, each
        assert each["resumed_codes"] == [0, 0] and each["difference"] == "", each
        if each["rank"] == 1:  # the other one is the run's own process
            assert each["state"] == "failed" and each["error"].startswith("WorkerLostError: worker 1 of 2"), each
        else:
            assert each["state"] == "killed", each


@pytest.mark.process
@pytest.mark.slow
def test_a_run_that_loses_a_worker_ends_and_resumes(home: Path, tmp_path: Path) -> None:
    assert_ends_and_resumes(home, tmp_path, seed=5, times=1)  # killed within its first second


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("reset, seed", [("prompt", 5), ("never", 3)])
def test_a_run_that_loses_a_worker_while_it_answers_ends_and_resumes(
    home: Path, tmp_path: Path, reset: str, seed: int
) -> None:
    assert_ends_and_resumes(home, tmp_path, seed=seed, times=1, kind=reset)


@pytest.mark.long
def test_a_run_that_loses_a_worker_at_any_moment_ends_and_resumes(home: Path, tmp_path: Path) -> None:
    assert_ends_and_resumes(home, tmp_path, seed=2, times=10)


def fails_once_in_the_second_worker(inputs):
    import os
    import pathlib

    mark = pathlib.Path(os.environ["REFINE_CACHE"], "failed")
    if os.environ.get("RANK") == "1" and not mark.exists():
        mark.touch()
        raise ValueError("the reward had enough")
    return inputs.logprobs.sum(-1)


@pytest.mark.process
@pytest.mark.slow
def test_the_error_of_a_worker_reaches_who_follows_and_the_run_resumes(home: Path, tmp_path: Path) -> None:
    sizes = dict(batch_size=2, mini_batch_size=2, processes=2)
    config = tiny_config(home / "model", **sizes)
    config = replace(config, refine=replace(config.refine, reward="custom"))
    source = reward_source(fails_once_in_the_second_worker)
    process = start(config, detach=False, runs=tmp_path, reward_source=source)
    with naming(RuntimeError, "at step 0 of 6", "worker 1 of 2", "the reward had enough"):
        follow(process, log=lambda line: None)
    process, listening = resume(process.run, detach=False), set[str]()

    def look(run: Run) -> None:
        with suppress(psutil.Error):  # a process has ended
            here = psutil.Process(process.popen.pid)
            for worker in (here, *here.children()):
                listening.update(
                    each.laddr.ip for each in worker.net_connections() if each.status == psutil.CONN_LISTEN
                )

    run = follow(process, every=0.2, on_update=look, log=lambda line: None)
    assert listening == {"127.0.0.1"}
    assert run.status.state == "finished" and len(run.metrics()) == STEPS
    assert len(run.rollouts()) == STEPS * 2 * config.refine.num_chunks * config.refine.group_size


# -- what needs no second process -----------------------------------------------------------------------------------------


def test_the_shares_of_a_batch_are_equal_and_together_the_batch() -> None:
    batch = make_batch((9, 8, 7, 6, 5, 4))
    parts = [[part for _, part in split(batch, 2, Workers(rank, 2))] for rank in range(2)]
    assert [[part.sequence_ids for part in parts[rank]] for rank in range(2)] == [[(0, 1), (2,)], [(3, 4), (5,)]]
    assert [start for start, _ in split(batch, 2, Workers(1, 2))] == [3, 5]
    with naming(ValueError, "6 rows", "4 workers"):
        Workers(0, 4).share(6)


def test_processes_must_divide_an_update() -> None:
    with refused("TrainConfig.mini_batch_size", 4):
        TrainConfig(recipe="test", refine=None, batch_size=4, mini_batch_size=4, processes=3)
    with refused("TrainConfig.gradient_noise", True):
        TrainConfig(recipe="test", refine=RefineConfig(), processes=2, gradient_noise=True)
    with refused("TrainConfig.sharding", "full"):
        TrainConfig(recipe="test", refine=None, sharding="full", optimizer="muon")


def test_gradients_are_exchanged_in_buckets_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refine_lab.workers.BUCKET", 10)
    sizes = [4, 5, 2, 30, 1]
    gradients = [torch.zeros(size) for size in sizes] + [torch.zeros(1, dtype=torch.float64)]
    assert [[x.numel() for x in bucket] for bucket in _buckets(gradients)] == [[4, 5], [2], [30], [1], [1]]
    assert list(_buckets([])) == []


def test_a_single_worker_changes_nothing() -> None:
    alone, values = Workers(), torch.arange(3.0)
    assert alone.sum(values) is values and alone.gather(values) is values and whole(values) is values
    assert sharded_like(values, values) is values and alone.share(3) == (0, 3)
    assert alone.sum_each({"a": values}) == {"a": values}
    assert alone.decide(4) == 4 and alone.any(True) and not alone.every(torch.tensor(False))


def test_the_watch_names_a_worker_that_has_failed_or_is_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store, began = dist.HashStore(), time.monotonic()
    with RunWriter.create(TrainConfig(recipe="test", refine=None), tmp_path) as writer:
        watch = Watch(writer.run, store, Workers(0, 3), {})
    assert watch._state_of(store, 1, began) == "" and "worker 1 of 3 has not started" in watch._state_of(
        store, 1, began - 301
    )
    store.set("host/1", "process 7 on a host")
    store.set("alive/1", "1")
    assert watch._state_of(store, 1, began) == ""
    monkeypatch.setattr("refine_lab.training.lost_workers.SILENT_SECONDS", -1.0)
    assert watch._state_of(store, 1, began).startswith(
        "worker 1 of 3 (process 7 on a host) was lost: it has not reported"
    )
    store.set("alive/1", "2")
    assert watch._state_of(store, 1, began) == "", "it has reported again"
    store.set("error/1", "ValueError: no")
    assert watch._state_of(store, 1, began) == "worker 1 of 3 (process 7 on a host) failed: ValueError: no"


def test_the_loss_of_a_worker_after_the_last_step_fails_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 40)"])  # a real-time signal
    with RunWriter.create(TrainConfig(recipe="test", refine=None), tmp_path) as writer:
        with Watch(writer.run, dist.HashStore(), Workers(0, 2), {1: child}) as watch:
            assert child.wait(60) == -40
            deadline = time.monotonic() + 30
            while not watch._lost and time.monotonic() < deadline:
                time.sleep(0.05)
        assert watch._lost == "worker 1 of 2 was killed by signal 40"
        watch._thread.join(30)
        assert writer.run.status.state == "starting", "the run has not failed"


def test_a_worker_waits_for_the_checkpoint_that_the_first_one_continues_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checkpoints, "SEEN_SECONDS", 0.3)
    monkeypatch.setattr(Workers, "decide", lambda self, value: 7)
    with RunWriter.create(TrainConfig(recipe="test", refine=None), tmp_path) as writer:
        with naming(FileNotFoundError, "step 7", str(writer.run.path), "share this folder"):
            trainer._starting_point(writer.run, Workers(1, 2))
        with writer.checkpoint(7):
            pass
        step, folder = trainer._starting_point(writer.run, Workers(1, 2))
    assert step == 7 and folder is not None and folder.name == "step-7"


def test_each_worker_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(recipe="test", refine=None, batch_size=4, mini_batch_size=4, processes=4)
    parallel._check(config, 4, launched=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refused("processes", 4):
        parallel._check(config, 4, launched=False)
    parallel._check(replace(config, device="cpu"), 4, launched=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    parallel._check(config, 4, launched=True)  # two machines of two GPUs
