"""How a test says what is refused, without a word of the sentence that tells it."""

from __future__ import annotations

from typing import Any

import pytest

from refine_lab.validation import ConfigError

ANY: Any = object()


def refused(field: str, value: Any = ANY, allowed: str | None = None) -> pytest.RaisesExc[ConfigError]:
    """Expects a `ConfigError` about `field`; its `value` and what is `allowed` are compared where they are given."""

    def matches(error: ConfigError) -> bool:
        assert error.field == field
        assert value is ANY or error.value is value or error.value == value
        assert allowed in (None, error.allowed)
        return True

    return pytest.raises(ConfigError, check=matches)


def naming(kind: type[Exception] | tuple[type[Exception], ...], *facts: object) -> pytest.RaisesExc[Exception]:
    """Expects an error of `kind` that names every one of `facts`: the file, the value, the number that it is about."""
    assert facts, "an error of the right type may be another one"

    def names(error: Exception) -> bool:
        missing = [str(fact) for fact in facts if str(fact) not in str(error)]
        assert not missing, f"{missing} not in {str(error)!r}"
        return True

    return pytest.raises(kind, check=names)
