"""The notebook of the ablations as papermill runs it, on two settings of one seed."""

from __future__ import annotations

import pytest

from refine_lab.runs.run import Run
from tests.support.executed_notebooks import execute, outputs, said, tables

pytestmark = [pytest.mark.notebook, pytest.mark.process, pytest.mark.slow]

TINY = {"ablations": "reward,k", "steps": 2, "batch_size": 2, "sequence_length": 512, "seeds": 0, "recall_documents": 2}
PLOTLY = "application/vnd.plotly.v1+json"


def test_an_ablation_is_trained_and_drawn(tmp_path):
    status, output = execute("ablate", tmp_path, **{**TINY, "ablations": "reward", "processes": 2})
    assert status == 0, output
    printed = said(tmp_path)
    assert printed.index("2 cells to execute: about ") < printed.index("2/2  ")
    assert "2 of 2 sweep cells have finished.\n" in printed and "Runs created with commit " in printed
    runs = [Run(path.parent) for path in (tmp_path / "runs" / "ablate").rglob("metrics.jsonl")]
    assert sorted((run.config.method, run.state) for run in runs) == [("refine", "finished")] * 2 + [
        ("sft", "finished")
    ]
    assert {run.config.refine.reward for run in runs if run.config.refine} == {"binary", "cosine"}
    (table,) = [text for text in tables(tmp_path) if text.startswith("Reward (table 6)")]
    *lines, note = table.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["base", "SFT", "REFINE,", "REFINE,"]
    assert "documents" in note
    assert "cosine (recipe)" in table and "exact recall word-1 at 512" in table
    (figure,) = [each["data"][PLOTLY] for each in outputs(tmp_path) if PLOTLY in each.get("data", {})]
    assert figure["layout"]["title"]["text"].startswith("Reward (table 6)")
    assert not [each for each in outputs(tmp_path) if each.get("name") == "stderr"]
