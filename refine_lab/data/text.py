"""Replaces characters that UTF-8 cannot encode."""

from __future__ import annotations


def replace_surrogates(text: str) -> str:
    """Returns the text with each unpaired surrogate, which UTF-8 cannot encode, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
