"""notebooks/monitor.ipynb under papermill: the runs of a folder as text, a still figure and a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.factories.run_monitor import write_run
from tests.support.executed_notebooks import execute, outputs, said, texts

pytestmark = pytest.mark.notebook


def test_it_shows_the_runs_of_a_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "theirs", 0)
    status, told = execute("monitor", tmp_path, folder=tmp_path / "theirs")
    assert status == 0, told
    (shown,) = (text for text in texts(tmp_path) if text.startswith("RunMonitor"))
    assert f"RunMonitor of 1 run; selected: {run.name}" in shown
    assert "finished" in shown and "at step 4" in shown
    figures = [output for output in outputs(tmp_path) if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert len(figures) == 1
    assert (tmp_path / "monitor-theirs.html").stat().st_size > 10_000
    assert (tmp_path / "out.ipynb").stat().st_size < 1_000_000


def test_an_empty_folder_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, told = execute("monitor", tmp_path, folder=tmp_path / "empty")
    assert status == 0, told
    assert "No run is selected" in said(tmp_path)
    status, told = execute("monitor", tmp_path, folder=tmp_path / "nowhere")
    assert status != 0
    assert "no runs folder at" in told
