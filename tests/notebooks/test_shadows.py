"""A file in the folder that a notebook is started in, which Python imports in place of a package of ours, is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMED = {
    "widgets.py": "{} shadows this project's package `widgets`: rename it, or start in a different folder",
    "widgets/__init__.py": "{} shadows this project's package `widgets`: rename it, or start in a different folder",
    "refine_lab.py": "cannot import name 'refuse_shadows' from 'refine_lab' ({})",
    "refine_lab/__init__.py": "cannot import name 'refuse_shadows' from 'refine_lab' ({})",
}
"""File -> the error's sentence about it."""


def first_imports(notebook: Path) -> str:
    """The first cell behind the parameters, up to the values that it shows."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return "".join(cells[1]["source"]).partition("settings = ")[0]


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As a kernel runs it: the folder that it was started in comes first."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize("file", NAMED)
def test_the_file_in_the_way_is_named_in_every_notebook(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert len(NOTEBOOKS) >= 6
    for notebook in NOTEBOOKS:
        failed = run(first_imports(notebook), tmp_path)
        assert failed.stderr.splitlines()[-1] == "ImportError: " + NAMED[file].format(path), notebook.name


def test_a_folder_without_modules_is_not_in_the_way(tmp_path: Path) -> None:
    for name in ("widgets", "refine_lab"):
        (tmp_path / name).mkdir()
    finished = run(
        "from refine_lab import refuse_shadows; refuse_shadows(); from widgets.core.page import page", tmp_path
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.notebook
def test_papermill_names_the_file(tmp_path: Path) -> None:
    """The project is found behind the folder that papermill is started in, as where it is installed."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "widgets.py").touch()
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.path.append({str(ROOT)!r})", encoding="utf-8")
    words = [str(Path(sys.executable).with_name("papermill")), str(ROOT / "notebooks" / "monitor.ipynb"), "out.ipynb"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    failed = subprocess.run(words, cwd=tmp_path / "start", env=environ, capture_output=True, text=True)
    assert failed.returncode == 1
    assert f"ImportError: {tmp_path / 'start' / 'widgets.py'} shadows this project's package" in failed.stderr
