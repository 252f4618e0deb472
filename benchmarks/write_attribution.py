"""How well write attribution finds the fact that an answer comes from, in documents with planted facts.

    python -m benchmarks.write_attribution --json FILE [--documents 200]

Held-out `word-4` documents of 512 tokens for tiny-deltanet; for tiny-lact the same, with all facts beyond its attention
window. For each model: in which fraction of documents the strongest write lies within three tokens of the asked fact's own
value, and exact recall as it is, with the strongest write and its neighbours erased, and with random writes erased.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from benchmarks.common import arguments, write
from refine_lab.config import DataConfig
from refine_lab.data.batches import SequenceData
from refine_lab.explore.lifetimes import write_lifetimes
from refine_lab.models import load_model
from refine_lab.models.loading import manifest_of
from refine_lab.statistics.means import mean_interval
from refine_lab.training.evaluation import recall_documents

LENGTH, NEAR = 512, 3
MODELS = ("tiny-deltanet", "tiny-lact")


def measure(model: str, count: int) -> dict[str, Any]:
    policy, tokenizer = load_model(model, device="cpu")
    window = policy.attention_window(policy.config)
    kind = f"word-4-d{window}" if window else "word-4"
    data = DataConfig(sequence_length=LENGTH, validation_sequences=1)
    held_out = SequenceData(data, tokenizer, 0, "validation", manifest_of(model))
    rows = write_lifetimes(policy, tokenizer, recall_documents(kind, count, LENGTH, held_out), attribute=True)
    figures = {"kind": kind, "documents": len(rows), "top_is_near": proportion(rows["top"].abs() <= NEAR)}
    for name in ("right", "right_top", "right_erased", "right_random"):
        figures[name] = proportion(rows[name])
    change = mean_interval(rows["right_random"].to_numpy(float) - rows["right"].to_numpy(float), 1.0)
    figures["random_change"] = dict(zip(("mean", "low", "high"), change, strict=True))
    return figures


def proportion(found: pd.Series) -> dict[str, float]:
    """Returns a fraction with its 95 % interval (Wilson, 1927)."""
    interval = binomtest(int(found.sum()), len(found)).proportion_ci(method="wilson")
    return {"mean": float(np.mean(found)), "low": interval.low, "high": interval.high}


def main() -> None:
    documents = ("--documents", {"type": int, "default": 200, "help": "documents for each model"})
    chosen = arguments(__doc__, documents, model=None)
    figures = {model: measure(model, chosen.documents) for model in MODELS}
    for model, found in figures.items():
        print(model, {name: round(x["mean"], 3) for name, x in found.items() if isinstance(x, dict)})
    write(Path(chosen.json), figures, documents=chosen.documents, length=LENGTH)


if __name__ == "__main__":
    main()
