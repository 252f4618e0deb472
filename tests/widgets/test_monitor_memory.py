"""From a row of the run monitor to the memory of its run, without a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from refine_lab.explore import client
from refine_lab.explore.client import shared_worker
from refine_lab.models.hub import SHIPPED
from tests.factories.run_monitor import write_run
from tests.support.refusals import refused
from tests.support.small_document import SECONDS
from widgets.run_monitor import RunMonitor


@pytest.fixture
def own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes `tmp_path` the folder for runs, also of the kernel's worker, which keeps the environment it was started in."""
    monkeypatch.setenv("REFINE_RUNS", str(tmp_path))
    monkeypatch.setattr(client, "_workers", {})
    yield
    shared_worker().close()


@pytest.mark.usefixtures("own_runs")
def test_a_row_opens_the_memory_of_its_run(tmp_path: Path) -> None:
    first, second, unsaved = (write_run(tmp_path, seed) for seed in range(3))
    for run, model in ((first, "tiny-deltanet"), (second, "tiny-lact")):
        shutil.copytree(SHIPPED / model, run.path / "checkpoints" / "step-4")
    monitor = RunMonitor()
    table = monitor.table
    saved = {row["name"]: row["saved"] for row in table.rows}
    assert saved == {first.name: True, second.name: True, unsaved.name: False}
    assert table.opens_memory and not table.copy_of(table.selected).opens_memory  # a page has no memory to show

    table.opened = first.name  # as the page sets it
    view = monitor.memory
    assert view is not None and view.fields["model"].value == f"runs/{first.name}"
    assert monitor._below_table.children == (view,)
    assert monitor.notice.status == f"The memory of REFINE, seed 0 – {first.name}:"
    view.shown.result(SECONDS)
    assert "width" in view.result.result["question"] and view.result.result["model"].endswith(first.name)
    assert "MemoryView of" in repr(monitor)

    view.read("The key is red. The key is").result(SECONDS)
    assert monitor.show_memory(second.name) is view and table.opened == second.name
    view.shown.result(SECONDS)
    assert view.exploration.model == f"runs/{second.name}"
    assert view.exploration._known.text == "The key is red. The key is"  # the document stays for the next run

    table.opened = unsaved.name
    assert "a run of the table with a checkpoint" in monitor.error and table.opened == second.name
    with refused("the run"):
        monitor.show_memory("nowhere")
    table.opened = ""
    assert monitor._below_table.children == () and "MemoryView" not in repr(monitor)
    monitor.close()


def test_runs_of_another_folder_are_opened_by_their_path(tmp_path: Path) -> None:
    run = write_run(tmp_path, 0)
    shutil.copytree(SHIPPED / "tiny-deltanet", run.path / "checkpoints" / "step-4")
    monitor = RunMonitor(tmp_path)
    view = monitor.show_memory(run.name)
    assert view is not None and view.exploration.model == str(tmp_path / run.name)
    view.shown.result(SECONDS)
    monitor.close()
