"""The error of a failed check."""

from __future__ import annotations


class Fault(Exception):
    """What a check found wrong and what to do about it, in one sentence."""
