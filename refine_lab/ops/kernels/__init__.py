"""Our own Triton kernels, each with an equivalent torch reference; all are off by default.

The environment variable `REFINE_KERNELS` enables them by name, separated by commas:

    head    statistics and gradients of a slice of logits in one pass each     (kernels/head.py, for ops/head.py)
    chunks  the delta rule's state through all chunks of a row in one launch   (kernels/chunks.py, for ops/delta_rule.py)

They run on CUDA, and on the CPU under Triton's interpreter (`TRITON_INTERPRET=1`). `python -m benchmarks.gpu` compares
each with what it replaces.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from jaxtyping import Float, Int
from torch import Tensor

from refine_lab.validation import unknown

Logits = Float[Tensor, "S V"]
PerRow = Float[Tensor, "S"]
Grads = tuple[PerRow | None, PerRow | None]
Ids = Int[Tensor, "S"]

SWITCH = "REFINE_KERNELS"
NAMES = ("head", "chunks")


def chosen(name: str, x: Tensor) -> bool:
    """Returns whether the kernel of that name is enabled and can run where `x` is.

    Raises ValueError for an unknown name, and ImportError if Triton is not installed.
    """
    asked = [word.strip() for word in os.environ.get(SWITCH, "").split(",") if word.strip()]
    for word in asked:
        if word not in NAMES:
            raise unknown(f"kernel in {SWITCH}", word, NAMES)
    runs = name in asked and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    if runs and find_spec("triton") is None:
        raise ImportError(f"the kernels in {SWITCH} need triton, which is not installed here")
    return runs
