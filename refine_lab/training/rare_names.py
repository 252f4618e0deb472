"""Rare names: words of several tokens that a row of held-out text has repeated after a long gap, and no other row contains.

In novels these are names of people and places, in source code identifiers that are defined far above. Whoever recalls the
first mention can complete the second; other knowledge of the language helps little.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.method.step import next_token_stats, split
from refine_lab.models.base import FastWeightLM
from refine_lab.models.state import hidden_states_only
from refine_lab.types import Batch

WORD = re.compile(r"[^\W\d]\w{3,}")
"""A word or an identifier of at least four characters that does not begin with a digit."""


class Name(NamedTuple):
    """A later mention of a rare name: `tokens[row, start:stop]`, at least two tokens."""

    row: int
    start: int
    stop: int


def rare_names(tokenizer: PreTrainedTokenizerBase, batch: Batch, window: int) -> list[Name]:
    """Returns the later mentions of rare names in a batch of held-out rows.

    A mention counts if its word stands in no other row, the previous mention ends at least `window` tokens before it, and
    it consists of two or more whole tokens, the first of which may include the character before the word.
    """
    mentions: dict[str, list[Name]] = defaultdict(list)
    for row, length in enumerate(batch.lengths.tolist()):
        for word, start, stop in _words(tokenizer, batch.tokens[row, :length].tolist()):
            mentions[word].append(Name(row, start, stop))
    found = []
    for places in mentions.values():
        if len({place.row for place in places}) == 1:
            found += [
                name
                for last, name in pairwise(places)
                if name.start - last.stop >= window and name.stop - name.start > 1
            ]
    return sorted(found)


def _words(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[tuple[str, int, int]]:
    """Returns each word of a text with its first token and the token after its last; words inside a token are left out."""
    texts = [str(tokenizer.decode([token])) for token in token_ids]
    ends, total = {}, 0
    starts: dict[int, int] = {}
    for token, text in enumerate(texts):
        space = len(text) - len(text.lstrip())
        starts[total] = token  # of several tokens that begin there, the last one has characters
        if space < len(text):
            starts.setdefault(total + space, token)
        total += len(text)
        ends[total] = token + 1
    matches = WORD.finditer("".join(texts))
    return [(m[0], starts[m.start()], ends[m.end()]) for m in matches if m.start() in starts and m.end() in ends]


@torch.no_grad()
def names_recalled(policy: FastWeightLM, batch: Batch, names: list[Name], micro_batch_size: int = 4) -> list[bool]:
    """Returns for each name whether all of its tokens but the first are the most probable ones after what precedes them."""
    top = []
    for _, micro in split(batch, micro_batch_size):
        micro = micro.to(policy.device)
        with hidden_states_only():
            stats = next_token_stats(policy, policy.read(micro.tokens, micro.lengths), micro, entropy=False)
        top += [*stats.is_top1.cpu()]
    return [bool(top[name.row][name.start : name.stop - 1].all()) for name in names]  # entry i is about token i + 1
