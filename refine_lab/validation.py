"""Validation: `ConfigError`, and the decorator for configurations, whose fields pydantic checks."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import field, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from refine_lab.text import quote

C = TypeVar("C")


class ConfigError(ValueError):
    """An error about one value, in one sentence: the `field` (or argument), its `value`, and what is `allowed`."""

    def __init__(self, field: str, value: object, allowed: str, sentence: str | None = None) -> None:
        super().__init__(field, value, allowed, sentence)
        self.field, self.value, self.allowed, self.sentence = field, value, allowed, sentence

    def __str__(self) -> str:
        return self.sentence or f"{self.field} must be {self.allowed}, got {quote(self.value)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raises a `ConfigError` that names the value and what is allowed, unless `ok`."""
    if not ok:
        raise ConfigError(name, value, allowed)


def unknown(what: str, name: object, allowed: Iterable[str]) -> ConfigError:
    """Returns the error for an unknown name, which suggests the nearest allowed one."""
    names = list(allowed)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(names)
    return ConfigError(what, name, listed, f"unknown {what} {quote(name)}; {hint}allowed values: {listed}")


def path_of(name: str, text: str | Path) -> Path:
    """Returns the path that `text` names, with a leading ~ expanded; nothing need exist there.

    Raises ConfigError, which calls it `name`, for a string that cannot be a path and for a user without a home folder.
    """
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).split(": ")[-1]
        sentence = f"{name} must be a path that can be opened, got {quote(str(text))} ({reason})"
        raise ConfigError(name, text, "a path that can be opened", sentence) from None
    return path


class Config:
    """Base class of all configurations."""

    __no_type_check__ = True  # else beartype, in tests, rejects a value before a ConfigError can

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Converts the fields of a saved file to today's format; subclasses add what older files lack."""
        return values

    @classmethod
    def inner_configs(cls) -> dict[str, Any]:
        """Returns the classes of the configurations inside this one by field name."""
        types = {name: each.annotation for name, each in cls.__pydantic_fields__.items()}  # type: ignore[attr-defined]
        options = ((name, inner) for name, each in types.items() for inner in (each, *get_args(each)))
        return {name: inner for name, inner in options if is_dataclass(inner)}

    def _require(self, ok: bool, name: str, allowed: str) -> None:
        """Calls `require` for a field of this configuration, or for a nested field given as `field.field`."""
        require(ok, f"{type(self).__name__}.{name}", attrgetter(name)(self), allowed)


_SETTINGS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
_NAMES_TO_NUMBERS = "a mapping from names to numbers"
_ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "string_type": "a non-empty string",
    "string_too_short": "a non-empty string",
    "string_too_long": "a string of at most {max_length} characters",
    "string_unicode": "a valid Unicode string",
    "dict_type": _NAMES_TO_NUMBERS,
    "dataclass_exact_type": "a {class_name}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:,.16g}",
    "less_than_equal": "at most {le:,.16g}",
}
"""Description of allowed values by pydantic error type."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def configuration(cls: type[C]) -> type[C]:
    """Makes a class a frozen dataclass whose fields pydantic checks; it raises `ConfigError` for the first invalid field.

    A string in a field's `Annotated` replaces the description in `_ALLOWED`.
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=_SETTINGS)(cls)
    validate = made.__init__

    def __init__(self: Any, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            raise _config_error(made, values, error) from None

    made.__init__ = __init__
    return made


def _config_error(cls: Any, values: Mapping[str, Any], error: ValidationError) -> ConfigError:
    """Returns the error to report first; unknown field names take precedence, since they may be misspelt."""
    fields, errors = cls.__pydantic_fields__, error.errors()
    first = next((each for each in errors if each["type"] == "unexpected_keyword_argument"), errors[0])
    kind, context, (name, *keys) = first["type"], first.get("ctx", {}), first["loc"] or ("",)
    if isinstance(raised := context.get("error"), ConfigError):
        return raised
    if kind == "unexpected_keyword_argument":
        return unknown(f"field of {cls.__name__}", name, fields)
    place = f"{cls.__name__}.{name}"
    if kind == "missing":
        return ConfigError(place, None, "given", f"{cls.__name__} needs the field {name!r}, which is missing")
    if keys[-1:] == ["[key]"]:
        return ConfigError(place, values[str(name)], _NAMES_TO_NUMBERS)
    options = get_args(fields[name].annotation)
    if kind == "literal_error":
        words = "one of " + ", ".join(map(repr, options))
    else:
        words = next((each for each in fields[name].metadata if isinstance(each, str)), None) or _ALLOWED[kind]
    words = words.format(**context) + (", or none" if type(None) in options else "")
    return ConfigError(place + "".join(f"[{key!r}]" for key in keys), first["input"], words)


MOST_TOKENS = 2**20
"""Maximum number of tokens of a sequence, and of all rollouts of a sequence."""
MOST_CHARACTERS = 2**22
"""Maximum number of characters of a text that is tokenised at once."""
MOST_SEED = 2**53
MOST_IN_BATCH = 2**28
"""Maximum number of tokens of a batch."""

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
"""A number of steps, examples or the like."""
Natural = Annotated[int, Field(ge=0, le=10_000_000)]
Size = Annotated[int, Field(ge=1, le=65_536)]
"""A number of rows or tokens that are in memory together."""
Length = Annotated[int, Field(ge=16, le=MOST_TOKENS)]
"""The number of tokens of a sequence."""
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
