"""Encodes prompts with one BOS token at most, and cuts the middle out of prompts that are too long."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from refine_lab.data.tasks.prompts import end_of_text
from refine_lab.data.tokenizer import beginning


@dataclass(frozen=True)
class Encoder:
    """Encodes texts; `begins` are the tokens that precede a prompt (see `refine_lab.data.tokenizer.beginning`)."""

    tokenizer: PreTrainedTokenizerBase
    begins: tuple[int, ...]

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None = None) -> Encoder:
        """Returns the encoder for `add_bos` as in `DataConfig`."""
        return Encoder(tokenizer, beginning(tokenizer, add_bos))

    def text(self, text: str) -> list[int]:
        """Returns the tokens of `text` without special tokens around it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def prompt(self, text: str) -> list[int]:
        """Returns the tokens of a prompt, which begins with `begins` exactly once even if the text has them already."""
        ids, size = self.text(text), len(self.begins)
        while size and tuple(ids[:size]) == self.begins:
            ids = ids[size:]
        return [*self.begins, *ids]

    @property
    def prefix(self) -> int:
        """Returns the token that precedes a text without a prompt: the last of `begins`, or end-of-text."""
        return self.begins[-1] if self.begins else end_of_text(self.tokenizer)


def cut_middle(ids: list[int], limit: int) -> list[int]:
    """Returns the first and the last half of `limit` tokens if there are more (as in LongBench)."""
    if len(ids) <= limit:
        return ids
    first = limit // 2
    return ids[:first] + ids[len(ids) - (limit - first) :]
