"""The recall task, which needs no download: recall documents that end with a question."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.data.batches import plain_rows
from refine_lab.data.corpus import Manifest, Split
from refine_lab.data.recall import Question, RecallDocument, encode_within, make_document, parse_kind
from refine_lab.data.tasks.prompts import Example
from refine_lab.data.tokenizer import beginning, end_of_text
from refine_lab.rng import Draws

QUESTIONS = {
    "word": ("What is the secret word for {key}?", "The secret word for {key} is"),
    "number": ("What is the special magic number for {key}?", "The special magic number for {key} is"),
}
PROMPT = "\nQuestion: {question}\nAnswer: {beginning}"
"""Question and beginning of the answer, in RULER's format. The wording differs from the one that the shipped models were
trained on, so that there is something to learn.
"""
TASK_SEED = 20_260_217
"""Seed of every document, independent of a run's seed: all runs train and test on the same documents."""
MOST_ATTEMPTS = 200
"""Maximum number of documents made to find one whose question belongs to the split."""


def recall_splits(
    kind: str, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, data: DataConfig, manifest: Manifest | None
) -> dict[str, list[Example]]:
    """Makes train, validation and test documents of a kind, with prompts of `prompt_tokens` tokens (`pairs`: at most).

    Train uses the training keys and text, the other two the held-out ones: validation asks about roughly a third of the
    held-out keys, in documents from the first half of the text, and test about the others, from the second half. If the
    kind gives a number of questions (`-qM`), the others are answered in the prompt, and may have any key of the split.

    Raises ValueError for an unknown kind, and if the prompt is too short or the text too short for
    the facts.
    """
    maker = _Maker(kind, config, tokenizer, data, manifest)
    counts = {"train": config.train, "validation": config.validation, "test": config.test or 0}
    return {name: maker.examples(name, count) if count else [] for name, count in counts.items()}


class _Maker:
    """Makes the examples of one kind."""

    def __init__(
        self,
        kind: str,
        config: TaskConfig,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        manifest: Manifest | None,
    ) -> None:
        self.kind, self.form, self.tokenizer, self.manifest = kind, parse_kind(kind).form, tokenizer, manifest
        self.num_questions = parse_kind(kind).questions if "-q" in kind else 1
        self.data = replace(data, sequence_length=config.prompt_tokens)
        self.beginning = beginning(tokenizer, data.add_bos)
        self.texts: dict[Split, list[np.ndarray]] = {}

    def examples(self, name: str, count: int) -> list[Example]:
        """Returns `count` examples of the split `name`."""
        split: Split = "train" if name == "train" else "validation"
        first, last = {"train": (0, 1), "validation": (0, 0.5), "test": (0.5, 1)}[name]
        if split not in self.texts:
            data, tokenizer = self.data, self.tokenizer
            texts = [plain_rows(data, tokenizer, source, split, self.manifest).tokens for source in data.sources]
            self.texts[split] = texts
        parts = [text[int(first * len(text)) : int(last * len(text))] for text in self.texts[split]]
        return [self._example(name, split, number, parts) for number in range(count)]

    def _example(self, name: str, split: Split, number: int, texts: list[np.ndarray]) -> Example:
        for attempt in range(MOST_ATTEMPTS):
            purpose = f"task {self.kind} {name} {attempt}"
            example = self._made(f"recall-{self.kind}-{name}-{number}", split, number, purpose, texts)
            third = hashlib.sha256(example.question.encode()).digest()[0] % 3
            if split == "train" or ("test" if third else "validation") == name:
                return example
        few = "the tokenizer has too few single-token words"
        raise ValueError(f"{few} to ask {name} questions that differ from those of the other split")

    def _made(self, name: str, split: Split, number: int, purpose: str, texts: list[np.ndarray]) -> Example:
        length, shares = self.data.sequence_length, torch.tensor([*self.data.sources.values()])
        while True:
            generator = Draws(seed=TASK_SEED).generator(number, purpose)
            text, first = texts[int(torch.multinomial(shares, 1, generator=generator))], self.beginning
            document = make_document(
                self.kind,
                length,
                text,
                generator,
                self.tokenizer,
                split,
                beginning=first,
                num_questions=self.num_questions,
            )
            example = self._asked(name, document)
            # The same facts are drawn again, since they come first, in as much more text as the prompt lacks.
            missing = self.data.sequence_length - len(example.prompt_ids)
            if self.form == "pairs" or not missing:
                return example
            length += missing

    def _asked(self, name: str, document: RecallDocument) -> Example:
        """Returns the document with its questions reworded by the task's template; the last one is the example's.

        Those before it have their answers in the prompt.
        """
        *before, question = document.questions[: self.num_questions]
        read = document.tokens[: document.questions[0].start]
        for earlier in before:
            read = [*read, *self._reworded(earlier)[1], *earlier.answer_ids, *encode_within(self.tokenizer, ".")]
        if self.form == "pairs":
            asked, prompt = question.key, document.tokens[question.start : question.prompt_end]
        else:
            asked, prompt = self._reworded(question)
        return Example(
            name=name,
            prompt_ids=(*read, *prompt),
            question_start=len(read),
            answer_ids=(*question.answer_ids, end_of_text(self.tokenizer)),
            answers=(str(self.tokenizer.decode(question.answer_ids)).strip(),),
            question=asked,
            documents=(str(self.tokenizer.decode(read[len(self.beginning) :])),),
            begins=len(self.beginning),
        )

    def _reworded(self, question: Question) -> tuple[str, list[int]]:
        """Returns a question and its tokens with the beginning of the answer, by the task's template."""
        asked, first_words = (text.format(key=question.key) for text in QUESTIONS[self.form])
        return asked, encode_within(self.tokenizer, PROMPT.format(question=asked, beginning=first_words))
