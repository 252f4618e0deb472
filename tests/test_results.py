"""The executed notebooks that the repository ships as evidence: whole, small, and without a trace of where they ran."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "docs" / "results").glob("*.ipynb"))
ELSEWHERE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|work|mnt|opt)/[\w.]")


def test_there_are_some() -> None:
    assert {"posttrain.ipynb", "ttt.ipynb"} <= {path.name for path in RESULTS}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_is_whole(path: Path) -> None:
    assert path.stat().st_size < 3_000_000
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    said = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert said.endswith("Every figure has its data.\n")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_does_not_say_where_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells]) + json.dumps(notebook.metadata)
    assert not ELSEWHERE.findall(shown)
