"""Runs the comparisons of kernels with their torch references in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from tests.support.paths import ROOT, TESTS


def compare_kernels(
    settings: Mapping[str, str], file: str = "interpreted_kernels.py", *options: str
) -> subprocess.CompletedProcess[str]:
    """Runs comparisons on CUDA, unless `settings` has TRITON_INTERPRET, which must precede Triton's import."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | settings
    path = TESTS / "support" / file
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(path), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def under_the_interpreter(file: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the comparisons of a file of this folder under Triton's interpreter, on one thread."""
    return compare_kernels({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, file, *options)
