"""The rows of the run table, what the page names the states, and the comparison of the selected runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from refine_lab.config import TrainConfig
from refine_lab.data.recall import RecallDocument
from refine_lab.experiments.stored_scores import store_recall, stored_scores
from refine_lab.recipes import ttt_per_prompt
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunWriter, write_status
from refine_lab.training.inputs import new_run
from tests.factories.run_monitor import write_run
from widgets.parts.run_comparison import ABSENT, NO_SCORES, TOO_FEW, RunComparison
from widgets.parts.run_rows import NO_PROCESS, shown_state
from widgets.parts.run_table import RunTable
from widgets.run_monitor import RunMonitor


def evaluated(folder: Path, method: str, seed: int, losses: list[float], **settings: object) -> Run:
    """A finished run of SFT or REFINE with these held-out losses, at steps 0, 1, ..."""
    refine = {"refine": None} if method == "sft" else {}
    config = TrainConfig(recipe="tiny", steps=len(losses) - 1, batch_size=2, mini_batch_size=2, seed=seed, **refine)
    with RunWriter.create(replace(config, **settings), folder) as writer:
        for step, loss in enumerate(losses):
            writer.evaluation(step, {"ntp_loss": loss, "ntp_accuracy": 0.25})
        writer.flush()
        writer.status("finished")
    return writer.run


def answered(folder: Path, method: str, seed: int, scores: list[float]) -> Run:
    """A test-time training run with these scores of its questions."""
    run = new_run(ttt_per_prompt(method, seed), folder, inputs={"prompts": len(scores)})
    for number, score in enumerate(scores):
        facts = {"name": f"p{number}", "method": method, "seed": seed, "prompt_tokens": 9, "cut": 0, "answer": "b"}
        facts |= {"question": f"q{number}", "references": ["b"], "seconds": 0.1, "loss_after": 2.0 - score}
        run.log.write([facts | {"exact_match": score, "contains_answer": score, "f1": score}])
    return run


def recalled(run: Run, right: list[float], tokens: int = 512) -> None:
    """Stores these answers of a run to questions about documents of this length."""
    names = [f"word-4 {number}" for number in range(len(right))]
    documents = [RecallDocument(tokens=[number] * tokens, questions=[]) for number in range(len(right))]
    answers = pd.DataFrame({"name": names, "question": names, "exact_recall": right})
    store_recall(run, answers, {"word-4": documents})


@pytest.fixture
def table(tmp_path: Path) -> Iterator[RunTable]:
    made = RunTable()
    yield made
    made.close()


def test_rows_have_state_progress_metrics_and_the_settings_that_differ(tmp_path: Path, table: RunTable) -> None:
    runs = [write_run(tmp_path, 0), write_run(tmp_path, 1, lr=1e-3), evaluated(tmp_path, "sft", 0, [3.0, 2.5])]
    table.show(runs)
    first, _, sft = table.rows
    assert (first["method"], first["seed"], first["state"], first["step"], first["steps"]) == (
        "REFINE",
        0,
        "finished",
        4,
        4,
    )
    assert first["metrics"] == {"NTP loss": 2.6, "cosine reward": 0.5} and sft["metrics"]["held-out loss"] == 2.5
    assert {row["experiment"] for row in table.rows} == {"tiny, from tiny-deltanet"}
    assert [(row["look"], row["symbol"]) for row in table.rows] == [(2, "diamond"), (2, "diamond"), (1, "circle")]
    assert sft["metrics"]["held-out accuracy (%)"] == 25.0 and first["about"].startswith("The paper's method")
    assert "cosine reward" in table.metrics and table.helps[table.metrics.index("cosine reward")].startswith(
        "The cosine"
    )
    columns = {column["label"]: column["by_method"] for column in table.settings}
    assert columns == {"lr": False, "steps": True}, "the number of steps differs between methods alone"
    assert [row["settings"]["lr"] for row in table.rows] == ["0.0001", "0.001", "1e-06"]
    text = repr(table)
    assert text.startswith("tiny, from tiny-deltanet\n") and "held-out loss" in text and "LongPPL" not in text
    assert "steps" not in text and "0.0001" in text and runs[0].name in text


def test_selected_and_hidden_runs_are_those_of_the_list(tmp_path: Path, table: RunTable) -> None:
    runs = [write_run(tmp_path, seed) for seed in (0, 1)]
    table.show(runs)
    table.selected, table.hidden = [runs[1].name, "none", runs[0].name], ["none", runs[1].name]
    assert (table.selected, table.hidden) == ([run.name for run in runs], [runs[1].name])
    assert [line.startswith("*") for line in repr(table).splitlines()[2:]] == [True, True]
    copy = table.copy_of([runs[1].name])
    assert ([row["name"] for row in copy.rows], copy.hidden, copy.selectable) == ([runs[1].name], [runs[1].name], False)
    copy.close()
    table.show(runs[:1])
    assert (table.selected, table.hidden) == ([runs[0].name], [])
    table.show([])
    assert repr(table) == "RunTable: no runs"


def test_a_run_is_followed_until_it_ends(tmp_path: Path, table: RunTable) -> None:
    config = TrainConfig(recipe="tiny", steps=2, batch_size=2, mini_batch_size=2)
    with RunWriter.create(config, tmp_path) as writer:
        table.show([writer.run])
        assert table.rows[0]["state"] == "not started"
        writer.train(1, {"ntp_loss": 3.0, "tokens_per_second": 5.0})
        writer.train(2, {"ntp_loss": 2.0, "tokens_per_second": 5.0})
        writer.flush()
        writer.status("finished")
    deadline = time.monotonic() + 20
    while table.rows[0]["state"] != "finished" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (table.rows[0]["state"], table.rows[0]["metrics"]) == ("finished", {"NTP loss": 2.0})


@pytest.mark.parametrize(
    ("state", "error", "shown"),
    [
        ("starting", "", ("queued", "", "")),
        ("waiting", "", ("not started", "", "")),
        ("running", "", ("running", "", "")),
        ("stopped", "a stop was requested; saved after step 3", ("stopped by you", "", "saved after step 3")),
        (
            "stopped",
            "stopped by SIGTERM; saved after step 3",
            ("stopped", "", "stopped by SIGTERM; saved after step 3"),
        ),
        ("killed", "", ("failed", NO_PROCESS, "")),
        ("failed", "the loss is nan", ("failed", "the loss is nan", "")),
    ],
)
def test_states_as_the_page_names_them(state: str, error: str, shown: tuple[str, str, str]) -> None:
    assert shown_state(state, error) == shown


def test_a_stopped_run_is_no_failure(tmp_path: Path, table: RunTable) -> None:
    run = write_run(tmp_path, 0)
    write_status(run, "stopped", error="a stop was requested; saved after step 4 in checkpoints/step-4")
    table.show([run])
    row = table.rows[0]
    assert (row["state"], row["bad"], row["error"]) == ("stopped by you", False, "")
    assert row["remark"] == "saved after step 4 in checkpoints/step-4"


# -- the comparison ----------------------------------------------------------------------------------------------------


def test_held_out_measures_are_compared_at_the_last_common_step(tmp_path: Path) -> None:
    """refine - sft at step 2: -0.1, -0.2, -0.3; t(0.975, 2) = 4.302653, standard deviation 0.1, half 0.248."""
    runs = [evaluated(tmp_path, "sft", seed, [3.0, 2.5, 2.0]) for seed in range(3)]
    runs += [evaluated(tmp_path, "refine", seed, [3.0, 2.5, 1.9 - seed / 10], steps=2) for seed in range(3)]
    shown = RunComparison()
    shown.show(runs)
    assert shown.reference.value == ("method", "sft") and shown.measure.value == "held-out ntp_loss"
    assert shown.found is not None
    assert shown.found.data["difference"].tolist() == ["−0.2000 [−0.4484, +0.0484]"]
    assert shown.found.head.startswith(
        "In held-out NTP loss, REFINE has the best mean (1.8000 nats): not shown to differ"
    )
    assert shown.found.note == "Measured at step 2, the last that all of these runs have reached."
    assert shown.found.head in shown._shown.value and shown.found.sentence in repr(shown)
    shown.measure.value = "held-out ntp_accuracy"
    assert "no interval because all seeds differ by the same amount" in shown.found.sentence
    shown.reference.value = ("run", runs[0].name)
    assert shown.found.data["method"].tolist()[0] == "SFT, seed 1" and len(shown.found.data) == 5
    assert "single runs are compared" in shown.found.sentence
    assert shown.found.methods.keys() == {"SFT", "REFINE"}
    shown.show([*runs[:3], evaluated(tmp_path, "refine", 0, [3.0])])
    assert shown.found is not None and "at step 0" in shown.found.note


def test_answers_are_compared_question_by_question(tmp_path: Path) -> None:
    runs = [answered(tmp_path, "none", 0, [0, 1, 0, 0]), answered(tmp_path, "refine", 0, [1, 1, 0, 1])]
    shown = RunComparison()
    shown.show(runs)
    assert [value for _, value in shown.measure.options] == ["contains_answer", "exact_match", "f1", "loss_after"]
    assert shown.found is not None and shown.found.data["distinct questions"].tolist() == [4]
    assert (
        "REFINE has the best mean (75.0 %): not shown to differ from baseline (no adaptation) (25.0 %; +50.0 points"
        in (shown.found.head)
    )


def test_recall_that_was_measured_after_training_is_compared_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path, "sft", 0, [3.0]), evaluated(tmp_path, "refine", 0, [2.0], steps=0)]
    for run, right in zip(runs, ([0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]), strict=True):
        recalled(run, right)
    shown = RunComparison()
    shown.show(runs)
    assert [value for _, value in shown.measure.options][:2] == ["exact_recall", "held-out ntp_loss"]
    assert shown.found is not None and shown.found.data["distinct questions"].tolist() == [4]
    assert "In exact recall, REFINE has the best mean (75.0 %): not shown to differ from SFT (25.0 %; +50.0 points" in (
        shown.found.head
    )
    (runs[0].path / "metrics.jsonl").write_text("damaged\n")
    shown.show(runs)
    assert (
        shown.found is None and "metrics.jsonl is damaged" in shown.reason and shown.reason[:60] in shown._shown.value
    )


def test_a_monitor_orders_its_rows_by_recall_if_there_is_any(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path, "sft", seed, [3.0], steps=0) for seed in range(2)]
    monitor = RunMonitor(tmp_path)
    assert monitor.table.sort == ["", False]
    monitor.close()
    for run, right in zip(runs, ([0.0, 1.0], [1.0, 1.0]), strict=True):
        recalled(run, right)
    monitor = RunMonitor(tmp_path)
    assert monitor.table.sort == ["metric:exact recall (%)", True]
    monitor.close()


def test_recall_of_an_earlier_checkpoint_or_of_other_documents_is_not_compared(tmp_path: Path) -> None:
    runs, names = [evaluated(tmp_path, "sft", seed, [3.0], steps=2) for seed in range(3)], ["sft", "refine", "dft"]
    for run, tokens in zip(runs, (512, 512, 2048), strict=True):
        recalled(run, [0.0, 1.0], tokens)
    scores, _ = stored_scores(runs, names)
    assert set(scores["exact_recall"]["method"]) == {"sft", "refine"}, "dft was asked longer documents"
    with RunWriter.open(runs[1].path, 2) as writer, writer.checkpoint(2):
        pass
    assert runs[1].done == 2
    assert "exact_recall" not in stored_scores(runs, names)[0], "refine has been trained further"


def test_a_choice_that_fails_leaves_no_earlier_conclusion(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path, method, 0, [3.0]) for method in ("sft", "refine")]
    shown = RunComparison()
    shown.show(runs[:2])
    assert shown.found is not None
    (runs[1].path / "metrics.jsonl").write_text("damaged\n")
    shown.reference.value = ("run", runs[0].name)  # the scores of single runs are read
    assert shown.found is None and "metrics.jsonl is damaged" in shown.reason
    assert shown.reason[:60] in shown._shown.value


def test_a_selected_run_without_comparable_scores_is_named(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path, method, 0, [3.0]) for method in ("sft", "refine")]
    other = write_run(tmp_path, 0, steps=4)
    shown = RunComparison()
    shown.show([*runs, other])
    assert shown.found is not None
    assert shown.found.sentence.endswith("steps 4 is not compared: it has no comparable scores in this measure.")


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    shown = RunComparison()
    assert repr(shown) == TOO_FEW
    shown.show([])
    assert (shown.reason, shown.reference.disabled) == (TOO_FEW, True)
    trained, other = evaluated(tmp_path, "sft", 0, [3.0]), write_run(tmp_path, 1)
    shown.show([trained])
    assert shown.reason == TOO_FEW
    shown.show([trained, other])
    assert shown.reason == NO_SCORES and NO_SCORES in shown._shown.value
    shown.show([trained, other, evaluated(tmp_path, "refine", 5, [3.0], lr=0.1)])
    shown.reference.value = ("method", "refine: lr 0.0001, steps 4")
    assert shown.reason == ABSENT
