"""Measures how long a write lives in the models of the evidence, and writes write_lifetimes.csv and write_lifetimes.png.

    python -m benchmarks.write_lifetimes [--models DIR] [--out docs/results] [--documents 200] [--figure-only]

DIR has a folder of weights per method (docs/results/weights); `tiny-deltanet`, from which their training began, is
measured too. All models read the same held-out documents: `number-1` of 1,024 tokens. Rows that the table has are not
measured again. The figure needs Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import pandas as pd

from benchmarks.evidence import RESULTS
from benchmarks.static_figures import draw
from refine_lab.config import DataConfig
from refine_lab.data.batches import SequenceData
from refine_lab.explore.lifetimes import write_lifetimes
from refine_lab.models import load_model
from refine_lab.models.loading import manifest_of
from refine_lab.runs.durable import replace_bytes, replace_text
from refine_lab.training.evaluation import recall_documents
from widgets.figures.lifetime_figure import lifetime_figure

TABLE, FIGURE = "write_lifetimes.csv", "write_lifetimes.png"
KIND, LENGTH = "number-1", 1024
BASE = "tiny-deltanet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=RESULTS / "weights", help="folder with a folder per method")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table and the figure")
    parser.add_argument("--documents", type=int, default=200, help="documents that every model reads")
    parser.add_argument("--figure-only", action="store_true", help="draw the figure of the table and measure nothing")
    chosen = parser.parse_args()
    table = chosen.out / TABLE
    if not chosen.figure_only:
        folders = sorted(path for path in chosen.models.iterdir() if (path / "config.json").is_file())
        for name, model in [("base", BASE), *((path.name, str(path)) for path in folders)]:
            measure(name, model, table, chosen.documents)
    rows = pd.read_csv(table)
    drawn = rows.assign(method=rows["method"].replace("expected_memory", "expected"))
    print(
        rows.groupby("method", sort=False)[["right", "right_erased", "logprob", "effect"]].mean().round(3).to_string()
    )
    chromium = shutil.which(os.environ.get("CHROMIUM") or "chromium")
    if chromium is None:
        parser.exit(2, "Chromium is needed for the figure: set CHROMIUM to its path.\n")
    (picture,) = draw([lifetime_figure(drawn).to_plotly_json()], chromium)
    replace_bytes(chosen.out / FIGURE, picture)


def measure(name: str, model: str, table: Path, count: int) -> None:
    """Adds the rows of one model to the table, unless they are there."""
    known = pd.read_csv(table) if table.is_file() else pd.DataFrame({"method": []})
    if (known["method"] == name).sum() >= count:
        return
    policy, tokenizer = load_model(model, device="cpu")
    data = DataConfig(sequence_length=LENGTH, validation_sequences=1)
    held_out = SequenceData(data, tokenizer, 0, "validation", manifest_of(model))
    rows = write_lifetimes(policy, tokenizer, recall_documents(KIND, count, LENGTH, held_out)).assign(method=name)
    every = pd.concat([known[known["method"] != name], rows], ignore_index=True)
    replace_text(table, every.to_csv(index=False, float_format="%.6g"))
    print(f"{name}: {len(rows)} documents", flush=True)


if __name__ == "__main__":
    main()
