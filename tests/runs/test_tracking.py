"""Metrics in experiment trackers: refusals, what an entry holds, and the real packages where they are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from refine_lab.runs import tracking
from refine_lab.runs.files import take_lock
from refine_lab.runs.run import Run
from refine_lab.validation import ConfigError
from tests.factories.live_curves import new_run, train
from tests.support.paths import ROOT

FOLLOW = """import json, sys
from refine_lab.runs import tracking
from refine_lab.runs.run import Run

run = Run(sys.argv[2])
print("sent", run.log_to(sys.argv[1], project="refine"), run.log_to(sys.argv[1], project="refine"))
"""

READ_TRACKIO = """
from trackio.sqlite_storage import SQLiteStorage

(name,) = SQLiteStorage.get_runs("refine")
logs = SQLiteStorage.get_logs("refine", name)
print(json.dumps([name, [[each["step"], each.get("train/ntp_loss"), each.get("held_out/ntp_loss")] for each in logs]]))
"""

READ_WANDB = """
import os
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record

def records(data):  # LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, parts with crc, length and type
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""

found = {}
for path in sorted(Path(os.environ["WANDB_DIR"]).rglob("*.wandb")):
    for record in records(path.read_bytes()):
        if record.WhichOneof("record_type") == "run":
            name = record.run.run_id
        if record.WhichOneof("record_type") == "history":
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found[values["_step"]] = [values["_step"], values.get("train/ntp_loss"), values.get("held_out/ntp_loss")]
print(json.dumps([name, [found[step] for step in sorted(found)]]))
"""


def finished_run(folder: Path) -> Run:
    with new_run(folder) as writer:
        writer.status("running", 0)
        for step in (1, 2):
            train(writer, step, ntp_loss=2.0 if step == 1 else float("nan"))
        writer.evaluation(2, {"ntp_loss": 1.5})
        writer.status("finished", 2)
        return writer.run


@pytest.mark.parametrize("tracker", tracking.TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_in_one_sentence(tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    run = finished_run(tmp_path)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as error:
        run.log_to(tracker, project="refine")
    told = f"{tracker} is not installed: pip install {tracker} (or the extra `tracking` of refine_lab)"
    assert str(error.value) == told
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_an_unknown_tracker_and_an_empty_project_are_refused(tmp_path):
    run = finished_run(tmp_path)
    for tracker, project, field in (("trackoi", "refine", "tracker"), ("trackio", " ", "project")):
        with pytest.raises(ConfigError) as error:
            run.log_to(tracker, project=project)
        assert error.value.field == field


def test_a_step_is_an_entry_once_a_later_one_or_the_end_follows():
    entries = tracking.Entries()
    first = [{"kind": "eval", "step": 0, "time": 1.0, "ntp_loss": 3.0}, {"kind": "train", "step": 1, "ntp_loss": 2.5}]
    assert list(entries.complete(first, ended=False)) == [(0, {"held_out/ntp_loss": 3.0})]
    second = [{"kind": "eval", "step": 1, "ntp_loss": 2.0}, {"kind": "train", "step": 2, "ntp_loss": float("nan")}]
    assert list(entries.complete(second, ended=False)) == [(1, {"train/ntp_loss": 2.5, "held_out/ntp_loss": 2.0})]
    assert list(entries.complete([], ended=True)) == [(2, {})]


def test_each_update_of_test_time_training_is_an_entry():
    lines = [{"kind": "update", "step": 7, "number": number, "names": ["a"], "nsp_loss": 0.5} for number in (1, 2)]
    found = list(tracking.Entries().complete(lines, ended=True))
    assert [step for step, _ in found] == [1, 2]
    assert found[1][1] == {"update/number": 2, "update/nsp_loss": 0.5, "update/batch": 7}


@pytest.mark.long
@pytest.mark.parametrize(("tracker", "read"), [("trackio", READ_TRACKIO), ("wandb", READ_WANDB)])
def test_a_run_is_followed_to_its_end_and_a_second_call_sends_nothing(tmp_path, tracker, read):
    if find_spec(tracker) is None:
        pytest.skip(f"needs {tracker}: pip install -e '.[tracking]'")
    places = {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline"}
    environ = {**os.environ, **places, "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true"}
    with new_run(tmp_path / "runs", steps=6) as writer, take_lock(writer.path):
        writer.evaluation(0, {"ntp_loss": 4.0})
        train(writer, 1, ntp_loss=3.5)
        command = [sys.executable, "-c", FOLLOW + read, tracker, str(writer.run.path)]
        process = subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(20)
        for step in range(2, 7):
            train(writer, step, ntp_loss=3.5 - step / 4)
        writer.evaluation(6, {"ntp_loss": 1.5})
        writer.status("finished", 6)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "sent 7 0" in text if tracker == "trackio" else "sent 7 " in text, text
    name, entries = json.loads(next(line for line in text.splitlines() if line.startswith("[")))
    assert name.startswith(f"{writer.run.name}-")
    expected = [[0, None, 4.0], [1, 3.5, None], *([step, 3.5 - step / 4, None] for step in range(2, 6)), [6, 2.0, 1.5]]
    assert entries == expected
