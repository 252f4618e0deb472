"""RULER's SQuADQA and HotpotQA (Hsieh et al., 2024), made by lm-evaluation-harness from the files as published.

Questions and paragraphs are divided between the splits before a prompt is made, so that no paragraph of one split, not even
as a distractor, stands in a prompt of another. The prompts are the harness's, which say "documents" where the paper's files
say "passages".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig
from refine_lab.data.tasks.passages import parse
from refine_lab.data.tasks.prompts import Example, encode
from refine_lab.data.tasks.published import Published, divide, read_published
from refine_lab.data.tasks.splits import Splits
from refine_lab.data.tasks.trained import UNTRAINED, History
from refine_lab.data.tokenizer import beginning
from refine_lab.validation import ConfigError

RULER_SEED = 20_260_218
"""Of every draw, whatever the seed of a run: all runs train and test on the same."""
NEEDS_LM_EVAL = (
    "a source 'ruler:FILE' needs the package lm_eval: pip install 'lm_eval==0.4.13' (the extra `eval` of refine_lab)"
)
ANSWER_PREFIX = " Answer:"
"""What the harness puts after the question, its `gen_prefix`."""
MORE_DOCUMENTS = 10
"""RULER tries 10 documents, 20, ... until a prompt is full; here 1, 2, ... where twice as many are too many for it."""


def ruler_splits(
    path: Path,
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    skipped: History = UNTRAINED,
    add_bos: bool | None = None,
) -> Splits:
    """Train, validation and test made from SQuAD v2.0 or HotpotQA (distractor), without questions whose own paragraphs do
    not fit, and without those that `skipped` was trained on.

    A prompt has as many documents as `prompt_tokens` holds, or as its split has.

    Raises FileNotFoundError or ValueError, in one sentence, where the file is not there or is neither of the two, where lm_eval
    is not installed, for `test` none, and where the questions are too few for the counts.
    """
    if config.test is None:
        allowed = f"a number for {config.source!r}"
        raise ConfigError("TaskConfig.test", None, allowed, f"TaskConfig.test must be {allowed}")
    published = read_published(path)
    generator = _Generator(published, config, tokenizer, add_bos)
    fits, trained = generator.fitting(), generator.trained(skipped)
    published = published.keep([fit and not known for fit, known in zip(fits, trained, strict=True)])
    wanted = {"train": config.train, "validation": config.validation, "test": config.test}
    parts = divide(published, wanted)
    splits = {name: generator.examples(name, parts[name], count) if count else [] for name, count in wanted.items()}
    return Splits(
        examples=splits,
        dropped=fits.count(False),
        trained=sum(known and fit for fit, known in zip(fits, trained, strict=True)),
        notes=tuple(_short_prompts(splits, config.prompt_tokens)),
    )


def _short_prompts(splits: dict[str, list[Example]], limit: int) -> Iterator[str]:
    """A sentence for each split whose paragraphs do not half fill its prompts."""
    for name, examples in splits.items():
        tokens = int(median(len(example.prompt_ids) for example in examples)) if examples else limit
        if tokens < limit / 2:
            yield f"Half of the {name} prompts have at most {tokens} of {limit} tokens."


class _Generator:
    """The harness's generator on a file of our own."""

    def __init__(
        self, published: Published, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None
    ) -> None:
        try:
            from lm_eval.tasks.ruler import qa_utils
        except ModuleNotFoundError as error:
            raise ValueError(f"{NEEDS_LM_EVAL}; {error}") from error
        self.harness: Any = qa_utils
        self.published, self.tokenizer, self.add_bos = published, tokenizer, add_bos
        self.room = config.prompt_tokens - self.count(ANSWER_PREFIX) - len(beginning(tokenizer, add_bos))

    def tokenise(self, text: str) -> Any:
        """What the harness measures a text by: without the tokens that a tokenizer adds of itself."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)

    def count(self, text: str) -> int:
        return len(self.tokenise(text).input_ids)

    def read(self, units: Sequence[Any]) -> tuple[list[dict], _Fixed]:
        """The harness's questions and paragraphs of some units."""
        content = self.published.content(units)
        with _replaced(self.harness, "download_json", lambda url: content):
            reader = self.harness.read_squad if self.published.kind == "squad" else self.harness.read_hotpotqa
            questions, paragraphs = reader.__wrapped__()  # its cache knows a file by its address alone
        return questions, _Fixed(paragraphs)

    def fitting(self) -> list[bool]:
        """Whether each question's prompt with no other paragraphs than its own fits."""
        questions, paragraphs = self.read(self.published.units)
        fits = []
        for number, question in enumerate(questions):
            alone = len(question["context"])
            text, _ = self.harness.generate_input_output(number, alone, qas=questions, docs=paragraphs)
            fits.append(self.count(text) <= self.room)
        return fits

    def trained(self, skipped: History) -> list[bool]:
        """Whether `skipped` was trained on each question."""
        questions, _ = self.read(self.published.units)
        return [skipped.holds_question(question["query"]) for question in questions]

    def examples(self, name: str, units: Sequence[Any], count: int) -> list[Example]:
        """`count` examples from the questions and paragraphs of `units`."""
        questions, paragraphs = self.read(units)
        draws = random.Random(f"{RULER_SEED} {name}")
        draws.shuffle(questions)  # in the file's order the first would all be about one article
        twice = (
            2 * MORE_DOCUMENTS * fmean(self.count(text) for text in draws.sample(paragraphs, min(50, len(paragraphs))))
        )
        with _seeded(f"{RULER_SEED} {name}"):
            samples = self.harness.generate_samples(
                tokenizer=self.tokenise,
                docs=paragraphs,
                qas=[_typical(questions, paragraphs), *questions],
                pre_samples=1,
                max_seq_length=self.room,
                num_samples=count,
                tokens_to_generate=0,  # the room for an answer is not the prompt's
                incremental=MORE_DOCUMENTS if twice <= self.room else 1,
            )
        prompts = (
            parse(f"{self.published.kind}-{name}-{number}", sample["input"] + ANSWER_PREFIX, tuple(sample["outputs"]))
            for number, sample in enumerate(samples)
        )
        return [encode(prompt, self.tokenizer, self.add_bos) for prompt in prompts]


def _typical(questions: list[dict], paragraphs: list[str]) -> dict:
    """The question with paragraphs of middling length around it: by the first one the harness sizes all prompts."""

    def length(question: dict) -> float:
        return fmean(len(paragraphs[place]) for place in (*question["context"], *question.get("more_context", ())))

    return sorted(questions, key=length)[len(questions) // 2]


class _Fixed(list):
    """Paragraphs in a fixed order.

    Where all of them fit a prompt, the harness shuffles the very list that its questions point into by number.
    """

    def __setitem__(self, place: Any, value: Any) -> None:
        pass


@contextmanager
def _replaced(module: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """The module with another function of that name: the harness reads from an address only."""
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """The global `random`, which the harness draws from, seeded; afterwards it goes on as before."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
