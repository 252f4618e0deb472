"""The Slurm scripts of docs/slurm, with Slurm's signal sent by the test instead of a scheduler."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from refine_lab.sweep import plan
from tests.factories.durable_runs import tiny_model
from tests.factories.swept import TRAINING, TRAINING_PARAMETERS, executions, write_notebook
from tests.support.paths import ROOT

SCRIPTS = sorted((ROOT / "docs" / "slurm").glob("*.sh"))
STEPS = 200


def submit(name: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a job script as Slurm does: in a session of its own, with the folder of submission in the environment."""
    environ = {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT), "REFINE_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "docs" / "slurm" / name), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd="/", env=environ, text=True, start_new_session=True, **pipes)


def wait_for_end(processes: list[psutil.Process], seconds: float = 60.0) -> None:
    """Waits until processes have ended; a zombie, which only its parent can remove, has ended."""
    deadline = time.monotonic() + seconds
    while left := [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_asks_slurm_for_the_signal_and_gives_it_to_python(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    (seconds,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE)
    assert int(seconds) > 120, "longer than a run may take to save"
    assert text.endswith('\nexec python -u -m refine_lab.sweep "$@"\n')
    assert f"docs/slurm/{script.name}" in (ROOT / "docs" / "remote.md").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.process
@pytest.mark.notebook
@pytest.mark.slow
def test_the_run_of_a_job_saves_at_the_signal_and_the_next_job_completes_it(tmp_path):
    notebook, out = write_notebook(tmp_path / "tiny.ipynb", TRAINING_PARAMETERS, TRAINING), tmp_path / "out"
    values = {"steps": STEPS, "model": str(tiny_model(tmp_path / "model"))}
    arguments = [str(notebook), "--out", str(out), *(str(word) for pair in values.items() for word in ("-p", *pair))]
    (cell,) = plan(notebook, values, out).cells
    job = submit("notebook.sh", *arguments)
    deadline = time.monotonic() + 300
    while not any(len(run.metrics()) for run in cell.runs):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0]
        time.sleep(0.1)
    processes = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGTERM)  # as --signal=B:TERM does: to the script, and to no other process of the job
    text, _ = job.communicate(timeout=180)
    assert job.returncode == -signal.SIGTERM, text
    (run,) = cell.runs
    saved = run.done
    assert not run.alive, "a run that Slurm would kill when the script ends"
    assert run.state == "stopped" and 0 < saved == len(run.metrics()) < STEPS
    wait_for_end(processes)
    job = submit("notebook.sh", *arguments)
    text, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and "1 of 1 cells have finished" in text, text
    assert run.state == "finished" and list(run.metrics()["step"]) == list(range(1, STEPS + 1))
    assert f"The run continues from checkpoints/step-{saved}." in (run.path / "log.txt").read_text()


@pytest.mark.process
@pytest.mark.notebook
@pytest.mark.slow
def test_the_tasks_of_an_array_share_the_cells_and_execute_each_once(tmp_path):
    notebook, out = write_notebook(tmp_path / "a.ipynb"), tmp_path / "out"
    values = {"count": [1, 2, 3], "wait": 2.0}
    arguments = [str(notebook), "--out", str(out), "-p", "count", "1:4", "-p", "wait", "2"]
    tasks = [submit("array.sh", *arguments) for _ in range(2)]
    texts = [task.communicate(timeout=300)[0] for task in tasks]
    cells = plan(notebook, values, out).cells
    assert [cell.state for cell in cells] == ["finished"] * 3, texts
    assert [len(executions(cell.output)) for cell in cells] == [1, 1, 1]
    assert all("is in use by process" in text or "has been finished by another process" in text for text in texts)
    assert 0 in [task.returncode for task in tasks]
