"""Interactive exploration of a model: how it reads a document, what it rolls out at any position, and how it adapts.

`reading` and `rollouts` are the functions, `session` caches models and documents so that nothing is read twice,
`worker` is the process that holds a session, and `client` is the notebook's connection to it. The names below are
imported on first use, so that a client does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refine_lab.explore.client import Worker, WorkerDied, shared_worker
    from refine_lab.explore.reading import DocumentReading, read_document
    from refine_lab.explore.rollouts import PrefixRollouts, rollouts_at

HOMES = {
    "DocumentReading": "reading",
    "PrefixRollouts": "rollouts",
    "Worker": "client",
    "WorkerDied": "client",
    "read_document": "reading",
    "rollouts_at": "rollouts",
    "shared_worker": "client",
}
__all__ = ["DocumentReading", "PrefixRollouts", "Worker", "WorkerDied", "read_document", "rollouts_at", "shared_worker"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
