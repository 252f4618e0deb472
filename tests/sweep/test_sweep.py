"""Sweeps as they run: cells in processes, a failure beside them, resumption, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import refine_lab
from refine_lab.runs.run import list_runs
from refine_lab.sweep import plan
from tests.factories.swept import executions, write_notebook
from tests.support.paths import ROOT

pytestmark = [pytest.mark.process, pytest.mark.notebook]


def start(notebook: Path | str, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "refine_lab.sweep", str(notebook), "--out", str(out), *options]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_failed_cell_is_named_the_others_go_on_and_only_what_is_missing_runs_again(tmp_path):
    notebook, out = write_notebook(tmp_path / "a.ipynb"), tmp_path / "out"
    options = ["-p", "fail", "true,false", "-p", "seeds", "3", "--processes", "2"]
    process = start(notebook, out, *options)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1, text
    assert text.count("RuntimeError: the last line (a-seeds=3_fail=True-") == 1 and "the first line" not in text
    assert text.endswith(f"1 of 2 cells have finished; the table is in {out / 'sweep.txt'}\n")
    cells = plan(notebook, {"fail": [True, False], "seeds": [3]}, out).cells
    assert [cell.state for cell in cells] == ["failed", "finished"]
    table = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert [row["error"] for row in table["cells"]] == ["RuntimeError: the last line", None]
    assert [row["values"]["seeds"] for row in table["cells"]] == [[3], [3]]
    assert (out / "sweep.txt").read_text(encoding="utf-8").split()[:2] == ["fail", "state"]
    assert executions(cells[1].output) == ["1 0.5 None [3]"]
    (out / "mended").touch()
    lines: list[str] = []
    grid = {"fail": [True, False], "seeds": range(3, 4), "count": [1, 2]}  # the cells of before, and two more
    result = refine_lab.sweep(notebook, grid, out, processes=2, log=lines.append)
    result.require_finished()
    assert len(lines) == 5 and lines[-1].lstrip().startswith("4/4")
    assert [len(executions(cell.output)) for cell in cells] == [2, 1]
    assert list(result.frame()["state"]) == ["finished"] * 4
    assert cells[0].executed.is_file() and "Ending Cell" in (cells[0].folder / "log.txt").read_text(encoding="utf-8")


def wait_until(done: Callable[[], object], process: subprocess.Popen[str], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)


def end(process: subprocess.Popen[str], number: signal.Signals, count: int) -> str:
    """Sends a signal to a sweep and returns its output; all of its processes, `count` at least, must end."""
    try:
        left = psutil.Process(process.pid).children(recursive=True)
        assert len(left) >= count
        process.send_signal(number)
        text, _ = process.communicate(timeout=180)
        psutil.wait_procs(left, timeout=120)
        assert not [child for child in left if child.is_running()]
    finally:
        process.kill()
    return text


@pytest.mark.slow
def test_a_signal_stops_the_runs_which_save_first(tmp_path):
    out, values = tmp_path / "out", {"seeds": 0, "steps": 100_000, "batch_size": 2, "sequence_length": 256}
    process = start("midtrain", out, *(word for name, value in values.items() for word in ("-p", name, str(value))))
    (cell,) = plan("midtrain", values, out).cells
    wait_until(lambda: any(len(run.metrics()) for run in cell.runs), process)
    assert cell.state == "running"
    end(process, signal.SIGTERM, 3)  # the process of the cell, the kernel, and the run that trains
    assert process.returncode == -signal.SIGTERM and cell.state == "stopped"
    (trained,) = [run for run in list_runs(cell.output) if len(run.metrics())]
    assert trained.state == "stopped" and trained.done == len(trained.metrics())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupt_and_a_kill_leave_no_process_and_the_cell_is_executed_again(tmp_path, number):
    notebook, out = write_notebook(tmp_path / "a.ipynb"), tmp_path / "out"
    process = start(notebook, out, "-p", "wait", "600")
    (cell,) = plan(notebook, {"wait": 600}, out).cells
    wait_until(lambda: executions(cell.output), process)
    text = end(process, number, 2)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert ("Run the same command again to continue." in text) == (number == signal.SIGINT)
    assert cell.state == "stopped"
    (out / "mended").touch()
    before = cell.seconds or 0.0
    process = start(notebook, out, "-p", "wait", "600")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "1 of 1 cells have finished" in text
    assert cell.state == "finished" and len(executions(cell.output)) == 2
    assert cell.seconds is not None and cell.seconds > before, "the time of both executions"
