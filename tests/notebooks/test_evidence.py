"""The notebook of one run of the evidence: a run is trained, measured and added to the table once."""

from __future__ import annotations

from pathlib import Path

import pytest

from refine_lab.experiments.evidence import ITEMS, TABLE, read_table
from refine_lab.runs.run import list_runs
from tests.support.executed_notebooks import execute, said

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

SMALL = {"sequence_length": 128, "recall": "word-1", "steps": 2, "experiment": "own"}


def test_a_run_is_trained_and_measured_once_and_the_base_without_training(tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    values = {**SMALL, "method": "expected_copy", "seed": 3, "table": tables}
    status, output = execute("evidence", tmp_path, **values)
    assert status == 0, output
    (run,) = list_runs(tmp_path / "runs")
    assert (run.state, run.config.method, run.config.seed) == ("finished", "expected", 3)
    assert execute("evidence", tmp_path, **values)[0] == 0
    assert "is in the table" in said(tmp_path) and len(list_runs(tmp_path / "runs")) == 1
    status, output = execute("evidence", tmp_path, **{**values, "method": "base", "seed": 0})
    assert status == 0, output
    assert len(list_runs(tmp_path / "runs")) == 1
    table = read_table(tables / TABLE)
    assert table["method"].tolist() == ["expected_copy_steps2", "base_steps2"]
    assert table["task"].tolist() == ["word-1 128"] * 2 and table["coefficient"].tolist() == ["1", ""]
    assert table["exact_recall"].astype(float).between(0, 1).all() and (table["ntp_loss"].astype(float) > 0).all()
    assert set(read_table(tables / ITEMS)["measure"]) >= {"exact_recall", "ntp_loss"}
