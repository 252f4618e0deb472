"""The compiled step of a single token, in a process without run-time checks of shapes (see tests/support/compiled_step.py)."""

from __future__ import annotations

from tests.support.comparisons import compare_kernels


def test_the_step_is_one_graph_and_equals_read():
    done = compare_kernels({"OMP_NUM_THREADS": "1"}, "compiled_step.py", "-o", "addopts=--import-mode=importlib")
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
