"""`benchmarks.aot`: the table over variants, and the faults that it names; test_kernels.py compiles ours."""

from __future__ import annotations

import json

from benchmarks.aot import CASES, faults, markdown, summary
from tests.support.paths import ROOT


def variant(kernel: str, shared: int, registers: int = 64, spilled: int = 0, fits: bool = True) -> dict:
    return {
        "kernel": kernel,
        "shared_bytes": shared,
        "registers": registers,
        "spilled_bytes": spilled,
        "fits": fits,
    }


ROWS = [
    variant("a", 1000, 40),
    variant("a", 2000, 255, spilled=16),
    variant("a", 300_000, 255, spilled=999, fits=False),
    variant("b", 300_000, fits=False),
]


def test_a_kernel_is_one_row_over_the_variants_that_fit():
    a, b = summary(ROWS)
    assert a == {
        "kernel": "a",
        "variants": 3,
        "too_large": 1,
        "spilling": 1,
        "registers": [40, 255],
        "spilled_bytes": [0, 16],
        "shared_bytes": [1000, 2000],
    }
    assert b["too_large"] == b["variants"] == 1 and b["registers"] is None


def test_faults_are_kernels_without_a_variant_and_misfits_of_ours():
    def case(rows: list[dict], error: str | None = None) -> dict:
        return {"kernels": summary(rows), "error": error}

    assert faults({"sm_90 DeltaNet-1.3B": case(ROWS[:3]), "sm_80 ours": case(ROWS[:3])}) == []
    found = faults({"sm_90 DeltaNet-1.3B": case(ROWS), "sm_90 ours": case(ROWS[:3]), "sm_80 x": case([], "it broke")})
    assert [text.partition(":")[0] for text in found] == ["sm_90 DeltaNet-1.3B", "sm_90 ours", "sm_80 x"]
    assert "1 of 1 variants" in found[0] and found[0].endswith("of b")
    assert "1 of 3 variants" in found[1] and found[2].endswith("it broke")


def test_the_recorded_kernels_fit():
    """Two of the 102 variants for DeltaNet-1.3B do not fit on an H200: the autotuner leaves them out."""
    cases = json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text(encoding="utf-8"))["cases"]
    assert faults(cases) == []
    assert {name.split()[-1] for name in cases} <= set(CASES)
    recorded = cases["sm_90 DeltaNet-1.3B"]["kernels"]
    assert (sum(row["variants"] for row in recorded), sum(row["too_large"] for row in recorded)) == (102, 2)
    assert all(row["too_large"] == 0 for row in cases["sm_90 ours"]["kernels"])
    page = (ROOT / "docs" / "gpu_kernels.md").read_text(encoding="utf-8")
    assert not [line for case in cases.values() for line in markdown(case) if line not in page]
