"""The executed notebooks that the repository ships as evidence: whole, small, shown without plotly, and with no trace of
where they ran."""

from __future__ import annotations

import base64
import json
import re
import struct
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter, MarkdownExporter

from tests.support.paths import ROOT

RESULTS = sorted((ROOT / "docs" / "results").glob("*.ipynb"))
FIGURE = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
ELSEWHERE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|work|mnt|opt)/[\w.]")


def test_there_are_some() -> None:
    assert {"posttrain.ipynb", "ttt.ipynb"} <= {path.name for path in RESULTS}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_is_whole(path: Path) -> None:
    assert path.stat().st_size < 2_500_000
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    said = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert said.endswith("Every figure has its data.\n")


def shown(path: Path) -> list[dict]:
    """The data of every output that shows something, by type."""
    return [
        output["data"]
        for cell in nbformat.read(path, 4).cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_figure_has_a_picture_for_viewers_without_plotly(path: Path) -> None:
    figures = [data for data in shown(path) if FIGURE in data]
    assert figures
    for data in figures:
        picture = base64.b64decode(data["image/png"])
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", picture[16:24])
        assert (width, height) == (1000, data[FIGURE]["layout"]["height"])


def test_nbconvert_shows_the_pictures_and_the_widgets_texts() -> None:
    """Its Markdown has the widgets' texts; its HTML leaves widgets to scripts from the network."""
    path = next(path for path in RESULTS if path.name == "posttrain.ipynb")
    pictures = [data["image/png"].strip() for data in shown(path) if FIGURE in data]
    (widget,) = [data["text/plain"] for data in shown(path) if WIDGET in data]
    page, _ = HTMLExporter().from_filename(str(path))
    text, resources = MarkdownExporter().from_filename(str(path))
    assert re.findall(r'src="data:image/png;base64,([^"]+)"', page) == pictures
    assert [base64.b64decode(picture) for picture in pictures] == list(resources["outputs"].values())
    assert all(f"]({name})" in text for name in resources["outputs"])
    assert widget.splitlines()[1].strip() in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_does_not_say_where_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells]) + json.dumps(notebook.metadata)
    assert not ELSEWHERE.findall(shown)


COMMIT = re.compile(r"`([0-9a-f]{7})`")


def commits_in_the_readme() -> dict[str, list[str]]:
    """The commits that the table of docs/results/README.md gives for each notebook and each file of a search."""
    text = (ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:\[(.+?)\]\(.+?\)|`(.+?)`) \| (.*`[0-9a-f]{7}`.*) \|$", text, re.MULTILINE)
    return {notebook or Path(search).name: COMMIT.findall(rest) for notebook, search, rest in rows}


def test_the_readme_tells_at_which_commits_each_result_was_made() -> None:
    """A search's file and a notebook of now record it themselves: the table repeats what they say."""
    told = commits_in_the_readme()
    searches = sorted((ROOT / "benchmarks" / "results").glob("search*.json"))
    assert told.keys() == {path.name for path in (*RESULTS, *searches)}
    for path in searches:
        assert json.loads(path.read_text())["environment"]["commit"][:7] == told[path.name][-1], path.name
    for path in RESULTS:
        recorded = re.findall(r"Runs (?:made at|created with commit) ([0-9a-f]{7})", path.read_text(encoding="utf-8"))
        assert not recorded or recorded[0] == told[path.name][-1], path.name
    known = subprocess.run(["git", "rev-list", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    history = {line[:7] for line in known.stdout.split()}
    if len(history) > 1:  # neither a shallow clone nor a copy without git
        assert {commit for commits in told.values() for commit in commits} <= history
