"""Texts as parameters: what papermill made a number of is refused, what `-r` passes on stays as it was typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from papermill.cli import _resolve_type as papermill_value

from refine_lab.experiments.parameters import convert, parameters
from tests.support.paths import ROOT
from tests.support.refusals import refused

NOTEBOOKS = ROOT / "notebooks"
PAPERMILL = str(Path(sys.executable).with_name("papermill"))


@pytest.mark.parametrize("hint", [str, "Optional[str]"])
@pytest.mark.parametrize("typed", ["007", "1e5", "2026_11_20", ".5", "1_000", "-3", "nan", "inf", "True", "False"])
def test_a_text_that_papermill_made_a_number_of_is_refused(hint: Any, typed: str) -> None:
    arrival = papermill_value(typed)  # what `-p` makes of it
    assert not isinstance(arrival, str)
    with refused("parameter data", arrival):
        convert("data", hint, arrival)
    assert convert("data", hint, typed) == typed  # what `-r` passes on


def test_a_text_that_papermill_leaves_as_it_is_needs_no_raw_option() -> None:
    for typed in ("0x10", "1,000", "tiny-deltanet", "v1.0"):
        assert convert("data", str, papermill_value(typed)) == typed


def test_none_is_no_text() -> None:
    assert convert("data", "Optional[str]", papermill_value("None")) is None
    with refused("parameter model", None):
        convert("model", str, papermill_value("None"))


def test_every_text_parameter_of_every_notebook_refuses_a_number() -> None:
    found = 0
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = nbformat.read(notebook, 4).cells
        (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
        declared: dict[str, Any] = {}
        exec(compile(cell.source, str(notebook), "exec", dont_inherit=True), declared)
        for name, hint in declared["__annotations__"].items():
            if hint in (str, "Optional[str]"):
                found += 1
                with pytest.raises(ValueError, match=f"use -r {name} VALUE"):
                    parameters(declared | {name: papermill_value("007")})
    assert found > 40


@pytest.mark.notebook
def test_papermill_passes_on_a_raw_text_and_the_notebook_refuses_a_number(tmp_path: Path) -> None:
    """A folder of runs whose name is digits, as `notebooks/monitor.ipynb` is given it."""
    (tmp_path / "007").mkdir()

    def papermill(option: str) -> tuple[int, str]:
        words = [PAPERMILL, str(NOTEBOOKS / "monitor.ipynb"), "out.ipynb", option, "folder", "007"]
        run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        return run.returncode, run.stderr

    status, output = papermill("-p")
    assert status == 1
    assert "parameter folder must be a string or none (" in output
    assert "use -r folder VALUE), got 7" in output
    status, output = papermill("-r")
    assert "parameter folder" not in output, output
    assert "'folder': '007'" in (tmp_path / "out.ipynb").read_text(encoding="utf-8")


def test_a_former_name_works_with_a_warning():
    namespace = {
        "__annotations__": {"trainable": "Optional[str]"},
        "trainable": None,
        "moving": "layers.0",
        "In": ["", "# Parameters\nmoving = 'layers.0'\n"],
    }
    with pytest.warns(FutureWarning, match="parameter 'moving' is now 'trainable'"):
        assert parameters(namespace) == {"trainable": "layers.0"}
