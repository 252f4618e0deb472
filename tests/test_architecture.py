"""The tree: folders in the order of docs/architecture.md, each importing only earlier ones, and no cycle among files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FACADE = "refine_lab"
"""`refine_lab/__init__.py` hands out names of every folder when they are asked for, and no module imports it."""


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the two packages."""
    paths = (path for package in ("refine_lab", "widgets") for path in (ROOT / package).rglob("*.py"))
    dotted = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in dotted.items()}


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it: inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inner if name in known)
            if node.module in known and not all(name in known for name in inner):
                yield node.module


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    found = {name: set(imports(path, known)) - {name} for name, path in known.items() if name != FACADE}
    assert len(found) > 100 and sum(map(len, found.values())) > 400
    return found


def listed_folders() -> list[str]:
    """The first column of the table under "Folders", in its order."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, _, section = text.partition("\n## Folders\n")
    return re.findall(r"^\| `([\w/]+)/` \|", section.partition("\n## ")[0], flags=re.MULTILINE)


def test_the_list_names_every_folder_once() -> None:
    there = {str(path.parent.relative_to(ROOT)) for path in modules().values()}
    listed = listed_folders()
    assert sorted(listed) == sorted(there)


def test_each_folder_imports_only_earlier_ones(graph: dict[str, set[str]]) -> None:
    known, order = modules(), {folder: place for place, folder in enumerate(listed_folders())}
    place = {name: order[str(path.parent.relative_to(ROOT))] for name, path in known.items()}
    upwards = [
        f"{name} imports {other}" for name, others in graph.items() for other in others if place[other] > place[name]
    ]
    assert not upwards


def test_no_module_imports_the_facade(graph: dict[str, set[str]]) -> None:
    assert [name for name, others in graph.items() if FACADE in others] == []


def test_there_is_no_cycle_among_files(graph: dict[str, set[str]]) -> None:
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_imports_inside_functions_count(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "def f():\n    from refine_lab.models import base\n    import refine_lab.config\n", encoding="utf-8"
    )
    assert set(imports(path, modules())) == {"refine_lab.models.base", "refine_lab.config"}
