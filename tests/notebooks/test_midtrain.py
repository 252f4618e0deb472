"""The notebooks as papermill runs them: from anywhere, with parameters however given, and leaving no process behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_lab.data.sources import CHECKED_BYTES
from refine_lab.models import load_model
from refine_lab.models.families import family
from refine_lab.models.hub import SHIPPED
from refine_lab.runs.process import follow, start, stop_all
from refine_lab.runs.run import Run, list_runs
from tests.support.paths import ROOT

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

PAPERMILL = str(Path(sys.executable).with_name("papermill"))
TINY = {"steps": "2", "sequence_length": "256", "batch_size": "2", "lr": "1e-5", "seeds": "0", "methods": "sft,refine"}
PLOTLY = "application/vnd.plotly.v1+json"


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where one papermill works: its runs, the notebook it writes."""

    path: Path

    @property
    def runs(self) -> list[Run]:
        runs = list_runs(self.path / "runs") if (self.path / "runs").is_dir() else []
        return sorted(runs, key=lambda run: (run.config.recipe, run.config.method, run.config.seed))

    @property
    def executed(self) -> Path:
        return self.path / "out.ipynb"

    def start(self, *options: str, notebook: Path = ROOT / "notebooks" / "midtrain.ipynb", cwd: Path = ROOT):
        """papermill as a user types it: the notebook's path as seen from `cwd`."""
        environ = {**os.environ, "REFINE_RUNS": str(self.path / "runs"), "OMP_NUM_THREADS": "1"}
        words = [PAPERMILL, os.path.relpath(notebook, cwd), str(self.executed), *options]
        if "report: " in notebook.read_text(encoding="utf-8"):  # not where papermill is started
            words += ["-p", "report", str(self.path / "report.html")]
        return subprocess.Popen(words, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, *options: str, **where: Path) -> tuple[int, str]:
        process = self.start(*options, **where)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output.decode()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens are made once for the module, where the environment names no cache."""
    with pytest.MonkeyPatch.context() as patch:
        if "REFINE_CACHE" not in os.environ:
            patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pairs(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in ("-p", name, value)]


def yaml(values: dict[str, str]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in values.items())


@pytest.fixture(scope="module")
def by_p(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Executed from the root, its parameters given with -p."""
    folder = Folder(path=tmp_path_factory.mktemp("by_p"))
    status, output = folder.run(*pairs(TINY))
    assert status == 0, output
    return folder


def trajectory(runs: list[Run]) -> list[list[float]]:
    """What a run is the same by: every number but times."""
    return [
        frame.drop(columns=["time", "seconds", "tokens_per_second"], errors="ignore").values.tolist()
        for run in runs
        for frame in (run.metrics(), run.evaluations())
    ]


# -- midtrain ------------------------------------------------------------------------------------------------------------


def test_every_figure_is_in_the_executed_notebook(by_p: Folder) -> None:
    cells = [cell for cell in nbformat.read(by_p.executed, 4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    figures = [output["data"][PLOTLY] for output in outputs if PLOTLY in output.get("data", {})]
    titles = [{note["text"] for note in figure["layout"].get("annotations", [])} for figure in figures]
    assert len(figures) == 5
    assert {"NTP loss", "NTP accuracy", "Cosine reward", "Binary reward", "Gradient norm", "Clipped ratios"} <= titles[
        0
    ]
    sampled = "Accuracy of sampled tokens<br>(release)"
    assert titles[1] == {"Held-out NTP accuracy (fig. 4)", "Held-out NTP loss (fig. E.1)", sampled}
    assert "fig. E.2" in figures[2]["layout"]["title"]["text"]
    assert titles[3] == {"Mean reward (fig. E.3 a, b)", "Standard deviation (fig. E.3 c, d)"}
    assert titles[4] == {"exact recall number-1 at 256 (%), higher is better"}  # such short rows have no key tokens
    tables = [
        output["data"]["text/plain"] for output in outputs if "<table" in output.get("data", {}).get("text/html", "")
    ]
    assert "with their references" in tables[0]
    assert [line.split()[0] for line in tables[1].splitlines()[2:5]] == ["base", "SFT", "REFINE"]
    sentence, caption, _, *rows = tables[2].splitlines()
    assert "Compared with SFT (" in sentence and "REFINE is not shown to differ (" in sentence
    assert caption == "Differences from SFT [95 % intervals]"
    assert any("exact recall" in row for row in rows) and any("NTP loss" in row for row in rows)
    for measured in (
        "NTP loss",
        "NTP accuracy",
        "cosine reward",
        "binary reward",
        "exact recall number-1 at 256",
        "updates",
    ):
        assert measured in tables[1]
    assert re.fullmatch(
        r"Runs created with commit (\w{40}( with uncommitted changes)?|unknown .*)\.\nEvery figure has its data\.\n",
        "".join(output["text"] for output in cells[-1].outputs),
    )
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert by_p.executed.stat().st_size < 1_000_000
    assert "rollout-inspector" in (by_p.path / "report.html").read_text(encoding="utf-8")


def test_runs_are_where_refine_runs_says(by_p: Folder) -> None:
    assert [(run.config.method, run.config.seed, run.state) for run in by_p.runs] == [
        ("refine", 0, "finished"),
        ("sft", 0, "finished"),
    ]
    sizes = {(run.config.steps, run.config.data.sequence_length, run.config.batch_size) for run in by_p.runs}
    assert sizes == {(2, 256, 2)}
    assert {run.metrics()["updates"].iloc[-1] for run in by_p.runs} == {2}


@pytest.mark.parametrize("how", ["-y", "-f"])
def test_parameters_give_the_same_run_however_they_come(by_p: Folder, tmp_path: Path, how: str) -> None:
    """From another folder, too; yaml reads 1e-5 as a text. -f names the runs' folder itself."""
    folder, values = Folder(path=tmp_path), TINY
    if how == "-f":
        values = {**TINY, "seeds": "[0]", "output": str(tmp_path / "runs")}
        (tmp_path / "values.yaml").write_text(yaml(values))
    status, output = folder.run(how, yaml(values) if how == "-y" else str(tmp_path / "values.yaml"), cwd=tmp_path)
    assert status == 0, output
    assert [run.config for run in folder.runs] == [run.config for run in by_p.runs]
    assert trajectory(folder.runs) == trajectory(by_p.runs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-p", "step", "3"], "unknown parameter 'step'; did you mean 'steps'?"),
        (["-y", "lr: fast"], "parameter lr must be a number or none, got 'fast'"),
        (["-p", "reward", "cosin"], "unknown reward 'cosin'; did you mean 'cosine'?"),
        (["-p", "data", "/nowhere"], "there is no source '/nowhere'; allowed values: 'python'"),
    ],
)
def test_a_bad_parameter_fails_at_once(tmp_path: Path, options: list[str], sentence: str) -> None:
    folder = Folder(path=tmp_path)
    status, output = folder.run(*options)
    assert status != 0
    assert sentence in output
    assert folder.runs == []


def test_a_run_that_fails_fails_the_notebook_with_its_error(tmp_path: Path) -> None:
    folder, data = Folder(path=tmp_path), tmp_path / "rows.jsonl"
    line = "a line of text that is long enough for rows\n"
    rows = [
        {"text": line * 200},
        {"text": line * 200},
        {"body": "no text"},
        {"text": line * (CHECKED_BYTES // len(line))},
    ]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")  # too large to be checked before training
    status, output = folder.run(*pairs({**TINY, "data": str(data)}))
    assert status != 0
    assert "has no column 'text'" in output
    assert sorted(run.state for run in folder.runs) == ["failed", "stopped"]


@pytest.mark.parametrize("notebook", ["midtrain", "pretrain"])
def test_a_model_that_fails_the_parity_gate_is_not_trained(tmp_path: Path, notebook: str) -> None:
    model = tmp_path / "broken"
    shutil.copytree(SHIPPED / "tiny-deltanet", model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp_norm.weight"].fill_(float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    folder = Folder(path=tmp_path)
    status, output = folder.run("-p", "model", str(model), notebook=ROOT / "notebooks" / f"{notebook}.ipynb")
    assert status != 0
    assert "RuntimeError: parity fails for DeltaNetForCausalLM in float32 on " in output
    assert "model.layers.2 is the first layer that differs" in output
    assert folder.runs == []


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    """A small random Qwen3.5 with the shipped tokenizer."""
    folder = tmp_path / "hybrid"
    config_class, model_class = family("qwen3_5_text")
    _, tokenizer = load_model("tiny-deltanet", device="cpu")
    heads = dict(
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4
    )
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, linear_key_head_dim=8, linear_value_head_dim=8
    )
    special = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model_class(config_class(**heads, **sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["tiny-lact", "hybrid"])
def test_a_model_of_another_family_is_only_a_parameter(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    model = str(request.getfixturevalue(name)) if name == "hybrid" else name
    folder = Folder(path=tmp_path)
    status, output = folder.run(*pairs({**TINY, "model": model}))
    assert status == 0, output
    assert [(run.config.method, run.config.model, run.state) for run in folder.runs] == [
        ("refine", model, "finished"),
        ("sft", model, "finished"),
    ]
    for run in folder.runs:
        assert run.evaluations()["ntp_loss"].notna().all()
    assert "parity holds for " in folder.executed.read_text()
    assert "Every figure has its data." in folder.executed.read_text()


def wait_until(done: Callable[[], object], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_papermill_that_is_ended_leaves_no_process_and_the_run_saves(tmp_path: Path, number: signal.Signals) -> None:
    folder = Folder(path=tmp_path)
    process = folder.start(*pairs({**TINY, "steps": "100000"}))
    try:
        wait_until(lambda: any(len(run.metrics()) for run in folder.runs) or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0].decode()
        left = psutil.Process(process.pid).children(recursive=True)
        assert len(left) >= 2, "a kernel and the run that trains"
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode != 0
        wait_until(lambda: not [child for child in left if child.is_running()])
    finally:
        process.kill()
    (trained,) = [run for run in folder.runs if len(run.metrics())]
    assert trained.state == "stopped"
    assert trained.latest_checkpoint() is not None
    assert not any(run.alive for run in folder.runs)


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with all its children, as the end of a machine does."""
    all_of_them = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in all_of_them:
        each.kill()
    process.communicate(timeout=120)
    psutil.wait_procs(all_of_them, timeout=60)


@pytest.mark.process
def test_the_same_command_after_a_kill_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with its children while the second run trains; the first is finished by then, and is not trained again."""
    folder, values = Folder(path=tmp_path), {**TINY, "steps": "6", "checkpoint_every": "1"}
    process = folder.start(*pairs(values))
    try:
        wait_until(
            lambda: [run.done for run in folder.runs if 0 < run.done < 6 and run.config.refine] or process.poll()
        )
        assert process.poll() is None, process.communicate()[0].decode()
    finally:
        end_all(process)
    before = folder.runs
    states = {run.config.method: run.state for run in before}
    assert states == {"sft": "finished", "refine": "killed"}
    status, output = folder.run("--log-output", *pairs(values))
    assert status == 0, output
    assert [run.path for run in folder.runs] == [run.path for run in before]
    assert f"{before[1].name} is finished" in output
    assert re.search(rf"{before[0].name} continues from step [1-5] of 6", output)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in the notebook
    for run in folder.runs:
        whole = follow(start(run.config, detach=False, runs=tmp_path / "whole"), log=lambda line: None)
        assert trajectory([run]) == trajectory([whole])
        ours, theirs = (load_file(each.path / "checkpoints" / "step-6" / "model.safetensors") for each in (run, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.process
def test_detached_training_outlives_the_notebook_which_says_so(tmp_path: Path) -> None:
    folder = Folder(path=tmp_path)
    status, output = folder.run(*pairs({**TINY, "steps": "100000", "detach": "true"}))
    try:
        assert status != 0, "there is nothing to draw yet"
        assert "2 of 2 runs are still in progress" in output
        assert "execute this cell and the cells below again when they have finished" in output
        assert all(run.alive for run in folder.runs)
    finally:
        stop_all(folder.runs)
    assert {run.state for run in folder.runs} == {"stopped"}


# -- pretrain ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("last_stage", "9", "last_stage must be from 1 to 8, got 9"),
        ("documents", "0", "documents must be from 1 to 10,000, got 0"),
        ("recipe", "pretrain_lct", "unknown pretrain recipe 'pretrain_lct'; did you mean 'pretrain_lact'?"),
    ],
)
def test_a_bad_parameter_of_pretraining_fails_at_once(tmp_path: Path, name: str, value: str, sentence: str) -> None:
    folder = Folder(path=tmp_path)
    status, output = folder.run("-p", name, value, notebook=ROOT / "notebooks" / "pretrain.ipynb")
    assert status != 0
    assert sentence in output
    assert folder.runs == []


@pytest.mark.parametrize(("model", "recipe"), [("new:tiny-deltanet", "pretrain"), ("new:tiny-lact", "pretrain_lact")])
def test_pretraining_goes_on_where_it_ended(tmp_path: Path, model: str, recipe: str) -> None:
    """Two stages from fresh weights; run again, nothing is trained twice and the same model is told of."""
    folder, notebook = Folder(path=tmp_path), ROOT / "notebooks" / "pretrain.ipynb"
    options = pairs({"model": model, "recipe": recipe, "steps": "1", "last_stage": "2", "documents": "5"})
    status, output = folder.run(*options, notebook=notebook)
    assert status == 0, output
    first, second = folder.runs
    assert first.config.model == model
    assert [run.config.recipe for run in folder.runs] == [f"{recipe}-1", f"{recipe}-2"]
    assert second.config.model == str(first.path)
    before = trajectory([first, second])
    status, output = folder.run("--log-output", *options, notebook=notebook, cwd=tmp_path)
    assert status == 0, output
    assert output.count("has already finished") == 2
    assert [run.path for run in folder.runs] == [first.path, second.path]
    assert trajectory([first, second]) == before
    last = second.latest_checkpoint()
    assert last is not None
    assert str(last[1]) in folder.executed.read_text()
