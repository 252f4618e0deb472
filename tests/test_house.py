"""The house: what imports what, the lock, the notebooks' form, and the size of things."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise, product
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

PYTHONS = ("3.11", "3.12", "3.13")

TOP_LEVEL = {
    *("notebooks", "refine_lab", "widgets", "runs", "tests", "benchmarks", "docs", ".ci"),
    *("environment.yml", "pyproject.toml", "requirements.lock", "Makefile", "README.md", "LICENSE"),
    *("CHANGELOG.md", "SECURITY.md", ".pre-commit-config.yaml", ".gitignore"),
}

# -- layout and size -----------------------------------------------------------------------------------------------------


def test_the_top_level_holds_what_the_project_lists_and_nothing_else() -> None:
    missing = {name for name in TOP_LEVEL if not (ROOT / name).exists()}
    assert not missing
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    found = {line.split("/")[0] for line in listing.stdout.splitlines()}  # nothing outside a git checkout
    assert found <= TOP_LEVEL


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_files_and_functions_stay_small() -> None:
    too_long = []
    for path in sources("refine_lab", "widgets", "benchmarks", "tests"):
        text = path.read_text(encoding="utf-8")
        most = 500 if path.is_relative_to(ROOT / "tests") else 400
        if text.count("\n") > most:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not too_long


# -- imports -------------------------------------------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

hidden = set(sys.argv[1:])

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import refine_lab
names = [module.name for module in pkgutil.walk_packages(refine_lab.__path__, "refine_lab.")]
for name in names:
    importlib.import_module(name)
assert not hidden & set(sys.modules), hidden & set(sys.modules)
print(*names)
"""


def test_every_module_imports_without_a_gpu_jupyter_fla_and_triton() -> None:
    hidden = ("fla", "triton", "IPython", "ipykernel", "ipywidgets", "anywidget", "jupyterlab", "plotly", "papermill")
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *hidden],
        cwd=ROOT,
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert {"refine_lab.config", "refine_lab.types", "refine_lab.rng"} <= set(run.stdout.split())


def test_few_tests_assert_the_wording_of_an_error() -> None:
    count = sum(len(re.findall(r"\bmatch=", path.read_text(encoding="utf-8"))) for path in sources("tests"))
    assert count <= 120, "tests assert the fields of an error rather than its wording"


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def test_refine_lab_never_imports_widgets() -> None:
    paths = sources("refine_lab")
    assert paths
    assert not [str(path) for path in paths for name in imported(path) if name.partition(".")[0] == "widgets"]


def without_encoding(path: Path) -> Iterator[int]:
    """The lines that read or write a text in whatever encoding the system happens to have."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or {"encoding", None} & {keyword.arg for keyword in node.keywords}:
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = [word.value if isinstance(word, ast.Constant) else None for word in node.args]
        if name == "open" and not method:
            wrong = not (len(words) > 1 and "b" in str(words[1]))
        elif name in ("open", "fdopen"):  # of a path; `RunWriter.open(path)` is none
            modes = [word for word in words if re.fullmatch(r"[rwxa][bt+]{0,2}", str(word))]
            wrong = not any("b" in mode for mode in modes) if modes else not words
        elif name in ("read_text", "write_text"):
            wrong = method and len(words) < (2 if name == "write_text" else 1)
        else:
            piped = any(keyword.arg in ("text", "universal_newlines") for keyword in node.keywords)
            wrong = piped and name in ("run", "Popen", "check_output")
        if wrong:
            yield node.lineno


def test_every_text_is_read_and_written_in_a_named_encoding(tmp_path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources("refine_lab", "widgets", "benchmarks")
        for line in without_encoding(path)
    ]
    assert not found
    wrong = """open(path)
path.read_text()
path.write_text("a")
path.open()
path.open("w")
open("a.txt")
subprocess.run(words, text=True)"""
    right = """open(path, "rb")
path.read_text(encoding="utf-8")
read_text(path)
os.open(path, flags)
lab.open("ttt.ipynb")
Run.open(path)
path.open("ab")
subprocess.run(words)"""
    for name, text, lines in (("wrong", wrong, [1, 2, 3, 4, 5, 6, 7]), ("right", right, [])):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert list(without_encoding(tmp_path / name)) == lines


# -- the lock ------------------------------------------------------------------------------------------------------------


def lock_lines() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    """Canonical name -> the lock's line."""
    parsed = [Requirement(line) for line in lock_lines()]
    return {canonicalize_name(pin.name): pin for pin in parsed}


@pytest.fixture(scope="module")
def ranges() -> list[Requirement]:
    """What pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [Requirement(text) for text in project["dependencies"] + extras["hub"] + extras["dev"] + extras["eval"]]


def version(pin: Requirement) -> str:
    (only,) = pin.specifier
    assert only.operator == "=="
    return only.version


def test_the_lock_pins_one_version_of_each_package_for_both_builds_of_torch(pins: dict[str, Requirement]) -> None:
    assert len(pins) == len(lock_lines())
    assert version(pins["torch"]) == "2.13.0"
    assert version(pins["triton"]) == "3.7.1"
    assert not [name for name, pin in pins.items() if "+" in version(pin) or name.startswith(("nvidia-", "cuda-"))]


def test_the_lock_satisfies_every_range(pins: dict[str, Requirement], ranges: list[Requirement]) -> None:
    outside = [
        str(wanted) for wanted in ranges if not wanted.specifier.contains(version(pins[canonicalize_name(wanted.name)]))
    ]
    assert not outside


def environments() -> Iterator[dict[str, str]]:
    for python, (platform, system) in product(PYTHONS, (("linux", "Linux"), ("darwin", "Darwin"))):
        here = {name: str(value) for name, value in default_environment().items()}
        there = {"python_version": python, "python_full_version": f"{python}.0"}
        yield {**here, **there, "sys_platform": platform, "platform_system": system}


def holds(wanted: Requirement, environment: dict[str, str], extras: set[str]) -> bool:
    marker = wanted.marker
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in extras | {""})


def test_the_lock_leaves_no_dependency_unpinned(pins: dict[str, Requirement], ranges: list[Requirement]) -> None:
    unpinned = set()
    for environment in environments():
        seen: set[tuple[str, frozenset[str]]] = set()
        todo = [wanted for wanted in ranges if holds(wanted, environment, set())]
        while todo:
            wanted = todo.pop()
            name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
            if (name, extras) in seen or name.startswith(("nvidia-", "cuda-")):  # these come by torch's own exact pins
                continue
            seen.add((name, extras))
            if name not in pins or not holds(pins[name], environment, set()):
                unpinned.add(f"{name} on Python {environment['python_version']}, {environment['sys_platform']}")
            try:
                needs = distribution(name).requires or []
            except PackageNotFoundError:  # for another Python or system than this one
                continue
            todo += [need for need in map(Requirement, needs) if holds(need, environment, set(extras))]
    assert not unpinned


def test_environment_yml_carries_the_lock() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    head, _, pip_section = text.partition("  - pip:\n")
    assert "  - python=3.11\n" in head
    assert "  - pip\n" in head
    assert [line.removeprefix("      - ") for line in pip_section.splitlines()] == [*lock_lines(), "-e ."]


# -- notebooks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def notebooks() -> dict[str, dict]:
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert "midtrain.ipynb" in found
    return found


def code_cells(notebook: dict) -> list[tuple[dict, str]]:
    return [(cell, "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebooks_are_stripped_and_carry_kernel_python3(notebooks: dict[str, dict]) -> None:
    for name, notebook in notebooks.items():
        assert notebook["metadata"]["kernelspec"]["name"] == "python3", name
        for cell, source in code_cells(notebook):
            assert cell["outputs"] == [], f"{name}: {source}"
            assert cell["execution_count"] is None, f"{name}: {source}"
        assert "widgets" not in notebook["metadata"], f"{name}: saved widget state"


def test_notebooks_begin_with_a_documented_parameters_cell(notebooks: dict[str, dict]) -> None:
    for name, notebook in notebooks.items():
        cell, source = code_cells(notebook)[0]
        assert "parameters" in cell["metadata"].get("tags", []), name
        for line in source.splitlines():
            assert re.fullmatch(r"[a-z]\w*: .+ = .+  # \S.*", line), f"{name}: {line}"
            (statement,) = ast.parse(line).body
            assert isinstance(statement, ast.AnnAssign), f"{name}: {line}"
            assert statement.value is not None, f"{name}: {line}"
            ast.literal_eval(statement.value)


def test_notebook_cells_are_thin_and_follow_a_sentence(notebooks: dict[str, dict]) -> None:
    for name, notebook in notebooks.items():
        kinds = [cell["cell_type"] for cell in notebook["cells"]]
        assert kinds[0] == "markdown", name
        assert ("code", "code") not in list(pairwise(kinds)), f"{name}: a code cell with no words before it"
        for cell, source in code_cells(notebook):
            longest = 45 if "parameters" in cell["metadata"].get("tags", []) else 20
            assert source.count("\n") < longest, f"{name}: {source}"
            assert not re.search(r"^\s*(def|class) ", source, re.MULTILINE), f"{name}: {source}"
