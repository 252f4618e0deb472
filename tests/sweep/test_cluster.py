"""Sweeps on a Ray cluster: refusals without Ray, and, on a local cluster of two nodes, a signal and the loss of a node."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from refine_lab.sweep import Cell, cluster, plan
from refine_lab.sweep.__main__ import main
from tests.factories.durable_runs import tiny_model
from tests.factories.swept import TRAINING, TRAINING_PARAMETERS, write_notebook
from tests.support.paths import ROOT

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -e '.[cluster]'")

STEPS = 150
PATIENT = {
    "RAY_raylet_start_wait_time_s": "240",
    "RAY_worker_register_timeout_seconds": "240",
    "RAY_worker_niceness": "0",
}
"""Settings of Ray for a busy machine: longer waits, and workers of the same priority as everything else."""


def test_without_ray_one_sentence_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    notebook, out = write_notebook(tmp_path / "a.ipynb"), tmp_path / "out"
    assert main([str(notebook), "--out", str(out), "--ray", "auto"]) == 2
    told = "a sweep on a Ray cluster needs Ray, which is not installed: pip install -e '.[cluster]'\n"
    assert capsys.readouterr().err == told and not out.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--cpus", "2"], "cpus must be 1 without the address of a Ray cluster (ray), got 2\n"),
        (["--gpus", "0.5"], "gpus must be 0 without the address of a Ray cluster (ray), got 0.5\n"),
        (["--gpus", "1.5"], "gpus must be a whole number from 0 to 64, or a fraction of one GPU, got 1.5\n"),
        (["--ray", " "], "ray must be the address of a Ray cluster, such as auto or host:6379, got ' '\n"),
    ],
)
def test_cores_and_gpus_are_for_a_cluster(tmp_path, capsys, options, told):
    notebook = write_notebook(tmp_path / "a.ipynb")
    assert main([str(notebook), "--out", str(tmp_path / "out"), *options]) == 2
    assert capsys.readouterr().err == told and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("devices", "gpus", "cells"),
    [(2, 1, 2), (8, 3, 2), (2, 0.4, 4), (1, 0.1, 10), (3, 0.3, 9), (2, 0.7, 2), (0, 0.5, 0)],
)
def test_a_fraction_of_a_gpu_is_not_divided_between_two(devices, gpus, cells):
    assert cluster.cells_on_gpus(devices, gpus) == cells


# -- on a cluster ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def add_node(nodes: Any) -> Any:
    sizes = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    return nodes.add_node(**sizes, runtime_env_agent_port=free_port())


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes of one core each, and the second of them."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in PATIENT.items():
            patched.setenv(name, value)
        from ray.cluster_utils import Cluster  # reads them

        nodes = Cluster()
        try:
            add_node(nodes)
            yield nodes, add_node(nodes)
        finally:
            nodes.shutdown()


def start(notebook: Path, out: Path, values: dict[str, str], address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "refine_lab.sweep", str(notebook), "--out", str(out), "--ray", address]
    command += [word for name, value in values.items() for word in ("-p", name, value)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_until(done: Callable[[], object], process: subprocess.Popen[str], seconds: float = 1800.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)


def log_of(cell: Cell) -> str:
    path = cell.folder / "log.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def power_off(nodes: Any, node: Any) -> None:
    """Kills every process of a node at once, as a power failure would, the runs that train on it among them."""
    (raylet,) = node.all_processes["raylet"]
    root = psutil.Process(raylet.process.pid)
    for each in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    nodes.remove_node(node, allow_graceful=False)


@pytest.mark.long
@with_ray
@pytest.mark.filterwarnings("ignore")
def test_a_signal_stops_the_runs_on_the_cluster_which_save_first(tmp_path, two_nodes):
    nodes, _ = two_nodes
    notebook, out = write_notebook(tmp_path / "tiny.ipynb", TRAINING_PARAMETERS, TRAINING), tmp_path / "out"
    values = {"steps": "100000", "model": str(tiny_model(tmp_path / "model"))}
    process = start(notebook, out, values, nodes.address)
    (cell,) = plan(notebook, values, out).cells
    wait_until(lambda: any(len(run.metrics()) for run in cell.runs), process)
    assert cell.state == "running"
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGTERM, text
    (run,) = cell.runs
    assert cell.state == "stopped" and run.state == "stopped" and run.done == len(run.metrics())
    assert not list(out.glob(".shared-*"))


@pytest.mark.long
@with_ray
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_outlives_a_node_and_its_runs_continue_from_their_checkpoints(tmp_path, two_nodes):
    nodes, second = two_nodes
    notebook, out = write_notebook(tmp_path / "tiny.ipynb", TRAINING_PARAMETERS, TRAINING), tmp_path / "out"
    values = {"seeds": "0:8", "steps": str(STEPS), "model": str(tiny_model(tmp_path / "model"))}
    process = start(notebook, out, values, nodes.address)
    cells = plan(notebook, {**values, "seeds": range(8)}, out).cells

    def on_second(cell: Cell) -> bool:
        """Whether the run of a cell is between two checkpoints on the second node."""
        begun = cell.state == "running" and f"(node {second.node_id} " in log_of(cell)
        return begun and any(5 <= run.done <= STEPS - 50 for run in cell.runs)

    def halfway() -> list[Cell]:
        finished = sum(cell.state == "finished" for cell in cells)
        return [cell for cell in cells if on_second(cell)] if finished >= 3 else []

    wait_until(halfway, process)
    (lost,) = halfway()
    power_off(nodes, second)
    saved = lost.runs[0].done
    text, _ = process.communicate(timeout=900)
    print(text)
    assert process.returncode == 0, text
    assert text.count("its worker was lost") == text.count("attempt 2 of 4") == 1
    assert f"8 of 8 cells have finished; the table is in {out / 'sweep.txt'}" in text
    assert [cell.state for cell in cells] == ["finished"] * 8
    for cell in cells:
        (run,) = cell.runs
        assert run.state == "finished" and list(run.metrics()["step"]) == list(range(1, STEPS + 1))
        attempts = re.findall(r"Attempt (\d) of this cell", log_of(cell))
        resumed = re.findall(r"The run continues from checkpoints/step-(\d+)", (run.path / "log.txt").read_text())
        assert attempts == (["1", "2"] if cell == lost else ["1"])
        assert resumed == ([str(saved)] if cell == lost else [])
