"""The documents: every name of ours that they mention exists, and so does every file they point at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from refine_lab import config
from tests.support.paths import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("refine_lab", "widgets", "notebooks", "benchmarks", "tests", "docs", "runs")


def quoted(path: Path) -> list[str]:
    """What stands between backticks, in prose."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def resolve(name: str) -> object:
    """The module, or what stands in it, that a dotted name leads to."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def test_names_resolve_or_are_reported() -> None:
    assert resolve("refine_lab.method.selection.smooth") is import_module("refine_lab.method.selection").smooth
    with pytest.raises(AttributeError, match="no_such"):
        resolve("refine_lab.method.selection.no_such")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_dotted_name_resolves(path: Path) -> None:
    names = [name for name in quoted(path) if re.fullmatch(r"(refine_lab|widgets|benchmarks)(\.\w+)+", name)]
    assert names or path.name not in ("method.md", "architecture.md")
    for name in names:
        resolve(name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_field_of_a_configuration_exists(path: Path) -> None:
    for text in quoted(path):
        if match := re.fullmatch(r"(RefineConfig|DataConfig|TrainConfig)\.(\w+)", text):
            kind = getattr(config, match[1])
            assert match[2] in {item.name for item in fields(kind)} or hasattr(kind, match[2]), text


def pointed_at(path: Path) -> Iterator[Path]:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            yield path.parent / target
    for name in quoted(path):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", name):
            yield ROOT / name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_pointed_at_is_there(path: Path) -> None:
    missing = [str(target.relative_to(ROOT)) for target in pointed_at(path) if not target.exists()]
    assert not missing


def imported_names(path: Path) -> list[str]:
    """The modules of ours that the Python blocks of a document import from."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^(?:from|import) (refine_lab[\w.]*)", "\n".join(blocks), flags=re.MULTILINE)


def test_documents_import_our_names_from_the_package_itself() -> None:
    found = {name for path in DOCUMENTS for name in imported_names(path)}
    assert found == {"refine_lab"}


def test_generated_parts_are_those_that_the_code_gives() -> None:
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, text in generate.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} differs from the code: run `make docs`"
