"""One run in several processes, the workers: how they find each other, and how each learns that another is lost.

They are started by `torchrun` (or `accelerate launch`), one a GPU, or by the run's own process if its configuration has
`processes` above 1. The first worker, of rank 0, is the process of the run: it holds the lock, and it alone writes the run
directory. Workers exchange tensors by nccl on CUDA and by gloo on the CPU. Those of one machine listen on its loopback
interface only; those that a launcher starts can be reached from other machines, as the launcher itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from refine_lab.config import RunConfig
from refine_lab.runs.child import StopSignal
from refine_lab.runs.process import TRAINER, spawn
from refine_lab.runs.run import Run
from refine_lab.training.answer_run import answer_prompts
from refine_lab.training.lost_workers import JOIN_SECONDS, Watch, leave_group
from refine_lab.training.trainer import train
from refine_lab.workers import Workers, join, require_devices

dist: Any = torch.distributed
"""Its stores are exported at run time only."""

HERE = "127.0.0.1"
END_SECONDS = 60.0
"""Maximum time for a worker to end after the first one has finished."""


def execute_with_workers(path: Path, stop: StopSignal, overrides: Collection[str] = ()) -> None:
    """Trains or answers a run together with the other workers of its configuration or of its launcher."""
    run = Run(path)
    execute = train if run.kind == "train" else answer_prompts
    with joined(run) as workers:
        execute(path, stop, overrides, workers)


@contextmanager
def joined(run: Run) -> Iterator[Workers]:
    """Yields the workers of a run, two or more, once all have joined.

    Raises WorkerLostError, which names the worker, for an error that another worker has caused, and ConfigError for a
    configuration that so many workers cannot share.
    """
    config = run.config
    count = int(os.environ.get("WORLD_SIZE", "1"))
    launched = count > 1
    count = count if launched else config.processes
    _check(config, count, launched)
    timeout = timedelta(seconds=JOIN_SECONDS)
    children: dict[int, subprocess.Popen[bytes]] = {}
    rank = int(os.environ["RANK"]) if launched else 0
    try:
        if launched:
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
        else:
            store = _local_store(count, timeout)
            for number in range(1, count):
                children[number] = _start(run, number, count, store.port)
        workers = Workers(rank, count)
        with Watch(run, store, workers, children):
            join(store, workers, config.device)
            yield workers
        for child in children.values():
            with suppress(subprocess.TimeoutExpired):  # its work is done
                child.wait(END_SECONDS)
    finally:
        for child in children.values():
            child.kill()
        leave_group()


def _check(config: RunConfig, count: int, launched: bool) -> None:
    """Raises ConfigError for a configuration that `count` workers cannot share, each with a GPU of its own."""
    config.require_shares(count)
    require_devices(config.device, count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched else count)


def _local_store(count: int, timeout: timedelta) -> Any:
    """Returns the store of workers that this process starts; they can be reached from this machine alone."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, loopback)
    server = socket.create_server((HERE, 0))  # torch's own would listen on every network
    port = server.getsockname()[1]
    return dist.TCPStore(HERE, port, count, True, timeout, wait_for_workers=False, master_listen_fd=server.detach())


def _start(run: Run, rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    """Starts a worker on this machine, with the environment variables that `torchrun` sets; it ends with this process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": HERE, "MASTER_PORT": port}
    with os.fdopen(os.dup(2), "wb") as output:
        environ = {name: str(value) for name, value in place.items()}
        return spawn([*TRAINER, str(run.path)], output, watched=True, environ=environ)
