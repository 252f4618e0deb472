"""Checks a model's configuration against its annotations and rejects an invalid value by name, in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isclose, isfinite
from typing import Any, TypeGuard

from transformers import PreTrainedConfig

from refine_lab.validation import ConfigError


def check_kinds(config: PreTrainedConfig) -> None:
    """Raises ConfigError for a field whose value does not match its annotation.

    `int` is a size and hence a positive whole number, `float` a positive number, `bool` True or False, each optionally
    with `| None`. A token id (`*_token_id`) is any whole number below the vocabulary size, and `initializer_range` may
    be 0. Other annotations are not checked.
    """
    for name, annotation in _annotations(type(config)).items():
        kind, value = annotation.removesuffix(" | None"), getattr(config, name)
        if kind not in KINDS or (value is None and kind != annotation):
            continue
        fits, allowed = TOKEN if name.endswith("_token_id") else RANGE if name == "initializer_range" else KINDS[kind]
        if not fits(value):
            raise _refusal(config, name, allowed if kind == annotation else f"{allowed} or None")
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if pad is not None and size is not None and not -size <= pad < size:
        raise _refusal(config, "pad_token_id", f"below vocab_size {size}")


def check_allowed(config: PreTrainedConfig, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ConfigError for a field whose value is not among those allowed."""
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise _refusal(config, name, f"one of {values}")


def whole_width(width: float) -> bool:
    """Returns whether the product of a size and a ratio is a whole number, up to rounding."""
    return isclose(width, round(width), rel_tol=1e-9)


def _refusal(config: PreTrainedConfig, name: str, allowed: str) -> ConfigError:
    return ConfigError(f"{type(config).__name__}.{name}", getattr(config, name), allowed)


def _annotations(kind: type) -> dict[str, str]:
    """Returns our own fields with their annotations as written, those of base classes first."""
    ours = [cls for cls in reversed(kind.__mro__) if issubclass(cls, PreTrainedConfig) and cls is not PreTrainedConfig]
    return {name: str(text) for cls in ours for name, text in cls.__annotations__.items()}


def whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: object) -> TypeGuard[float]:
    return (isinstance(value, float) and isfinite(value)) or whole(value)


Kind = tuple[Callable[[Any], bool], str]
KINDS: Mapping[str, Kind] = {
    "int": (lambda x: whole(x) and x > 0, "a positive whole number"),
    "float": (lambda x: number(x) and x > 0, "a positive number"),
    "bool": (lambda x: isinstance(x, bool), "True or False"),
}
TOKEN: Kind = (whole, "a token's number")
RANGE: Kind = (lambda x: number(x) and x >= 0, "a number that is not negative")
