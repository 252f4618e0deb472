"""`benchmarks.static_figures`: pictures beside the plotly figures of an executed notebook, and nothing else changed."""

from __future__ import annotations

import base64
import os
import struct
import subprocess
import sys
from pathlib import Path

import nbformat
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests.support.paths import ROOT

FIGURE = "application/vnd.plotly.v1+json"


def figure(**layout: object) -> dict:
    return go.Figure(go.Scatter(x=[0, 1], y=[1.0, 2.0]), layout=layout).to_plotly_json()


def notebook(folder: Path) -> Path:
    """A figure without a width, one with a picture already, one with a width, and an output that is no figure."""
    shown = [
        {FIGURE: figure(height=300)},
        {FIGURE: figure(), "image/png": "kept"},
        {FIGURE: figure(width=400, height=200), "text/plain": "Figure"},
        {"text/plain": "3"},
    ]
    outputs = [new_output("display_data", data) for data in shown]
    path = folder / "executed.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("show()", outputs=outputs, execution_count=1)]), path)
    return path


def static_figures(*paths: Path, **environment: str) -> tuple[int, str]:
    """The command's exit status, and what it said."""
    command = [sys.executable, "-m", "benchmarks.static_figures", *map(str, paths)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.browser
def test_every_figure_without_a_picture_gets_one_and_nothing_else_changes(tmp_path: Path, chromium: str) -> None:
    path = notebook(tmp_path)
    before = nbformat.read(path, 4)
    status, said = static_figures(path, CHROMIUM=chromium)
    assert (status, "pictures added: 2" in said) == (0, True), said
    after = nbformat.read(path, 4)
    data = [output.data for output in after.cells[0].outputs]
    sizes = []
    for index in (0, 2):
        picture = base64.b64decode(data[index].pop("image/png"))
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        sizes.append(struct.unpack(">II", picture[16:24]))
    assert sizes == [(1000, 300), (400, 200)]
    assert after == before

    written = path.read_bytes(), path.stat().st_mtime_ns
    nbformat.write(before, path)
    static_figures(path, CHROMIUM=chromium)
    assert path.read_bytes() == written[0]  # the same picture again, byte for byte
    status, said = static_figures(path, CHROMIUM=chromium)
    assert (status, "pictures added: 0" in said) == (0, True), said
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["no JSON", "{}", "[1]", '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_a_file_that_is_no_notebook_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.ipynb"
    path.write_text(text, encoding="utf-8")
    status, said = static_figures(path, CHROMIUM=sys.executable)
    assert status == 2
    assert said.endswith(f"error: {path} is no Jupyter notebook\n")
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "program", ["/no-browser", pytest.param(sys.executable, marks=pytest.mark.browser)], ids=["missing", "no browser"]
)
def test_without_chromium_the_notebook_stays_as_it_is(tmp_path: Path, program: str) -> None:
    path = notebook(tmp_path)
    before = path.read_bytes()
    status, said = static_figures(path, CHROMIUM=program)
    assert status == 2, said
    assert f"error: {program} " in said
    assert path.read_bytes() == before
