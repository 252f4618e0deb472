"""The parity gate: does going on from a state give what reading the whole prefix again gives?

    refine_lab.parity(model)                  # in Python; `refine_lab.parity.parity` is the same function
    python -m refine_lab.parity NAME          # exit status 0 where it holds, 1 where it does not, 2 for bad input

A wrong state gives no error, only worse numbers: a model is held against the plain procedure before it is trained. A batch
of unequal rows is read once, states are taken inside it, two continuations branch from each, and everything that a step of
REFINE uses of them is compared with `read(prefix + continuation)`: from scratch, one prefix at a time, unpadded.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from refine_lab.parity.gate import default_prefixes, parity, parity_of
from refine_lab.parity.report import Parity, Row

__all__ = ["Parity", "Row", "default_prefixes", "parity", "parity_of"]


class _Gate(ModuleType):
    """Once imported, the module stands where the package has the function of its name: calling it is calling that."""

    def __call__(self, *arguments: Any, **settings: Any) -> Parity:
        return parity(*arguments, **settings)


sys.modules[__name__].__class__ = _Gate
