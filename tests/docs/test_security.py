"""SECURITY.md: each promise names tests that exist, and no module does what it excludes."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.paths import ROOT

PROMISED = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## Limits")[0]
ROWS = re.findall(r"^\| ([A-Z`].+?) \| (.+?) \|$", PROMISED, flags=re.MULTILINE)
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "socket", "socketserver", "http", "asyncio"}
"""Modules that unpickle or open ports."""
ALLOWED = {
    "refine_lab/explore/worker.py": {"pickle.dumps", "pickle.HIGHEST_PROTOCOL"},  # an answer for its own parent process
    "refine_lab/runs/files.py": {"socket.gethostname"},  # which machine holds a lock
    "refine_lab/training/parallel.py": {"socket.if_nameindex", "socket.create_server"},  # workers, on loopback
}
"""What is used of these modules nevertheless."""
EVALUATING = {
    "refine_lab/method/custom.py": {"exec", "compile"},  # the reward of a run that is trained
    "refine_lab/experiments/parameters.py": {"eval"},  # the types in a notebook's own first cell
}
"""Where `eval`, `exec` and `compile` are called."""


def trees() -> dict[str, ast.Module]:
    paths = [path for package in ("refine_lab", "widgets") for path in (ROOT / package).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_every_promise_names_a_test() -> None:
    assert len(ROWS) >= 9
    assert not [promise for promise, tests in ROWS if "::" not in tests]


@pytest.mark.parametrize("name", re.findall(r"`(tests/[\w/]+\.py::\w+)`", PROMISED))
def test_the_test_of_a_promise_exists(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_the_readme_links_it() -> None:
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def imported(tree: ast.AST) -> set[str]:
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return {module.partition(".")[0] for module in modules}


def test_no_module_unpickles_or_opens_a_port() -> None:
    found = trees()
    assert len(found) > 100
    used = {path: imported(tree) & FORBIDDEN for path, tree in found.items()}
    assert {path for path, modules in used.items() if modules} == set(ALLOWED)
    for path, names in ALLOWED.items():
        assert set(re.findall(rf"\b(?:{'|'.join(used[path])})\.\w+", ast.unparse(found[path]))) == names
    loads = {path: ast.unparse(node) for path, tree in found.items() for node in ast.walk(tree) if _loads(node)}
    assert (
        list(loads) == ["refine_lab/models/loading.py"] and "weights_only=True" in loads["refine_lab/models/loading.py"]
    )
    assert not [path for path, tree in found.items() if re.search(r"allow_pickle=True|\.read_pickle", _code(tree))]


def test_code_is_evaluated_in_two_places_alone() -> None:
    called = {
        path: {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        for path, tree in trees().items()
    }
    assert {path: both for path, names in called.items() if (both := names & {"eval", "exec", "compile"})} == EVALUATING


def _loads(node: ast.AST) -> bool:
    """Whether a node calls `torch.load`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"


def _code(tree: ast.Module) -> str:
    """The code without texts, in which docstrings may name what is excluded."""
    return "\n".join(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.keyword, ast.Attribute)))
