"""Our own Triton kernels, each beside a torch reference of equal result. All are off until they are asked for.

The switch is the environment's `REFINE_KERNELS`: the names of kernels with commas between them, out of

    head    statistics and gradients of a slice of logits in one pass each     (kernels/head.py, for ops/head.py)
    chunks  the delta rule's state through all chunks of a row in one launch   (kernels/chunks.py, for ops/delta_rule.py)

They run on CUDA, and on the CPU under Triton's interpreter (`TRITON_INTERPRET=1`). `python -m benchmarks.gpu` measures each
against what it replaces.
"""

from __future__ import annotations

import os

from torch import Tensor

from refine_lab.config import unknown

SWITCH = "REFINE_KERNELS"
NAMES = ("head", "chunks")


def chosen(name: str, x: Tensor) -> bool:
    """Whether the kernel of that name was asked for and can run where `x` is. Raises ValueError for a name that is none."""
    asked = [word.strip() for word in os.environ.get(SWITCH, "").split(",") if word.strip()]
    for word in asked:
        if word not in NAMES:
            raise unknown(f"kernel in {SWITCH}", word, NAMES)
    return name in asked and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
