"""Reads a notebook's parameters: converts each value to its declared type and refuses unknown names.

The parameters cell declares each parameter as `name: type = value`; papermill adds a cell of plain assignments after
it. `-p`, `-y` and `-f` deliver one value as different types (`-y 'lr: 1e-5'` arrives as a string), so the declared type
decides. A type that allows None is written `"Optional[int]"`, because papermill does not understand `|` and a
parameters cell imports nothing. A number is never accepted as a string: `-p data 007` arrives as 7, and the original
text is lost. `-r` passes it unchanged.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Optional, get_args, get_origin

from refine_lab.validation import require, unknown

NONE = ("none", "null", "~", "")
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "none"}


def parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the notebook's declared parameters, converted to their declared types; `namespace` is its `globals()`.

    Raises ValueError for a name that the caller set but the notebook does not declare, suggesting the nearest declared
    one, and for a value that is not of the declared type.
    """
    declared: dict[str, Any] = namespace.get("__annotations__", {})
    for name in _injected(namespace.get("In", ())):
        if name not in declared:
            raise unknown("parameter", name, declared)
    return {name: convert(name, hint, namespace[name]) for name, hint in declared.items()}


def convert(name: str, hint: Any, value: Any) -> Any:
    """Converts `value`, possibly a string, to `hint`: bool, int, float, str or list[int], or `"Optional[...]"` of one.

    Raises ValueError that names the parameter, the value and what is allowed.
    """
    hint = eval(hint, {"Optional": Optional}) if isinstance(hint, str) else hint
    options = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if NoneType in options and (value is None or str(value).strip().lower() in NONE):
        return None
    (kind,) = (option for option in options if option is not NoneType)
    made = _whole_numbers(value) if get_origin(kind) is list else CONVERTERS[kind](value)
    words = "whole numbers, as in 0,1,2" if get_origin(kind) is list else WORDS[kind]
    words += " or none" if NoneType in options else ""
    if kind is str and (value is None or isinstance(value, (bool, int, float))):
        words += (
            f" (papermill's -p makes numbers, True, False and None of texts that look like them: use -r {name} VALUE)"
        )
    require(made is not None, f"parameter {name}", value, words)
    return made


def _injected(cells: Iterable[str]) -> list[str]:
    """Returns the names that papermill assigned, from executed cells that begin like papermill's own."""
    names = []
    for cell in cells:
        if re.match(r"\s*# Parameters\n", cell):
            targets = (node.targets for node in ast.parse(cell).body if isinstance(node, ast.Assign))
            names += [target.id for group in targets for target in group if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("PAPERMILL_")]  # papermill's own, from --inject-paths


def _bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else TRUTH.get(str(value).strip().lower())


def _number(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    try:
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return int(value)  # exactly, which a float above 2**53 is not
    except ValueError:
        pass  # 25.0 and 2.5e1 as texts are whole as well
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole_numbers(value: Any) -> list[int] | None:
    if isinstance(value, str):
        value = [part for part in value.strip().strip("[]()").split(",") if part.strip()]
    numbers = [_whole(part) for part in (value if isinstance(value, (list, tuple)) else [value])]
    whole = [number for number in numbers if number is not None]
    return whole if whole and len(whole) == len(numbers) else None


CONVERTERS = {bool: _bool, float: _number, int: _whole, str: _text}


def in_jupyterlab() -> bool:
    """Returns whether this kernel's notebook is open in Jupyter, whose server sets a session name.

    papermill sets none itself. If it is called from a notebook cell, it passes on that notebook's name, which is then
    also in the environment of the kernel's parent process.
    """
    if not os.environ.get("JPY_SESSION_NAME"):
        return False
    parent = Path(f"/proc/{os.getppid()}/environ")  # Linux
    return not parent.is_file() or b"\0JPY_SESSION_NAME=" not in b"\0" + parent.read_bytes()
