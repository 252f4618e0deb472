"""Experiment 7: the loss on the remainder of documents after adaptation, with and without resets."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.evidence_page import page
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
        for method, change in (("sft", -0.02), ("expected", -0.05)):
            run = rest_run(method=method, seed=seed)
            items = {"rest_change": [change + 0.001 * seed + 0.01 * number for number in range(4)]}
            record(tmp_path, run, {"ntp_loss": 2.0}, items, commit="abc", seconds=1)
    lines = page(tmp_path).splitlines()
    assert "4 of 120 registered rows have been measured." in lines
    assert "### Remainder of python, reset prompt" in lines
    (sft,) = [line for line in lines if line.startswith("| SFT | 0.0003, 2 | 2 | -0.0045 ± 0.0007 | – |")]
    (expected,) = [
        line for line in lines if line.startswith("| expected match | 0.0003, 2 | 2 | -0.0345 ± 0.0007 | -0.0300")
    ]
    assert sft and expected
