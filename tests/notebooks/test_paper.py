"""The notebook of the paper's tables as papermill runs it: a tiny chain from mid-training to test-time training."""

from __future__ import annotations

from pathlib import Path

import pytest

from refine_lab.runs.run import Run
from tests.support.executed_notebooks import execute, outputs, said, tables

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

TINY = {"steps": 1, "batch_size": 2, "sequence_length": 256, "posttrain_steps": 1, "ttt_steps": 1, "questions": 3}
TINY |= {"seeds": 0, "tasks": "niah_single_1", "lengths": 256, "samples": 2, "device": "cpu"}


def table(folder: Path, beginning: str) -> list[str]:
    """The lines below the header of the one table whose caption begins so."""
    (found,) = [text for text in tables(folder) if text.startswith(beginning)]
    return found.splitlines()[2:]


def test_a_chain_is_launched_and_laid_beside_the_paper(tmp_path: Path) -> None:
    status, output = execute("paper", tmp_path, launch=True, chain="1,8", **TINY)
    assert status == 0, output
    runs = [Run(path) for path in sorted((tmp_path / "runs").iterdir()) if (path / "config.json").is_file()]
    methods = [f"{run.kind} {run.config.method}" for run in runs]
    assert methods == ["train refine", "train nested_refine", "answer none", "answer none", "answer refine"]
    mid, post, _, _, adapted = runs
    assert post.config.model.startswith(str(mid.path)) and adapted.config.model.startswith(str(post.path))
    left = table(tmp_path, "Remaining work")
    assert all(float(line.split()[-1]) > 0 for line in left[:3])
    works = ("1 of 1 runs", "1 of 1 runs", "4 of 4 runs", "3 of 3 task measurements")
    assert all(work in line for work, line in zip(works, left, strict=False))
    needles = [line for line in table(tmp_path, "Table 3, the paper's DeltaNet-1.3B and ours") if "S-NIAH" in line]
    at_256, mean = (line.split() for line in needles)
    assert (
        at_256[1] == "256" and mean[1:5] == ["mean", "100.0", "100.0", "99.9"] and "gap" in mean
    )  # SFT was not trained
    rows = {line.split()[0]: line for line in table(tmp_path, "Table 4, the paper's DeltaNet-1.3B and ours")[1:]}
    assert len(rows) == 8 and "12.3" in rows["8"] and rows["2"].split()[-2] == "gap" and rows["8"].endswith("3 (2)")
    assert any("-p ablations selection" in line for line in table(tmp_path, "Gaps"))
    figures = [
        output["data"] for output in outputs(tmp_path) if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert len(figures) == 5
    assert not [output for output in outputs(tmp_path) if output.get("name") == "stderr"]
    assert said(tmp_path).endswith("Every figure has its data.\n") and "\nRuns created with commit " in said(tmp_path)


def test_a_wrong_parameter_stops_the_notebook_before_anything_is_made(tmp_path: Path) -> None:
    status, output = execute("paper", tmp_path, launch=True, **{**TINY, "chain": 9})
    assert status != 0 and "PaperPlan.chain must be numbers of rows from 1 to 8" in output
    assert not (tmp_path / "runs").exists()
