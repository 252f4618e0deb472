"""Where the checkout and the text of the tests lie."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
TEXT = TESTS / "fixtures" / "text"
