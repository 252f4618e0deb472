"""The worker process: calls, steps, stops, errors, its death and its client's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from queue import Queue

import numpy as np
import psutil
import pytest

from refine_lab.explore.client import Worker, WorkerDied
from refine_lab.explore.targets import Target
from refine_lab.ttt_config import TTTConfig
from tests.support.paths import ROOT
from tests.support.refusals import naming

pytestmark = pytest.mark.process

MODEL = "tiny-deltanet"
IDS = np.random.default_rng(0).integers(1, 2000, 300).astype(np.int32)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker("cpu")
    yield made
    made.close()


def test_calls_and_errors(worker: Worker) -> None:
    reading = worker.call("read", model=MODEL, token_ids=IDS)
    assert reading.entropies.shape == (300,)
    (rollouts,) = worker.call("rollouts", model=MODEL, token_ids=IDS, positions=[120], n=2, k=3)
    assert rollouts.rollout_ids.shape == (2, 3)
    with naming(FileNotFoundError, "'nope'"):
        worker.call("open", model="nope")
    with naming(ValueError, "method '_read'"):
        worker.call("_read", model=MODEL, token_ids=IDS)
    with naming(TypeError, "'depth'"):
        worker.call("read", model=MODEL, token_ids=IDS, depth=1)


def test_a_job_tells_its_steps_serves_others_and_stops(worker: Worker) -> None:
    before, steps = worker.call("fingerprint", model=MODEL), []
    job = worker.submit("adapt", steps.append, model=MODEL, token_ids=IDS, config=TTTConfig(steps=10_000, lr=1e-4))
    deadline = time.monotonic() + 60
    while len(steps) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    worker.call("read", model=MODEL, token_ids=IDS)  # answered between two steps
    assert not job.done()
    with pytest.raises(ValueError, match="a model is being adapted already"):
        worker.call("adapt", model=MODEL, token_ids=IDS, config=TTTConfig())
    worker.stop(job)
    assert job.result(30) is None
    made = len(steps)
    assert [step.number for step in steps] == list(range(1, made + 1))
    assert worker.call("open", model=MODEL)["updates"] == made
    assert worker.call("fingerprint", model=MODEL) != before
    assert worker.call("reset", model=MODEL) == made
    assert worker.call("fingerprint", model=MODEL) == before
    worker.stop(job)  # has ended: nothing happens
    assert worker.call("open", model=MODEL)["updates"] == 0


def test_an_error_in_telling_a_step_is_not_lost(worker: Worker) -> None:
    def fail(step: object) -> None:
        raise ZeroDivisionError("told badly")

    job = worker.submit("adapt", fail, model=MODEL, token_ids=IDS, config=TTTConfig(steps=50, lr=1e-6))
    with naming(ZeroDivisionError, "told badly"):
        job.result(60)
    worker.call("reset", model=MODEL)


def test_after_its_death_another_takes_over(worker: Worker) -> None:
    worker.call("open", model=MODEL)
    pid = worker.pid
    assert pid is not None
    job = worker.submit("adapt", model=MODEL, token_ids=IDS, config=TTTConfig(steps=10_000))
    os.kill(pid, signal.SIGKILL)
    with naming(WorkerDied, "SIGKILL"):
        job.result(30)
    assert worker.call("open", model=MODEL)["updates"] == 0
    assert worker.pid != pid


def test_its_death_is_told_while_another_thread_holds_the_lock_of_a_callback(worker: Worker) -> None:
    worker.call("open", model=MODEL)
    lock, told, calls = threading.Lock(), threading.Event(), []
    job = worker.submit("adapt", model=MODEL, token_ids=IDS, config=TTTConfig(steps=10_000))

    def callback(_: object) -> None:
        told.set()
        if lock.acquire(timeout=20):  # as a panel that is being cancelled
            lock.release()

    job.add_done_callback(callback)
    assert worker.pid is not None
    with lock:
        os.kill(worker.pid, signal.SIGKILL)
        assert told.wait(20)
        thread = threading.Thread(target=lambda: calls.append((worker.cancel(job), worker.submit("open", model=MODEL))))
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "the worker waits for the callback, which waits for this thread"
    ((_, opened),) = calls
    assert opened.result(60)["updates"] == 0


def test_a_call_that_finds_the_worker_dead_runs_no_callback_itself(worker: Worker) -> None:
    worker.call("open", model=MODEL)
    ran: Queue[str] = Queue()
    job = worker.submit("adapt", model=MODEL, token_ids=IDS, config=TTTConfig(steps=10_000))
    job.add_done_callback(lambda _: ran.put(threading.current_thread().name))
    process = worker._process
    assert process is not None
    with worker._lock:  # so that the call comes before the listener
        process.kill()
        process.wait(10)
        assert worker.submit("open", model=MODEL).running()
    with pytest.raises(WorkerDied):
        job.result(10)
    assert ran.get(timeout=10) == "worker-lost"


def test_closing_answers_who_waits(worker: Worker) -> None:
    worker.call("open", model=MODEL)
    job = worker.submit("adapt", model=MODEL, token_ids=IDS, config=TTTConfig(steps=10_000))
    worker.close()
    with pytest.raises(WorkerDied):
        job.result(10)
    assert worker.pid is None


def test_it_ends_with_its_client() -> None:
    script = (
        "import os, sys, time; from refine_lab.explore.client import shared_worker; worker = shared_worker('cpu');"
        f"worker.call('open', model={MODEL!r}); print(worker.pid, flush=True); time.sleep(60)"
    )
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert client.stdout is not None
    pid = int(client.stdout.readline())
    assert psutil.pid_exists(pid)
    client.kill()
    client.wait()
    client.stdout.close()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_client_does_not_load_torch() -> None:
    script = "import sys; from refine_lab.explore.client import Worker; Worker(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_cancelled_calls_end_before_the_next_token(worker: Worker) -> None:
    long = {"model": MODEL, "token_ids": IDS, "positions": [100, 150, 200], "n": 64, "k": 64}
    worker.call("read", model=MODEL, token_ids=IDS)
    running, waiting = worker.submit("rollouts", **long), worker.submit("rollouts", **long)
    time.sleep(0.2)
    began = time.monotonic()
    worker.cancel(waiting)
    worker.cancel(running)
    assert running.result(30) is None and waiting.result(30) is None
    assert time.monotonic() - began < 10, "each of them takes much longer"
    (made,) = worker.call("rollouts", model=MODEL, token_ids=IDS, positions=[120], n=2, k=3)
    assert made.rollout_ids.shape == (2, 3)
    document = np.resize(IDS, 60_000)
    target = Target(position=len(document) - 1, token_ids=(5,))
    for method, arguments in (("read", {}), ("attribute", {"target": target})):
        running = worker.submit(method, model=MODEL, token_ids=document, **arguments)
        time.sleep(0.5)
        began = time.monotonic()
        worker.cancel(running)
        assert running.result(120) is None, method
        assert time.monotonic() - began < 10, f"{method} ends before the next module"
    worker.cancel(running)  # has ended: nothing happens
    assert worker.call("open", model=MODEL)["updates"] == 0
