"""The runs of the evidence: configurations, what is measured, and tables that several processes add to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import Experiment, contrasts_of, experiments, frontiers, measure_in_turn
from refine_lab.experiments import evidence
from refine_lab.experiments.evidence import (
    DOCUMENTS,
    EvidenceRun,
    item_scores,
    measure,
    questions_of,
    read_table,
    record,
    recorded,
    row_losses,
)
from refine_lab.models.loading import load_model
from refine_lab.training.evaluation import next_token
from refine_lab.types import Batch
from tests.support.refusals import naming, refused


@pytest.mark.parametrize(("method", "coefficient"), [(name, None) for name in evidence.VARIANTS] + [("weighted", 0.2)])
def test_a_variant_is_the_method_with_its_settings(method: str, coefficient: float | None) -> None:
    run = EvidenceRun(method=method, coefficient=coefficient, seed=3)
    config, (name, own) = run.config, evidence.VARIANTS[method]
    assert (config.method, config.seed, config.steps, config.data.recall) == (name, 3, 60, {"number-1": 0.5})
    if config.refine is not None:
        assert {field: getattr(config.refine, field) for field in own} == own
        assert coefficient is None or config.refine.nsp_coef == coefficient


def test_the_places_of_memory_have_the_settings_of_the_recipe() -> None:
    refine = EvidenceRun(method="refine_memory", coefficient=1.0).config.refine
    assert refine is not None
    assert (refine.num_chunks, refine.rollout_length, refine.tau, refine.margin) == (8, 5, 0.5, 5)
    assert (refine.group_size, refine.group_by, refine.reward, refine.nsp_coef) == (8, "prefix", "binary", 1.0)
    single = EvidenceRun(method="refine_memory", group_size=1).config.refine
    assert single is not None and (single.group_size, single.group_by) == (1, "sequence")


def test_labels_name_the_settings_that_differ() -> None:
    run = EvidenceRun(method="refine_memory", group_size=32, rollout_length=9, reward="exact", scale_by_std=False)
    assert run.label == "refine_memory_n32_k9_exact_unscaled"
    assert EvidenceRun(method="refine_memory", group_size=8, reward="binary").label == "refine_memory"
    assert EvidenceRun(planted=False).task == "python 1024"
    assert EvidenceRun(method="refine").key[3:] == ("refine", "0.2", "0")
    assert EvidenceRun(method="sft", lr=1e-3, steps=20).label == "sft_steps20_lr0.001"
    assert EvidenceRun(data="/texts/novels").task == "number-1 novels 1024"
    assert EvidenceRun(planted=False, data="/texts/novels", recall="word-1").task == "novels word-1 1024"
    with refused("method", "refined"):
        EvidenceRun(method="refined")
    with refused("reward", "cosine"):
        _ = EvidenceRun(method="sft", reward="cosine").config
    with refused("group_size", 4):
        _ = EvidenceRun(method="sft", group_size=4).config
    with refused("reward", "edit"):
        _ = EvidenceRun(method="expected_memory", reward="edit").config


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("expected_memory", "group_size", 8),
        ("weighted", "scale_by_std", False),
        ("weighted", "reward", "cosine"),
        ("longce", "rollout_length", 9),
        ("dft", "group_size", 1),
    ],
)
def test_a_setting_without_effect_is_refused(method: str, name: str, value: object) -> None:
    with refused(name, value):
        _ = EvidenceRun(method=method, **{name: value}).config  # type: ignore[arg-type]


def test_losses_of_rows_add_up_to_those_of_all_rows() -> None:
    policy, _ = load_model("tiny-deltanet", device="cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 100, (5, 24), generator=generator)
    batch = Batch(tokens=tokens, lengths=torch.tensor([24, 9, 20, 2, 24]), sequence_ids=(0, 1, 2, 3, 4))
    keys = torch.zeros(5, 23, dtype=torch.bool)
    keys[0, 3:9], keys[2, 18] = True, True
    losses, key_sums = row_losses(policy, batch, keys, micro_batch_size=2)
    whole = next_token(policy, batch, key_tokens=keys)
    assert float(losses.sum()) / batch.num_targets == pytest.approx(whole["ntp_loss"], abs=1e-5)
    assert float(key_sums.sum()) / 7 == pytest.approx(whole["key_loss"], abs=1e-5)
    assert key_sums[[1, 3, 4]].tolist() == [0, 0, 0]
    alone = next_token(policy, batch.rows(1, 2))["ntp_loss"]
    assert float(losses[1]) / 8 == pytest.approx(alone, abs=1e-5)


MEANS = {"exact_recall": 0.5, "longppl": 3.25, "ntp_loss": 2.0, "key_tokens": 7}
ITEMS = {"exact_recall": [1.0, 0.0, 1.0], "ntp_loss": [1.5, 2.5], "key_loss": [1.25]}


def test_a_row_is_added_once(tmp_path: Path) -> None:
    run = EvidenceRun(experiment="9", method="weighted", coefficient=0.2, seed=4)
    assert not recorded(tmp_path, run.key)
    for _ in range(2):
        record(tmp_path, run, MEANS, ITEMS, commit="abc", seconds=12)
    assert recorded(tmp_path, run.key)
    (row,) = read_table(tmp_path / evidence.TABLE).to_dict("records")
    expected = {"experiment": "9", "model": "tiny-deltanet", "task": "number-1 1024", "method": "weighted"}
    expected |= {"coefficient": "0.2", "seed": "4", "exact_recall": "0.5", "longppl": "3.25", "ntp_loss": "2"}
    assert row == expected | {"key_tokens": "7", "commit": "abc", "seconds": "12"}
    scores = item_scores(tmp_path, "exact_recall", "9")
    assert scores["score"].tolist() == [1, 0, 1] and scores["item"].tolist() == [0, 1, 2]
    with refused("measure", "f1"):
        item_scores(tmp_path, "f1")
    with refused("experiment", "1"):
        item_scores(tmp_path, "ntp_loss", "1")


def test_an_interrupted_record_has_its_items_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, replace_text = EvidenceRun(experiment="9", seed=4), evidence.replace_text

    def only_items(path: Path, text: str) -> None:
        if path.name == evidence.TABLE:
            raise OSError("no space")
        replace_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(evidence, "replace_text", only_items)
        with naming(OSError, "no space"):
            record(tmp_path, run, MEANS, ITEMS, commit="abc", seconds=12)
    assert not recorded(tmp_path, run.key)
    record(tmp_path, run, MEANS, ITEMS, commit="abc", seconds=12)
    assert recorded(tmp_path, run.key) and read_table(tmp_path / evidence.ITEMS)["measure"].is_unique


ADD = """
import sys
from pathlib import Path
from refine_lab.experiments.evidence import EvidenceRun, record
for seed in range(int(sys.argv[2]), 100, 4):
    record(Path(sys.argv[1]), EvidenceRun(seed=seed), {"ntp_loss": 1.0}, {"ntp_loss": [1.0, 2.0]}, commit="", seconds=1)
"""


@pytest.mark.process
def test_processes_add_rows_at_the_same_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ADD, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(start)]) for start in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    table, items = (read_table(tmp_path / name) for name in (evidence.TABLE, evidence.ITEMS))
    assert sorted(map(int, table["seed"])) == sorted(map(int, items["seed"])) == list(range(100))
    assert set(items["values"]) == {"1 2"}


def test_rows_are_measured_once_and_those_without_measures_are_left_out(tmp_path: Path) -> None:
    asked: list[int] = []

    def measures(run: EvidenceRun) -> tuple[dict[str, float], dict[str, list[float]]] | None:
        asked.append(run.seed)
        return None if run.seed == 1 else ({"ntp_loss": 2.0 + run.seed}, {"ntp_loss": [2.0]})

    found = [EvidenceRun(seed=seed) for seed in range(3)]
    measure_in_turn(found, tmp_path, 1.0, measures)
    measure_in_turn(found, tmp_path, 1.0, measures)
    assert asked == [0, 1, 2, 1] and read_table(tmp_path / evidence.TABLE)["ntp_loss"].tolist() == ["2", "4"]
    measure_in_turn([EvidenceRun(seed=9)], tmp_path, -1.0, measures)
    assert asked == [0, 1, 2, 1], "nothing starts after its time"


def test_every_registered_run_is_distinct_and_every_contrast_has_its_runs() -> None:
    found = experiments()
    keys = [run.key[1:] for experiment in found.values() for run in experiment.runs]
    assert len(keys) == len(set(keys)) > 150
    for name, experiment in found.items():
        labels = {f"{run.label} {run.key[4]}".strip() for run in experiment.runs}
        assert {label for pair in experiment.contrasts for label in pair} <= labels, name
        assert experiment.question.endswith("?")


def test_contrasts_are_paired_over_seeds_and_items_with_holms_correction(tmp_path: Path) -> None:
    for seed in range(3):
        for method, right in (("sft", 40 + seed), ("expected_memory", 80 + seed)):
            items = {"exact_recall": [1.0] * right + [0.0] * (120 - right)}
            record(tmp_path, EvidenceRun(experiment="1", method=method, seed=seed), {}, items, commit="", seconds=1)
    pairs = [("expected_memory 1", "sft"), ("longce 1", "sft")]
    experiment = Experiment("Which?", "exact_recall", [], pairs)
    found = contrasts_of(experiment, "1", tmp_path, "number-1 1024", "exact_recall")
    (row,) = found.to_dict("records")  # there are no runs of longce
    assert row["difference"] == pytest.approx(1 / 3) and row["low"] > 0.2 and row["seeds"] == 3 and row["items"] == 120
    assert not row["equivalent"] and row["p_holm"] == pytest.approx(2 * row["p"]), "two contrasts are registered"
    questions = [f"key {number % 40}" for number in range(120)]  # documents with the same key are one item
    (fewer,) = contrasts_of(experiment, "1", tmp_path, "number-1 1024", "exact_recall", questions).to_dict("records")
    assert (fewer["difference"], fewer["items"], fewer["prompts"]) == (row["difference"], 40, 120)


def test_frontiers_use_the_runs_of_both_experiments(tmp_path: Path) -> None:
    rates = {"0.1": (0.5, 2.00), "0.3": (0.7, 2.01), "1": (0.9, 2.03)}
    for seed in range(3):
        for method, better in (("expected_memory", 0.05), ("weighted", 0.0)):
            for coefficient, (recall, loss) in rates.items():
                run = EvidenceRun(
                    experiment="1" if coefficient == "1" else "2",
                    method=method,
                    coefficient=float(coefficient),
                    seed=seed,
                )
                means = {"exact_recall": recall + better * (1 + 0.1 * seed), "ntp_loss": loss + 0.0001 * seed}
                record(tmp_path, run, means, {}, commit="", seconds=1)
    registered = frontiers(tmp_path)
    own = EvidenceRun(method="weighted", coefficient=0.1)  # a user's run, which the registered frontiers leave out
    record(tmp_path, own, {"exact_recall": 0.0, "ntp_loss": 3.0}, {}, commit="", seconds=1)
    assert frontiers(tmp_path).equals(registered)
    (row,) = frontiers(tmp_path).to_dict("records")
    assert (row["method"], row["against"], row["seeds"]) == ("expected_memory", "weighted", 3)
    assert row["difference"] == pytest.approx(0.055, abs=1e-3) and row["low"] > 0


def test_every_document_has_a_question() -> None:
    run = EvidenceRun(sequence_length=256)
    questions = questions_of(run)
    assert len(questions) == DOCUMENTS > len(set(questions)) > 50 and questions == questions_of(run)


@pytest.mark.slow
def test_the_model_before_training_is_measured() -> None:
    run = EvidenceRun(method="base", sequence_length=256)
    means, items = measure(run, "tiny-deltanet")
    assert len(items["exact_recall"]) == evidence.DOCUMENTS and len(items["ntp_loss"]) == evidence.ROWS
    assert (
        means["exact_recall"] == pytest.approx(sum(items["exact_recall"]) / evidence.DOCUMENTS)
        and means["exact_recall"] > 0.5
    )
    assert means["ntp_loss"] == pytest.approx(sum(items["ntp_loss"]) / evidence.ROWS, abs=1e-5)
