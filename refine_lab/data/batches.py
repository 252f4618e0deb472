"""Training and validation batches as a function of (seed, step), identical whether or not a run was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from refine_lab.config import DataConfig
from refine_lab.data.corpus import Manifest, Split
from refine_lab.data.recall import make_document
from refine_lab.data.tokenizer import beginning
from refine_lab.data.tokens import TokenRows, document_rows, packed_rows, token_array
from refine_lab.rng import Draws
from refine_lab.types import Batch

VALIDATION_SEED = 0
"""Seed of the held-out rows, which are the same for every seed of a run."""
ROWS_AT_ONCE = 2**18
"""Number of rows whose kinds are drawn together when skipping ahead, which bounds the memory."""
HELD_OUT_SHARE = 20
"""The held-out tokens are limited to a 20th of `max_tokens`, or to what the held-out rows need if that is more."""


class SequenceData:
    """The sequences of a run: rows of plain text, each once per epoch, mixed with recall documents.

    Rows are windows of joined documents, or the first tokens of one document each (`DataConfig.rows`).

    The object stores no position in the data: a row is determined by the seed and its number alone, `sequence_id` =
    step * batch_size + row.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        split: Split = "train",
        manifest: Manifest | None = None,
    ) -> None:
        """Reads the sources of `config`, tokenising those that are not in the cache.

        Raises ValueError if a source has no row, or if a kind of recall document is unknown or does not fit.
        """
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.split: Split = split
        self.beginning = beginning(tokenizer, config.add_bos)
        self.manifest = manifest
        self.rows = {name: plain_rows(config, tokenizer, name, split, manifest) for name in config.sources}
        self.tokens = {name: rows.tokens for name, rows in self.rows.items()}
        plain = max(0.0, 1 - sum(config.recall.values())) / sum(config.sources.values())
        self._names = [*config.sources, *config.recall]
        self._kinds = _Kinds(seed, [plain * share for share in config.sources.values()] + list(config.recall.values()))
        for kind in config.recall:  # fails now where it cannot be made, not at the first batch that holds one
            self._recall_document(kind, sequence_id=0)

    def batch(self, step: int, batch_size: int) -> Batch:
        """Returns batch `step` (from 0), tokens [batch_size, T]; rows shorter than the longest are padded on the right.

        Repeating a step or moving to later ones costs the same as the first call. The first call after a resume, and a
        call for an earlier step, draws the kinds of all preceding rows once.
        """
        start, stop = step * batch_size, (step + 1) * batch_size
        kinds, before = self._kinds.between(start, stop)
        rows = []
        for sequence_id, kind in zip(range(start, stop), kinds.tolist(), strict=True):
            name, is_text = self._names[kind], kind < len(self.rows)
            rows.append(
                self._plain_row(name, int(before[kind])) if is_text else self._recall_document(name, sequence_id)
            )
            before[kind] += 1
        return padded(rows, tuple(range(start, stop)))

    def validation(self) -> Batch:
        """Returns the first `validation_sequences` held-out rows in a fixed order, the same for every seed.

        Raises ValueError if the held-out text has fewer.
        """
        text = replace(self.config, recall={})
        held_out = SequenceData(text, self.tokenizer, VALIDATION_SEED, "validation", self.manifest)
        count = self.config.validation_sequences
        kinds, _ = held_out._kinds.between(0, count)
        for kind, name in enumerate(held_out.rows):
            wanted, there = int(np.count_nonzero(kinds == kind)), len(held_out.rows[name])
            if wanted > there:
                document = self.config.rows == "document"
                size = f"rows of {'at most ' * document}{self.config.sequence_length} tokens"
                advice = "ask for fewer" if document else "ask for fewer or shorter ones"
                raise ValueError(
                    f"{wanted} of the {count} validation sequences (DataConfig.validation_sequences) would come from {name!r}, "
                    f"but its held-out text is only enough for {there} {size}; {advice}"
                )
        return held_out.batch(0, count)

    def _plain_row(self, source: str, index: int) -> Int[np.ndarray, "T"]:
        """Returns row number `index` of a source; every epoch has each row once, in a new order."""
        rows = self.rows[source]
        epoch, place = divmod(index, len(rows))
        return rows[int(epoch_order(self.seed, epoch, len(rows), f"windows of {source}")[place])]

    def _recall_document(self, kind: str, sequence_id: int) -> Int[np.ndarray, "T"]:
        """Returns a recall document in text from a source drawn in proportion to its share."""
        generator = Draws(seed=self.seed).generator(sequence_id, "recall")
        shares = torch.tensor(list(self.config.sources.values()))
        text = [*self.tokens.values()][int(torch.multinomial(shares, 1, generator=generator))]
        length, first = self.config.sequence_length, self.beginning
        document = make_document(kind, length, text, generator, self.tokenizer, self.split, beginning=first)
        return np.array(document.tokens, dtype=np.int32)


class _Kinds:
    """The kind of each row, by index: one stream of draws, of which a shorter one is always a prefix.

    A window's number is the count of earlier rows of its kind. The stream and the counts are kept at the start of the
    last batch, so that neither time nor memory grows with the step.
    """

    def __init__(self, seed: int, shares: Sequence[float]) -> None:
        self.seed, self._ends = seed, np.cumsum(shares)
        self._rewind()

    def between(self, start: int, stop: int) -> tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "kinds"]]:
        """Returns the kinds of the rows start..stop-1, and how many rows of each kind precede them."""
        if start < self._row:
            self._rewind()
        while self._row < start:
            passed = self._drawn(min(ROWS_AT_ONCE, start - self._row), self._generator)
            self._row += len(passed)
            self._counts += np.bincount(passed, minlength=len(self._ends))
        return self._drawn(stop - start, self._generator.clone_state()), self._counts.copy()

    def _rewind(self) -> None:
        self._row, self._counts = 0, np.zeros(len(self._ends), dtype=np.int64)
        self._generator = Draws(seed=self.seed).generator(0, "kinds")

    def _drawn(self, count: int, generator: torch.Generator) -> Int[np.ndarray, "rows"]:
        points = torch.rand(count, generator=generator, dtype=torch.float64).numpy() * self._ends[-1]
        return np.searchsorted(self._ends, points, side="right")


def plain_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    split: Split,
    manifest: Manifest | None = None,
) -> TokenRows:
    """Returns the rows of one source that `config` requires.

    Raises ValueError if there are none.
    """
    document = config.rows == "document"
    limit = config.max_tokens
    if split == "validation":
        limit = max(limit // HELD_OUT_SHARE, config.validation_sequences * config.sequence_length)
    tokens = token_array(
        source,
        split,
        tokenizer,
        max_tokens=limit,
        min_tokens=config.min_tokens,
        manifest=manifest,
        beginning=beginning(tokenizer, config.add_bos),
        row_tokens=config.sequence_length if document else None,
    )
    rows = document_rows(tokens) if document else packed_rows(tokens, config.sequence_length)
    if len(rows):
        return rows
    fewer = f"fewer than one row of {config.sequence_length}"
    raise ValueError(f"the {split} text of {source!r} has {len(tokens)} tokens, {fewer}")


@lru_cache(maxsize=32)
def epoch_order(seed: int, epoch: int, count: int, purpose: str) -> Int[np.ndarray, "count"]:
    """Returns the order of an epoch's `count` windows or examples."""
    return torch.randperm(count, generator=Draws(seed=seed, step=epoch).generator(0, purpose)).numpy()


def padded(rows: list[np.ndarray], sequence_ids: tuple[int, ...]) -> Batch:
    """Returns rows of token ids of any length as a batch, padded on the right."""
    tokens = pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], batch_first=True)
    return Batch(tokens=tokens, lengths=torch.tensor([len(row) for row in rows]), sequence_ids=sequence_ids)
