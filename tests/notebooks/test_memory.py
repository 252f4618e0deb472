"""notebooks/memory.ipynb under papermill: where the sample document's answer comes from, and what the model says without it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.executed_notebooks import execute, said, texts

pytestmark = pytest.mark.notebook


def test_it_finds_the_fact_and_writes_a_page(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    status, told = execute("memory", tmp_path, device="cpu", erased="646-648", report=report)
    assert status == 0, told
    _, view, lens = texts(tmp_path)
    assert re.search(r"^    647 '·width': \+2\.\d+ nats \(size 2\.\d+\), raises it$", view, re.MULTILINE)
    assert "is the most likely token after layer 3 and later" in lens
    erased = r"Without the writes of tokens 646-648 in all heads, log p falls from −1\.66 to −10\.5\d nats"
    assert re.search(erased, said(tmp_path))
    assert "with the whole memory of the changed document it moves by +15." in said(tmp_path)
    page = report.read_text(encoding="utf-8")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[0])
    assert len(data["widgets"]) == 5  # prediction, heads, document, layer lens, counterfactual
