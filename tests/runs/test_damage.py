"""One damaged run blocks nothing but itself; what was deleted, what does not fit, and what a terminal would act on."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from refine_lab.method.rewards import checked
from refine_lab.models.loading import load_model
from refine_lab.runs.process import _log_end, attach, follow, hold
from refine_lab.runs.queue import require_finished, run_in_turn
from refine_lab.runs.run import Run, list_runs
from refine_lab.runs.started import Change, accept, check_beginning
from refine_lab.runs.writer import RunWriter, write_status
from refine_lab.text import printable, quote
from refine_lab.training.__main__ import sentence_of
from refine_lab.types import RewardInputs
from refine_lab.validation import ConfigError, path_of
from tests.factories.bad_files import DEEP
from tests.factories.run_monitor import write_run
from tests.support.refusals import refused
from widgets.parts.live_curves import LiveCurves
from widgets.run_monitor import RunMonitor

ESCAPES = "\x1b[31mred\x1b[0m \u202eturned\u2066"


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "nested config": lambda run: (run / "config.json").write_text(DEEP),
    "nested status": lambda run: (run / "status.json").write_text(DEEP),
    "nested metrics": lambda run: (run / "metrics.jsonl").write_text(DEEP + "\n"),
    "pipe as config": lambda run: pipe(run / "config.json"),
    "pipe as status": lambda run: pipe(run / "status.json"),
    "pipe as metrics": lambda run: pipe(run / "metrics.jsonl"),
    "pipe as lock": lambda run: pipe(run / "lock"),
    "pipe as rollouts": lambda run: pipe(run / "rollouts" / "9-9.parquet"),
    "text as step": lambda run: line(run, {"kind": "train", "step": "1", "ntp_loss": 1.0}),
    "list as step": lambda run: line(run, {"kind": "train", "step": [1], "ntp_loss": 1.0}),
    "text as loss": lambda run: line(run, {"kind": "train", "step": 1, "ntp_loss": "low"}),
    "object as loss": lambda run: line(run, {"kind": "eval", "step": 1, "ntp_loss": {}}),
    "list as kind": lambda run: line(run, {"kind": ["train"], "step": 1}),
    "huge number": lambda run: line(run, {"kind": "train", "step": 10**400, "ntp_loss": 1.0}),
    "list as line": lambda run: line(run, [1, 2]),
    "list as state": lambda run: (run / "status.json").write_text('{"state": ["finished"]}'),
}


def line(run: Path, values: object) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


@pytest.mark.parametrize("name", DAMAGE)
def test_one_damaged_run_blocks_nothing_but_itself(tmp_path: Path, name: str) -> None:
    good, bad = write_run(tmp_path, 0), write_run(tmp_path, 1)
    DAMAGE[name](bad.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert good.name in [run.name for run in list_runs(tmp_path)]
    monitor = RunMonitor(tmp_path)
    curves = LiveCurves([good, bad])
    try:
        states = {row["name"]: row["state"] for row in curves.progress}
        assert states[good.name] == "finished"
        if "rollouts" not in name and "lock" not in name and "config" not in name:
            assert states[bad.name] == "unreadable"
        assert good.name in {row["name"] for row in monitor.table.rows}
        monitor.table.selected = [good.name]
        assert f"step {monitor.step.value}" in monitor.rolled_notice.status
        assert not monitor.error or monitor.error.startswith(f"skipped: {bad.path}")
        frame = curves.frame()
        assert frame.loc[frame["seed"] == 0, "ntp_loss"].tolist() == [2.9, 2.8, 2.7, 2.6]
        assert any(len(panel["lines"]) for panel in curves.curves["panels"])
    finally:
        monitor.close()
        curves.close()


MALFORMED: dict[str, object] = {
    "changes": 3,
    "a change": [3],
    "a change without a step": [{"name": "lr", "before": 1, "now": 2}],
    "a change without values": [{"name": "lr", "step": 2}],
    "the step of a change": [{"name": "lr", "before": 1, "now": 2, "step": "2"}],
    "the name of a change": [{"name": ["lr"], "before": 1, "now": 2, "step": 2}],
    "parent": 3,
    "parent without a step": {"run": "../a"},
    "parent's run": {"run": ["../a"], "step": 2},
    "reward": ["cosine"],
    "selection": ["entropy"],
}
"""Values of a field of `started.json`, by what is malformed in them."""


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_record_of_the_start_is_named_and_concerns_one_run(tmp_path: Path, name: str) -> None:
    good, bad = write_run(tmp_path, 0), write_run(tmp_path, 1)
    monitor, path = RunMonitor(tmp_path), bad.path / "started.json"
    field = next(each for each in ("changes", "parent", "reward", "selection") if each.removesuffix("s") in name)
    path.write_text(json.dumps(bad.started | {field: MALFORMED[name]}), encoding="utf-8")
    try:
        monitor.table.selected = []
        monitor.table.selected = [good.name, bad.name]  # listed before the damage
        assert monitor.error == "" and "started.json is damaged" in monitor.differences.value
        assert "started.json is damaged" in monitor.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
        monitor.refresh()
        assert [row["name"] for row in monitor.table.rows] == [good.name] and str(path) in monitor.error
    finally:
        monitor.close()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert [run.name for run in list_runs(tmp_path)] == [good.name]
    assert [f"skipped: {field} of {path} must be" in str(each.message) for each in warned] == [True]
    for reads in (hold, check_beginning, lambda run: accept(run, [Change("lr", 1, 2)])):
        with refused(f"{field} of {path}"):
            reads(bad)


def test_load_model_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    run = write_run(tmp_path, 0)
    pipe(run.path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(str(run.path))


@pytest.mark.parametrize("what", ["run", "metrics.jsonl"])
def test_a_run_whose_files_are_deleted_ends_with_a_sentence(tmp_path: Path, what: str) -> None:
    run = write_run(tmp_path, 0)
    with RunWriter(run.path, step=4) as writer:
        if what == "run":
            shutil.rmtree(run.path)
        else:
            (run.path / what).unlink()
        with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl was deleted while the run was in progress"):
            writer.train(5, {"ntp_loss": 1.0})
        with pytest.raises(FileNotFoundError, match="was deleted"):
            writer.status("running")
    assert run.path.exists() == (what != "run")
    if what == "run":
        with pytest.raises(FileNotFoundError, match=r"the run directory .* was deleted or moved"):
            _ = run.status


def test_the_end_of_a_log_is_read_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path, 0)
    with (run.path / "log.txt").open("wb") as log:
        log.truncate(10 * 2**40)  # a sparse file, larger than any memory
        log.seek(0, os.SEEK_END)
        log.write(b"\nthe last word\n" + b"x" * 1000)
    assert _log_end(run).splitlines()[-2:] == ["the last word", f"{'x' * 200}... (1,000 characters)"]


def test_escapes_of_a_run_reach_no_terminal(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run = write_run(tmp_path, 0)
    write_status(run, "failed", error=ESCAPES)
    path = run.path.rename(tmp_path / f"run {ESCAPES.replace('/', '')}")
    run, printed = Run(path), []
    assert run.status.error == r"\x1b[31mred\x1b[0m \u202eturned\u2066"
    for fails in (lambda: require_finished([run]), lambda: follow(attach(run), log=printed.append)):
        with pytest.raises(RuntimeError, match=r"\\x1b\[31mred") as raised:
            fails()
        assert str(raised.value).isprintable()
    write_status(run, "finished")
    run_in_turn([run], detach=True, log=printed.append)
    assert printed and all(text.isprintable() for text in printed)
    monitor = RunMonitor(tmp_path)
    try:
        assert r"\x1b[31mred" in repr(monitor)
        for text in (repr(monitor), repr(monitor.curves), repr(monitor.notice)):
            assert text.replace("\n", "").isprintable()
    finally:
        monitor.close()
    (path / "config.json").write_text("{")
    with pytest.warns(UserWarning, match=r"\\x1b\[31mred"):
        list_runs(tmp_path)


def test_an_error_in_the_status_is_cut(tmp_path: Path) -> None:
    run = write_run(tmp_path, 0)
    write_status(run, "failed", error="x" * 10_000_000)
    assert (run.path / "status.json").stat().st_size < 3000
    assert str(run.status.error).endswith("... (10,000,000 characters)")


def test_a_value_is_quoted_to_200_characters() -> None:
    error = ConfigError("a field", [1] * 1_000_000, "small")
    assert str(error).startswith("a field must be small, got [1, 1, 1,") and len(str(error)) < 300
    assert quote(10**5000) == "a value of type int"
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert quote(nested) == "a value of type list"
    while nested:  # else Python ends it recursively
        nested = nested.pop()  # type: ignore[assignment]
    assert quote(ESCAPES).isprintable()


@pytest.mark.parametrize("text", ["~nosuch/a", "a\0b", "x" * 5000, "\ud800", "/etc/passwd\0"])
def test_a_text_that_is_no_path_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="parameter data must be a path that can be opened, got '") as raised:
        path_of("parameter data", text)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 350


def test_printable_keeps_letters_and_line_ends() -> None:
    assert printable("Grüße\n日本 🙂") == "Grüße\n日本 🙂"
    assert printable("a\tb\x9b\u2028\ud800") == r"a\tb\x9b\u2028\ud800"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_lack_of_memory_comes_with_advice(error: Exception) -> None:
    sentence = sentence_of(error)
    assert sentence.startswith(type(error).__name__)
    assert "micro_batch_size" in sentence and "activation_checkpointing" in sentence


def test_other_errors_come_without_advice() -> None:
    assert sentence_of(ValueError("a value")) == "ValueError: a value"
    assert sentence_of(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(0), ZeroDivisionError("division by zero")])
def test_an_error_inside_a_reward_names_it(error: BaseException) -> None:
    def broken(inputs: RewardInputs) -> torch.Tensor:
        raise error

    ids, states = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)
    inputs = RewardInputs(rollout_ids=ids, target_ids=ids, hidden_states=states, target_hidden_states=states,
                          logprobs=torch.zeros(2, 3))  # fmt: skip
    with pytest.raises(RuntimeError, match=f"reward 'broken' raised {type(error).__name__}"):
        checked(broken)(inputs)
