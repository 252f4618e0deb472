"""How a test says that a value is refused, without a word of the sentence that tells it."""

from __future__ import annotations

from typing import Any

import pytest

from refine_lab.config import ConfigError

ANY: Any = object()


def refused(field: str, value: Any = ANY, allowed: str | None = None) -> pytest.RaisesExc[ConfigError]:
    """Expects a `ConfigError` about `field`; its `value` and what is `allowed` are compared where they are given."""

    def matches(error: ConfigError) -> bool:
        same_value = value is ANY or error.value is value or error.value == value
        return error.field == field and same_value and allowed in (None, error.allowed)

    return pytest.raises(ConfigError, check=matches)
