"""Parameters that no notebook can use: each is refused in one sentence, within seconds, before a run directory is made."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.factories.bad_files import bad_files
from tests.support.executed_notebooks import execute
from tests.support.paths import ROOT, TESTS

CASES = json.loads((TESTS / "fixtures" / "bad_parameters.json").read_text(encoding="utf-8"))
IDS = [f"{number}-{case['notebook']}-{','.join(case['parameters'])}" for number, case in enumerate(CASES)]
BY_PAPERMILL = [
    next(case for case in CASES if case["notebook"] == notebook and name in case["parameters"])
    for notebook, name in (("midtrain", "sequence_length"), ("pretrain", "documents"), ("posttrain", "train"),
                           ("explore", "file"), ("monitor", "folder"))
]  # fmt: skip
SECONDS = 10.0
LONGEST = 1000
"""Number of characters of a sentence, most of them the names that are allowed."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bad_files(tmp_path_factory.mktemp("files"))


def filled(value: Any, files: Path) -> Any:
    """A value of the list, with its placeholders replaced."""
    if isinstance(value, list):
        return [filled(item, files) for item in value]
    if not isinstance(value, str):
        return value
    long = {"{files}": str(files), "{letters}": "x" * 5000, "{digits}": "9" * 5000, "{long}": "a word " * 600_000}
    for placeholder, text in long.items():
        value = value.replace(placeholder, text)
    return value


def run_cells(notebook: str, parameters: dict[str, Any]) -> None:
    """Executes a notebook's code in this process, with its parameters, up to the line that starts runs.

    The parity gate is left out, since it does not depend on a parameter that the list holds.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells:
        if cell.cell_type != "code" or "gate.check()" in cell.source:
            continue
        source, starts, _ = cell.source.partition("\nrun_in_turn(")
        exec(compile(source, notebook, "exec", dont_inherit=True), namespace)
        if starts:
            return
        if "parameters" in cell.metadata.get("tags", []):
            namespace.update(parameters)
            namespace["In"] = ["# Parameters\n" + "\n".join(f"{name} = 0" for name in parameters)]


def one_sentence(text: str) -> bool:
    return 0 < len(text) <= LONGEST and "\n" not in text and text.isprintable()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 150
    assert len({json.dumps(case, sort_keys=True) for case in CASES}) == len(CASES)
    assert {case["notebook"] for case in CASES} == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_bad_parameter_is_refused_in_one_sentence(
    case: dict[str, Any], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFINE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parameters = {name: filled(value, files) for name, value in case["parameters"].items()}
    began = time.process_time()  # other processes of a busy machine do not count
    with pytest.raises((ValueError, OSError)) as refusal:
        run_cells(case["notebook"], parameters)
    assert time.process_time() - began < SECONDS
    text = str(refusal.value)
    assert one_sentence(text), text
    assert not [name for name in case["names"] if name not in text], text
    assert not list((tmp_path / "runs").rglob("config.json"))


@pytest.mark.notebook
@pytest.mark.parametrize("case", BY_PAPERMILL, ids=lambda case: case["notebook"])
def test_papermill_reports_the_same_sentence(case: dict[str, Any], files: Path, tmp_path: Path) -> None:
    parameters = {name: filled(value, files) for name, value in case["parameters"].items()}
    status, output = execute(case["notebook"], tmp_path, **parameters)
    assert status == 1
    last = output.strip().splitlines()[-1]
    assert one_sentence(last)
    assert not [name for name in case["names"] if name not in last], last
    assert not list((tmp_path / "runs").rglob("config.json"))
