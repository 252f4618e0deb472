"""The parity gate: checks that continuing from a state equals re-reading the whole prefix.

    refine_lab.parity(model)                  # in Python; `refine_lab.parity.parity` is the same function
    python -m refine_lab.parity NAME          # exit status 0 if parity holds, 1 if it does not, 2 for bad input

A wrong state raises no error and only makes results worse, so a model is compared with the plain procedure before it is
trained. A batch of rows of unequal length is read once, states are taken inside it, and two continuations branch from
each. All quantities that a REFINE step uses are compared with `read(prefix + continuation)` from scratch, one prefix at
a time, unpadded.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from refine_lab.parity.gate import default_prefixes, parity, parity_of
from refine_lab.parity.report import Comparison, Parity

__all__ = ["Comparison", "Parity", "default_prefixes", "parity", "parity_of"]


class _Gate(ModuleType):
    """Makes the module callable as its function, since the module replaces the package's function once it is imported."""

    def __call__(self, *arguments: Any, **settings: Any) -> Parity:
        return parity(*arguments, **settings)


sys.modules[__name__].__class__ = _Gate
