"""Executes cells on a Ray cluster whose nodes share the folder of the sweep; no other module imports Ray.

A cell is one Ray task. It starts the process of the cell on its node, as `local` does, and waits until that has ended.
Ray's scheduler is told how many CPU cores and GPUs each cell needs. A cell whose worker or node was lost is submitted
again, and its notebook continues the runs in the cell's folder from their checkpoints.
"""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Any

from refine_lab.runs.child import SAVE_SECONDS
from refine_lab.runs.durable import make_folder
from refine_lab.runs.environment import project_root
from refine_lab.runs.files import is_held
from refine_lab.sweep.backend import stop_all
from refine_lab.sweep.cells import Cell, last_line
from refine_lab.sweep.local import LocalProcesses
from refine_lab.validation import ConfigError, require

RETRIES = 3
"""How often a cell is submitted again after its worker or node was lost."""
FREE_SECONDS = SAVE_SECONDS + 120
"""Maximum time that a resubmitted cell waits for the processes of its lost worker, and for the locks of a lost node."""
SEEN_SECONDS = 60.0
"""Maximum time until a node sees a file that another node has written to a network file system."""
RAY_PARTS = 10_000
"""Number of parts into which Ray divides a GPU."""
NODES_SECONDS = 5.0
"""How long a list of the cluster's nodes is used before it is read again."""
MISSING = "a sweep on a Ray cluster needs Ray, which is not installed: pip install -e '.[cluster]'"


@dataclass(eq=False)
class RayExecution:
    """A cell that was submitted to a Ray cluster (see `backend.Execution`)."""

    cell: Cell
    submit: Callable[[int], Any]
    "Submits the cell to the cluster as a numbered attempt, and returns the reference to the task's result."
    log: Callable[[str], object]
    attempt: int = 1
    _task: Any = field(init=False)
    _future: Future[str | None] = field(init=False)
    _failure: str | None = None
    _done: bool = False
    _stopping: bool = False

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._task = self.submit(self.attempt)
        self._future = self._task.future()  # asking Ray itself could lose a signal that arrives meanwhile

    @property
    def ended(self) -> bool:
        if not self._done and self._future.done():
            self._collect()
        return self._done and not any(run.alive for run in self.cell.runs)

    def failure(self) -> str:
        return self._failure or "its process ended without a result"

    def stop(self) -> None:
        self._stopping = True
        if not self._done:
            imported_ray().cancel(self._task)

    def kill(self) -> None:
        if not self._done:
            imported_ray().cancel(self._task, force=True)  # the process on the node then saves and ends by itself

    def _collect(self) -> None:
        """Reads the result of the task; submits the cell again if its worker or node was lost."""
        ray = imported_ray()
        try:
            self._failure, self._done = self._future.result(), True
        except ray.exceptions.TaskCancelledError:
            self._done = True
        except ray.exceptions.RayTaskError as error:
            self._failure, self._done = last_line(str(error)), True
        except ray.exceptions.RayError as error:
            lost = f"its worker was lost ({type(error).__name__})"
            self._done = self._stopping or self.attempt > RETRIES
            self._failure = f"{lost} in attempt {self.attempt} of {RETRIES + 1}"
            if not self._done:
                self.attempt += 1
                self.log(f"{self.cell.name}: {lost}; attempt {self.attempt} of {RETRIES + 1}")
                self._begin()


class RayCluster:
    """The backend that submits cells to a Ray cluster; entering the context connects to it.

    `address` is that of the cluster, such as `auto` or `host:6379`. Each cell gets `cpus` cores and `gpus` GPUs. At most
    `most` cells are submitted at a time. Raises ConfigError if Ray is not installed, and on entering if the cluster
    cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        cpus: int = 1,
        gpus: int | float = 0,
        most: int = 256,
        log: Callable[[str], object] = print,
    ) -> None:
        self._ray = imported_ray()
        self._address, self._cpus, self._gpus, self._log = address, cpus, gpus, log
        self._connected = False
        self._marker: Path | None = None
        self._slots, self._read = 1, -NODES_SECONDS
        self.submitted = most

    @property
    def processes(self) -> int:
        """Returns how many cells the cluster's nodes can execute at a time; 1 if none has room for a cell now."""
        if time.monotonic() - self._read > NODES_SECONDS:
            self._slots, self._read = self._room(), time.monotonic()
        return max(1, min(self._slots, self.submitted))

    def start(self, cell: Cell) -> RayExecution:
        if self._marker is None:
            self._marker = cell.folder.parent / f".shared-{uuid.uuid4().hex}"
            self._marker.touch()
        marker = self._marker
        task = self._ray.remote(execute_on_node).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0, runtime_env={"env_vars": self._environ()}
        )
        return RayExecution(cell, lambda attempt: task.remote(cell, marker, attempt), self._log)

    def __enter__(self) -> RayCluster:
        if not self._ray.is_initialized():
            with _same_sigterm():
                self._connect()
        resources = f"{self._cpus} CPU cores and {self._gpus:g} GPUs"
        if room := self._room():
            self._log(f"The Ray cluster has room for {room} cells at a time, each with {resources}.")
        else:
            self._log(f"No node of the Ray cluster has {resources}; the cells wait until one with them joins.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._marker is not None:
            self._marker.unlink(missing_ok=True)
        if self._connected:
            self._ray.shutdown()

    def _connect(self) -> None:
        try:
            self._ray.init(address=self._address, log_to_driver=False, logging_level="error")
        except (OSError, RuntimeError, ValueError, ImportError) as error:  # no cluster there, or of another version
            sentence = f"the Ray cluster at {self._address} cannot be used: {last_line(str(error))}"
            raise ConfigError("ray", self._address, "the address of a Ray cluster", sentence) from error
        self._connected = True

    def _room(self) -> int:
        """Returns the number of cells that fit on the nodes, whether or not other work occupies them now."""
        found = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                cells = int(has.get("CPU", 0) // self._cpus)
                found += min(cells, cells_on_gpus(int(has.get("GPU", 0)), self._gpus)) if self._gpus else cells
        return found

    def _environ(self) -> dict[str, str]:
        """Returns variables for the workers: where this checkout is, and that a cell without GPUs uses none."""
        root = project_root()
        path = os.pathsep.join(filter(None, (root and str(root), os.environ.get("PYTHONPATH"))))
        environ = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(self._cpus)}
        return environ if self._gpus else {**environ, "CUDA_VISIBLE_DEVICES": ""}


def cells_on_gpus(devices: int, gpus: int | float) -> int:
    """Returns the number of cells that fit on a node's GPUs; a fraction of a GPU is never divided between two of them."""
    if gpus >= 1:
        return devices // int(gpus)
    return devices * (RAY_PARTS // ceil(gpus * RAY_PARTS - 1e-6))


def imported_ray() -> Any:
    """Imports Ray. Raises ConfigError, in one sentence, if it is not installed."""
    require_ray()
    return import_module("ray")


def require_ray() -> None:
    if find_spec("ray") is None:
        raise ConfigError("ray", None, "installed", MISSING)


def check_resources(cpus: int, gpus: int | float) -> None:
    """Raises ConfigError unless a node can have the cores and GPUs of a cell."""
    require(1 <= cpus <= 1024, "cpus", cpus, "from 1 to 1,024")
    fits = 0 <= gpus <= 64 and (gpus <= 1 or gpus == int(gpus))
    require(fits, "gpus", gpus, "a whole number from 0 to 64, or a fraction of one GPU")


# -- on a node ---------------------------------------------------------------------------------------------------------


def execute_on_node(cell: Cell, marker: Path, attempt: int) -> str | None:
    """Executes a cell on the node of this Ray worker, and returns one line if its process ended without a result.

    If the task is cancelled, the runs of the cell save and stop. Raises RuntimeError if the node does not share the
    folder of the sweep, or if a process elsewhere keeps working on the cell.
    """
    host = platform.node()
    _wait(marker.exists, SEEN_SECONDS, f"{host} does not share the folder {marker.parent} with the other nodes")
    _wait(lambda: not _in_use(cell), FREE_SECONDS, f"another process still works on {cell.name}")
    if attempt > 1 and cell.state == "finished":  # its process has outlived the worker that was lost
        return None
    make_folder(cell.folder)
    node = imported_ray().get_runtime_context().get_node_id()
    with (cell.folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"Attempt {attempt} of this cell, on {host} (node {node} of the Ray cluster).\n")
    execution = LocalProcesses().start(cell)
    try:
        while not execution.ended:
            time.sleep(0.2)
    except KeyboardInterrupt:  # the task was cancelled
        while not execution.ended:
            with suppress(KeyboardInterrupt):  # Ray may repeat it
                stop_all([execution])
    return None if cell.result else execution.failure()


def _in_use(cell: Cell) -> bool:
    return is_held(cell.folder) or any(run.alive for run in cell.runs)


def _wait(done: Callable[[], bool], seconds: float, sentence: str) -> None:
    """Waits until `done`. Raises RuntimeError with the sentence after that many seconds."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(sentence)
        time.sleep(0.5)


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM, which connecting to Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
