"""The cells of a grid: a notebook, the values of its parameters, and all combinations of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from refine_lab.experiments.parameters import Declared, code_cells, convert, declared_parameters
from refine_lab.runs.durable import short_digest
from refine_lab.runs.environment import project_root
from refine_lab.text import quote
from refine_lab.validation import ConfigError, path_of, require, unknown

MOST_CELLS = 10_000
"""Maximum number of cells of a grid."""
OWNED = ("output", "report", "detach", "fresh")
"""Parameters that the sweep sets in every notebook that declares them."""
RANGE = re.compile(r"\s*([+-]?\d{1,15})\s*:\s*([+-]?\d{1,15})\s*")

Grid = Mapping[str, Any]
"""Parameter -> its value, or a list, tuple or range of values."""


@dataclass(frozen=True)
class Notebook:
    """A notebook that can be swept over: its file, its parameters and a digest of its code."""

    path: Path
    content: bytes
    parameters: Mapping[str, Declared]
    digest: str
    "Digest of the code cells only; text and outputs are not included."

    @property
    def name(self) -> str:
        return self.path.stem


def read_notebook(notebook: Path | str) -> Notebook:
    """Reads a notebook: a path, or the name of one of the project's notebooks, such as `midtrain`.

    Raises FileNotFoundError or ValueError for anything else.
    """
    path = path_of("the notebook", notebook)
    root = project_root()
    if not path.suffix and path.name == str(notebook) and not path.exists() and root is not None:
        path = root / "notebooks" / f"{notebook}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"there is no notebook {path}")
    content = path.read_bytes()
    cells = code_cells(path, content)
    digest = short_digest(hashlib.sha256(json.dumps([cell["source"] for cell in cells]).encode()))
    return Notebook(path.absolute(), content, declared_parameters(path, cells), digest)


def split_values(name: str, text: str) -> list[str]:
    """Returns the values in a command-line string: `a,b` is two values, and `a:b` the integers from a to b - 1.

    Spaces around a value do not belong to it.
    Raises ConfigError for an empty value, an empty range, and more than `MOST_CELLS` values.
    """
    values: list[str] = []
    for part in text.split(","):
        require(bool(part.strip()), f"parameter {name}", text, "comma-separated values, none of them empty")
        if found := RANGE.fullmatch(part):
            first, end = int(found[1]), int(found[2])
            require(first < end, f"the range of parameter {name}", part, "a:b with a below b; b is not included")
            _require_few(name, len(values) + end - first)
            values += map(str, range(first, end))
        else:
            values.append(part.strip())
    _require_few(name, len(values))
    return values


def combinations(notebook: Notebook, grids: Grid | Sequence[Grid]) -> list[dict[str, Any]]:
    """Returns the parameters of every cell, in the order of the grids: all combinations of each grid's values.

    A cell holds every parameter that the notebook declares, except those in `OWNED`. A cell that several grids contain
    is returned once. Raises ConfigError, which names the parameter, for one that the notebook does not declare, one in
    `OWNED`, a value of another type, a value that is listed twice, and more than `MOST_CELLS` cells.
    """
    defaults = {name: each.default for name, each in notebook.parameters.items() if name not in OWNED}
    found: dict[str, dict[str, Any]] = {}
    for grid in [grids] if isinstance(grids, Mapping) else grids:
        axes = {name: axis(notebook, name, values) for name, values in grid.items()}
        _require_few("all parameters", len(found) + prod(map(len, axes.values())))
        for values in product(*axes.values()):
            cell = defaults | dict(zip(axes, values, strict=True))
            found.setdefault(json.dumps(cell, sort_keys=True), cell)
    return list(found.values())


def axis(notebook: Notebook, name: str, values: Any) -> list[Any]:
    """Returns the values of one parameter, of the type that the notebook declares."""
    free = [each for each in notebook.parameters if each not in OWNED]
    if name in OWNED:
        allowed = f"left to the sweep, which sets {', '.join(OWNED)} for each cell"
        raise ConfigError(f"parameter {name}", values, allowed)
    if name not in free:
        raise unknown("parameter", name, free)
    many = isinstance(values, Iterable) and not isinstance(values, (str, Mapping))
    listed = list(values) if many else [values]
    require(bool(listed), f"parameter {name}", values, "at least one value")
    typed = [convert(name, notebook.parameters[name].hint, value) for value in listed]
    for number, value in enumerate(typed):
        if value in typed[:number]:
            raise ConfigError(
                f"parameter {name}", value, "", f"parameter {name} contains the value {quote(value)} twice"
            )
    return typed


def changed(notebook: Notebook, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a cell that differ from the notebook's defaults."""
    return {name: value for name, value in values.items() if value != notebook.parameters[name].default}


def varying(cells: Collection[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the parameters in which cells differ."""
    names = next(iter(cells), {})
    return [name for name in names if len({json.dumps(cell[name]) for cell in cells}) > 1]


def _require_few(name: str, count: int) -> None:
    allowed = f"at most {MOST_CELLS:,}"
    require(count <= MOST_CELLS, f"the number of values of {name}", count, allowed)
