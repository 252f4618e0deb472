"""The line and the phase of the step in which an operation runs, read from Python's own stack."""

from __future__ import annotations

import sys
import threading
from functools import cache
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
HERE = str(Path(__file__).parent)

PHASES = {
    "_read": "read",
    "next_token_stats": "head",
    "answer_stats": "answer",
    "places": "select",
    "Branches.of": "states",
    "sample": "sample",
    "decode": "decode",
    "read_rollouts": "follow",
    "assess": "rewards",
    "_rollout_metrics": "rewards",
    "Tensor.backward": "backward",
    "OptimizerUpdate.apply": "update",
    "next_token": "read",
    "read_document": "read",
    "rollouts_at": "sample",
}
"""Qualified name of a function -> the phase of a step; of several calls, the innermost counts."""


class Place(NamedTuple):
    """Where an operation runs: the phase of the step, and a file's line or, in a backward pass, the node of autograd."""

    phase: str
    line: str


def place() -> Place:
    """Returns where the caller's operation runs. The innermost line of this project counts, else that of a library."""
    frame, phase, own, other = sys._getframe(1), None, None, None
    while frame is not None:
        found, label, ours = _known(frame.f_code)
        phase = phase or found
        if label is not None and own is None:
            if ours:
                own = f"{label}:{frame.f_lineno}"
            elif other is None:
                other = f"{label}:{frame.f_lineno}"
        frame = frame.f_back
    if phase is None:
        phase = "other" if threading.current_thread() is threading.main_thread() else "backward"
    return Place(phase, own or _node() or other or "unknown")


def _node() -> str | None:
    node = torch._C._current_autograd_node()
    return None if node is None else f"backward of {node.name()}"


@cache
def _known(code: CodeType) -> tuple[str | None, str | None, bool]:
    """Returns the phase that a function begins, how its lines are labelled, and whether it belongs to this project."""
    path, phase = code.co_filename, PHASES.get(code.co_qualname)
    if path.startswith(HERE):
        return None, None, False
    if "site-packages" in path:
        short = path.split("site-packages/")[-1]
        counted = short.startswith(("fla/", "torch/optim", "torch/nn/utils/clip_grad"))
        return (phase if phase == "backward" else None), (short if counted else None), False
    if path.startswith(str(ROOT)):
        return phase, str(Path(path).relative_to(ROOT)), True
    return None, None, False
