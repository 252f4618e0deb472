"""The figures of docs/gpu.md are those of the files that `benchmarks.fake_gpu` wrote."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from benchmarks.fake_gpu import roofline
from benchmarks.fake_gpu.report import MEMORY
from tests.support.paths import ROOT


def figures(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def text() -> str:
    return (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def row(beginning: str) -> list[str]:
    """The cells of a row of a table."""
    (line,) = (line for line in text().splitlines() if line.startswith(f"| {beginning} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_the_figures_of_the_files():
    names = {
        "DeltaNet-1.3B, REFINE": "fake_gpu",
        "DeltaNet-1.3B, REFINE, nothing recomputed": "fake_gpu_deltanet_none",
        "DeltaNet-1.3B, SFT": "fake_gpu_deltanet_sft",
        "LaCT-760M, REFINE": "fake_gpu_lact",
        "DeltaNet-1.3B, evaluation of 4 rows": "fake_gpu_evaluation",
    }
    for label, name in names.items():
        found = figures(name)
        launches, triton = f"{found['launches']:,}", f"{found['triton_launches']:,}"
        peak, wide = found["peak_gib"]["total"], found["fp32_stream_gib_at_peak"]
        speed = f"{round(found['tokens_per_second'], -2):,.0f}"
        expected = [launches, triton, str(found["synchronisations"]), f"{peak:.1f}", f"{wide:.1f}", speed]
        assert row(label)[1:] == expected, label
        assert found["device_mismatches"] == 0, label


@pytest.mark.parametrize("name", ["fake_gpu", "fake_gpu_lact"])
def test_the_best_micro_batch_is_that_of_the_file(name):
    found, document = figures(name), re.sub(r"\s+", " ", text())
    estimate, peak = found["tokens_per_second_estimate"], found["micro_batch_peak_gib"]["total"]
    assert peak < MEMORY
    sentence = (
        f"{round(estimate, -2):,.0f} tokens/s, in micro-batches of {found['micro_batch_size']} rows ({peak:.0f} GiB)"
    )
    assert sentence in document


def test_the_document_names_the_constants_of_the_roofline():
    assert f"max(bytes / {roofline.BANDWIDTH / 1e12:g} TB/s, FLOPs / peak, {roofline.LAUNCH * 1e6:g} µs)" in text()
    assert f"{roofline.HOST * 1e6:g} µs on the host" in text()
    assert f"{roofline.CHUNK_SECONDS * 1e6:g} µs per chunk of {roofline.CHUNK_TOKENS} tokens" in text()
