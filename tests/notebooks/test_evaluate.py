"""The notebook of the evaluation as papermill runs it: with a gap, again, and with a wrong parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.factories.evaluation import write_longbench, write_ruler
from tests.support.executed_notebooks import execute, outputs, said, texts

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

PLOTLY = "application/vnd.plotly.v1+json"


def papermill(folder: Path, **values: Any) -> tuple[int, str]:
    return execute("evaluate", folder, **values)


def test_tasks_of_files_a_gap_and_again(tmp_path):
    write_ruler(tmp_path / "data", length=512)
    write_ruler(tmp_path / "data", length=1024)
    write_longbench(tmp_path / "data")
    tasks = "ruler_squadqa,longbench_hotpotqa,longbench_trec,recall"
    settings = {"tasks": tasks, "limit": 3, "data": tmp_path / "data", "device": "cpu"}
    status, output = papermill(tmp_path, **settings)
    assert status == 0, output
    first = said(tmp_path)
    assert "[1/6] ruler_squadqa at 512 tokens: any_match" in first and "longbench_trec: skipped" in first
    assert first.endswith("written to evaluation/results.json and results.parquet\n")
    (figure,) = [output["data"][PLOTLY] for output in outputs(tmp_path) if PLOTLY in output.get("data", {})]
    names = {trace["name"] for trace in figure["data"]}
    assert names == {
        "ruler_squadqa (any_match, 3 distinct samples)",
        "recall (exact_recall_word-4, 3 distinct samples)",
    }
    assert "These tasks have fewer than 100 distinct samples" in first
    assert any("trec_*.parquet" in text or "longbench_trec" in text for text in texts(tmp_path))
    assert not [output for output in outputs(tmp_path) if output.get("name") == "stderr"]
    result = json.loads((tmp_path / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert [unit["status"] for unit in result["units"]] == ["done"] * 3 + ["missing"] + ["done"] * 2
    unit = result["units"][-1]
    recalled = pd.read_parquet(tmp_path / "evaluation" / "samples" / f"recall-{unit['length']}.parquet")
    assert len(recalled) == 3 and recalled["exact_recall_word-4"].mean() == pytest.approx(
        unit["metrics"]["exact_recall_word-4"]["value"]
    )
    assert papermill(tmp_path, **settings)[0] == 0
    again = json.loads((tmp_path / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert again["units"] == result["units"]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("task", "niah", "unknown parameter 'task'; did you mean 'tasks'?"),
        ("tasks", "niahs", "unknown task 'niahs'; did you mean 'niah'?"),
        ("ttt", "grpo", "EvaluationConfig.ttt must be one of 'none', 'sft', 'refine'"),
    ],
)
def test_a_wrong_parameter_stops_the_notebook_at_once(tmp_path, name, value, sentence):
    status, output = papermill(tmp_path, **{name: value})
    assert status != 0 and sentence in output
    assert not (tmp_path / "evaluation").exists()
