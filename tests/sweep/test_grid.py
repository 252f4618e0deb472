"""Grids: values from texts, combinations, folders of cells, and what is refused before anything is created."""

from __future__ import annotations

from pathlib import Path

import pytest

from refine_lab.experiments.parameters import declared_parameters
from refine_lab.sweep.__main__ import main
from refine_lab.sweep.grid import combinations, read_notebook, split_values
from refine_lab.sweep.runner import plan
from tests.factories.swept import PARAMETERS, write_notebook
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("0:3", ["0", "1", "2"]),
        ("-1:1,7", ["-1", "0", "7"]),
        ("recall:word-4", ["recall:word-4"]),
        ("1:b,1.0:2", ["1:b", "1.0:2"]),
        ("a b, c ,1 : 3", ["a b", "c", "1", "2"]),
    ],
)
def test_a_comma_separates_values_and_a_range_is_of_whole_numbers(text, values):
    assert split_values("x", text) == values


def test_a_grid_has_all_combinations_in_the_types_that_the_notebook_declares(tmp_path):
    notebook = read_notebook(write_notebook(tmp_path / "a.ipynb"))
    cells = combinations(notebook, {"seeds": ["0", "1"], "rate": ["1", 2], "count": "3", "fail": "true"})
    assert [(cell["seeds"], cell["rate"]) for cell in cells] == [([0], 1.0), ([0], 2.0), ([1], 1.0), ([1], 2.0)]
    assert all(cell["count"] == 3 and cell["fail"] is True and cell["name"] is None for cell in cells)
    assert all(type(cell["rate"]) is float and "output" not in cell for cell in cells)
    (both,) = combinations(notebook, {"seeds": [[0, 1]]})
    assert both["seeds"] == [0, 1]
    union = combinations(notebook, [{"count": [1, 2]}, {"rate": [0.5, 0.7]}])
    assert [(cell["count"], cell["rate"]) for cell in union] == [(1, 0.5), (2, 0.5), (1, 0.7)]


def test_a_folder_depends_on_the_code_and_on_every_value_and_on_nothing_else(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb")
    (first,) = plan(path, {"rate": 0.25, "name": "/some/where/x y"}, tmp_path / "out").cells
    assert first.name.startswith("a-rate=0.25_name=x-y-") and first.folder.parent == tmp_path / "out"
    (again,) = plan(path, {"name": "/some/where/x y", "rate": "0.25", "count": 1}, tmp_path / "out").cells
    assert again.folder == first.folder
    assert first.parameters == {"rate": 0.25, "name": "/some/where/x y", "output": str(first.folder / "output")}
    (elsewhere,) = plan(path, {"rate": 0.25, "name": "/else/x y"}, tmp_path / "out").cells
    write_notebook(path, body="pass")
    (changed,) = plan(path, {"rate": 0.25, "name": "/some/where/x y"}, tmp_path / "out").cells
    assert len({first.folder, elsewhere.folder, changed.folder}) == 3
    assert not (tmp_path / "out").exists()


def test_the_parameters_of_the_projects_notebooks_are_read():
    found = {path.stem: declared_parameters(path) for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert found["midtrain"]["seeds"].default == [0, 1] and found["midtrain"]["seeds"].hint == "list[int]"
    assert found["midtrain"]["lr"].hint == "Optional[float]" and found["posttrain"]["release"].default is False
    assert read_notebook("midtrain").path == ROOT / "notebooks" / "midtrain.ipynb"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-p", "conut", "1"], "unknown parameter 'conut'; did you mean 'count'? allowed values: count, rate, "),
        (["-p", "count", "1,x"], "parameter count must be a whole number, got 'x'"),
        (["-r", "count", "0:3"], "parameter count must be a whole number, got '0:3'"),
        (["-p", "count", "1,1"], "parameter count contains the value 1 twice"),
        (["-p", "rate", "1,,2"], "parameter rate must be comma-separated values, none of them empty, got '1,,2'"),
        (["-p", "seeds", "3:3"], "the range of parameter seeds must be a:b with a below b; b is not included, got '3:3'"),
        (["-p", "seeds", "0:999999999"], "the number of values of seeds must be at most 10,000, got 999999999"),
        (["-p", "count", "0:200", "-p", "seeds", "0:200"], "at most 10,000, got 40000"),
        (["-p", "output", "x"], "parameter output must be left to the sweep, which sets output, report, detach, fresh"),
        (["-p", "count", "1", "-r", "count", "2"], "the parameters must be named once each, got 'count'"),
        (["--processes", "0"], "processes must be from 1 to 256, got 0"),
        (["--processes", "0", "--dry-run"], "processes must be from 1 to 256, got 0"),
        (["-p", "rate", "nan"], "parameter rate must be a number, got 'nan'"),
        (["-p", "rate", "1e-4,0.0001"], "parameter rate contains the value 0.0001 twice"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence_before_anything_is_created(tmp_path, capsys, options, sentence):
    notebook = write_notebook(tmp_path / "a.ipynb")
    assert main([str(notebook), "--out", str(tmp_path / "out"), *options]) == 2
    text = capsys.readouterr().err
    assert sentence in text and text.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.ipynb"]


ODD = """--name 'of "a", $HOME; {b}:c \\ ä"""


def test_a_value_may_look_like_an_option_or_contain_any_character(tmp_path, monkeypatch, capsys):
    notebook = write_notebook(tmp_path / "a {x} b.ipynb")
    options = ["-p", "count", "-1:1", "-r", "name", ODD, "-p", "rate", "-1e-4, 2", "-r", "seeds", "0,1"]
    monkeypatch.chdir(tmp_path)
    assert main([notebook.name, *options, "--out", "o u {t}", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        ["count", "rate"],
        *([count, rate] for count in ("-1", "0") for rate in ("-0.0001", "2.0")),
    ]
    grid = {"count": range(-1, 1), "name": ODD, "rate": [-1e-4, 2.0], "seeds": [[0, 1]]}
    cells = plan(notebook, grid, tmp_path / "o u {t}").cells
    assert [line.split()[-1] for line in lines[1:5]] == [cell.name.split()[-1] for cell in cells]
    assert all(cell.values["name"] == ODD and cell.values["seeds"] == [0, 1] for cell in cells)
    assert [path.name for path in tmp_path.iterdir()] == [notebook.name], "a dry run creates nothing"
    with pytest.raises(SystemExit) as refusal:
        main([str(notebook), "--out", "out", "-p", "count"])
    assert refusal.value.code == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-p", "reward", "cosine,cosin"], "unknown reward 'cosin'; did you mean 'cosine'?"),
        (["-p", "recipe", "midtrane"], "unknown midtrain recipe 'midtrane'; did you mean 'midtrain'?"),
        (
            ["-p", "group_by", "prefix"],
            "grouping by prefix needs at least 2 rollouts per position (RefineConfig.group_size), got 1",
        ),
    ],
)
def test_a_value_that_the_configuration_refuses_is_refused_too(tmp_path, capsys, options, sentence):
    assert main(["midtrain", "--out", str(tmp_path / "out"), *options]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ("count = 1", "each line of its parameters cell must be `name: type = value`, got 'count = 1'"),
        ("count: dict = {}", "must be one of int, Optional[int], float, "),
        ("count: int = max(1, 2)", "the default of parameter count must be a plain value"),
    ],
)
def test_a_notebook_without_declared_parameters_is_refused(tmp_path, parameters, sentence):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        read_notebook(write_notebook(tmp_path / "a.ipynb", parameters))
    assert sentence in str(refusal.value) and "a.ipynb" in str(refusal.value)


def test_a_file_that_is_no_notebook_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        read_notebook(tmp_path / "b.ipynb")
    assert "b.ipynb" in str(missing.value)
    (tmp_path / "c.ipynb").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        read_notebook(tmp_path / "c.ipynb")
    assert "c.ipynb is not a notebook" in str(refusal.value)
    assert PARAMETERS.count("\n") + 1 == len(declared_parameters(write_notebook(Path(tmp_path / "d.ipynb"))))
