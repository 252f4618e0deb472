"""The list of models to choose from, and the names of runs that are found from any working folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refine_lab.explore.session import Session
from refine_lab.models.hub import SHIPPED, locate
from refine_lab.runs.files import is_run
from refine_lab.runs.run import Run, list_runs, located, portable
from refine_lab.ttt_config import TTTConfig
from tests.factories.run_monitor import write_run
from tests.support.refusals import naming
from widgets.parts.model_picker import model_choices, model_names, model_picker, model_words, run_picker
from widgets.run_monitor import RunMonitor

SHIPPED_NAMES = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir())


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs, with one that has two checkpoints and a newer one that has none; the kernel works elsewhere."""
    folder = tmp_path / "runs"
    run = write_run(folder, 0)
    for step in (2, 4):
        shutil.copytree(SHIPPED / "tiny-lact", run.path / "checkpoints" / f"step-{step}")
    write_run(folder, 1)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("REFINE_RUNS", str(folder))
    monkeypatch.chdir(tmp_path / "notebooks")
    return folder


def test_every_listed_name_is_found_from_any_folder(runs: Path) -> None:
    run = f"runs/{next(path.name for path in runs.iterdir() if path.name.endswith('s0'))}"
    checkpoints = [f"{run}/checkpoints/step-4", f"{run}/checkpoints/step-2"]
    assert model_names() == [*SHIPPED_NAMES, run, *checkpoints]
    saved = runs.parent / run / "checkpoints"
    places = [saved / "step-4", saved / "step-4", saved / "step-2"]
    for prefix in ("runs/", ""):  # the bare name is found, too
        assert [locate(prefix + name.removeprefix("runs/")).folder for name in (run, *checkpoints)] == places
    with naming(FileNotFoundError, "nowhere", runs):
        locate("nowhere")


def test_runs_are_listed_in_words(runs: Path) -> None:
    name = next(path.name for path in runs.iterdir() if path.name.endswith("s0"))
    *_, last, newest, oldest = model_choices()
    words = [each.words for each in (last, newest, oldest)]
    assert words == [f"REFINE, seed 0{step} – {name}" for step in ("", ", step 4", ", step 2")]
    assert [each.group for each in (last, newest, oldest)] == ["finished runs", "checkpoints", "checkpoints"]
    assert [model_words(each) for each in (name, f"runs/{name}/checkpoints/step-2")] == [words[0], words[2]]
    assert model_words("tiny-lact") == "tiny-lact (shipped model)" and model_words("org/repo") == "org/repo"


def test_runs_with_recorded_rollouts_are_listed_newest_first(runs: Path) -> None:
    first, second = sorted(path.name for path in runs.iterdir())
    picker = run_picker("run", "the same run")
    assert picker.options == [f"runs/{second}", f"runs/{first}"]
    shutil.rmtree(runs / second / "rollouts")
    picker.value = "another"  # typed
    picker.update()
    assert (picker.options, picker.value) == ([f"runs/{first}"], "another")
    shutil.rmtree(runs)
    picker.update()
    assert picker.options == []


def test_saved_weights_are_a_model_and_no_run(runs: Path) -> None:
    """The picker lists them, and the run monitor neither lists them nor reports an error."""
    session = Session("cpu")
    list(session.adapt("tiny-deltanet", np.arange(1, 60, dtype=np.int32), TTTConfig(refine=None, steps=1, lr=1e-3)))
    shown, before = [run.name for run in list_runs()], model_names()
    path = session.save("tiny-deltanet", "mine")
    assert model_names() == [*SHIPPED_NAMES, "runs/mine", *before[len(SHIPPED_NAMES) :]]
    assert locate("runs/mine").folder == path
    monitor = RunMonitor(runs)
    assert (monitor.error, sorted(row["name"] for row in monitor.table.rows)) == ("", sorted(shown))
    monitor.curves.close()
    monitor.table.close()
    assert not is_run(path)
    with naming(FileNotFoundError, "mine is not a run directory: it has no config.json of a run"):
        Run(path)
    config = replace(Run(runs / shown[0]).config, model=str(path))
    assert (stored := portable(config, runs / "next")).model == "run:mine"
    assert located(stored, runs / "next") == config


def test_a_run_that_does_not_exist_is_not_asked_for_on_the_hub(runs: Path) -> None:
    newest = ", ".join(sorted((path.name for path in runs.iterdir()), reverse=True))
    with pytest.raises(FileNotFoundError) as caught:
        locate("runs/nowhere")
    places = f"neither in the current folder nor in {runs}"
    assert str(caught.value) == (
        f"there is no run or checkpoint 'runs/nowhere', {places}; the newest runs in the latter are {newest}"
    )


def test_a_typed_name_is_accepted_and_the_list_is_read_again(runs: Path) -> None:
    picker = model_picker("model", "org/repo")
    assert picker.value == "org/repo"
    before = picker.options
    shutil.copytree(SHIPPED / "tiny-lact", write_run(runs, 2).path / "checkpoints" / "step-4")
    picker.update()
    assert len(picker.options) == len(before) + 2 and picker.value == "org/repo"
    picker.error = "there is no such model"
    picker._on_message(picker, {"typed": "a\udc00"}, [])  # as the page sends it
    assert picker.error == ""
    assert picker.value == "a\ufffd"


def test_without_runs_the_shipped_models_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_RUNS", str(tmp_path / "none"))
    assert model_names() == SHIPPED_NAMES
    with pytest.raises(FileNotFoundError, match="the latter has no runs"):
        locate("runs/nowhere")
