"""Experiment 7: the loss on the remainder of documents after adaptation, with and without resets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks.evidence_page import _change, page
from benchmarks.evidence_ttt import METHODS, RestRun, measure, runs
from refine_lab.experiments.evidence import record


def rest_run(**changes: object) -> RestRun:
    values = {"text": "python", "reset": "prompt", "method": "sft", "lr": 3e-4, "steps": 2, "seed": 0, **changes}
    return RestRun(**values)  # type: ignore[arg-type]


def test_the_registered_rows_are_distinct_and_balanced():
    found = runs()
    assert len({run.key for run in found}) == len(found) == 120
    assert {run.method for run in found[:5]} == set(METHODS)


@pytest.mark.slow
def test_weights_are_reset_after_each_document_or_carried_over():
    alone = measure(rest_run(), documents=1, length=256)
    reset, carried = (measure(rest_run(reset=reset), documents=3, length=256) for reset in ("prompt", "never"))
    first = int(np.random.default_rng(0).permutation(3)[0])
    assert reset["rest_change"][first] == carried["rest_change"][first] != 0
    assert reset["rest_change"][0] == alone["rest_change"][0], "whatever was adapted to before"
    others = [number for number in range(3) if number != first]
    assert all(reset["rest_change"][number] != carried["rest_change"][number] for number in others)
    before = [
        [loss - change for loss, change in zip(each["rest_loss"], each["rest_change"], strict=True)]
        for each in (reset, carried)
    ]
    assert before[0] == pytest.approx(before[1]), "the loss before is that of the original weights"


def test_the_page_has_the_change_and_its_difference_from_sft(tmp_path):
    for seed in (0, 1):
        for method, changes in (("sft", (-0.02, -0.01, 0.0, 0.01)), ("expected", (-0.05, -0.04, -0.032, -0.018))):
            run = rest_run(method=method, seed=seed, steps=8)
            items = {"rest_change": [change + 0.001 * seed for change in changes]}
            record(tmp_path, run, {"ntp_loss": 2.0}, items, commit="abc", seconds=1)
    lines = page(tmp_path).splitlines()
    assert "4 of 120 registered rows have been measured." in lines
    assert "### Remainder of python, reset prompt" in lines
    assert [line for line in lines if line.startswith("| SFT (0.0003, 8) | 2 | -0.0045 (")]
    (change,) = [line for line in lines if line.startswith("| expected match (0.0003, 8) | 2 | -0.0345 (-0.")]
    assert change.rstrip(" |)").partition(" to ")[2].startswith("-0."), "the whole interval is below zero"
    (contrast,) = [
        line for line in lines if line.startswith("| expected match (0.0003, 8) – SFT (0.0003, 8) | -0.0300 (")
    ]
    cells = [cell.strip() for cell in contrast.split("|")[3:-1]]
    assert cells[:2] == ["2", "4"] and cells[3] == "1.000", "it is not within the margin"
    assert 0 < float(cells[2].removeprefix("< ")) < 0.05, "corrected for 32 contrasts"


def test_a_single_seed_has_a_change_without_an_interval():
    scores = pd.DataFrame({"seed": [0, 0, 1, 1], "item": [0, 1, 0, 1], "score": [-0.25, 0.0, -0.25, 0.0]})
    assert _change(scores[scores["seed"] == 0]) == "-0.1250"
    assert _change(scores).startswith("-0.1250 (-")
