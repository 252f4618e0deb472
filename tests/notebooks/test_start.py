"""notebooks/start.ipynb: its map under papermill, and its links, which lead to every notebook and to documents that exist."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tests.support.executed_notebooks import execute, texts
from tests.support.paths import ROOT

NOTEBOOKS = ROOT / "notebooks"


def test_every_notebook_and_document_is_linked() -> None:
    cells = nbformat.read(NOTEBOOKS / "start.ipynb", 4).cells
    links = re.findall(r"\]\(([^):]+)\)", "".join(cell.source for cell in cells if cell.cell_type == "markdown"))
    assert not [link for link in links if not (NOTEBOOKS / link).is_file()]
    others = {path.name for path in NOTEBOOKS.glob("*.ipynb")} - {"start.ipynb"}
    assert {link for link in links if link.endswith(".ipynb")} == others


def test_make_lab_opens_it() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "jupyter lab notebooks/start.ipynb --ServerApp.root_dir=. " in makefile  # links reach docs/


@pytest.mark.notebook
def test_the_map_shows_what_the_answers_owe_to_the_memory(tmp_path: Path) -> None:
    status, said = execute("start", tmp_path, device="cpu")
    assert status == 0, said
    settings, shown = texts(tmp_path)
    assert settings == "{'model': 'tiny-deltanet', 'device': 'cpu'}"
    assert re.search(r"^  Long-short difference \(nats\): .*<- shown$", shown, re.MULTILINE)
    highest = shown.split("highest Long-short difference:")[1]
    assert "' width'" in highest and "' file'" in highest  # the answers to both questions
    assert (tmp_path / "out.ipynb").stat().st_size < 300_000
