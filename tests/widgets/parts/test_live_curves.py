"""The live curves' Python side on real run directories, and the JavaScript's pure parts under node."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traitlets import TraitError

from refine_lab.runs.writer import RunWriter
from tests.factories.live_curves import new_run, train
from widgets.core.packing import unpack
from widgets.figures.plots import check_figures
from widgets.parts.follower import Activity, Follower, RunReader, activity_of
from widgets.parts.live_curves import LiveCurves


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    with new_run(tmp_path, steps=3) as writer:
        writer.evaluation(0, {"ntp_loss": 3.1, "ntp_accuracy": 0.2})
        for step in (1, 2, 3):
            train(writer, step)
        writer.evaluation(3, {"ntp_loss": 2.9, "ntp_accuracy": 0.3})
        writer.status("finished")
    return writer.path


@pytest.fixture
def follow() -> Iterator[Callable[..., LiveCurves]]:
    """Makes widgets and stops them in the end."""
    made: list[LiveCurves] = []

    def make(*runs: Path) -> LiveCurves:
        made.append(LiveCurves(runs))
        return made[-1]

    yield make
    for widget in made:
        widget.close()


def line_of(widget: LiveCurves, panel: str, index: int = 0) -> dict[str, np.ndarray]:
    """Arrays of one line of a panel, read back from the bytes that go to the page."""
    (found,) = [item for item in widget.curves["panels"] if item["name"] == panel]
    line = found["lines"][index]
    return {name: np.frombuffer(line[name], "<f4") for name in ("x", "y", "low", "high") if name in line}


def wait_for(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_the_row_of_a_run_whose_gradient_is_mostly_noise_says_so(
    tmp_path: Path, follow: Callable[..., LiveCurves]
) -> None:
    with new_run(tmp_path, steps=6) as writer:
        for step in range(6):
            if step:
                train(writer, step)
            noise = {"nsp_signal": 0.001, "nsp_noise": 4.0, "nsp_ntp_cosine": 0.1, "nsp_snr": 0.00025}
            spread = {"nsp_snr_stderr": 0.001, "nsp_snr_upper": 0.003} if step else {}
            writer.evaluation(
                step, {"ntp_loss": 3.0, "long_ppl": 17.5, "key_loss": 2.86, "key_tokens": 40, **noise, **spread}
            )
            if step == 3:
                assert follow(writer.path).progress[0]["note"] == ""
        writer.status("finished")
    widget = follow(writer.path)
    note = widget.progress[0]["note"]
    assert "after 6 evaluations" in note and "0.003" in note and "mostly noise" in repr(widget)
    ratio = line_of(widget, "eval:nsp_snr")
    np.testing.assert_allclose(ratio["y"], [0.00025] * 6, rtol=1e-6)
    np.testing.assert_allclose(ratio["high"][1:], [0.00125] * 5, rtol=1e-6)
    np.testing.assert_allclose(line_of(widget, "eval:long_ppl")["y"], [17.5] * 6)
    assert "eval:key_tokens" not in [panel["name"] for panel in widget.curves["panels"]]


def test_a_finished_run_is_there_at_once(finished: Path, follow: Callable[..., LiveCurves]) -> None:
    widget = follow(finished)
    line = line_of(widget, "train:ntp_loss")
    np.testing.assert_allclose(line["x"], [1, 2, 3])
    np.testing.assert_allclose(line["y"], [2.9, 2.8, 2.7], rtol=1e-6)
    np.testing.assert_allclose(line_of(widget, "train:ntp_accuracy")["y"], 25)  # percent
    np.testing.assert_allclose(line_of(widget, "eval:ntp_loss")["x"], [0, 3])
    reward = line_of(widget, "train:cosine_mean")
    np.testing.assert_allclose([reward["low"][0], reward["high"][0]], [0.3, 0.7], rtol=1e-6)
    assert "train:reward_mean" not in [panel["name"] for panel in widget.curves["panels"]]  # it only repeats the cosine
    assert widget.progress[0]["label"] == "REFINE, seed 0"
    assert (widget.progress[0]["state"], widget.progress[0]["step"], widget.progress[0]["steps"]) == ("finished", 3, 3)
    assert not [thread for thread in threading.enumerate() if thread.name == "live-curves"]


def test_a_run_that_nobody_has_begun_is_waiting_not_killed(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    writer = new_run(tmp_path)
    assert follow(writer.path).progress[0]["state"] == "waiting"
    writer.status("starting", pid=os.getpid())
    assert follow(writer.path).progress[0]["state"] == "killed"


def test_runs_that_do_not_start_are_read_less_and_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("widgets.parts.follower.INTERVAL", 0.02)
    reader, times = RunReader(new_run(tmp_path).path), []

    def update() -> Activity:
        times.append(time.monotonic())
        return activity_of([reader], reader.poll())

    follower = Follower(update, print)
    follower.start()
    wait_for(lambda: len(times) == 4)  # new data, then after 0.04, 0.08 and 0.16 seconds
    assert times[-1] - times[0] >= 0.02 + 0.04 + 0.08
    time.sleep(0.05)
    follower.wake()
    wait_for(lambda: len(times) == 5)
    follower.stop()
    assert not follower.is_alive() and times[-1] - times[-2] < 4.0


def test_it_grows_with_the_file_and_skips_half_a_line(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    writer = new_run(tmp_path, steps=2)
    train(writer, 1)
    widget = follow(writer.path)
    assert widget.progress[0]["state"] == "waiting"
    with (writer.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 2, "ntp_')
    time.sleep(0.6)
    assert line_of(widget, "train:ntp_loss")["x"].tolist() == [1]
    with (writer.path / "metrics.jsonl").open("ab") as file:
        file.write(b'loss": 1.5}\n')
    wait_for(lambda: line_of(widget, "train:ntp_loss")["x"].tolist() == [1, 2])
    assert line_of(widget, "train:ntp_loss")["y"][1] == 1.5
    writer.status("finished", 2)
    wait_for(lambda: widget.progress[0]["state"] == "finished")
    wait_for(lambda: not widget._follower.is_alive())  # type: ignore[union-attr]
    assert widget.error == ""
    writer.close()


def test_a_run_may_come_later(tmp_path: Path, follow: Callable[..., LiveCurves], finished: Path) -> None:
    parked = finished.rename(tmp_path / "parked")
    widget = follow(finished)
    assert widget.progress[0]["state"] == "waiting"
    assert widget.curves["panels"] == []
    parked.rename(finished)
    wait_for(lambda: widget.progress[0]["state"] == "finished")
    assert line_of(widget, "train:ntp_loss")["x"].tolist() == [1, 2, 3]


def test_arms_and_seeds_are_lines_of_one_panel(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    widget = follow()
    assert repr(widget) == "LiveCurves: no runs"
    for method, seed in (("refine", 0), ("sft", 0), ("sft", 1)):
        with new_run(tmp_path, method, seed) as writer:
            train(writer, 1)
            writer.status("finished")
        widget.add(writer.path)
        widget.add(writer.path)  # known already
    assert [method["method"] for method in widget.curves["methods"]] == ["sft", "refine"]
    assert [method["symbol"] for method in widget.curves["methods"]] == ["circle", "diamond"]
    lines = widget.curves["panels"][0]["lines"]
    assert [(line["method"], line["seed"]) for line in lines] == [("refine", 0), ("sft", 0), ("sft", 1)]
    assert len(widget.progress) == 3


def test_a_run_taken_up_again_is_read_anew(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    with new_run(tmp_path) as writer:
        for step in (1, 2, 3):
            train(writer, step)
        writer.status("stopped")
    widget = follow(writer.path)
    with RunWriter.open(writer.path, 1) as again:
        train(again, 2, ntp_loss=1.25)
        again.status("stopped")
    widget.stop()
    assert line_of(widget, "train:ntp_loss")["x"].tolist() == [1, 2]
    assert line_of(widget, "train:ntp_loss")["y"][1] == 1.25


def test_errors_reach_the_reader(tmp_path: Path, finished: Path, follow: Callable[..., LiveCurves]) -> None:
    with new_run(tmp_path, "sft") as writer:
        writer.status("failed", error="CUDA out of <b>memory</b>")
    with new_run(tmp_path, "sft", 1) as damaged:
        (damaged.path / "metrics.jsonl").write_text("no json\n")
        damaged.status("finished")
    widget = follow(writer.path, damaged.path, finished)
    failed, unreadable, whole = widget.progress
    assert (failed["state"], failed["error"]) == ("failed", "CUDA out of <b>memory</b>")
    assert unreadable["state"] == "unreadable"
    assert "is not a valid metrics line" in unreadable["error"]
    assert (whole["state"], whole["error"]) == ("finished", "")
    assert len(line_of(widget, "train:ntp_loss")["x"]) == 3


def test_an_error_of_the_following_itself_is_shown(
    tmp_path: Path, follow: Callable[..., LiveCurves], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = new_run(tmp_path)
    widget = follow(writer.path)

    def fail(*arguments: Any) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("widgets.parts.live_curves.gather", fail)
    train(writer, 1)
    wait_for(lambda: widget.error != "")
    assert widget.error == "KeyError: 'lost'"
    monkeypatch.undo()
    writer.close()


def test_a_killed_run_is_called_so(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    with new_run(tmp_path) as writer:
        writer.status("running")
    assert follow(writer.path).progress[0]["state"] == "killed"  # nobody holds the lock


def test_long_series_are_thinned(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    with new_run(tmp_path, "sft", steps=5000) as writer:
        lines = [{"kind": "train", "step": step, "ntp_loss": 99.0 if step == 3210 else 2.0} for step in range(1, 5001)]
        (writer.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        writer.status("finished")
    line = line_of(follow(writer.path), "train:ntp_loss")
    assert len(line["x"]) <= 1000
    assert (line["x"][0], line["x"][-1]) == (1, 5000)
    assert line["x"][line["y"] == 99].tolist() == [3210]


def test_seeds_of_an_arm_are_thinned_to_the_same_steps(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    """So that a mean over them is of one step."""
    draw = np.random.default_rng(0)
    for seed in (0, 1):
        with new_run(tmp_path, "sft", seed, steps=3000) as writer:
            lines = [{"kind": "train", "step": step, "ntp_loss": float(draw.normal())} for step in range(1, 3001)]
            (writer.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            writer.status("finished")
    widget = follow(*sorted(tmp_path.iterdir()))
    one, other = (line_of(widget, "train:ntp_loss", index)["x"] for index in (0, 1))
    np.testing.assert_array_equal(one, other)
    assert 500 < len(one) <= 1000


def test_lines_have_the_tokens_and_seconds_up_to_each_step(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    with new_run(tmp_path, steps=4) as writer:
        for step in range(5):
            if step:
                train(writer, step, tokens=100 * step, seconds=0.5)
            if step in (0, 4):
                writer.evaluation(step, {"ntp_loss": 3.0})
        writer.status("finished")
    widget = follow(writer.path)
    for panel, tokens, seconds in (
        ("train:ntp_loss", [100, 200, 300, 400], [0.5, 1, 1.5, 2]),
        ("eval:ntp_loss", [0, 400], [0, 2]),
    ):
        (found,) = [item for item in widget.curves["panels"] if item["name"] == panel]
        assert np.frombuffer(found["lines"][0]["tokens"], "<f4").tolist() == tokens
        assert np.frombuffer(found["lines"][0]["seconds"], "<f4").tolist() == seconds
    widget.axis = "seconds"
    with pytest.raises(TraitError, match="epochs"):
        widget.axis = "epochs"


def test_updates_come_at_most_four_times_a_second(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    writer = new_run(tmp_path, steps=100)
    widget = follow(writer.path)
    times: list[float] = []
    widget.observe(lambda change: times.append(time.monotonic()), "curves")
    for step in range(1, 61):
        train(writer, step)
        time.sleep(0.02)
    wait_for(lambda: line_of(widget, "train:ntp_loss")["x"][-1] == 60)
    assert len(times) >= 2
    assert np.diff(times).min() >= 0.24
    writer.close()


def test_stop_reads_the_rest_and_ends_the_thread(tmp_path: Path, follow: Callable[..., LiveCurves]) -> None:
    writer = new_run(tmp_path)
    widget = follow(writer.path)
    thread = widget._follower
    train(writer, 1)
    widget.stop()
    assert thread is not None
    assert not thread.is_alive()
    assert line_of(widget, "train:ntp_loss")["x"].tolist() == [1]
    train(writer, 2)
    widget.start()
    wait_for(lambda: line_of(widget, "train:ntp_loss")["x"].tolist() == [1, 2])
    writer.close()


def test_what_is_drawn_is_the_model_state(finished: Path, follow: Callable[..., LiveCurves]) -> None:
    widget = follow(finished)
    state = widget.get_state()
    assert unpack(state["curves"])["panels"][0]["lines"][0]["y"] == widget.curves["panels"][0]["lines"][0]["y"]
    assert state["progress"] == widget.progress
    assert "export default" in state["_esm"]
    assert ".live-curves" in state["_css"]


def test_it_is_a_table_as_text_and_a_figure_when_static(finished: Path, follow: Callable[..., LiveCurves]) -> None:
    widget = follow(finished)
    data = widget._repr_mimebundle_()[0]
    header, row = data["text/plain"].splitlines()
    assert header.split()[:3] == ["run", "state", "step"]
    assert row.split() == ["REFINE,", "seed", "0", "finished", "3/3", "5,000", "2.7000", "0.5000", "2.9000", "30.0000"]
    figure = widget.figure()
    check_figures(figure)
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["NTP loss", "NTP accuracy", "Held-out NTP loss", "Held-out NTP accuracy", "Cosine reward"]
