"""The monitor on real run directories: what it shows, what it compares, and runs that it starts and stops."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import pytest

from refine_lab.config import DataConfig, TrainConfig, to_json
from refine_lab.data.recall import RecallDocument
from refine_lab.experiments.compare import config_differences, evaluation_results
from refine_lab.experiments.stored_scores import store_recall
from refine_lab.recipes import ttt_per_prompt
from refine_lab.runs.cards import write_card
from refine_lab.runs.run import Run
from refine_lab.runs.started import accept, check_unchanged
from refine_lab.runs.writer import RunWriter, write_status
from refine_lab.training.inputs import new_run
from tests.factories.run_monitor import HOSTILE, card_with, write_run
from tests.support.refusals import naming, refused
from widgets.figures.tables import Table
from widgets.parts.step_slider import StepSlider
from widgets.rollout_inspector import RolloutInspector
from widgets.run_monitor import RunMonitor


@pytest.fixture
def watch() -> Iterator[Callable[[Path], RunMonitor]]:
    """Makes monitors, and ends what follows the runs."""
    made: list[RunMonitor] = []

    def make(folder: Path) -> RunMonitor:
        made.append(RunMonitor(folder))
        return made[-1]

    yield make
    for monitor in made:
        monitor.close()


def test_settings_that_differ(tmp_path: Path) -> None:
    one, other = write_run(tmp_path, 0), write_run(tmp_path, 1, lr=1e-3)
    table = config_differences([one, other]).set_index("setting")
    assert table.index.tolist() == ["seed", "lr"]
    assert table.loc["lr"].tolist() == ["0.0001", "0.001"]
    assert config_differences([one]).empty
    sft = replace(one.config, refine=None, data=DataConfig(sources={HOSTILE: 1.0}))
    with RunWriter.create(sft, tmp_path) as writer:
        table = config_differences([one, writer.run]).set_index("setting")
    assert table.loc["method"].tolist() == ["refine", "sft"]
    assert not [name for name in table.index if name.startswith("refine")]
    assert json.loads(table.loc[f"data.sources.{HOSTILE}"].iloc[1]) == 1.0
    assert one.config.refine is not None
    binary = replace(one.config, refine=replace(one.config.refine, reward="binary"))
    with RunWriter.create(binary, tmp_path) as another:
        table = config_differences([one, another.run, writer.run]).set_index("setting")
    assert table.loc["refine.reward"].tolist() == ["cosine", "binary", "–"]


def test_runs_are_followed_compared_and_looked_into(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    runs = [write_run(tmp_path, seed, lr) for seed, lr in ((0, 1e-4), (1, 1e-3), (2, 1e-4))]
    monitor = watch(tmp_path)
    assert [run.name for run in monitor.runs] == [run.name for run in reversed(runs)]  # the newest first
    assert len(monitor.curves.progress) == 3
    monitor.table.selected = [runs[0].name, runs[1].name]
    assert {row["name"] for row in monitor.curves.progress} == {runs[0].name, runs[1].name}
    assert "<td" in monitor.differences.value and "0.001" in monitor.differences.value
    assert (monitor.step.value, monitor.step.last) == (4, 4)
    assert monitor.inspector.rollouts["position"].tolist() == [24]
    monitor.step.value = 2
    assert monitor.inspector.rollouts["position"].tolist() == [22]
    first = f"REFINE, lr 0.001, seed 1 ({runs[1].name})"  # the first of the two in the table
    assert monitor.rolled_notice.status == f"1 rollout of {first} at step 2."
    assert monitor.children[-2:] == (monitor.rolled_notice, monitor.inspector)
    heads = re.findall(r'title="([^"]+)">(REFINE, lr [^<]+)</th>', monitor.differences.value)
    assert (runs[0].name, "REFINE, lr 0.0001, seed 0") in heads
    assert f"rollouts of {first} at step 2\nRolloutInspector: 1 of 1" in repr(monitor)
    assert monitor.step.label == "REFINE, lr 0.001, seed 1, rollouts at step"
    assert [name for _, name in monitor.rolled_out.options] == [runs[1].name, runs[0].name]
    monitor.rolled_out.value = runs[0].name
    assert monitor.step.label == "REFINE, lr 0.0001, seed 0, rollouts at step" and monitor.step.value == 4
    monitor.rolled_out.value = runs[1].name
    monitor.step.value = 2
    monitor.refresh()
    assert monitor.step.value == 2  # who looks at a step stays there
    later = write_run(tmp_path, 3)
    monitor.refresh()
    assert monitor.table.rows[0]["name"] == later.name
    assert set(monitor.table.selected) == {runs[0].name, runs[1].name}
    assert monitor.error == ""


def test_all_begun_runs_of_the_newest_experiment_are_selected_at_first(
    tmp_path: Path, watch: Callable[[Path], RunMonitor]
) -> None:
    """Recall stored after training is a panel with a point for each run, from the untrained model at step 0."""
    older = write_run(tmp_path, 0)
    older.path.rename(tmp_path / "20200101-000000-tiny-refine-s0")
    config = replace(older.config, recipe="midtrain", steps=1)
    runs = []
    for seed in range(6):
        with RunWriter.create(replace(config, seed=seed), tmp_path) as writer:
            if seed < 5:
                writer.train(1, {"ntp_loss": 3.0})
                with writer.checkpoint(1):
                    pass
                writer.flush()
                writer.status("finished")
        runs.append(writer.run)
    answers = pd.DataFrame({"name": ["word-1 0"], "question": ["word-1 x"], "exact_recall": [1.0]})
    documents = {"word-1": [RecallDocument(tokens=[1, 2], questions=[])]}
    store_recall(runs[0], answers, documents, before=answers.assign(exact_recall=0.0))
    monitor = watch(tmp_path)
    assert {*monitor.table.selected} == {run.name for run in runs[:5]}, "all seeds, without the run that has not begun"
    panel = monitor.curves.curves["panels"][0]
    assert (panel["name"], len(panel["lines"])) == ("recall:exact_recall", 1)
    assert np.frombuffer(panel["lines"][0]["x"], "<f4").tolist() == [0, 1]
    assert np.frombuffer(panel["lines"][0]["y"], "<f4").tolist() == [0, 100]
    store_recall(runs[1], answers, documents)
    monitor.refresh()
    lines = monitor.curves.curves["panels"][0]["lines"]
    assert [(line["seed"], len(line["x"]) // 4) for line in lines if line["seed"] < 2] == [(1, 1), (0, 2)]


def test_two_experiments_of_one_method_and_seed_are_two(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    """Runs of other settings are other lines, labels and means; only seeds of one experiment are averaged, step by step."""
    short = [write_run(tmp_path, seed, steps=3) for seed in (0, 1)]
    long = [write_run(tmp_path, seed, steps=6, lr=1e-3) for seed in (0, 1)]
    monitor = watch(tmp_path)
    labels = {row["name"]: row["label"] for row in monitor.curves.progress}
    assert labels == {
        short[0].name: "REFINE, lr 0.0001, steps 3, seed 0",
        short[1].name: "REFINE, lr 0.0001, steps 3, seed 1",
        long[0].name: "REFINE, lr 0.001, steps 6, seed 0",
        long[1].name: "REFINE, lr 0.001, steps 6, seed 1",
    }
    methods = {
        method["method"]: (method["label"], method["dash"], method["look"])
        for method in monitor.curves.curves["methods"]
    }
    assert sorted(methods) == ["refine: lr 0.0001, steps 3", "refine: lr 0.001, steps 6"]
    assert {dash for _, dash, _ in methods.values()} == {"solid", "dash"}
    assert {look for *_, look in methods.values()} == {2}, "the colour stays that of the method"
    lines = monitor.curves.curves["panels"][0]["lines"]
    assert sorted((line["method"], line["seed"]) for line in lines) == [
        (method, seed) for method in sorted(methods) for seed in (0, 1)
    ]
    assert monitor.curves.frame().groupby("method").size().to_dict() == {
        "refine: lr 0.0001, steps 3": 6,
        "refine: lr 0.001, steps 6": 12,
    }
    still = {trace.name: list(trace.x) for trace in monitor.curves.figure().data if trace.showlegend}
    assert still == {"REFINE, lr 0.0001, steps 3": [1, 2, 3], "REFINE, lr 0.001, steps 6": [1, 2, 3, 4, 5, 6]}
    assert all(label in repr(monitor.curves) for label in labels.values())
    monitor.table.selected = [run.name for run in short]
    assert {row["label"] for row in monitor.curves.progress} == {"REFINE, seed 0", "REFINE, seed 1"}


def test_a_run_made_twice_is_no_further_seed(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    runs = [write_run(tmp_path / "runs", 0), write_run(tmp_path / "other", 0)]
    again = runs[1].path.rename(tmp_path / "runs" / "20300101-000000-tiny-refine-s0")
    monitor = watch(tmp_path / "runs")
    labels = {row["name"]: row["label"] for row in monitor.curves.progress}
    assert labels == {
        runs[0].name: f"REFINE, {runs[0].name[:15]}, seed 0",
        again.name: "REFINE, 20300101-000000, seed 0",
    }


def test_a_page_says_whose_rollouts_it_holds(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    run = write_run(tmp_path / "runs", 0)
    page = watch(tmp_path / "runs").save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"Rollouts of REFINE, seed 0 ({run.name}) at steps 1 to 4." in page


def test_a_page_tells_settings_scores_and_conclusion(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    runs = [write_run(tmp_path / "runs", seed) for seed in (0, 1)]
    monitor = watch(tmp_path / "runs")
    scores = Table(pd.DataFrame({"method": ["REFINE"], "exact match": [0.5]}), "Scores")
    path = monitor.save_html(tmp_path / "page.html", "Post-training", more=[scores, None], conclusion="No difference.")
    page = path.read_text(encoding="utf-8")
    facts = {
        "runs": "2 (2 finished)",
        "methods": "REFINE",
        "seeds": "0, 1",
        "lr": "0.0001",
        "model": runs[0].config.model,
    }
    for name, value in facts.items():
        assert json.dumps([name, value]) in page
    assert '"conclusion": "No difference."' in page
    tables = {table["caption"]: table["rows"] for table in page_tables(page)}
    assert tables["Scores"] == [["REFINE", "0.5"]]
    shared = dict(tables["Settings that all selected runs share"])
    assert shared["lr"] == "0.0001" and "seed" not in shared
    monitor.table.selected = []  # nothing is selected: every part is empty, and nothing fails
    assert monitor.error == "" and monitor.differences.value == ""
    assert json.dumps(["runs", "none selected"]) in monitor.save_html(path).read_text(encoding="utf-8")
    fields = [field for field in monitor.children if hasattr(field, "tooltip")]
    assert fields and all(field.tooltip is not None for field in fields), "ipywidgets would show the tooltip null"


def test_a_page_holds_the_rollouts_of_all_steps_or_of_the_last(
    tmp_path: Path, watch: Callable[[Path], RunMonitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs", 0)
    monitor = watch(tmp_path / "runs")
    assert monitor._all_rollouts().rollouts["step"].tolist() == [1, 2, 3, 4]
    monkeypatch.setattr("widgets.run_monitor.PAGE_ROLLOUTS", 2)
    assert monitor._all_rollouts().rollouts["step"].tolist() == [3, 4]
    assert "<title>Two runs</title>" in monitor.save_html(tmp_path / "page.html", title="Two runs").read_text()
    (tmp_path / "none").mkdir()
    assert watch(tmp_path / "none").save_html(tmp_path / "none.html").stat().st_size > 10_000


def test_the_slider_of_steps() -> None:
    slider = StepSlider(label="rollouts at step", last=9, value=7)
    assert repr(slider) == "StepSlider: rollouts at step 7 of 9"
    with refused("value", 10, "from 0 to 9"):
        slider.value = 10
    with refused("value", -1, "from 0 to 9"):
        slider.value = -1
    with refused("last", -1, "at least 0"):
        slider.last = -1
    with refused("value", 3, "from 0 to 2"):
        StepSlider(last=2, value=3)
    assert (slider.value, slider.last) == (7, 9)
    slider.last = 12
    assert slider.value == 7
    slider.last, slider.disabled = 4, True
    assert repr(slider) == "StepSlider: rollouts at step 4 of 4, disabled"
    state = {"label": "rollouts at step", "last": 4, "value": 4, "disabled": True, "error": "", "status": ""}
    assert slider.page_state() == state | {"first": 0, "unit": "", "help": ""}
    with slider.hold_trait_notifications():
        slider.first, slider.last = 6, 9
    assert slider.value == 6


def test_runs_of_test_time_training_are_shown_too(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    trained, config = write_run(tmp_path, 0), ttt_per_prompt("sft", 3)
    run = new_run(config, tmp_path, inputs={"prompts": 2})
    facts = {"name": "a", "method": "sft", "seed": 3, "prompt_tokens": 9, "cut": 0, "question": "", "references": ["b"]}
    scores = {"answer": "b", "exact_match": 1.0, "contains_answer": 1.0, "f1": 1.0, "seconds": 0.1, "loss_after": 2.0}
    run.log.write([facts | scores])
    monitor = watch(tmp_path)
    assert {each.name for each in monitor.runs} == {trained.name, run.name}
    shown = {row["name"]: row for row in monitor.curves.progress}
    assert shown[run.name]["state"] == "waiting"
    assert (shown[run.name]["step"], shown[run.name]["steps"]) == (1, 2)
    assert shown[run.name].keys() == shown[trained.name].keys(), "one kind of row"
    assert "answers:contains_answer" in {panel["name"] for panel in monitor.curves.curves["panels"]}
    assert monitor.step.first == 1 and monitor.step.last == 4
    alone = watch(run.path)
    assert (alone.folder, [each.name for each in alone.runs]) == (tmp_path, [run.name])


def test_what_is_damaged_or_gone_is_said(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    runs = [write_run(tmp_path, seed) for seed in range(2)]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    monitor = watch(tmp_path)
    assert re.match(r"skipped: .*broken.*config\.json is damaged", monitor.error)
    assert [row["state"] for row in monitor.curves.progress] == ["finished"] * 2
    shutil.rmtree(runs[0].path)
    monitor.curves.start()
    monitor.curves.stop()
    shown = {row["name"]: row for row in monitor.curves.progress}
    assert (shown[runs[0].name]["state"], shown[runs[0].name]["error"]) == ("unreadable", "the run directory is gone")
    assert [run.name for run in monitor.runs] == [runs[1].name], "which can be started and stopped still"
    monitor.stop()
    assert monitor.notice.status == "None of the selected runs is in progress."


def page_tables(page: str) -> list[dict]:
    """Returns the tables of an offline page."""
    data = re.search(r'<script type="application/json" id="data">(.*)</script>', page)
    assert data is not None
    return next(each["state"]["tables"] for each in json.loads(data[1])["widgets"] if "tables" in each["state"])


def test_evaluations_of_the_selected_runs_are_listed(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    run, other = write_run(tmp_path / "runs", 0), write_run(tmp_path / "runs", 1)
    monitor = watch(tmp_path / "runs")
    assert "Evaluations" not in monitor.differences.value + repr(monitor)
    for name, value in (("first", 0.25), ("second", 0.5)):
        write_card(run.path, tmp_path / "results" / name, card_with(value))
    monitor._pressed("refresh")
    shown = monitor.differences.value
    assert shown.count("niah_single_1") == 2 and "<td" in shown and "<img" not in shown
    values, date = ("0.2500 ± 0.0625", "0.5000 ± 0.0625", "50 (48)"), "2026-02-16 10:00"
    for cell in (*values, date, "../../results/first", "not measured: "):
        assert f">{cell}" in shown and cell in repr(monitor)
    page = monitor.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in page
    tables = page_tables(page)
    assert [table["caption"] for table in tables[:2]] == ["Differing settings", "Evaluations"]
    expected = evaluation_results(monitor.runs)
    assert tables[1]["columns"] == list(expected) and tables[1]["rows"] == expected.to_numpy().tolist()
    monitor.table.selected = [other.name]
    assert "Evaluations" not in monitor.differences.value
    for damage in ("{", "[]", '{"tasks": [{}]}', '{"tasks": 3}'):
        (card_file := next((run.path / "evaluations").glob("*.json"))).write_text(damage, encoding="utf-8")
        assert evaluation_results([run])["step"].tolist() == ["a file in evaluations is damaged"], card_file


def inspectors() -> list[RolloutInspector]:
    """Those that live."""
    return [each for each in ipywidgets.widgets.widget._instances.values() if isinstance(each, RolloutInspector)]


def test_what_is_no_longer_shown_is_not_kept(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    """An executed notebook holds the state of every widget that lives."""
    others = inspectors()
    runs = [write_run(tmp_path / "runs", seed) for seed in (0, 1)]
    monitor = watch(tmp_path / "runs")
    for run in runs * 2:
        first, monitor.table.selected = monitor.inspector, [run.name]
        assert (first.comm is None) == (first is not monitor.inspector)
    monitor.save_html(tmp_path / "page.html")
    assert [each for each in inspectors() if each not in others] == [monitor.inspector]


def test_text_of_a_run_is_no_markup(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    one = write_run(tmp_path, 0)
    other = replace(one.config, data=DataConfig(sources={HOSTILE: 1.0}))
    with RunWriter.create(other, tmp_path):
        pass
    monitor = watch(tmp_path)
    monitor.table.selected = [row["name"] for row in monitor.table.rows]
    assert "onerror" in monitor.differences.value
    assert "<img" not in monitor.differences.value


def test_refusals(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    with naming(FileNotFoundError, tmp_path / "nowhere"):
        RunMonitor(tmp_path / "nowhere")
    empty = watch(tmp_path)
    assert repr(empty).startswith("RunMonitor of 0 runs; selected: none")
    empty.stop()
    assert empty.notice.status == "None of the selected runs is in progress."


def followers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "live-curves"]


def test_a_resumed_run_is_followed_in_table_and_curves_until_it_is_closed(
    tmp_path: Path, watch: Callable[[Path], RunMonitor]
) -> None:
    run, others = write_run(tmp_path, 0), followers()
    write_status(run, "stopped")
    monitor = watch(tmp_path)
    assert followers() == others, "all runs have ended"
    write_status(run, "starting")  # resumed: no process works on it yet
    monitor.follow()
    assert len(followers()) == len(others) + 2
    write_status(run, "finished")
    deadline = time.monotonic() + 20
    while followers() != others and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [row["state"] for row in (*monitor.table.rows, *monitor.curves.progress)] == ["finished"] * 2
    write_status(run, "stopped")
    monitor.follow()
    monitor.stop_following()
    assert followers() == others and monitor.table.rows[0]["state"] == "stopped"
    with RunWriter.create(run.config, tmp_path):
        pass
    waiting = watch(tmp_path)
    assert len(followers()) == len(others) + 2
    waiting.close()
    assert followers() == others and waiting.comm is None


def test_recall_that_is_stored_after_training_is_on_the_page(
    tmp_path: Path, watch: Callable[[Path], RunMonitor]
) -> None:
    config = TrainConfig(recipe="tiny", steps=1, batch_size=2, mini_batch_size=2)
    runs = []
    for each in (replace(config, refine=None), config):
        with RunWriter.create(each, tmp_path / "runs") as writer:
            writer.evaluation(0, {"ntp_loss": 3.0})
            writer.flush()
            writer.status("finished")
        runs.append(writer.run)
    monitor = watch(tmp_path / "runs")
    assert monitor.comparison.measure.value == "held-out ntp_loss"
    for number, run in enumerate(runs):
        answers = pd.DataFrame({"name": ["word-1 0"], "question": ["word-1 x"], "exact_recall": [float(number)]})
        store_recall(run, answers, {"word-1": [RecallDocument(tokens=[1, 2], questions=[])]})
    page = monitor.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert monitor.comparison.found is not None and "In exact recall" in monitor.comparison.found.head
    assert "exact recall (%)" in page


@pytest.mark.process
def test_an_edited_run_is_not_started_and_its_accepted_change_is_shown(
    tmp_path: Path, watch: Callable[[Path], RunMonitor]
) -> None:
    run = write_run(tmp_path, 0, lr=1e-4)
    write_status(run, "stopped")
    (run.path / "config.json").write_text(to_json(replace(run.config, lr=1e-3)), encoding="utf-8")
    monitor, edited = watch(tmp_path), Run(run.path)
    monitor._pressed("start")
    assert "lr was 0.0001 and is now 0.001" in monitor.error
    assert edited.state == "stopped"
    assert "Forks and accepted changes" not in monitor.differences.value + repr(monitor)
    accept(edited, check_unchanged(edited, ["lr"]))
    monitor = watch(tmp_path)
    for shown in (monitor.differences.value, repr(monitor)):
        assert "Forks and accepted changes" in shown
        assert "lr changed from 0.0001 to 0.001 after step" in shown
    page = monitor.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert f'"{run.name}", "lr changed from 0.0001 to 0.001 after step' in page
    (run.path / "started.json").write_text('{"changes": [3]}', encoding="utf-8")
    assert f"error: skipped: changes of {run.path / 'started.json'} must be a list" in repr(watch(tmp_path))


def test_a_run_is_started_found_again_and_stopped(tmp_path: Path, watch: Callable[[Path], RunMonitor]) -> None:
    data = DataConfig(sources={"python": 1.0}, sequence_length=64, max_tokens=50_000, validation_sequences=1)
    config = TrainConfig(
        recipe="tiny", model="tiny-deltanet", data=data, refine=None, steps=10_000, batch_size=1, mini_batch_size=1
    )
    with RunWriter.create(config, tmp_path) as writer:
        run = writer.run
    watch(tmp_path).start()
    try:
        again = watch(tmp_path)  # as after a restart of the kernel: it knows nothing of the first
        deadline = time.monotonic() + 120
        while not len(run.metrics()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert run.state == "running"
        again._pressed("start")
        assert again.error == "" and "finished or are in progress" in again.notice.status
    finally:
        watch(tmp_path).stop()
    while run.alive and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run.state == "stopped"
