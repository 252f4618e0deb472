"""Which batches `tests/fixtures/rows.json` holds the digests of, and how they are made.

`python -m tests.recorded_rows` prints them anew. The file was written by the code that counted every row anew at each step
(commit 82e0530); no row of any seed may change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from refine_lab.config import DataConfig
from refine_lab.data.batches import SequenceData
from refine_lab.models.hub import SHIPPED

TEXT = Path("tests/fixtures/text")
PROSE, CODE = (str(TEXT / name) for name in ("lighthouse.txt", "parser.txt"))
CONFIGS = {
    "one source": DataConfig(sources={str(TEXT): 1.0}, sequence_length=64),
    "one source and recall": DataConfig(
        sources={str(TEXT): 1.0}, sequence_length=96, recall={"word-1": 0.3, "pairs": 0.2}
    ),
    "two sources, unequal": DataConfig(sources={PROSE: 3.0, CODE: 1.0}, sequence_length=32),
    "three sources and recall": DataConfig(
        sources={PROSE: 1.0, CODE: 0.25, str(TEXT): 2.0},
        sequence_length=128,
        recall={"number-1": 0.15, "pairs-is": 0.05},
    ),
}
SEEDS = (0, 1, 2, 3, 7, 11, 20_260_216)
BATCHES = ((0, 8), (1, 8), (2, 8), (40, 8), (333, 3), (0, 200), (1000, 16))
"""Step and batch size; the texts are small, so that later batches are of later epochs."""


def digests(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """A name and a digest of the rows of every batch; relative paths, since a source's name is part of its draws."""
    for name, config in CONFIGS.items():
        for seed in SEEDS:
            data = SequenceData(config, tokenizer, seed)
            for step, batch_size in BATCHES:
                batch = data.batch(step, batch_size)
                content = repr((batch.tokens.tolist(), batch.lengths.tolist(), batch.sequence_ids))
                yield (
                    f"{name}, seed {seed}, step {step} of {batch_size}",
                    hashlib.sha256(content.encode()).hexdigest()[:16],
                )


if __name__ == "__main__":
    print(json.dumps(dict(digests(AutoTokenizer.from_pretrained(SHIPPED / "tiny-deltanet"))), indent=1))
