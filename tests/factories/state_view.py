"""What the tests of state view and others share."""

from __future__ import annotations

import numpy as np

from refine_lab.explore.states import StateSummary


def summary(**changes: object) -> StateSummary:
    rng = np.random.default_rng(0)
    numbers = {name: rng.random((2, 2, 3), dtype=np.float32) for name in ("norms", "effective_ranks", "changes")}
    numbers["changes"][..., 0] = np.nan
    numbers["norms"][1, 1] = np.nan  # a layer of one head
    settings = {
        "positions": np.array([0, 4, 9]),
        "layers": (0, 2),
        "names": ("recurrent_state", "recurrent_state"),
        "write_strengths": rng.random((1, 2, 10), dtype=np.float32),
        "write_layers": (2,),
        **numbers,
    }
    return StateSummary(**(settings | changes))  # type: ignore[arg-type]
