"""Grids of notebook executions: each cell of a grid is one execution by papermill, with its own folder and runs.

    python -m refine_lab.sweep notebooks/midtrain.ipynb -p lr 1e-4,3e-4 -p seeds 0:8 --out DIR
    refine_lab.sweep("midtrain", {"lr": [1e-4, 3e-4], "seeds": range(8)}, "DIR")      # the same in Python

`grid` reads the notebook and the values, `cells` describes the folders, `runner` executes the cells in local processes
(`local`) or on a Ray cluster (`cluster`), `execute` is the process of one cell, `estimate` estimates time and disk
space, and `tables` writes the table of results.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from refine_lab.sweep.cells import Cell
from refine_lab.sweep.runner import Sweep, plan, sweep

__all__ = ["Cell", "Sweep", "plan", "sweep"]


class _Runner(ModuleType):
    """Makes the module callable as its function, since the module replaces the package's function once it is imported."""

    def __call__(self, *arguments: Any, **settings: Any) -> Sweep:
        return sweep(*arguments, **settings)


sys.modules[__name__].__class__ = _Runner
