"""The answer rule: the maximum length of an answer and which part of the generated text counts as the answer.

Decoding, scores and tables share this rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig
from refine_lab.data.tasks.prompts import Example, answer_ids
from refine_lab.validation import require

UNKNOWN_ANSWER_TOKENS = 32
"""Maximum answer tokens if there is no reference answer to measure (RULER's limit for its questions)."""

_EMPTY_LINES = re.compile(r"\s*\n")


@dataclass(frozen=True, kw_only=True)
class AnswerRule:
    """Which part of the generated text is the answer. The defaults apply to a question that the user types.

    Raises ValueError for `max_tokens` below 1.
    """

    max_tokens: int = UNKNOWN_ANSWER_TOKENS
    "Maximum number of generated tokens, not counting stripped empty lines before the answer (at most the same number again)."
    lines: Literal["first", "all"] = "first"
    "Whether the answer is the first line or all lines."
    strip_leading: bool = True
    "Whether empty lines before the answer are removed."

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "AnswerRule.max_tokens", self.max_tokens, "at least 1")

    def cut(self, text: str) -> str:
        """Returns the answer in a generated text, without surrounding spaces."""
        kept = self._from_first_line(text)
        return (kept.partition("\n")[0] if self.lines == "first" else kept).strip()

    def ended(self, text: str) -> bool:
        """Returns whether further tokens cannot change the answer."""
        return self.lines == "first" and "\n" in self._from_first_line(text)

    def full(self, tokens: int, empty: int) -> bool:
        """Returns whether generation must stop after `tokens` tokens, the first `empty` of which form empty lines."""
        return tokens >= self.max_tokens + min(empty, self.max_tokens)

    def empty(self, text: str) -> bool:
        """Returns whether a text consists only of empty lines that are removed before an answer."""
        return self.strip_leading and "\n" in text and not text.strip()

    def _from_first_line(self, text: str) -> str:
        start = _EMPTY_LINES.match(text) if self.strip_leading else None
        return text[start.end() :] if start else text


def answer_rule(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> AnswerRule:
    """Returns the rule of a task, given the `examples` to be answered.

    If `answer_tokens` is none, the limit is the longest of their reference answers plus the end-of-text token, or
    `UNKNOWN_ANSWER_TOKENS` without any reference answer.
    """
    lengths = chain.from_iterable(reference_tokens(example, tokenizer) for example in examples)
    needed = max((length + 1 for length in lengths), default=UNKNOWN_ANSWER_TOKENS)
    strip = bool(config.settled().strip_leading)
    return AnswerRule(max_tokens=config.answer_tokens or needed, lines=config.lines, strip_leading=strip)


def too_long(rule: AnswerRule, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> int:
    """Counts the examples whose reference answers all exceed the token limit."""
    shortest = (min(found) for e in examples if (found := reference_tokens(e, tokenizer)))
    return sum(tokens > rule.max_tokens for tokens in shortest)


def several_lines(rule: AnswerRule, examples: Sequence[Example]) -> int:
    """Counts the examples whose reference answers would all be cut by `rule`, so that no answer can match one."""
    return sum(bool(e.answers) and all(rule.cut(text) != text.strip() for text in e.answers) for e in examples)


def reference_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the number of tokens of each distinct reference answer, without the end-of-text token."""
    texts = dict.fromkeys(text.strip() for text in example.answers)
    return [len(answer_ids(tokenizer, f" {text}")) - 1 for text in texts]
