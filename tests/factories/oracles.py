"""Models that are right by construction: a table of next tokens in the weights, and one that copies facts from its prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.data.recall import encode_within
from refine_lab.models import DeltaNetConfig, DeltaNetForCausalLM

CERTAIN = 100.0
"""Logit of the right token, in a table whose other logits are below half of it."""


def table_model(cycle: Sequence[int], vocabulary: int) -> DeltaNetForCausalLM:
    """A DeltaNet that continues a cycle of tokens: its layers add nothing, and its head has a row per next token."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "num_heads": 2, "num_hidden_layers": 1, "intermediate_size": 128}
    config = DeltaNetConfig(vocab_size=vocabulary, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, **sizes)
    model = DeltaNetForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        hidden = model.model.norm(model.model.embeddings.weight)
        for token, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            model.lm_head.weight[following] = CERTAIN * hidden[token] / hidden[token].square().sum()
    return model


ASKED = re.compile(r"for (\w+)(?: mentioned in the provided text)? is$")
FACT = r"\n(?:The secret word|One of the special magic numbers) for {key} is:?( \w+)\."


class CopyingModel(DeltaNetForCausalLM):
    """Answers the question at the end of a recall document with the value in the fact that the document holds.

    Its hidden states are logits, and its state is what is left of the answers.
    """

    tokenizer: PreTrainedTokenizerBase

    def read(self, input_ids, lengths=None, state=None):
        if state is None:
            state = [self.answer(row[:n].tolist()) for row, n in zip(input_ids, lengths, strict=True)]
        hidden = torch.zeros(len(state), 1, self.config.vocab_size)
        for row, left in zip(hidden, state, strict=True):
            row[0, left[0] if left else 0] = CERTAIN
        rest = [left[1:] for left in state]
        return SimpleNamespace(final_state=rest, hidden_states=hidden, hidden_at=lambda positions: hidden)

    @property
    def head(self):
        return lambda hidden: hidden

    def answer(self, ids: list[int]) -> list[int]:
        text = str(self.tokenizer.decode(ids))
        asked = ASKED.search(text)
        found = re.search(FACT.format(key=asked[1]), text) if asked else None
        return encode_within(self.tokenizer, found[1]) if found else []


def copying_model(tokenizer: PreTrainedTokenizerBase) -> CopyingModel:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    model = CopyingModel(DeltaNetConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes))
    model.tokenizer = tokenizer
    return model
