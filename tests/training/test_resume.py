"""A resume continues the same run or refuses: settings, reward, text, steps; forks; steps without a finite gradient."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refine_lab import fork
from refine_lab.config import TrainConfig, from_json, to_json
from refine_lab.experiments.compare import lineage
from refine_lab.experiments.runs import stage_runs, text_runs
from refine_lab.method.custom import reward_source, selection_source
from refine_lab.method.step import StepResult
from refine_lab.runs.process import hold
from refine_lab.runs.run import Run, list_runs
from refine_lab.runs.started import accept, check_unchanged
from refine_lab.runs.writer import RunWriter
from refine_lab.training import trainer
from refine_lab.training.inputs import resume_or_create
from refine_lab.training.trainer import train
from tests.factories.durable_runs import STEPS, After, assert_same, begun, go, tiny_config, tiny_model
from tests.support.paths import ROOT, TEXT
from tests.support.refusals import naming, refused


def first_is_right(inputs):
    return (inputs.rollout_ids[:, 0] == inputs.target_ids[:, 0]).float()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def config(home: Path) -> TrainConfig:
    config = tiny_config(tiny_model(home / "model"))
    assert config.refine is not None
    text = shutil.copytree(TEXT, home / "text")
    data = replace(config.data, sources={str(text): 1.0})
    return replace(config, refine=replace(config.refine, reward="custom"), data=data)


@pytest.fixture(scope="module")
def whole(home: Path, config: TrainConfig) -> Run:
    """An uninterrupted run with a custom reward."""
    with RunWriter.create(config, home / "whole", reward_source=reward_source(first_is_right)) as writer:
        return go(writer.run)


@pytest.fixture(scope="module")
def interrupted(home: Path, config: TrainConfig) -> Path:
    """The same run, stopped after four of six batches."""
    with RunWriter.create(config, home / "interrupted", reward_source=reward_source(first_is_right)) as writer:
        train(writer.path, After(writer.path, 4))
        return writer.path


@pytest.fixture
def stopped(interrupted: Path, tmp_path: Path) -> Run:
    return Run(shutil.copytree(interrupted, tmp_path / interrupted.name))


def edit(run: Run, change: Callable[[TrainConfig], TrainConfig]) -> Run:
    (run.path / "config.json").write_text(to_json(change(run.config)), encoding="utf-8")
    return Run(run.path)


EDITS = {
    "lr": (lambda c: replace(c, lr=3e-4), "0.001", "0.0003"),
    "seed": (lambda c: replace(c, seed=1), "0", "1"),
    "optimizer": (lambda c: replace(c, optimizer="muon"), "'adamw'", "'muon'"),
    "batch_size": (lambda c: replace(c, batch_size=4), "2", "4"),
    "model": (lambda c: replace(c, model="tiny-deltanet"), "/model'", "'tiny-deltanet'"),
    "refine": (lambda c: replace(c, refine=None), "'num_chunks': 2", "none"),
    "dtype": (lambda c: replace(c, dtype="bfloat16"), "'float32'", "'bfloat16'"),
    "schedule": (lambda c: replace(c, schedule="linear"), "'constant'", "'linear'"),
    "data.sequence_length": (lambda c: replace(c, data=replace(c.data, sequence_length=64)), "48", "64"),
    "data.sources": (lambda c: replace(c, data=replace(c.data, sources={"python": 1.0})), "/text'", "{'python': 1.0}"),
    "steps": (lambda c: replace(c, steps=5), "6", "5"),
}
"""Settings that change the results, each with an edit and both values as they are named."""


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_setting_is_refused_with_both_values(stopped: Run, name: str) -> None:
    change, before, now = EDITS[name]
    run = edit(stopped, change)
    status = (run.path / "status.json").read_bytes()
    with naming(ValueError, run.path, f"{name} was ", before, f" and is now {now}", f"--override {name}"):
        hold(run)
    assert (run.path / "status.json").read_bytes() == status
    assert not run.alive
    with naming(ValueError, f"{name} was "):
        check_unchanged(run, ["eval_every"])
    accept(run, check_unchanged(run, [name]))
    assert [(each["name"], each["step"]) for each in run.started["changes"]] == [(name, 4)]
    hold(run).close()  # accepted once and for all
    assert lineage([run])["event"].str.contains(f"^{name} changed from .* to .* after step 4$").all()


def test_an_edited_reward_is_refused_with_both_lines(stopped: Run) -> None:
    source = (stopped.path / "reward.py").read_text(encoding="utf-8")
    (stopped.path / "reward.py").write_text(source.replace("[:, 0]", "[:, 1]"), encoding="utf-8")
    with naming(ValueError, "reward.py has changed", "[:, 0]", "[:, 1]", "--override reward.py"):
        hold(stopped)
    accept(stopped, check_unchanged(stopped, ["reward.py"]))
    assert go(stopped).state == "finished"


def surprising(inputs):
    return -inputs.logprobs


def test_a_selection_is_trained_with_compared_and_kept_like_a_reward(stopped: Run, tmp_path: Path) -> None:
    run = fork(stopped, 4, tmp_path / "forks", selection=surprising)
    assert run.config.refine.selection == "custom"
    source = (run.path / "selection.py").read_text(encoding="utf-8")
    assert source == selection_source(surprising) == run.started["selection"]
    (run.path / "selection.py").write_text(source.replace("-inputs", "2 * inputs"), encoding="utf-8")
    with naming(ValueError, "selection.py has changed", "2 * inputs", "--override selection.py"):
        hold(run)
    (run.path / "selection.py").write_text(source, encoding="utf-8")
    assert go(run).state == "finished"
    again = fork(run, 6, tmp_path / "forks", selection="custom", steps=7)
    assert (again.path / "selection.py").read_bytes() == (run.path / "selection.py").read_bytes()
    with refused("selection", "custom"):
        fork(stopped, 4, selection="custom")


def test_a_run_that_recorded_no_selection_goes_on(stopped: Run) -> None:
    started = json.loads((stopped.path / "started.json").read_text(encoding="utf-8"))
    del started["selection"]
    (stopped.path / "started.json").write_text(json.dumps(started), encoding="utf-8")
    assert check_unchanged(stopped) == []
    (stopped.path / "selection.py").write_text("def mine(inputs): ...", encoding="utf-8")
    with naming(ValueError, "selection.py has changed", "none"):
        check_unchanged(stopped)


def test_an_edited_text_is_refused_with_both_digests(stopped: Run, whole: Run, config: TrainConfig) -> None:
    text = Path(next(iter(config.data.sources))) / "queue.txt"
    before = text.read_bytes()
    digests = dict(stopped.inputs or {})["texts"]
    text.write_bytes(before.swapcase())
    try:
        with naming(ValueError, f"'{text}' has changed", next(iter(digests.values()))["queue.txt"], "--override texts"):
            go(stopped)
        train(stopped.path, After(stopped.path, 1), ["texts"])
        assert [each["name"] for each in stopped.started["changes"]] == ["texts"]
        assert go(stopped).state == "finished"  # the accepted text is that of the run from now on
    finally:
        text.write_bytes(before)


def test_an_unknown_override_is_refused(stopped: Run) -> None:
    with refused("--override", "lrr"):
        check_unchanged(stopped, ["lrr"])


@pytest.mark.parametrize("field", ["checkpoint_every", "keep_checkpoints"])
def test_a_setting_that_changes_no_result_may_be_edited(stopped: Run, whole: Run, field: str) -> None:
    run = edit(stopped, lambda c: replace(c, **{field: 1}))
    hold(run).close()
    assert_same(go(run), whole)


def test_more_steps_need_no_override_with_a_constant_schedule(stopped: Run) -> None:
    go(stopped)
    run = edit(stopped, lambda c: replace(c, steps=8))
    assert run.state == "stopped"
    accept(run, check_unchanged(run))
    assert (go(run).state, run.metrics()["step"].tolist()) == ("finished", list(range(1, 9)))
    assert run.started["changes"] == [{"name": "steps", "before": STEPS, "now": 8, "step": STEPS}]


def test_more_steps_need_an_override_with_a_linear_schedule(config: TrainConfig, tmp_path: Path) -> None:
    run = begun(replace(config, schedule="linear", refine=None), new(tmp_path / "runs"))
    longer = edit(run, lambda c: replace(c, steps=9))
    with naming(ValueError, "steps was 6 and is now 9", "--override steps"):
        hold(longer)
    assert [change.name for change in check_unchanged(longer, ["steps"])] == ["steps"]


@pytest.mark.process
def test_the_command_refuses_and_accepts(stopped: Run, whole: Run) -> None:
    run = edit(stopped, lambda c: replace(c, lr=3e-4))
    command = [sys.executable, "-m", "refine_lab.training", str(run.path)]
    no = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (no.returncode, run.state) == (2, "stopped")
    assert "lr was 0.001 and is now 0.0003" in no.stderr
    yes = subprocess.run([*command, "--override", "lr"], cwd=ROOT, capture_output=True, text=True)
    assert (yes.returncode, run.state) == (0, "finished"), yes.stderr
    assert [each["name"] for each in run.started["changes"]] == ["lr"]
    assert set(run.metrics()["lr"]) == {1e-3, 3e-4}


def test_an_optimizer_that_was_changed_starts_with_new_moments(stopped: Run, capsys: pytest.CaptureFixture) -> None:
    run = edit(stopped, lambda c: replace(c, optimizer="muon"))
    accept(run, check_unchanged(run, ["optimizer"]))
    assert go(run).state == "finished"
    assert "The moments of AdamW are not used: the run continues with Muon, AdamW." in capsys.readouterr().out


def test_a_reward_that_is_no_text_is_named(stopped: Run, config: TrainConfig) -> None:
    path = stopped.path / "reward.py"
    path.write_bytes(b"\xff")
    with naming(ValueError, path, "not UTF-8 text"):
        hold(stopped)
    with naming(ValueError, path, "not UTF-8 text"):
        resume_or_create([config], stopped.path.parent)


@pytest.mark.parametrize("values", [{"texts": 3}, {"texts": {"a": "b"}}, {"texts": {}, "model": []}, {}])
def test_inputs_that_are_no_digests_are_named(stopped: Run, values: dict[str, object]) -> None:
    (stopped.path / "inputs.json").write_text(json.dumps(values), encoding="utf-8")
    with naming(ValueError, stopped.path / "inputs.json", "is damaged"):
        go(stopped)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_change_is_recorded_with_the_step_after_which_the_run_continues(stopped: Run, when: str) -> None:
    """The newest checkpoint is damaged before the change is accepted, or after the changed run was stopped again."""
    newest = stopped.path / "checkpoints" / "step-4" / "model.safetensors"
    run = edit(stopped, lambda c: replace(c, lr=3e-4))
    if when == "before":
        newest.write_bytes(b"")
    accept(run, check_unchanged(run, ["lr"]))
    if when == "after":
        train(run.path, After(run.path, 0))
        assert [each["step"] for each in run.started["changes"]] == [4]
        newest.write_bytes(b"")
    assert go(run).metrics()["lr"].tolist() == [1e-3] * 2 + [3e-4] * 4
    assert [each["step"] for each in run.started["changes"]] == [2]


def test_a_run_of_an_earlier_version_is_compared_from_now_on(stopped: Run, capsys: pytest.CaptureFixture) -> None:
    (stopped.path / "started.json").unlink()
    accept(stopped, check_unchanged(stopped))
    assert (
        f"{stopped.path} has no started.json, so it is not known whether its settings have changed"
        in capsys.readouterr().out
    )
    with naming(ValueError, "lr was 0.001"):
        hold(edit(stopped, lambda c: replace(c, lr=1.0)))


# -- the same command again ----------------------------------------------------------------------------------------------


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_newest_run_is_the_last_one_made_whatever_its_name_is(config: TrainConfig, tmp_path: Path) -> None:
    source = reward_source(first_is_right)
    (first,) = resume_or_create([config], tmp_path, reward_source=source)
    first.path.rename(tmp_path / first.name.replace(first.name[:4], "2999"))
    (second,) = resume_or_create([config], tmp_path, reward_source=source, fresh=True)
    third = second.path.rename(tmp_path / second.name.replace(second.name[:4], "2000"))
    assert [run.name[:4] for run in list_runs(tmp_path)] == ["2999", "2000"]
    assert resume_or_create([config], tmp_path, reward_source=source)[0].path == third


def test_another_reward_and_changed_or_forked_runs_are_not_continued(stopped: Run, config: TrainConfig) -> None:
    folder, source = stopped.path.parent, reward_source(first_is_right)
    assert resume_or_create([config], folder, reward_source=source)[0].path == stopped.path
    assert resume_or_create([config], folder, reward_source=source + "\n")[0].path != stopped.path
    forked = fork(stopped, 4, new(folder / "forks"))
    assert resume_or_create([config], folder / "forks", reward_source=source)[0].path != forked.path
    edit(stopped, lambda c: replace(c, seed=3))
    assert resume_or_create([replace(config, seed=3)], folder, reward_source=source)[0].path != stopped.path


def test_a_run_without_a_status_waits(config: TrainConfig, tmp_path: Path) -> None:
    """The power failed between its configuration and its first status."""
    (run,) = text_runs([replace(config, refine=None)], tmp_path)
    (run.path / "status.json").unlink()
    assert [each.path for each in text_runs([run.config], tmp_path)] == [run.path]
    assert (run.state, run.status.step, run.status.steps) == ("waiting", 0, STEPS)
    assert go(run).state == "finished"


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1" * 4000, '"1"', "-1", "[1]", "true"])
def test_a_run_with_a_damaged_number_is_left_out_and_blocks_no_other(
    stopped: Run, config: TrainConfig, tmp_path: Path, number: str
) -> None:
    (stopped.path / "started.json").write_text(f'{{"number": {number}}}', encoding="utf-8")
    with pytest.warns(UserWarning, match=r"skipped: number of .*started\.json must be a whole number"):
        (other,) = resume_or_create([config], stopped.path.parent)
    assert other.number == 1
    with pytest.warns(UserWarning, match="skipped"):
        assert [run.path for run in list_runs(stopped.path.parent)] == [other.path]


# -- forks -----------------------------------------------------------------------------------------------------------------


def test_a_fork_without_changes_ends_as_its_parent(stopped: Run, whole: Run) -> None:
    forked = fork(stopped, 2)
    assert forked.parent == (stopped.path, 2)
    assert (forked.state, forked.done, forked.metrics()["step"].tolist()) == ("waiting", 2, [1, 2])
    assert_same(go(forked), whole)
    assert lineage([forked, stopped]).values.tolist() == [[forked.name, f"forked from {stopped.name} after step 2"]]


def test_a_fork_goes_on_with_its_own_settings(stopped: Run) -> None:
    parent = {path: path.read_bytes() for path in stopped.path.rglob("*") if path.is_file()}
    forked = go(fork(stopped, 4, lr=5e-4, steps=7, reward="binary"))
    assert forked.state == "finished"
    assert forked.metrics()["lr"].tolist() == [1e-3] * 4 + [5e-4] * 3
    assert from_json((forked.path / "config.json").read_text(encoding="utf-8")).refine.reward == "binary"
    assert not (forked.path / "reward.py").exists()
    assert {path: path.read_bytes() for path in parent} == parent


def test_a_fork_is_refused_without_its_checkpoint_and_for_another_model(stopped: Run) -> None:
    with refused("step", 3):
        fork(stopped, 3)
    with refused("model", "tiny-lact"):
        fork(stopped, 4, model="tiny-lact")
    with refused("steps", 4):
        fork(stopped, 4, steps=4)
    assert len(list_runs(stopped.path.parent)) == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts/1-2.parquet", "checkpoints/step-4/model.safetensors"])
def test_a_damaged_parent_is_refused_before_a_fork_is_created(stopped: Run, name: str) -> None:
    (stopped.path / name).write_bytes(b"")
    with naming(ValueError, stopped.path / name):
        fork(stopped, 4)
    assert [*stopped.path.parent.iterdir()] == [stopped.path]


def test_a_fork_keeps_the_reward_of_its_parent_or_has_none(stopped: Run, config: TrainConfig, tmp_path: Path) -> None:
    forked = fork(stopped, 4, tmp_path / "forks", reward="custom")
    assert (forked.path / "reward.py").read_bytes() == (stopped.path / "reward.py").read_bytes()
    plain = fork(stopped, 4, str(tmp_path / "forks"), reward="cosine")
    with refused("reward", "custom"):
        fork(plain, 4, reward="custom")


@pytest.mark.parametrize("change", ["fork", "lr"])
def test_a_fork_or_a_changed_run_without_a_whole_checkpoint_does_not_begin_anew(stopped: Run, change: str) -> None:
    if change == "fork":
        run, what = fork(stopped, 4), "a fork cannot start over"
    else:
        run, what = edit(stopped, lambda c: replace(c, lr=3e-4)), "a run whose lr was changed cannot start over"
        accept(run, check_unchanged(run, ["lr"]))
    for _, folder in run.checkpoints():
        (folder / "model.safetensors").write_bytes(b"")
    names = sorted(run.path.rglob("*"))
    with naming(ValueError, run.path, "model.safetensors is damaged", what):
        go(run)
    assert sorted(run.path.rglob("*")) == names, "nothing is changed"


def test_a_folder_of_runs_can_be_moved(stopped: Run, tmp_path: Path, whole: Run) -> None:
    fork(stopped, 4)
    moved = shutil.move(stopped.path.parent, tmp_path.parent / f"{tmp_path.name}-moved")
    parent, child = list_runs(moved)
    assert child.parent == (parent.path, 4)
    assert not [
        path for path in moved.rglob("*.json*") if str(tmp_path) in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert_same(go(child), whole)


def test_a_curriculum_can_be_moved_and_continues(config: TrainConfig, tmp_path: Path) -> None:
    stages = [replace(config, refine=None, steps=2), replace(config, refine=None, steps=4)]
    first, second = stage_runs(stages, new(tmp_path / "runs"))
    assert second.config.model == str(first.path)
    go(first)
    train(second.path, After(second.path, 2))
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    again = stage_runs(stages, moved)
    assert [run.path for run in again] == [moved / first.name, moved / second.name]
    hold(again[1]).close()
    assert go(again[1]).state == "finished"
    assert again[1].metrics()["step"].tolist() == [1, 2, 3, 4]


# -- steps without a finite gradient ---------------------------------------------------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Weights are NaN during these steps, so that their losses are, and are what they were after each."""

    def one_step(train_state, batch, draws) -> StepResult:
        if draws.step not in steps:
            return trained(train_state, batch, draws)
        norm = train_state.policy.model.norm.weight
        kept = norm.detach().clone()
        with torch.no_grad():
            norm.fill_(torch.nan)
        result = trained(train_state, batch, draws)
        assert torch.isnan(norm).all(), "no update was made"
        with torch.no_grad():
            norm.copy_(kept)
        return result

    trained = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", one_step)


@pytest.mark.parametrize("method", ["sft", "refine", "several updates"])
def test_a_step_that_is_not_finite_is_skipped_and_recorded(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    poisoned(monkeypatch, 3)
    config = (
        replace(config, refine=None)
        if method == "sft"
        else replace(config, refine=replace(config.refine, reward="cosine"))
    )
    config = replace(config, mini_batch_size=1 if method == "several updates" else 2)
    run = go(begun(config, new(tmp_path / "whole")))
    metrics = run.metrics().set_index("step")
    assert metrics["skipped_updates"].fillna(0).tolist() == [0, 0, config.updates_per_batch, 0, 0, 0]
    assert metrics["ntp_loss"].isna().tolist() == [False, False, True, False, False, False]
    again = begun(config, new(tmp_path / "parts"))
    train(again.path, After(again.path, 3))
    assert again.done == 3
    assert_same(go(again), run)


def test_three_skipped_steps_in_a_row_end_the_run_as_it_was_before_the_first(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 4, 5, 6)
    run = begun(replace(config, refine=None, steps=9, checkpoint_every=1, keep_checkpoints=9), new(tmp_path / "runs"))
    train(run.path, After(run.path, 5))  # a stop between two of them saves, and changes no count
    with naming(FloatingPointError, "steps 4 to 6 of 9", "is from step 3", "an lr below 0.001"):
        go(run)
    assert [step for step, _ in run.checkpoints()] == [1, 2, 3]
    monkeypatch.undo()


def test_the_checkpoint_before_the_first_skipped_step_is_written(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 4, 5, 6)
    run = begun(replace(config, refine=None, steps=9, checkpoint_every=100), new(tmp_path / "runs"))
    with naming(FloatingPointError, "is from step 3"):
        go(run)
    assert run.done == 3


def test_a_run_does_not_finish_with_a_skipped_step(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, STEPS)
    with naming(FloatingPointError, f"step {STEPS} of {STEPS} made no update"):
        go(begun(replace(config, refine=None), new(tmp_path / "runs")))


def test_a_gradient_above_the_bound_is_skipped(config: TrainConfig, tmp_path: Path) -> None:
    run = begun(replace(config, refine=None, skip_above_grad_norm=1e-9), new(tmp_path / "runs"))
    with naming(FloatingPointError, "steps 1 to 3", "skip_above_grad_norm", "no checkpoint had been written by then"):
        go(run)


def test_weights_that_are_not_finite_at_the_start_are_named(config: TrainConfig, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(config.model, tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = torch.inf
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run = begun(replace(config, model=str(model), refine=None), new(tmp_path / "runs"))
    with naming(ValueError, "1 weights of 'model.norm.weight'", str(model), "NaN or infinite before training"):
        go(run)


def test_what_a_run_started_with_is_json(stopped: Run) -> None:
    started = json.loads((stopped.path / "started.json").read_text(encoding="utf-8"))
    assert started["reward"] == reward_source(first_is_right)
    assert from_json(json.dumps(started["config"])) == stopped.config
    assert (started["number"], started["parent"], started["changes"]) == (1, None, [])
