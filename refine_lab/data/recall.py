"""Recall documents: key-value facts planted in text, with questions about them at the end.

The kinds are: `pairs`, only `key value.` statements and questions; `pairs-is`, which links the two with "is";
`pairs-word` and `pairs-number`, which use the sentences of the next two kinds equally densely; `word-N`, N sentences
with one-word values in filler text; and `number-N`, N of RULER's needle sentences with 7-digit values (Hsieh et al.,
2024). In training every fact is asked about, in random order; `word-4-q2` asks about two. A held-out document asks
about one fact, at its very end. With the suffix `-dN` every fact ends at least N tokens before the first question,
which places it outside an attention window.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from refine_lab.data.corpus import Split
from refine_lab.validation import ConfigError

WORD_FACT = "The secret word for {key} is{value}."
WORD_QUESTION = "What is the secret word for {key}? The secret word for {key} is"
NUMBER_FACT = "One of the special magic numbers for {key} is:{value}."
NUMBER_QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
PAIRS = {
    "pairs": ("", ""),
    "pairs-is": ("", " is"),
    "pairs-word": ("\nThe secret word for", " is"),
    "pairs-number": ("\nOne of the special magic numbers for", " is:"),
}
"""Text before the key, and between key and value."""
SPACE_AND_DIGITS = 8
"""Maximum number of tokens for a 7-digit number and the space before it."""
TEMPLATES = {"word": (WORD_FACT, WORD_QUESTION), "number": (NUMBER_FACT, NUMBER_QUESTION)}
"""A value includes the space before it, so that its tokens are the same in the fact and in the answer."""
ANCHOR = "is"
"""Prepended to a text while it is encoded, because some tokenizers put a space before the first word of their input."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about `key`: `tokens[start:prompt_end]`, followed by `answer_ids`."""

    key: str
    start: int
    prompt_end: int
    answer_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class RecallDocument:
    tokens: list[int]
    questions: list[Question]


@dataclass(frozen=True, kw_only=True)
class RecallKind:
    """A kind of recall document: number of `facts`, and of `questions` in training; both 0 for `pairs`.

    The statements and questions of `pairs` fill the document. `distance` is the minimum number of tokens between the
    last fact and the first question.
    """

    form: Literal["pairs", "word", "number"]
    facts: int = 0
    questions: int = 0
    distance: int = 0


def parse_kind(name: str) -> RecallKind:
    """Returns the kind with that name.

    Raises ValueError unless it is one of `PAIRS`, or `word-N` or `number-N`, optionally with `-qM`, M at most N, and
    `-dD`.
    """
    if name in PAIRS:
        return RecallKind(form="pairs")
    match = re.fullmatch(r"(word|number)-([1-9]\d{0,6})(?:-q([1-9]\d{0,6}))?(?:-d([1-9]\d{0,6}))?", name)
    if match is None or int(match[3] or 1) > int(match[2]):
        allowed = (
            f"one of {', '.join(PAIRS)}, or 'word-N' or 'number-N' with N facts, optionally followed by '-qM' "
            "(M of the facts are asked about) and '-dD' (all facts end at least D tokens before the first question)"
        )
        raise ConfigError("a kind of recall document", name, allowed)
    facts, questions, distance = int(match[2]), int(match[3] or match[2]), int(match[4] or 0)
    form = "word" if match[1] == "word" else "number"
    return RecallKind(form=form, facts=facts, questions=questions, distance=distance)


@dataclass(frozen=True, kw_only=True)
class Words:
    """The tokenizer's words: token ids of ` word`, and the keys of each split among them."""

    texts: dict[int, str]
    keys: dict[Split, tuple[int, ...]]


@cache
def recall_words(tokenizer: PreTrainedTokenizerBase) -> Words:
    """Returns every lower-case word of at least three letters that is one token with the space before it.

    A fifth of them, by hash, are keys of held-out documents and never keys in training. Words of the sentences
    themselves are excluded.
    """
    used = set(re.findall("[a-z]+", " ".join(chain.from_iterable(TEMPLATES.values())).lower()))
    before, texts = tokenizer.encode(ANCHOR, add_special_tokens=False), {}
    for token in range(len(tokenizer)):
        text = str(tokenizer.decode([*before, token])).removeprefix(ANCHOR)  # alone it may lose its space (Metaspace)
        if re.fullmatch(r" [a-z]{3,}", text) and text[1:] not in used and encode_within(tokenizer, text) == [token]:
            texts[token] = text
    held_out = {token: hashlib.sha256(text.encode()).digest()[0] < 256 // 5 for token, text in texts.items()}
    train, validation = (tuple(token for token in texts if held_out[token] is held) for held in (False, True))
    return Words(texts=texts, keys={"train": train, "validation": validation})


def make_document(
    kind: str,
    length: int,
    filler: Int[np.ndarray, "tokens"],
    generator: torch.Generator,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    *,
    beginning: tuple[int, ...] = (),
    num_questions: int | None = None,
) -> RecallDocument:
    """Makes a document of at most `length` tokens (`word` and `number`: exactly `length`), including the tokens `beginning`.

    The text around the facts is a random excerpt of `filler` [any number of tokens]; each fact is planted at a uniform
    depth. `num_questions` is the number of questions of `word` and `number`; None: the kind's in training, otherwise one.

    Raises ValueError if the facts and questions do not fit, the filler is too short or the tokenizer has too few words.
    """
    chosen = parse_kind(kind)
    writer = _Writer(tokenizer, generator, split, beginning)
    if chosen.form == "pairs":
        return writer.pairs(name=kind, length=length)
    count = (chosen.questions if split == "train" else 1) if num_questions is None else num_questions
    facts, questions = writer.facts(chosen.form, chosen.facts, count)
    ending = sum(len(prompt) + len(answer) + len(writer.stop) for _, prompt, answer in questions)
    room = length - len(beginning) - sum(map(len, facts)) - ending
    _require_length(kind, length, length - room + chosen.distance)
    document = writer.plant(facts, writer.filler(filler, room), chosen.distance)
    return writer.ask(document, questions)


_Unplaced = tuple[str, list[int], list[int]]
"""A question before it is placed: its key, and the tokens of question and answer."""


class _Writer:
    """The random draws and the wording of one document."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator, split: Split, beginning: tuple[int, ...]
    ) -> None:
        self.tokenizer, self.generator, self.beginning = tokenizer, generator, beginning
        self.split: Split = split
        self.words = recall_words(tokenizer)
        self.stop = encode_within(tokenizer, ".")

    def below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))

    def order(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()

    def pick(self, choices: tuple[int, ...], count: int) -> list[int]:
        """Returns `count` different elements of `choices`."""
        if count > len(choices):
            raise ValueError(
                f"a recall document with {count} facts needs {count} single-token words, but the tokenizer has {len(choices)} "
                f"for {self.split} documents"
            )
        return [choices[i] for i in self.order(len(choices))[:count]]

    def keys_and_words(self, count: int) -> tuple[list[int], list[int]]:
        """Returns distinct keys, and the same number of distinct words that are not among them."""
        keys = self.pick(self.words.keys[self.split], count)
        taken = set(keys)
        return keys, self.pick(tuple(word for word in self.words.texts if word not in taken), count)

    def facts(self, form: str, count: int, asked: int) -> tuple[list[list[int]], list[_Unplaced]]:
        """Returns the sentences of `count` facts, and questions about `asked` of them."""
        keys, values = self.keys_and_words(count)
        texts = [self.number() if form == "number" else self.words.texts[value] for value in values]
        fact, question = (f"\n{template}" for template in TEMPLATES[form])
        names = [self.words.texts[key].strip() for key in keys]
        facts = [
            encode_within(self.tokenizer, fact.format(key=k, value=v) + "\n") for k, v in zip(names, texts, strict=True)
        ]
        questions = [
            (
                names[i],
                encode_within(self.tokenizer, question.format(key=names[i])),
                encode_within(self.tokenizer, texts[i]),
            )
            for i in self.order(count)[:asked]
        ]
        return facts, questions

    def filler(self, tokens: Int[np.ndarray, "tokens"], count: int) -> list[int]:
        """Returns `count` tokens of text from a random start, with a newline at document boundaries."""
        if len(tokens) < count:
            got = f"the source has {len(tokens)}"
            raise ValueError(f"a recall document needs {count} tokens of text around its facts, {got}")
        start = self.below(len(tokens) - count + 1)
        text = np.asarray(tokens[start : start + count])
        between = (text == self.tokenizer.eos_token_id) | np.isin(text, self.beginning)
        return np.where(between, encode_within(self.tokenizer, "\n")[0], text).tolist()

    def plant(self, facts: list[list[int]], text: list[int], distance: int) -> list[int]:
        """Inserts each fact into `text` at a uniformly drawn place, none among the last `distance` tokens."""
        places = sorted(self.below(len(text) + 1 - distance) for _ in facts)
        document = text[: places[0]]
        for fact, start, end in zip(facts, places, [*places[1:], len(text)], strict=True):
            document += fact + text[start:end]
        return document

    def ask(self, document: list[int], questions: list[_Unplaced]) -> RecallDocument:
        asked, document = [], [*self.beginning, *document]
        for key, prompt, answer in questions:
            start, document = len(document), document + prompt
            asked.append(Question(key=key, start=start, prompt_end=len(document), answer_ids=answer))
            document = document + answer + self.stop
        return RecallDocument(tokens=document, questions=asked)

    def pairs(self, name: str, length: int) -> RecallDocument:
        """Fills up to half the document with a random number of pairs and the rest with questions, repeated in training."""
        before, link = (encode_within(self.tokenizer, text) if text else [] for text in PAIRS[name])
        number = name == "pairs-number"
        size = len(before) + 1 + len(link) + (SPACE_AND_DIGITS if number else 1) + len(self.stop)
        _require_length(name, length, 2 * size + len(self.beginning))
        length -= len(self.beginning)
        most = min(length // (2 * size), len(self.words.keys[self.split]), len(self.words.texts) // 2)
        count = max(1, most - self.below(most // 2 + 1))  # 1 where there are no words: choosing them says so
        keys, words = self.keys_and_words(count)
        values = [encode_within(self.tokenizer, self.number()) if number else [word] for word in words]
        prompts = [[*before, key, *link] for key in keys]
        stated = [token for pair in zip(prompts, values, strict=True) for part in (*pair, self.stop) for token in part]
        costs = [len(prompt) + len(value) + len(self.stop) for prompt, value in zip(prompts, values, strict=True)]
        questions, room = [], length - len(stated)
        for i in (i for _ in range(length) for i in self.order(count)):
            room -= costs[i]
            if room < 0 or (questions and self.split == "validation"):
                break
            questions.append((self.words.texts[keys[i]].strip(), prompts[i], values[i]))
        return self.ask(stated, questions)

    def number(self) -> str:
        """Returns a 7-digit number with the space before it."""
        return f" {1_000_000 + self.below(9_000_000)}"


def _require_length(kind: str, length: int, least: int) -> None:
    if length < least:
        raise ValueError(
            f"a recall document of kind {kind!r} needs at least {least} tokens, but only {length} are allowed"
        )


def encode_within(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the tokens of `text` as they are within a longer text.

    A text that begins with a letter is encoded alone if the tokenizer joins it to the text before.
    """
    before, joined = (tokenizer.encode(part, add_special_tokens=False) for part in (ANCHOR, ANCHOR + text))
    kept = joined[: len(before)] == before
    return joined[len(before) :] if kept else tokenizer.encode(text, add_special_tokens=False)


def value_span(tokenizer: PreTrainedTokenizerBase, document: RecallDocument, question: Question) -> tuple[int, int]:
    """Returns the first index of the asked fact's value in a `word` or `number` document, and the index after its last.

    Raises ValueError if the fact does not stand before the question.
    """
    value = str(tokenizer.decode(question.answer_ids))
    for fact, _ in TEMPLATES.values():
        sentence = encode_within(tokenizer, "\n" + fact.format(key=question.key, value=value) + "\n")
        inside = _last_index(sentence, question.answer_ids)
        start = _last_index(document.tokens[: question.start], sentence)
        if inside >= 0 and start >= 0:
            return start + inside, start + inside + len(question.answer_ids)
    raise ConfigError("the asked key", question.key, "that of a fact in the document, a sentence of its own")


def _last_index(tokens: list[int], part: list[int]) -> int:
    """Returns the last index at which `part` stands in `tokens`; -1 if it does not."""
    starts = range(len(tokens) - len(part), -1, -1)
    return next((start for start in starts if tokens[start : start + len(part)] == part), -1)
