"""Key tokens: held-out tokens whose prediction needs more than the last tokens of their prefix, for LongPPL.

LongPPL (Fang et al., 2024; arXiv 2410.23771) is the perplexity of these tokens alone. A run chooses its key tokens once,
by the model that it starts from, and stores them, so that every evaluation measures the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from refine_lab.config import RefineConfig
from refine_lab.method.memory import short_difference
from refine_lab.method.step import next_token_stats, split
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import hidden_states_only
from refine_lab.rng import Draws
from refine_lab.runs.durable import replace_text, short_digest
from refine_lab.runs.files import read_json
from refine_lab.runs.run import Run
from refine_lab.types import Batch

THRESHOLD = 1.0
"""Minimum long-short difference of a key token, in nats. Fang et al. use 2 nats, with short contexts of 4,096 tokens."""
WINDOW = 128
"""w: short contexts have w to 2 w - 1 tokens. A model whose attention reads a larger window has that one instead."""
FILE = "key_tokens.json"
"""The file of a run directory that holds its key tokens."""


def short_contexts(policy: FastWeightLM) -> RefineConfig:
    """Returns the settings by which the short contexts of key tokens are read: windows, which need no random offset."""
    window = max(WINDOW, policy.attention_window(policy.config))
    return RefineConfig(selection="memory", window=window, short_contexts="windows")


@torch.no_grad()
def key_tokens(policy: FastWeightLM, batch: Batch, micro_batch_size: int = 4) -> Bool[Tensor, "B S"]:
    """Returns which tokens are key tokens: entry i of a row is about x_{i+1}, [B, T - 1] on the CPU.

        log p(x_{i+1} | x_{<=i}) - log p(x_{i+1} | the last tokens of x_{<=i}) >= `THRESHOLD`

    The last tokens are w to 2 w - 1, with w from `short_contexts`; a prefix of fewer than 2 w tokens has no key token after it.
    Fang et al. also require log p(x_{i+1} | x_{<=i}) > -2 of a separate, stronger model. That bound is left out, since
    here it would keep only tokens that the model predicts well before it is trained.
    """
    refine, draws = short_contexts(policy), Draws(seed=0)  # windows draw nothing
    found = torch.zeros(len(batch.lengths), batch.tokens.shape[1] - 1, dtype=torch.bool)
    for start, micro in split(batch, micro_batch_size):
        micro = micro.to(policy.device)
        with hidden_states_only():
            stats = next_token_stats(policy, policy.read(micro.tokens, micro.lengths), micro, entropy=False)
        difference = short_difference(policy, micro, stats.logprobs, refine, draws)[:, :-1].cpu()
        found[start : start + len(difference), : difference.shape[1]] = difference >= THRESHOLD
    return found


def key_tokens_of(run: Run, batch: Batch, choose: Callable[[], Bool[Tensor, "B S"]]) -> Bool[Tensor, "B S"]:
    """Returns the key tokens of a run's held-out rows: the stored ones, or else those that `choose` returns, stored now.

    They are chosen again if the rows have changed, which a run refuses unless the change of its texts is accepted. Raises
    ValueError, which names the file, for a file that holds something else.
    """
    path, rows = run.path / FILE, _digest(batch)
    if path.is_file():
        stored = read_json(path)
        if stored.get("rows") == rows:
            return _mask(stored.get("key_tokens"), batch, str(path))
    found = choose()
    places = [(row.nonzero().flatten() + 1).tolist() for row in found]
    values = {"rows": rows, "threshold": THRESHOLD, "key_tokens": places}
    replace_text(path, json.dumps(values) + "\n")
    return found


def _mask(places: Any, batch: Batch, name: str) -> Bool[Tensor, "B S"]:
    """Returns the stored indices of key tokens, a list for each row, as `key_tokens` does."""
    lengths = batch.lengths.tolist()
    valid = isinstance(places, list) and len(places) == len(lengths)
    valid = valid and all(
        isinstance(row, list) and all(type(place) is int and 1 <= place < length for place in row)
        for row, length in zip(places, lengths, strict=True)
    )
    if not valid:
        raise ValueError(f"{name} is damaged: it has no list of tokens for each of {len(lengths)} held-out rows")
    found = torch.zeros(len(lengths), batch.tokens.shape[1] - 1, dtype=torch.bool)
    for mask, row in zip(found, places, strict=True):
        mask[torch.tensor(row, dtype=torch.int64) - 1] = True
    return found


def _digest(batch: Batch) -> str:
    whole = hashlib.sha256()
    for values in (batch.tokens, batch.lengths):
        whole.update(values.cpu().numpy().tobytes())
    return short_digest(whole)
