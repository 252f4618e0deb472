"""What the cells of the notebooks import exists, without executing a notebook."""

from __future__ import annotations

import ast
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(path: Path) -> ast.Module:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").split("\n")
    return ast.parse("\n".join(line for line in lines if not line.startswith(("%", "!"))))


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_imported_name_and_every_attribute_of_a_module_exists(path: Path) -> None:
    tree, modules, missing = code_of(path), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("refine_lab", "widgets"):
            package = import_module(node.module)
            for name in node.names:
                try:
                    value = getattr(package, name.name, None) or import_module(f"{node.module}.{name.name}")
                except ModuleNotFoundError:
                    missing.append(f"{node.module}.{name.name}")
                else:
                    if isinstance(value, ModuleType):
                        modules[name.asname or name.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and not hasattr(module, node.attr):
                missing.append(f"{node.value.id}.{node.attr}")
    assert not missing
