"""Prompts with answers, as text and as tokens, and how prompts over the limit are handled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig
from refine_lab.data.recall import encode_within
from refine_lab.data.tokenizer import beginning, end_of_text


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt's question, documents and accepted answers as text."""

    name: str
    "Unique within its source, and the same each time the source is loaded."
    question: str
    "The question as text; empty if none is found."
    answers: tuple[str, ...]
    "The answers as text; empty if the source has none."
    documents: tuple[str, ...]
    "The passages as text, before any truncation."


@dataclass(frozen=True, kw_only=True)
class TextPrompt(Prompt):
    """A prompt before it is tokenised; `text[:question_start]` is the document."""

    text: str
    question_start: int


@dataclass(frozen=True, kw_only=True)
class Example(Prompt):
    """A tokenised prompt: `prompt_ids[:question_start]` is the document, the rest is the question."""

    prompt_ids: tuple[int, ...]
    "The prompt's tokens; the first `begins` of them precede its text (see `data.tokenizer.beginning`)."
    question_start: int
    "Index of the question's first token; `len(prompt_ids)` if no question is found."
    answer_ids: tuple[int, ...]
    "Training target: the first answer with the space before it and the end-of-text token; empty without answers."
    cut: int = 0
    "Number of tokens cut out of the middle of the prompt."
    begins: int = 0
    "Number of tokens before the prompt's text, such as a BOS token."

    def parts(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """Returns document and question as text, which together are the prompt."""
        document, asked = self.prompt_ids[self.begins : self.question_start], self.prompt_ids[self.question_start :]
        return str(tokenizer.decode(list(document))), str(tokenizer.decode(list(asked)))


def encode(prompt: TextPrompt, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None = None) -> Example:
    """Tokenises a prompt of any length; `add_bos` as in `DataConfig`. An answer has no `beginning`.

    Raises ValueError if the prompt is empty, or the tokenizer is not a fast one (from the library `tokenizers`).
    """
    if not prompt.text.strip():
        raise ValueError(f"the prompt {prompt.name!r} is empty")
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer must be a fast one (from the library `tokenizers`), got {type(tokenizer).__name__}"
        )
    encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins, ids = beginning(tokenizer, add_bos), tuple(encoded["input_ids"])
    # a token that reaches into the question is the question's
    ends = (end for _, end in encoded["offset_mapping"])
    start = next((token for token, end in enumerate(ends) if end > prompt.question_start), len(ids))
    space = "" if prompt.text[-1].isspace() else " "
    return Example(
        **{field.name: getattr(prompt, field.name) for field in fields(Prompt)},
        prompt_ids=(*begins, *ids),
        question_start=len(begins) + start,
        answer_ids=answer_ids(tokenizer, space + prompt.answers[0].strip()) if prompt.answers else (),
        begins=len(begins),
    )


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Returns the tokens of `text` as they are after a prompt, followed by the end-of-text token."""
    return (*encode_within(tokenizer, text), end_of_text(tokenizer))


def within_limit(examples: Iterable[Example], config: TaskConfig, count: int | None) -> tuple[list[Example], int]:
    """Returns the first `count` examples (none: all) within `prompt_tokens`, and the number of longer ones left out.

    Raises ValueError if a prompt is longer and `over_limit` is `refuse`, or if a question alone is longer.
    """
    limit, kept, dropped, rest = config.prompt_tokens, [], 0, iter(examples)
    while len(kept) != count and (example := next(rest, None)) is not None:
        if config.over_limit == "drop" and len(example.prompt_ids) > limit:
            dropped += 1
        else:
            kept.append(cut_middle(example, limit) if config.over_limit == "cut_middle" else example)
    if longer := [(len(e.prompt_ids), e.name) for e in kept if len(e.prompt_ids) > limit]:
        tokens, name = max(longer)
        raise ValueError(
            f"{len(longer)} of {len(kept)} prompts have more tokens than TaskConfig.prompt_tokens {limit}, the longest "
            f"{tokens} ({name!r}): raise prompt_tokens, or set over_limit to 'cut_middle' or 'drop'"
        )
    return kept, dropped


def cut_middle(example: Example, limit: int) -> Example:
    """Cuts out the middle of the prompt so that `limit` tokens remain; the whole question is kept (as in LongBench).

    Raises ValueError if the question alone is longer.
    """
    tokens = len(example.prompt_ids)
    if tokens <= limit:
        return example
    question, room = tokens - example.question_start, limit - example.begins
    if question > room:
        raise ValueError(
            f"the question of {example.name!r} alone has {limit - room + question} tokens, "
            f"but TaskConfig.prompt_tokens is {limit}"
        )
    last, cut = min(max(limit // 2, question), room), tokens - limit
    ids = example.prompt_ids[: limit - last] + example.prompt_ids[tokens - last :]
    return replace(example, prompt_ids=ids, question_start=example.question_start - cut, cut=cut)


def prompts_digest(examples: Iterable[Example]) -> str:
    """Returns a digest of the examples' names, prompts and answers."""
    prompts = hashlib.sha256()
    for example in examples:
        facts = (example.name, example.prompt_ids, example.question_start, example.answers)
        prompts.update(repr(facts).encode())
    return prompts.hexdigest()
