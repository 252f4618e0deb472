"""The README's Python runs as it stands there, and its commands are those of the Makefile."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import torch

from refine_lab.models import State, load_model
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_first_python_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert names["rest"].hidden_states.shape[1] == names["tokens"].shape[1] - 4
    saved, end = State.load("branches.safetensors"), names["trace"].final_state
    assert saved.rows == 4
    assert all(torch.equal(saved.select([3]).tensors[name], end.tensors[name]) for name in end.tensors)
    assert capsys.readouterr().out.startswith("def area(width, height):\n    return width *")


def test_the_second_python_block_names_models_as_they_are_looked_for():
    """A shipped one, one on the hub, a folder of our runs: the first is loaded, the others are of the forms that there are."""
    tree = ast.parse(blocks("python")[1])
    shipped, hub, run = (node.args[0].value for node in ast.walk(tree) if isinstance(node, ast.Call))
    assert load_model(shipped, device="cpu")[0].config.model_type == "lact_swiglu"
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", hub)
    assert Path(run).parts[0] == "runs"


def test_the_third_python_block_uses_what_there_is():
    tree = ast.parse(blocks("python")[2])
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names: dict = {}
    exec(compile(ast.Module(imports, []), "README.md", "exec"), names)
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called == {"follow", "start", "midtrain", "load_model"}
    assert called - {"load_model"} <= set(names)
    assert names["midtrain"]("refine", seed=0).method == "refine"


def test_every_make_command_is_a_target():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {
        name for pair in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", README, re.MULTILINE) for name in pair if name
    }
    assert {"demo", "test", "setup", "check", "lint"} <= used
    assert used <= targets


def test_every_tier_is_in_the_table():
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"][
        "markers"
    ]
    named = {mark.partition(":")[0] for mark in marks}
    assert named == set(re.findall(r"^\| \w+ \| `(\w+)` \|", README, re.MULTILINE))
