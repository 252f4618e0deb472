"""notebooks/explore.ipynb under papermill: its texts, its page, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.executed_notebooks import execute, tables, texts

pytestmark = pytest.mark.notebook


def test_it_shows_a_document_of_ones_own_and_writes_a_page(tmp_path: Path) -> None:
    source = tmp_path / "mine.txt"
    source.write_text("def area(width, height):\n    return width * height\n\n" * 12, encoding="utf-8")
    report = tmp_path / "report.html"
    values = {"file": source, "num_chunks": 4, "group_size": 3, "reward": "hybrid", "device": "cpu", "report": report}
    values["compare"] = "tiny-deltanet"
    status, said = execute("explore", tmp_path, **values)
    assert status == 0, said
    _, explorer, states, side, _ = texts(tmp_path)
    assert "12 rollouts at 4 sampled positions, mean hybrid reward" in explorer
    assert "StateView: 8 heads" in states
    assert "A and B predict every token of this document identically" in side
    assert (tmp_path / "report_side_by_side.html").is_file()
    (table,) = tables(tmp_path)
    assert len(re.findall("Ex. ", table)) == 4
    page = report.read_text(encoding="utf-8")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[0])
    assert len(data["widgets"]) == 5  # map, rollouts of a click, rewards, rollouts, states
    assert (tmp_path / "out.ipynb").stat().st_size < 1_300_000  # each number or text field has its own copy of a script


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rewrad": "cosine"}, "unknown parameter 'rewrad'; did you mean 'reward'?"),
        ({"reward": "cosin"}, "reward must be one of 'cosine', 'binary', 'hybrid', 'edit', 'exact', got 'cosin'"),
    ],
)
def test_it_refuses(tmp_path: Path, values: dict[str, str], sentence: str) -> None:
    status, said = execute("explore", tmp_path, **values)
    assert status != 0
    assert sentence in said
