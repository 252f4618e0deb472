"""Estimates of a training step before it is run: the memory of each GPU by part, and the time.

    refine_lab.estimate("DeltaNet-1.3B", 16_384, world_size=8)
    python -m refine_lab.estimate DeltaNet-1.3B 16384 --world-size 8

`models` says how many weights a model has, `blocks` which tensors a block keeps, `memory` when they are in memory
together, `seconds` how long the step takes, and `step` has `estimate`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from refine_lab.estimate.step import Estimate, estimate

__all__ = ["Estimate", "estimate"]


class _Estimator(ModuleType):
    """Makes the module callable as its function, since the module replaces the package's function once it is imported."""

    def __call__(self, *arguments: Any, **settings: Any) -> Estimate:
        return estimate(*arguments, **settings)


sys.modules[__name__].__class__ = _Estimator
