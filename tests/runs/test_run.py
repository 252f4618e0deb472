"""Run directories: what is written is what is read, whatever a kill leaves behind."""

import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from refine_lab.config import FORMAT_VERSION, RefineConfig, TrainConfig
from refine_lab.runs import environment
from refine_lab.runs import writer as runs_writer
from refine_lab.runs.run import MetricsTail, Run, list_runs, made_at, runs_dir
from refine_lab.runs.writer import RunProgress, RunWriter, write_status
from refine_lab.training import __main__ as trainer
from tests.support.refusals import naming, refused


def make_config(**changes) -> TrainConfig:
    return TrainConfig(**{"recipe": "tiny", "steps": 12, "batch_size": 2, "mini_batch_size": 2, **changes})


def make_rows(step: int, count: int = 4) -> dict:
    """Rollouts whose every value tells its step and row."""
    rows = torch.arange(count)
    ids = (100 * step + rows)[:, None] + torch.arange(3)
    return {
        "sequence_id": rows + 2**40,
        "position": rows * 10 + step,
        "sample_index": [0] * count,
        "prefix_ids": [list(range(row)) for row in range(count)],  # ragged
        "rollout_ids": ids,
        "target_ids": ids + 1,
        "logprobs": torch.full((count, 3), -0.5 * step),
        "entropy": np.linspace(0, 1, count),
        "cosine": torch.linspace(-1, 1, count),
        "binary": torch.zeros(count),
        "reward": torch.linspace(-1, 1, count),
        "advantage": torch.full((count,), float(step)),
    }


def train(writer: RunWriter, first: int, last: int) -> None:
    """Steps as a trainer writes them: line, rollouts, evaluation, checkpoint (every 4 steps)."""
    for step in range(first, last + 1):
        writer.train(step, {"ntp_loss": torch.tensor(1 / step), "tokens": 10 * step})
        writer.rollouts(step, make_rows(step))
        writer.status("running")
        if step % 4 == 0:
            writer.evaluation(step, {"ntp_loss": 2 / step})
            with writer.checkpoint(step) as folder:
                (folder / "step.txt").write_text(str(step))


@pytest.fixture
def writer(tmp_path):
    with RunWriter.create(make_config(), tmp_path) as writer:
        yield writer


def timeless(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="time")


# --- where and what -------------------------------------------------------------------------------------------------


def test_runs_dir_is_the_projects_and_never_the_current_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("REFINE_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert runs_dir() == Path(runs_writer.__file__).resolve().parent.parent.parent / "runs"
    monkeypatch.setattr(
        environment, "__file__", str(tmp_path / "site-packages" / "refine_lab" / "runs" / "environment.py")
    )
    assert runs_dir() == Path.home() / "refine_lab_runs"


def test_runs_dir_follows_the_environment_and_refuses_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.setenv("REFINE_RUNS", str(tmp_path))
    assert runs_dir() == tmp_path
    monkeypatch.setenv("REFINE_RUNS", "here")
    with refused("REFINE_RUNS", "here", "an absolute path"):
        runs_dir()


def test_directories_of_one_second_are_unique(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_writer.time, "strftime", lambda form: "20260102-030405")
    configs = [make_config(), make_config(), make_config(), make_config(refine=None, seed=7, recipe="other")]
    names = []
    for config in configs:
        with RunWriter.create(config, tmp_path) as writer:
            names.append(writer.path.name)
    first = "20260102-030405-tiny-refine-s0"
    assert names == [first, f"{first}-2", f"{first}-3", "20260102-030405-other-sft-s7"]
    assert [run.name for run in list_runs(tmp_path)] == names, "in the order in which they were created"


def test_a_run_made_after_the_clock_was_set_back_is_the_newest(tmp_path, monkeypatch):
    times = iter(
        [time.localtime(1e9), time.localtime(1e9 - 3600), time.localtime(1e9 - 3600), time.localtime(1e9 + 60)]
    )
    strftime = time.strftime
    monkeypatch.setattr(runs_writer.time, "strftime", lambda form, *rest: strftime(form, *(rest or [next(times)])))
    made = []
    for _ in range(4):
        with RunWriter.create(make_config(), tmp_path) as writer:
            made.append(writer.path)
    assert [run.path for run in list_runs(tmp_path)] == made


def test_what_is_known_before_training_is_written(tmp_path):
    config = make_config(refine=RefineConfig(reward="binary"), steps=5)
    with RunWriter.create(config, tmp_path, reward_source="def reward(): ...\n") as writer:
        run = Run(writer.path)
    assert run.config == config
    assert (run.path / "reward.py").read_text() == "def reward(): ...\n"
    assert run.status.state == "starting"
    assert (run.status.step, run.status.steps, run.status.error, run.status.pid) == (0, 5, None, None)
    assert run.env["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert {"python", "transformers", "fla", "triton", "commit", "dirty", "platform"} <= set(run.env)
    assert run.env["device"] is run.env["threads"] is None, "not known before the process that trains"
    with RunWriter.open(run.path):
        assert run.env["threads"] == torch.get_num_threads()
        assert run.env["device"]
    assert not run.alive
    (run.path / "lock").touch()
    assert run.state == "waiting", "no process has begun it, whatever held its lock"
    write_status(run, "starting", pid=1)
    assert run.state == "killed", "nobody holds the lock of a run that a process has begun"


def test_list_runs_of_a_folder_without_runs_is_empty(tmp_path):
    (tmp_path / "notes").mkdir()
    assert list_runs(tmp_path) == list_runs(tmp_path / "absent") == []


# --- what is written is what is read --------------------------------------------------------------------------------


def test_metrics_and_evaluations_are_read_apart(writer):
    writer.evaluation(0, {"ntp_loss": 3.0, "ntp_accuracy": 0.25})
    train(writer, 1, 4)
    run = Run(writer.path)
    assert run.metrics()["step"].tolist() == [1, 2, 3, 4]
    assert run.metrics()["ntp_loss"].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert run.metrics()["tokens"].tolist() == [10, 20, 30, 40]
    assert run.evaluations()["step"].tolist() == [0, 4]
    assert run.evaluations()["ntp_loss"].tolist() == [3.0, 0.5]
    assert abs(run.metrics()["time"].iloc[-1] - time.time()) < 60


def test_a_run_without_lines_has_empty_frames_with_columns(writer):
    run = Run(writer.path)
    assert run.metrics()["ntp_loss"].tolist() == run.evaluations()["ntp_accuracy"].tolist() == []
    assert run.rollouts()["reward"].tolist() == []
    assert run.latest_checkpoint() is None


def test_numbers_that_are_not_finite_are_null_in_strict_json(writer):
    writer.train(1, {"ntp_loss": math.nan, "grad_norm": torch.tensor(math.inf), "lr": np.float32(0.5)})
    line = (writer.path / "metrics.jsonl").read_text()
    assert "NaN" not in line
    assert "Infinity" not in line
    row = Run(writer.path).metrics().iloc[0]
    assert math.isnan(row["ntp_loss"])
    assert math.isnan(row["grad_norm"])
    assert row["lr"] == 0.5


def test_every_line_is_on_disk_when_the_call_returns(writer):
    for step in (1, 2):
        writer.train(step, {"ntp_loss": 1.0})
        assert len((writer.path / "metrics.jsonl").read_bytes().splitlines()) == step


def test_rollouts_come_back_as_they_were_in_closed_files(writer):
    train(writer, 1, 11)
    files = sorted(path.name for path in (writer.path / "rollouts").iterdir())
    assert files == ["1-4.parquet", "5-8.parquet", "9-10.parquet"], "closed at checkpoints and every ten steps"
    writer.close()
    frame = Run(writer.path).rollouts()
    assert frame["step"].tolist() == [step for step in range(1, 12) for _ in range(4)]
    row = frame[frame["step"] == 7].iloc[3]
    assert (row["sequence_id"], row["position"], row["sample_index"]) == (2**40 + 3, 37, 0)
    assert row["prefix_ids"].tolist() == [0, 1, 2]
    assert row["rollout_ids"].tolist() == [703, 704, 705]
    assert row["target_ids"].tolist() == [704, 705, 706]
    assert row["logprobs"].tolist() == [-3.5] * 3
    assert (row["entropy"], row["cosine"], row["binary"], row["reward"], row["advantage"]) == (1, 1, 0, 1, 7)
    assert Run(writer.path).rollouts(steps=[3, 9])["step"].unique().tolist() == [3, 9]


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda rows: rows.pop("reward"), ": reward"),
        (lambda rows: rows.update(rewards=[0.0] * 4), ": rewards"),
        (lambda rows: rows.update(reward=[0.0]), "'reward': 1"),
    ],
)
def test_rollouts_of_other_columns_are_refused(writer, change, fact):
    rows = make_rows(1)
    change(rows)
    with naming(ValueError, fact):
        writer.rollouts(1, rows)


def test_a_checkpoint_is_whole_or_absent(writer):
    with writer.checkpoint(4) as folder:
        (folder / "weights").write_text("old")
        assert Run(writer.path).checkpoints() == [], "not before it is whole"
    with naming(OSError, "disk full"), writer.checkpoint(8) as folder:
        raise OSError("disk full")
    assert [step for step, _ in Run(writer.path).checkpoints()] == [4]
    with writer.checkpoint(4) as folder:
        (folder / "weights").write_text("new")
    with writer.checkpoint(16):
        pass
    run = Run(writer.path)
    assert [step for step, _ in run.checkpoints()] == [4, 16]
    assert (run.checkpoints()[0][1] / "weights").read_text() == "new"
    assert run.latest_checkpoint() == (16, writer.path / "checkpoints" / "step-16")
    assert {path.name for path in (writer.path / "checkpoints").iterdir()} == {"step-4", "step-16"}


def test_a_status_is_read_as_it_was_written(writer):
    writer.train(3, {"ntp_loss": 1.0})
    writer.status("running", tokens_per_second=5000.0, seconds_left=math.inf)
    status = Run(writer.path).status
    assert (status.state, status.step, status.tokens_per_second, status.seconds_left) == ("running", 3, 5000.0, None)


def test_a_step_costs_less_than_a_millisecond(writer):
    rows, progress = make_rows(1, count=128), RunProgress(writer, 0)
    seconds = []
    for step in range(1, 100):
        values = {f"value_{i}": torch.tensor(float(i)) for i in range(20)}
        start = time.process_time()
        writer.train(step, values)
        if step % 10:  # a tenth step writes the parquet file
            writer.rollouts(step, rows)
        progress.report(step)
        seconds.append(time.process_time() - start)
    assert statistics.median(seconds) < 1e-3


# --- after a kill ---------------------------------------------------------------------------------------------------


def leave_wreck(path: Path) -> None:
    """What a process leaves that is killed while it writes."""
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99, "ntp_l')
    (path / "rollouts" / ".9-12.parquet.tmp").write_bytes(b"PAR1half")
    (path / ".status.json.123.tmp").write_text('{"state": "run')
    (path / "checkpoints" / ".step-12.tmp").mkdir()
    (path / "checkpoints" / ".step-12.tmp" / "model.safetensors").write_bytes(b"half")


def test_readers_skip_what_is_half_written(writer):
    train(writer, 1, 8)
    leave_wreck(writer.path)
    run = Run(writer.path)
    assert run.metrics()["step"].tolist() == list(range(1, 9))
    assert run.rollouts()["step"].max() == 8
    assert run.status.step == 8
    assert run.latest_checkpoint()[0] == 8


@pytest.mark.parametrize("step", [4, 6, None], ids=["at a checkpoint", "between two", "from nothing"])
def test_a_resumed_run_has_the_records_of_an_uninterrupted_one(tmp_path, step):
    with RunWriter.create(make_config(), tmp_path) as whole:
        whole.evaluation(0, {"ntp_loss": 5.0})
        train(whole, 1, 12)
    killed = RunWriter.create(make_config(), tmp_path)
    killed.evaluation(0, {"ntp_loss": 5.0})
    train(killed, 1, 11)  # its last rollouts are lost with it
    leave_wreck(killed.path)
    with RunWriter.open(killed.path, step) as resumed:
        if step is None:
            resumed.evaluation(0, {"ntp_loss": 5.0})
        assert Run(killed.path).metrics()["step"].tolist() == list(range(1, (step or 0) + 1))
        assert [s for s, _ in Run(killed.path).checkpoints()] == ([4] if step else [])
        train(resumed, (step or 0) + 1, 12)
    one, other = Run(whole.path), Run(resumed.path)
    pd.testing.assert_frame_equal(timeless(one.metrics()), timeless(other.metrics()))
    pd.testing.assert_frame_equal(timeless(one.evaluations()), timeless(other.evaluations()))
    pd.testing.assert_frame_equal(one.rollouts(), other.rollouts())
    assert [s for s, _ in one.checkpoints()] == [s for s, _ in other.checkpoints()] == [4, 8, 12]
    assert not [path for path in other.path.rglob(".*") if path.is_file()], "nothing half-written is left"


def test_resuming_leaves_other_peoples_hidden_files_alone(writer):
    (writer.path / ".ipynb_checkpoints").mkdir()
    with RunWriter.open(writer.path, 4):
        assert (writer.path / ".ipynb_checkpoints").is_dir()


def test_a_damaged_line_is_named_and_never_cut_away(writer):
    (writer.path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 3}\n'
    )
    before = (writer.path / "metrics.jsonl").read_bytes()
    with naming(ValueError, writer.path / "metrics.jsonl", '{"kind": "tr'):
        RunWriter.open(writer.path, 2)
    assert (writer.path / "metrics.jsonl").read_bytes() == before


def test_opening_at_the_last_step_leaves_the_metrics_file_alone(writer):
    train(writer, 1, 4)
    before = (writer.path / "metrics.jsonl").stat().st_ino
    with RunWriter.open(writer.path, 4):
        assert (writer.path / "metrics.jsonl").stat().st_ino == before


# --- following ------------------------------------------------------------------------------------------------------


def test_tail_gives_every_whole_line_once(writer):
    tail = MetricsTail(Run(writer.path))
    assert tail.read() == []
    writer.train(1, {"ntp_loss": 1.0})
    writer.train(2, {"ntp_loss": 2.0})
    assert [line["step"] for line in tail.read()] == [1, 2]
    line = json.dumps({"kind": "train", "step": 3}).encode() + b"\n"
    with (writer.path / "metrics.jsonl").open("ab", buffering=0) as file:
        file.write(line[:9])
        assert tail.read() == []
        file.write(line[9:])
        assert tail.read() == [{"kind": "train", "step": 3}]
    assert tail.read() == []
    assert tail.restarts == 0


def test_tail_begins_anew_when_a_resumed_run_cuts_the_file(writer):
    train(writer, 1, 8)
    tail = MetricsTail(Run(writer.path))
    assert len(tail.read()) == 10
    with RunWriter.open(writer.path, 4) as resumed:
        train(resumed, 5, 12)
    steps = [line["step"] for line in tail.read() if line["kind"] == "train"]
    assert steps == list(range(1, 13))
    assert tail.restarts == 1


# --- bad run directories --------------------------------------------------------------------------------------------


def test_a_folder_that_is_absent_or_no_run(tmp_path):
    with naming(FileNotFoundError, tmp_path / "absent"):
        Run(tmp_path / "absent")
    with naming(FileNotFoundError, tmp_path, "config.json"):
        Run(tmp_path)
    with naming(FileNotFoundError, tmp_path, "config.json"):
        RunWriter.open(tmp_path, 1)


@pytest.mark.parametrize(
    ("name", "text", "read", "fact"),
    [
        ("config.json", '{"format_version": 1, "rec', lambda run: run.config, "damaged"),
        ("config.json", "[1, 2]", lambda run: run.config, "list"),
        ("config.json", '{"format_version": 99}', lambda run: run.config, f"1 to {FORMAT_VERSION}, got 99"),
        ("config.json", '{"format_version": 1}', lambda run: run.config, "'recipe'"),
        ("config.json", '{"kind": "ask"}', lambda run: run.config, "'ask'"),
        ("config.json", '{"format_version": 1, "stepz": 3}', lambda run: run.config, "'stepz'"),
        ("status.json", "", lambda run: run.status, "damaged"),
        ("status.json", '{"state": "running"}', lambda run: run.status, "'step'"),
        ("env.json", "null", lambda run: run.env, "NoneType"),
        ("metrics.jsonl", "hello\n", lambda run: run.metrics(), "hello"),
        ("rollouts/1-2.parquet", "hello", lambda run: run.rollouts(), "damaged"),
    ],
)
def test_damaged_files_are_named(writer, name, text, read, fact):
    (writer.path / name).write_text(text)
    with naming(ValueError, writer.path / name, fact) as error:
        read(Run(writer.path))
    assert "\n" not in str(error.value)


def test_a_missing_status_is_that_of_a_run_that_waits_at_its_last_checkpoint(writer):
    (writer.path / "status.json").unlink()
    run = Run(writer.path)
    assert (run.state, run.status.step, run.status.steps) == ("waiting", run.done, run.steps)
    (writer.path / "config.json").unlink()
    with naming(FileNotFoundError, writer.path, "status.json"):
        _ = run.status


@pytest.mark.parametrize(
    ("name", "value"), [("state", "asleep"), ("state", ["running"]), ("step", "4"), ("steps", 1.5)]
)
def test_a_status_of_other_values_is_refused(writer, name, value):
    path = writer.path / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with refused(name, value) as error:
        _ = Run(writer.path).status
    assert str(path) in str(error.value)


def test_a_damaged_neighbour_is_told_and_left_out(tmp_path):
    whole = RunWriter.create(make_config(), tmp_path).path
    for name, text in (("a-damaged", "{"), ("z-damaged", '{"format_version": 99}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    with pytest.warns(UserWarning, match="skipped: .*-damaged") as told:
        assert [run.path for run in list_runs(tmp_path)] == [whole]
    assert len(told) == 2


def test_what_is_no_numbered_checkpoint_is_passed_over(writer):
    for name in ("step-3", "step-old", "step-²"):
        (writer.path / "checkpoints" / name).mkdir()
    assert [step for step, _ in Run(writer.path).checkpoints()] == [3]


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("config.json", None), ("status.json", "{")])
def test_the_trainer_refuses_a_damaged_run_in_one_sentence(writer, name, text, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "child_setup", lambda *paths: [])
    (writer.path / name).unlink()
    if text is not None:
        (writer.path / name).write_text(text)
    assert trainer.main([str(writer.path)]) == 2
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1


def test_a_failure_is_told_even_where_the_status_is_damaged(writer, capsys):
    (writer.path / "status.json").write_text("{")
    trainer._report(writer.path, 4, RuntimeError("no more"))
    status = Run(writer.path).status
    assert (status.state, status.step, status.error) == ("failed", 4, "RuntimeError: no more")
    (writer.path / "config.json").write_text("{")
    trainer._report(writer.path, 4, RuntimeError("no more"))
    assert "cannot be written into status.json" in capsys.readouterr().err


# -- which code made a run ---------------------------------------------------------------------------------------------


def test_the_commits_of_runs_are_named_once_with_what_was_not_committed(tmp_path):
    def run(name: str, text: str) -> SimpleNamespace:
        (tmp_path / name).mkdir()
        (tmp_path / name / "env.json").write_text(text)
        return SimpleNamespace(path=tmp_path / name)

    clean = [run(f"clean-{i}", '{"commit": "abc", "dirty": false}') for i in range(2)]
    assert made_at(clean) == "Runs created with commit abc."
    dirty, outside = run("dirty", '{"commit": "def", "dirty": true}'), run("outside", '{"commit": null, "dirty": null}')
    said = made_at([*clean, dirty, outside])
    assert said == "Runs created with commit abc, def with uncommitted changes, unknown (no git checkout)."
    (tmp_path / "bare").mkdir()
    with naming(FileNotFoundError, tmp_path / "bare", "env.json"):
        made_at([SimpleNamespace(path=tmp_path / "bare")])
