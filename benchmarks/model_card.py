"""The figures of a model's card: recall of planted facts, next-token prediction and bits per byte on held-out text.

Everything is drawn from fixed seeds, so that card and test measure the same documents. Prose is measured where `--prose`
names a folder of .txt files, all of which the model must never have read.

Of a LaCT, every fact lies further back than its window of attention, so that only the fast weights can have kept it; once
more it is asked with fast weights that are never updated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.common import arguments, write
from refine_lab.config import DataConfig
from refine_lab.data.batches import SequenceData, plain_rows
from refine_lab.data.corpus import Manifest, compare
from refine_lab.models import FastWeightLM, load_model
from refine_lab.models.hub import resolve
from refine_lab.models.loading import manifest_of
from refine_lab.training.evaluation import EVALUATION_SEED, bits_per_byte, exact_recall, next_token, recall_documents
from refine_lab.types import Batch

RECALL = (("word-1", 512), ("word-1", 1024), ("word-4", 512), ("number-1", 512), ("number-1", 1024))
"""Kind of document and its tokens."""
BEYOND = (("word-1", 256), ("word-1", 512), ("word-1", 1024), ("word-4", 256), ("word-4", 512))
BEYOND += (("number-1", 256), ("number-1", 512))
"""The same of a model with a window, which the facts lie beyond."""
NOT_UPDATED = "fast weights not updated"
DOCUMENTS, ROWS, ROW_TOKENS = 200, 64, 1024


def held_out(manifest: Manifest | None, tokenizer: PreTrainedTokenizerBase, rows: int = ROWS) -> SequenceData:
    """The held-out Python files: rows to predict, and the text that facts are planted in."""
    config = DataConfig(sequence_length=ROW_TOKENS, validation_sequences=rows)
    return SequenceData(config, tokenizer, seed=EVALUATION_SEED, split="validation", manifest=manifest)


def prediction(policy: FastWeightLM, tokenizer: PreTrainedTokenizerBase, batch: Batch) -> dict[str, float]:
    """Next-token loss in nats, accuracy, and bits per byte over the rows; an end of text is predicted, but is no byte."""
    measured = next_token(policy, batch, micro_batch_size=8)
    widths = torch.zeros(len(tokenizer), dtype=torch.long)
    for text, token in tokenizer.get_vocab().items():  # byte-level: a character of a token stands for a byte
        widths[token] = 0 if token in tokenizer.all_special_ids else len(text)
    num_bytes = sum(
        int(widths[row[1:length]].sum()) for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)
    )
    bits = bits_per_byte(measured["ntp_loss"], batch.num_targets, num_bytes)
    return {**measured, "bits_per_byte": bits, "rows": len(batch.lengths), "tokens": batch.num_targets}


def prose_rows(folder: str, tokenizer: PreTrainedTokenizerBase, rows: int = ROWS) -> Batch:
    """Windows spread evenly over all files of the folder (of which the sources hold one out: both parts are read)."""
    config = DataConfig(sources={folder: 1.0}, sequence_length=ROW_TOKENS, validation_sequences=1)
    tokens = np.concatenate([plain_rows(config, tokenizer, folder, split).tokens for split in ("train", "validation")])
    starts = np.linspace(0, len(tokens) - ROW_TOKENS, rows).astype(int)
    cut = torch.from_numpy(np.stack([tokens[start : start + ROW_TOKENS] for start in starts]).astype(np.int64))
    return Batch(tokens=cut, lengths=torch.full((rows,), ROW_TOKENS), sequence_ids=tuple(range(rows)))


def measure(model: str, documents: int = DOCUMENTS, rows: int = ROWS, prose: str | None = None) -> dict[str, Any]:
    """All figures of the model of that name, as the card quotes them."""
    policy, tokenizer = load_model(model, device="cpu")
    manifest, folder = manifest_of(model), resolve(model)
    data = held_out(manifest, tokenizer, rows)
    figures: dict[str, Any] = {
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "corpus_share": 1.0 if manifest is None else compare(manifest).share,
        "code": prediction(policy, tokenizer, data.validation()),
    }
    print("code", figures["code"], flush=True)
    if prose is not None:
        figures["prose"] = prediction(policy, tokenizer, prose_rows(prose, tokenizer, rows))
        print("prose", figures["prose"], flush=True)
    figures["recall"] = {}
    for name, kind, length, asked in questions(model, policy):
        share = exact_recall(asked, recall_documents(kind, documents, length, data))
        figures["recall"].setdefault(name, {})[str(length)] = share
        print(f"{name} at {length} tokens  {share:.3f}", flush=True)
    return figures


def questions(model: str, policy: FastWeightLM) -> Iterator[tuple[str, str, int, FastWeightLM]]:
    """What recall is asked of: its name on the card, the kind of document, the document's tokens, and the model."""
    window = getattr(policy.config, "window_size", None)
    if window is None:
        yield from ((kind, kind, length, policy) for kind, length in RECALL)
        return
    frozen, _ = load_model(model, device="cpu", settings={"lact_chunk_size": 2**20})  # no chunk is ever complete
    beyond = [(f"{kind}-d{window}", length) for kind, length in BEYOND]
    yield from ((kind, kind, length, policy) for kind, length in beyond)
    kind, length = beyond[0]
    yield f"{kind}, {NOT_UPDATED}", kind, length, frozen
    yield "word-1", "word-1", length, policy


def table(figures: dict[str, Any]) -> str:
    """The figures as the card's Markdown table, from what `measure` gives or its JSON."""
    rows = [("held-out measure", "result")]
    for text in ("code", "prose"):
        if text in figures:
            found = figures[text]
            rows.append((f"{text}: next-token accuracy", f"{found['ntp_accuracy']:.1%}"))
            rows.append((f"{text}: next-token loss", f"{found['ntp_loss']:.3f} nats a token"))
            rows.append((f"{text}: bits per byte", f"{found['bits_per_byte']:.3f}"))
    for kind, shares in figures["recall"].items():
        name = kind.removesuffix(f", {NOT_UPDATED}")
        ending = "" if name == kind else ", fast weights never updated"
        rows += [(f"recall of {name} at {length} tokens{ending}", f"{share:.1%}") for length, share in shares.items()]
    lines = [f"| {name} | {figure} |" for name, figure in rows]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def main() -> None:
    chosen = arguments(
        __doc__,
        ("--documents", {"type": int, "default": DOCUMENTS, "help": "recall documents of each kind"}),
        ("--rows", {"type": int, "default": ROWS, "help": "held-out rows of 1,024 tokens"}),
        ("--prose", {"default": None, "help": "folder of .txt files that the model has not read"}),
    )
    figures = measure(chosen.model, chosen.documents, chosen.rows, chosen.prose)
    print(table(figures))
    named = None if chosen.prose is None else Path(chosen.prose).name
    write(chosen.json, figures, model=Path(chosen.model).name, documents=chosen.documents, prose=named)


if __name__ == "__main__":
    main()
