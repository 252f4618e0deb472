"""Writes the final weights of five runs of the evidence in bfloat16, as models that `load_model` reads.

    python -m benchmarks.evidence_weights --work DIR [--out docs/results/weights]

DIR is the folder of the executions, as for `benchmarks.evidence`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from refine_lab.experiments.evidence import EvidenceRun
from refine_lab.models import load_model
from refine_lab.models.loading import MANIFEST, manifest_of
from refine_lab.runs.run import Run, list_runs

ROOT = Path(__file__).parent.parent
WEIGHTS = {
    "sft": EvidenceRun(method="sft"),
    "refine": EvidenceRun(method="refine"),
    "refine_memory": EvidenceRun(method="refine_memory", coefficient=1.0),
    "expected_memory": EvidenceRun(method="expected_memory", coefficient=1.0),
    "weighted": EvidenceRun(method="weighted", coefficient=0.2),
}
"""Runs of experiment 1 with seed 0, by the name of the folder of their weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the executions")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "weights")
    chosen = parser.parse_args()
    runs = [run for folder in sorted(chosen.work.glob("*/output")) for run in list_runs(folder)]
    for name, wanted in WEIGHTS.items():
        found = [run for run in runs if run.state == "finished" and run.config == wanted.config]
        if not found:
            print(f"There is no finished run of {name} in {chosen.work}.")
            continue
        write_weights(found[-1], chosen.out / name)
        print(f"{name}: {found[-1].name}")


def write_weights(run: Run, folder: Path) -> None:
    """Writes the last checkpoint's model in bfloat16, with its tokenizer and the manifest of its training text."""
    policy, tokenizer = load_model(run.path, device="cpu", dtype=torch.bfloat16)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest = manifest_of(str(run.path))
    if manifest is not None:
        manifest.save(folder / MANIFEST)


if __name__ == "__main__":
    main()
