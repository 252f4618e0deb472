"""The prompt of the TTT panel as its fields have it: tokens, held-out remainder, answer rule and reference answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refine_lab.data.tasks.prompts import Example, answer_ids
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.reading import DocumentReading
from refine_lab.refine_config import RefineConfig
from refine_lab.training.held_out_rest import HeldOutRest, hold_out
from refine_lab.ttt_config import TTTConfig

BETWEEN = " | "
"""Separates several accepted answers in the field of the reference answer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PanelPrompt:
    """A prompt that the model is adapted to and answers."""

    ids: np.ndarray
    adapted: int
    "How many of the first tokens are adapted to."
    held: HeldOutRest | None
    rule: AnswerRule
    references: tuple[str, ...]
    reference_ids: tuple[int, ...]
    "Tokens of the first reference as they follow the prompt; empty without a reference."

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """Returns the tokens to adapt to and, if there is one, the remainder, as `Session.adapt` takes them."""
        parts = {"token_ids": self.ids[: self.adapted]}
        return parts if self.held is None else parts | {"rest": self.ids[self.held.first : self.held.stop]}

    def same(self, other: PanelPrompt | None) -> bool:
        """Returns whether losses of another prompt can stand in one curve with those of this one."""
        same = other is not None and (self.adapted, self.held) == (other.adapted, other.held)
        return same and np.array_equal(self.ids, other.ids)  # type: ignore[union-attr]

    def levels(self, reading: DocumentReading) -> dict[str, float]:
        """Returns the means of a reading that a step reports, in nats per token."""
        losses, entropies = reading.losses[1:], reading.entropies[1:]
        levels = {"loss": losses[: self.adapted - 1].mean(), "entropy": entropies[: self.adapted - 1].mean()}
        if self.held is not None:
            levels["rest_loss"] = self.held.rest(losses).mean()
        return {name: float(value) for name, value in levels.items()}


class PromptFields:
    """Reads the prompt from the panel's fields; an `example` is used token by token until document or question is edited."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        exploration: Exploration,
        example: Example | None,
        rule: AnswerRule,
        adapt_on: str,
    ) -> None:
        self.fields, self.exploration, self.example, self.rule = fields, exploration, example, rule
        self.adapt_on = adapt_on
        self.first, self.first_reference = self.texts, fields["reference"].value
        fields["question"].observe(lambda _: self._follow_question(), "value")

    @property
    def texts(self) -> tuple[str, str]:
        """Returns document and question."""
        return self.fields["document"].value, self.fields["question"].value

    def _follow_question(self) -> None:
        """Empties the reference answer when its question is replaced, and restores it with the question."""
        field, asked = self.fields["reference"], self.texts[1] == self.first[1]
        if field.value in ("", self.first_reference):
            field.value = self.first_reference if asked else ""

    @property
    def edited(self) -> bool:
        return self.texts != self.first

    def ids(self) -> np.ndarray:
        """Returns the tokens of document and question. Raises ValueError for too few or too many."""
        if self.example is not None and not self.edited:
            return np.array(self.example.prompt_ids, dtype=np.int32)
        return self.exploration.tokens_of("".join(self.texts))

    def prompt(self) -> PanelPrompt:
        """Returns the prompt. Raises ValueError for texts that cannot be read, and a share that cannot be held out."""
        ids, share, held = self.ids(), self.fields["held_out"].value / 100, None
        adapted = self._document_tokens(ids) if share or self.adapt_on == "document" else len(ids)
        if share:
            held = hold_out(adapted, share)
            adapted = held.first
        rule = replace(AnswerRule() if self.edited else self.rule, max_tokens=self.fields["answer_tokens"].value)
        references = self._references()
        return PanelPrompt(
            ids=ids,
            adapted=adapted,
            held=held,
            rule=rule,
            references=references,
            reference_ids=self._reference_ids(references),
        )

    def _document_tokens(self, ids: np.ndarray) -> int:
        """Returns how many of the prompt's tokens are the document's; one that reaches into the question is not."""
        document, question = self.texts
        if self.example is not None and not self.edited:
            return self.example.question_start
        if not question:
            return len(ids)
        own = self.exploration.tokens_of(document)[: len(ids)]
        same = own == ids[: len(own)]
        return len(own) if same.all() else int(same.argmin())

    def _references(self) -> tuple[str, ...]:
        text = self.fields["reference"].value
        if self.example is not None and text == self.first_reference:
            return tuple(answer for answer in self.example.answers if answer.strip())
        return tuple(part.strip() for part in text.split(BETWEEN) if part.strip())

    def _reference_ids(self, references: tuple[str, ...]) -> tuple[int, ...]:
        if not references:
            return ()
        space = "" if "".join(self.texts)[-1:].isspace() else " "
        return answer_ids(self.exploration.tokenizer, space + references[0].strip())[:-1]


def refine_of(config: TTTConfig) -> RefineConfig | None:
    """Returns the settings of REFINE in a configuration; None if its method is another."""
    refine = config.refine
    return refine if refine is not None and refine.method == "refine" else None
