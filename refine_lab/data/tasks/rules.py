"""How long an answer may be, and which part of the generated text it is: one rule for decoding, for scores and for tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig, require
from refine_lab.data.tasks.prompts import Example, answer_ids

UNKNOWN_ANSWER_TOKENS = 32
"""Tokens of an answer, at most, where no reference answer says how long one is (RULER's limit for its questions)."""

_EMPTY_LINES = re.compile(r"\s*\n")


@dataclass(frozen=True, kw_only=True)
class AnswerRule:
    """Which part of the generated text is the answer. The defaults are those for a question of the user's own.

    Raises ValueError for `max_tokens` below 1.
    """

    max_tokens: int = UNKNOWN_ANSWER_TOKENS
    "Tokens that are generated, at most; those of empty lines that are left out do not count, up to as many again."
    lines: Literal["first", "all"] = "first"
    "The answer is the first line, or all lines."
    strip_leading: bool = True
    "Whether empty lines before the answer are left out."

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "AnswerRule.max_tokens", self.max_tokens, "at least 1")

    def cut(self, text: str) -> str:
        """The answer in a generated text, without spaces around it."""
        kept = self._from_first_line(text)
        return (kept.partition("\n")[0] if self.lines == "first" else kept).strip()

    def ended(self, text: str) -> bool:
        """Whether the answer in a text stays the same whatever is generated after it."""
        return self.lines == "first" and "\n" in self._from_first_line(text)

    def full(self, tokens: int, empty: int) -> bool:
        """Whether no more may be generated after `tokens` tokens, the first `empty` of which are `empty`."""
        return tokens >= self.max_tokens + min(empty, self.max_tokens)

    def empty(self, text: str) -> bool:
        """Whether a text holds empty lines that are left out before an answer, and nothing else."""
        return self.strip_leading and "\n" in text and not text.strip()

    def _from_first_line(self, text: str) -> str:
        start = _EMPTY_LINES.match(text) if self.strip_leading else None
        return text[start.end() :] if start else text


def answer_rule(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> AnswerRule:
    """The rule of a task: `examples` are those that are answered.

    With `answer_tokens` none, the longest of their reference answers and the end-of-text token have room; without any
    reference answer it is `UNKNOWN_ANSWER_TOKENS`.
    """
    longest = max((max(found) for e in examples if (found := reference_tokens(e, tokenizer))), default=None)
    needed = UNKNOWN_ANSWER_TOKENS if longest is None else longest + 1
    strip = config.settled().strip_leading
    assert strip is not None
    return AnswerRule(max_tokens=config.answer_tokens or needed, lines=config.lines, strip_leading=strip)


def too_long(rule: AnswerRule, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> int:
    """Of how many examples every reference answer has more tokens than are generated."""
    shortest = (min(found) for e in examples if (found := reference_tokens(e, tokenizer)))
    return sum(tokens > rule.max_tokens for tokens in shortest)


def several_lines(rule: AnswerRule, examples: Sequence[Example]) -> int:
    """How many examples have reference answers that `rule` would all cut, so that no answer can equal one."""
    return sum(bool(e.answers) and all(rule.cut(text) != text.strip() for text in e.answers) for e in examples)


def reference_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of tokens of each different reference answer, without the end-of-text token."""
    texts = dict.fromkeys(text.strip() for text in example.answers)
    return [len(answer_ids(tokenizer, f" {text}")) - 1 for text in texts]
