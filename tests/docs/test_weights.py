"""The committed weights of the evidence: `load_model` reads each, and they recall as the table says."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from benchmarks.evidence_weights import WEIGHTS
from refine_lab.data.batches import SequenceData
from refine_lab.models import load_model
from refine_lab.models.loading import manifest_of
from refine_lab.training.evaluation import exact_recall, recall_documents
from tests.support.paths import ROOT

RESULTS = ROOT / "docs" / "results"


@pytest.mark.slow
def test_every_model_loads_and_recalls_about_as_much_as_its_run() -> None:
    table, found = pd.read_csv(RESULTS / "evidence.csv", dtype=str, keep_default_na=False), {}
    for name, run in WEIGHTS.items():
        folder, config = RESULTS / "weights" / name, replace(run, experiment="1").config
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert sum(path.stat().st_size for path in folder.iterdir()) < 2_500_000
        policy, tokenizer = load_model(folder, device="cpu")
        held_out = SequenceData(replace(config.data, recall={}), tokenizer, 0, "validation", manifest_of(str(folder)))
        found[name] = exact_recall(policy, recall_documents("number-1", 100, 1024, held_out))
        own = table[(table["experiment"] == "1") & (table["method"] == run.label) & (table["seed"] == "0")]
        assert found[name] == pytest.approx(float(own["exact_recall"].item()), abs=0.1)
    assert found["expected_memory"] > max(found["sft"], found["refine"]) + 0.1
