"""A task: training, validation and test examples, what the splits share, and how the prompts are answered."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from transformers import PreTrainedTokenizerBase

from refine_lab.config import DataConfig, TaskConfig, require
from refine_lab.data.corpus import Manifest
from refine_lab.data.tasks.files import ANSWERS, file_splits
from refine_lab.data.tasks.prompts import Example
from refine_lab.data.tasks.recall import recall_splits
from refine_lab.data.tasks.ruler_qa import ruler_splits
from refine_lab.data.tasks.rules import AnswerRule, answer_rule, several_lines, too_long
from refine_lab.data.tasks.splits import SplitReport, Splits, quoted, report
from refine_lab.data.tasks.trained import UNTRAINED, History
from refine_lab.data.tokenizer import describe_beginning
from refine_lab.validation import path_of


@dataclass(frozen=True, kw_only=True)
class Task:
    """The examples of a task; the same for every run with its configuration and tokenizer."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    report: SplitReport
    "Contents of the splits and what they share."
    rule: AnswerRule
    "How the validation and test examples are answered."

    @property
    def examples(self) -> tuple[Example, ...]:
        """Returns the examples of all splits."""
        return (*self.train, *self.validation, *self.test)


def load_task(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    manifest: Manifest | None = None,
    past: History = UNTRAINED,
    *,
    leave_out: bool = False,
) -> Task:
    """Loads the examples that `config` describes; recall documents are made in the text of `data`.

    `data.add_bos` applies to all examples. `past` is what the answering model was trained on. Validation and test
    examples among it are refused, or test examples left out with `leave_out`; with `shared` set to `allow` they are
    kept. The report mentions this, and says when it is unknown.

    Raises FileNotFoundError or ValueError, in one sentence, for a missing or invalid source, for too few examples, for
    a prompt over the limit if `over_limit` is `refuse`, and if two splits share a question or a document and `shared`
    is `refuse`. Warns if no reference answer of an example fits into `answer_tokens`.
    """
    skipped = past if leave_out and config.shared == "refuse" else UNTRAINED
    splits = load_splits(config, tokenizer, data, manifest, skipped)
    asked = [*splits.examples["validation"], *splits.examples["test"]]
    rule = answer_rule(config, tokenizer, asked)
    notes = [*splits.notes, *filter(None, [describe_beginning(tokenizer, data.add_bos)])]
    asked = splits.examples["test"] if leave_out else asked  # with `leave_out`, no validation example is answered
    every = [*chain.from_iterable(splits.examples.values())]
    notes += [*_answer_notes(config, rule, tokenizer, asked), *past.notes(config, every)]
    splits = _without(splits, skipped)
    refusal = "set TaskConfig.shared to 'allow' to accept this" if config.shared == "refuse" else None
    if repeated := [] if leave_out and refusal else [e for e in asked if past.holds(e)]:
        questions = quoted([*dict.fromkeys(example.question or example.name for example in repeated)])
        found = f"{past.names} was trained on {len(repeated)} of the {len(asked)} prompts to be answered, {questions}"
        if refusal:
            raise ValueError(f"{config.source!r}: {found}; {refusal}")
        notes.append(f"{found[0].upper()}{found[1:]}.")
    if splits.trained:
        notes.insert(0, f"{splits.trained} prompts that {past.names} was trained on are left out.")
    made = report(splits.examples, splits.dropped, tuple(notes))
    if refusal and made.shared:
        raise ValueError(f"{config.source!r}: {'; '.join(map(str, made.shared))}; {refusal}")
    train, validation, test = (tuple(splits.examples[name]) for name in ("train", "validation", "test"))
    return Task(train=train, validation=validation, test=test, report=made, rule=rule)


def load_splits(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    manifest: Manifest | None,
    skipped: History,
) -> Splits:
    """Loads the examples of each split, without checking what they share. Raises what `load_task` raises for a source.

    A task without training or validation examples replaces those that `skipped` was trained on with others.
    """
    if config.train or config.validation:
        skipped = UNTRAINED
    if config.test_source is not None:
        others = replace(config, test_source=None, test=0)
        asked = replace(config, source=config.test_source, test_source=None, train=0, validation=0)
        first, second = (load_splits(each, tokenizer, data, manifest, skipped) for each in (others, asked))
        return Splits(
            examples={**first.examples, "test": second.examples["test"]},
            dropped=first.dropped + second.dropped,
            trained=first.trained + second.trained,
            notes=(*first.notes, *second.notes),
        )
    rest = config.source.partition(":")[2]
    counted = config.form == "file" or config.test is not None
    require(
        counted, "TaskConfig.test", config.test, f"a number for {config.source!r}, whose prompts are made as needed"
    )
    if config.form == "recall":
        return Splits(examples=recall_splits(rest, config, tokenizer, data, manifest))
    if config.form == "ruler":
        return ruler_splits(path_of("TaskConfig.source", rest), config, tokenizer, skipped, data.add_bos)
    return file_splits(config, tokenizer, skipped, data.add_bos)


def _without(splits: Splits, skipped: History) -> Splits:
    """Removes the test examples that `skipped` was trained on. Raises ValueError if none is left."""
    left = [example for example in splits.examples["test"] if not skipped.holds(example)]
    trained = splits.trained + len(splits.examples["test"]) - len(left)
    if trained and not left:
        known = f"{skipped.names} was trained on the questions of all {trained} prompts, so none is left"
        raise ValueError(f"{known} to be answered; set TaskConfig.shared to 'allow' to answer them anyway")
    return replace(splits, examples={**splits.examples, "test": left}, trained=trained)


def _answer_notes(
    config: TaskConfig, rule: AnswerRule, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Example]
) -> Iterator[str]:
    """Yields sentences on the answer limit and on prompts that cannot be scored or answered correctly."""
    if not asked:
        return
    scored = [example for example in asked if example.answers]
    why = ", as the longest reference answer needs" if scored and config.answer_tokens is None else ""
    yield f"An answer has at most {rule.max_tokens} token{'s' * (rule.max_tokens > 1)}{why}."
    column = f" in column {config.answer_column or ANSWERS!r}" if config.test_form == "file" else ""
    if not scored:
        yield f"No prompt has a reference answer{column}; answers are not scored."
    elif bare := len(asked) - len(scored):
        yield f"{bare} of {len(asked)} prompts have no reference answer{column} and are not scored."
    long, several = too_long(rule, tokenizer, scored), several_lines(rule, scored)
    first = f"For {long} of {len(scored)} prompts, no reference answer fits into {rule.max_tokens} tokens"
    second = (
        f"For {several} of {len(scored)} prompts, every reference answer has several lines, but only the first line of a "
        "generated answer is used"
    )
    for count, sentence, advice in ((long, first, "raise answer_tokens"), (several, second, "set lines to 'all'")):
        if count:
            warnings.warn(f"{sentence}: {advice}", stacklevel=3)
            yield f"{sentence}."
