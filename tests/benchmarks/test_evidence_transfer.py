"""Experiment 5: the models of experiment 1 on tasks and lengths that they were not trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import evidence_transfer
from benchmarks.evidence import experiments
from refine_lab.experiments import evidence
from refine_lab.experiments.evidence import EvidenceRun, record
from refine_lab.runs.writer import RunWriter


def test_a_model_is_that_of_the_finished_run_of_experiment_1(tmp_path):
    runs = experiments()["5"].runs
    base, sft = runs[0], next(run for run in runs if run.method == "sft" and run.seed == 1)
    assert evidence_transfer.model_of(base, tmp_path) == "tiny-deltanet"
    assert {evidence_transfer.origin(run).key for run in runs} <= {run.key for run in experiments()["1"].runs}
    assert evidence_transfer.model_of(sft, tmp_path) is None
    with RunWriter.create(evidence_transfer.origin(sft).config, tmp_path / "sft" / "output") as writer:
        writer.status("running", 3)
        assert evidence_transfer.model_of(sft, tmp_path) is None
        writer.status("finished", 60)
    assert evidence_transfer.model_of(sft, tmp_path) == str(writer.path)
    assert evidence_transfer.model_of(replace(sft, seed=2), tmp_path) is None


def test_models_that_were_trained_again_are_compared_with_the_first_ones(tmp_path):
    first = EvidenceRun(experiment="1", method="sft", seed=1)
    for folder, recall in (("tables", 0.5), ("out", 0.25)):
        (tmp_path / folder).mkdir()
        record(tmp_path / folder, first, {"exact_recall": recall, "ntp_loss": 2.0}, {}, commit="abc", seconds=1)
    record(tmp_path / "out", replace(first, seed=2), {"exact_recall": 0.1}, {}, commit="abc", seconds=1)
    (row,) = evidence_transfer.compared(tmp_path / "tables", tmp_path / "out").to_dict("records")
    assert (row["seed"], row["exact_recall"], row["exact_recall_first"], row["ntp_loss_first"]) == (
        "1",
        "0.5",
        "0.25",
        "2",
    )


@pytest.mark.slow
def test_other_facts_and_needles_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "DOCUMENTS", 2)
    monkeypatch.setattr(evidence, "ROWS", 2)
    monkeypatch.setattr(evidence_transfer, "DOCUMENTS", 2)
    monkeypatch.setattr(evidence_transfer, "SAMPLES", 2)
    run = EvidenceRun(experiment="5", method="sft", sequence_length=2048)
    means, items = evidence_transfer.transfer(run, "tiny-deltanet", tmp_path)
    assert means["longppl"] > 1 and 1 < means["ntp_loss"] < 4
    assert set(items) == {"exact_recall", "ntp_loss", "key_loss", "recall word-4", *evidence_transfer.NEEDLES}
    assert all(len(items[name]) == 2 for name in ("exact_recall", "recall word-4", *evidence_transfer.NEEDLES))
    assert all(0 <= score <= 1 for name in evidence_transfer.NEEDLES for score in items[name])
