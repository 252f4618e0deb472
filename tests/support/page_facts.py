"""Reads what the top of a saved page says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def page_head(path: Path) -> tuple[str, dict[str, str]]:
    """Returns the conclusion at the top of a saved page, and its facts by name."""
    head = re.search(r'"head": (\{.*?\]\]\})', path.read_text(encoding="utf-8"))
    assert head is not None
    found: dict[str, Any] = json.loads(head[1])
    return found["conclusion"], dict(found["facts"])
