"""Measures test-time training by the loss on the unseen remainder of documents (experiment 7).

    python -m benchmarks.evidence_ttt [--out docs/results] [--hours 1]

`tiny-deltanet` adapts to the first half of each document with each method and reads on; its weights are reset after each
document, or never. A row is added to the tables of the evidence as soon as it is measured; rows that are there are skipped.
docs/log.md has the registration.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from benchmarks.evidence import NOVELS, RESULTS, Measures, measure_in_turn
from refine_lab.config import DataConfig
from refine_lab.data.batches import SequenceData
from refine_lab.experiments.configs import method_configs
from refine_lab.models import load_model
from refine_lab.models.base import FastWeightLM
from refine_lab.models.loading import manifest_of
from refine_lab.training.adaptation import Adapter, padded_batch, preserve_weights, read_prompt
from refine_lab.training.held_out_rest import HeldOutRest, hold_out

MODEL, LENGTH, DOCUMENTS = "tiny-deltanet", 2_048, 32
"""Model, tokens of a document, and number of documents of each text."""
METHODS = ("sft", "weighted", "expected", "refine", "refine_memory")
SETTINGS = ((1e-4, 4), (3e-4, 8))
"""Learning rate, and updates on each document."""
TEXTS: Mapping[str, tuple[str, Literal["packed", "document"]]] = {
    "python": ("python", "document"),
    "novels": (str(NOVELS), "packed"),
}
"""Source and form of the rows: the beginnings of Python files, and windows of novels, which are far longer than a row."""


@dataclass(frozen=True, kw_only=True)
class RestRun:
    """One row of experiment 7: a method with its learning rate and updates on the documents of one text."""

    text: str
    reset: str
    "When the weights are reset: `prompt` (after each document) or `never`."
    method: str
    lr: float
    steps: int
    seed: int

    @property
    def task(self) -> str:
        """Returns the task as it stands in the table."""
        return f"remainder of {self.text}, reset {self.reset} {LENGTH}"

    @property
    def label(self) -> str:
        """Returns the method with its learning rate and updates."""
        return f"{self.method}_lr{self.lr:g}_steps{self.steps}"

    @property
    def key(self) -> tuple[str, ...]:
        """Returns the values of `experiments.evidence.KEYS`."""
        return ("7", MODEL, self.task, self.label, "", str(self.seed))


def runs() -> list[RestRun]:
    """Returns the registered rows, seed by seed."""
    return [
        RestRun(text=text, reset=reset, method=method, lr=lr, steps=steps, seed=seed)
        for seed in range(3)
        for text in TEXTS
        for reset in ("prompt", "never")
        for lr, steps in SETTINGS
        for method in METHODS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of evidence.csv")
    parser.add_argument("--hours", type=float, default=1.0, help="no measurement starts after this time")
    chosen = parser.parse_args()
    measure_in_turn(runs(), chosen.out, chosen.hours, measures_of)


def measures_of(run: RestRun) -> Measures:
    """Returns the mean loss of the remainders after adaptation, and the items of `measure`."""
    items = measure(run)
    return {"ntp_loss": sum(items["rest_loss"]) / DOCUMENTS}, items


def measure(run: RestRun, documents: int = DOCUMENTS, length: int = LENGTH) -> dict[str, list[float]]:
    """Returns the mean loss of each document's remainder after adaptation, and its change by adaptation, in nats.

    With `reset` "never" the weights and the moments of the optimizer carry over from document to document; the loss before
    is that of the original weights in both cases. Every method sees the same documents in the same order, which differs by
    seed; the items are in the documents' own order.
    """
    policy, tokenizer = load_model(MODEL)
    source, form = TEXTS[run.text]
    data = DataConfig(
        sources={source: 1.0}, sequence_length=length, rows=form, min_tokens=length, validation_sequences=documents
    )
    rows = SequenceData(data, tokenizer, 0, "validation", manifest_of(MODEL)).validation().tokens
    (config,) = method_configs("per_prompt", [run.seed], methods=[run.method], lr=run.lr, steps=run.steps)
    held = hold_out(length, 0.5)
    before = [_rest_loss(policy, row, held) for row in rows]
    adapter, after = Adapter(policy, config.ttt), [0.0] * documents
    for number in np.random.default_rng(run.seed).permutation(documents).tolist():
        row = rows[number]
        adapter = adapter if run.reset == "never" else Adapter(policy, config.ttt)
        with nullcontext() if run.reset == "never" else preserve_weights(policy, config.ttt.parameters):
            for _ in adapter.adapt(padded_batch(policy, [row[: held.first]], (number,))):
                pass
            after[number] = _rest_loss(policy, row, held)
    return {"rest_loss": after, "rest_change": [loss - old for loss, old in zip(after, before, strict=True)]}


@torch.no_grad()
def _rest_loss(policy: FastWeightLM, row: Int[Tensor, "T"], held: HeldOutRest) -> float:
    return float(held.rest(read_prompt(policy, row).losses).mean())


if __name__ == "__main__":
    main()
