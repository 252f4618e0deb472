"""A notebook executed by papermill in a folder of its own, and what its cells put out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat

from tests.support.paths import ROOT

PAPERMILL = str(Path(sys.executable).with_name("papermill"))


def execute(notebook: str, folder: Path, /, **values: Any) -> tuple[int, str]:
    """Its exit status and output; the executed notebook is `folder`/out.ipynb, runs are in `folder`/runs."""
    environ = {**os.environ, "REFINE_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    words = [word for name, value in values.items() for word in ("-p", name, str(value))]
    source, executed = str(ROOT / "notebooks" / f"{notebook}.ipynb"), str(folder / "out.ipynb")
    command = [PAPERMILL, "--no-progress-bar", source, executed, *words]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def outputs(folder: Path) -> list[Any]:
    cells = nbformat.read(folder / "out.ipynb", 4).cells
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def said(folder: Path) -> str:
    return "".join(output["text"] for output in outputs(folder) if output.get("name") == "stdout")


def texts(folder: Path) -> list[str]:
    """What stands where nothing is drawn, of every output that is shown."""
    return [output["data"]["text/plain"] for output in outputs(folder) if "text/plain" in output.get("data", {})]


def tables(folder: Path) -> list[str]:
    found = [output["data"] for output in outputs(folder) if "<table" in output.get("data", {}).get("text/html", "")]
    return [data["text/plain"] for data in found]
