"""Runs the comparisons of our kernels with their torch references in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from tests.support.paths import ROOT, TESTS


def compare_kernels(settings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `interpreted_kernels.py`, on CUDA unless `settings` has TRITON_INTERPRET, which must precede Triton's import."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | settings
    file = TESTS / "support" / "interpreted_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
