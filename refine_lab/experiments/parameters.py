"""Reads a notebook's parameters: converts each value to its declared type and rejects unknown names.

The parameters cell declares each parameter as `name: type = value`; papermill adds a cell of plain assignments after
it. `-p`, `-y` and `-f` deliver one value as different types (`-y 'lr: 1e-5'` arrives as a string), so the declared type
decides. A type that allows None is written `"Optional[int]"`, because papermill does not understand `|` and a
parameters cell imports nothing. A number is never accepted as a string: `-p data 007` arrives as 7, and the original
text is lost. `-r` passes it unchanged.
"""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Optional, get_args

from pydantic import AllowInfNan, BeforeValidator, Field, Strict, StringConstraints, TypeAdapter, ValidationError

from refine_lab.text import shorten
from refine_lab.validation import ConfigError, require, unknown


def _number(value: Any) -> Any:
    """Rejects booleans, and parses an exponent, which pydantic's integers do not have: `2.5e1` is the whole number 25."""
    if isinstance(value, bool):
        raise ValueError("a boolean is not a number")
    return float(value) if isinstance(value, str) and "e" in value.lower() else value


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return [part for part in value.strip("[]()").split(",") if part.strip()]
    return value if isinstance(value, (list, tuple)) else [value]


def _is_none(value: Any, kind: Any) -> bool:
    """Returns whether a value is a way to write None; ~ is the home folder, and a blank string is rejected."""
    if kind is str:
        return isinstance(value, str) and value.lower() in ("none", "null", "")
    return str(value).strip().lower() in ("none", "null", "~", "")


_Whole = Annotated[int, BeforeValidator(_number)]
_Name = Annotated[str, Strict(), StringConstraints(strip_whitespace=True, min_length=1)]
_Numbers = Annotated[list[_Whole], BeforeValidator(_items), Field(min_length=1, max_length=1000)]
_Names = Annotated[list[_Name], BeforeValidator(_items), Field(min_length=1, max_length=1000)]
TYPES: dict[Any, tuple[Any, str]] = {
    int: (_Whole, "a whole number"),
    float: (Annotated[float, BeforeValidator(_number), AllowInfNan(False)], "a number"),
    bool: (bool, "true or false"),
    str: (Annotated[str, Strict()], "a string"),
    list[int]: (_Numbers, "up to 1,000 whole numbers, as in 0,1,2"),
    list[str]: (_Names, "up to 1,000 names, as in sft,refine"),
}
"""Declared type -> the type by which pydantic converts a value, and the description of allowed values."""


RENAMED_PARAMETERS = {"moving": "trainable"}
"""Former names of notebook parameters, which this version still accepts with a warning."""


def parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the notebook's declared parameters, converted to their declared types; `namespace` is its `globals()`.

    Raises ValueError for a name that the caller set but the notebook does not declare, suggesting the nearest declared
    one, and for a value that is not of the declared type.
    """
    declared: dict[str, Any] = namespace.get("__annotations__", {})
    values = dict(namespace)
    for name in _injected(namespace.get("In", ())):
        if (present := RENAMED_PARAMETERS.get(name)) in declared:
            message = f"parameter {name!r} is now {present!r}; the former name will be removed"
            warnings.warn(message, FutureWarning, stacklevel=2)
            values[present] = values[name]
        elif name not in declared:
            raise unknown("parameter", name, declared)
    return {name: convert(name, hint, values[name]) for name, hint in declared.items()}


@dataclass(frozen=True)
class Declared:
    """A parameter as a notebook declares it."""

    hint: str
    "Its type: one of `TYPES`, or `Optional[...]` of one."
    default: Any


def declared_parameters(notebook: Path, cells: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Declared]:
    """Returns the parameters that a notebook declares in its cell tagged `parameters`; nothing is executed.

    `cells` are its code cells, if they were read already.

    Raises ValueError, naming the notebook, if it has no such cell, or if a line of the cell is not
    `name: type = value` with a type in `TYPES` and a plain value.
    """
    for cell in code_cells(notebook) if cells is None else cells:
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            break
    else:
        raise ValueError(f"{notebook} has no code cell with the tag 'parameters'")
    found = {}
    for statement in ast.parse("".join(cell["source"])).body:
        line = shorten(ast.unparse(statement))
        declares = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value
        if not isinstance(statement, ast.AnnAssign) or not declares:
            raise ValueError(f"{notebook}: each line of its parameters cell must be `name: type = value`, got {line!r}")
        hint = statement.annotation
        text = hint.value if isinstance(hint, ast.Constant) else ast.unparse(hint)
        allowed = [name for kind in TYPES for name in (_type_name(kind), f"Optional[{_type_name(kind)}]")]
        name = ast.unparse(statement.target)
        require(text in allowed, f"the type of parameter {name} of {notebook}", text, "one of " + ", ".join(allowed))
        try:
            default = ast.literal_eval(statement.value)  # type: ignore[arg-type]
        except ValueError:
            raise ValueError(
                f"{notebook}: the default of parameter {name} must be a plain value, got {line!r}"
            ) from None
        found[name] = Declared(str(text), default)
    return found


def code_cells(notebook: Path, content: bytes | None = None) -> list[dict[str, Any]]:
    """Returns a notebook's code cells, from its `content` if that was read already.

    Raises FileNotFoundError, and ValueError for a file that is not a notebook.
    """
    if content is None and not notebook.is_file():
        raise FileNotFoundError(f"there is no notebook {notebook}")
    try:
        cells = json.loads(notebook.read_bytes() if content is None else content)["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{notebook} is not a notebook of Jupyter's format 4") from None


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def convert(name: str, hint: Any, value: Any) -> Any:
    """Converts `value`, possibly a string, to `hint`: a type of `TYPES`, or `"Optional[...]"` of one.

    Raises ValueError that names the parameter, the value and what is allowed.
    """
    hint = eval(hint, {"Optional": Optional}) if isinstance(hint, str) else hint
    optional = NoneType in get_args(hint)
    kind = get_args(hint)[0] if optional else hint
    if optional and (value is None or _is_none(value, kind)):
        return None
    annotation, allowed = TYPES[kind]
    allowed += " or none" if optional else ""
    if kind is str and (value is None or isinstance(value, (bool, int, float))):
        allowed += f" (papermill's -p converts strings that look like numbers, booleans or None: use -r {name} VALUE)"
    if kind is str and isinstance(value, str) and not value.strip():
        raise ConfigError(f"parameter {name}", value, "a non-blank string" + (", or none" if optional else ""))
    try:
        stripped = value.strip() if isinstance(value, str) and kind is not str else value
        return TypeAdapter(annotation).validate_python(stripped)
    except ValidationError:
        raise ConfigError(f"parameter {name}", value, allowed) from None


def _injected(cells: Iterable[str]) -> list[str]:
    """Returns the names that papermill assigned, from executed cells that begin like papermill's own."""
    nodes = (node for cell in cells if re.match(r"\s*# Parameters\n", cell) for node in ast.walk(ast.parse(cell)))
    names = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return [name for name in names if not name.startswith("PAPERMILL_")]  # papermill adds these for --inject-paths


def in_jupyterlab() -> bool:
    """Returns whether this kernel's notebook is open in Jupyter, whose server sets a session name.

    papermill sets none itself. If it is called from a notebook cell, it passes on that notebook's name, which is then
    also in the environment of the kernel's parent process.
    """
    if not os.environ.get("JPY_SESSION_NAME"):
        return False
    parent = Path(f"/proc/{os.getppid()}/environ")  # Linux
    return not parent.is_file() or b"\0JPY_SESSION_NAME=" not in b"\0" + parent.read_bytes()
