"""Settings of selection by memory and by copies, which are ours (docs/method.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from refine_lab.config import RefineConfig

MEMORY: Mapping[str, Any] = {
    "tau": 0.5,  # ours: a gain of 5 nats is chosen e^10 times as often as none
    "margin": 5,  # ours: the release's 20 excludes a third of the first chunk of a row of 512 tokens
}
"""What selection by memory or by copies changes besides `selection`; c 8 and k 5 are those of the paper."""


def by_memory(refine: RefineConfig, selection: Literal["memory", "copy"] = "memory") -> RefineConfig:
    """Returns a method that rolls out where the next tokens need the memory, or can be copied from far back."""
    return replace(refine, selection=selection, **MEMORY)
