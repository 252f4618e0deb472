"""Functions of the test-time training notebook: adaptation to one prompt, step by step with each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig
from refine_lab.data.sample import sample_document
from refine_lab.data.tasks.examples import Example, Task
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.data.tasks.scores import SCORES
from refine_lab.experiments.configs import drop_none
from refine_lab.models.base import FastWeightLM
from refine_lab.ops.precision import autocast
from refine_lab.statistics.rest_change import RestChange, rest_change
from refine_lab.text import quote
from refine_lab.training.adaptation import Reading, Update, adapted, read_prompt
from refine_lab.training.answering import adapt_ids, example_of
from refine_lab.training.answers import answer, answer_row
from refine_lab.training.held_out_rest import HeldOutRest, hold_out
from refine_lab.ttt_config import TTTRunConfig
from refine_lab.validation import ConfigError, require


@dataclass(frozen=True, eq=False)
class PromptTrace:
    """How adaptation to one prompt changed the model, per step and method."""

    tokens: list[str]  # the text of each token of the prompt, [T]
    # a row per step: `method`, `step`, `tokens_per_second`, `reward`, `loss_before`, `loss_after`, ...
    steps: pd.DataFrame
    answers: pd.DataFrame  # a row per method: `method`, `answer` and scores; `none` is the answer before adaptation
    readings: dict[str, Reading]  # of each token: `none` before adaptation, and each method after its last step
    rests: dict[str, RestChange]  # by method; empty if nothing is held out


def prompt_to_trace(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TaskConfig,
    *,
    example: int | None = 0,
    text: str | None = None,
    question: str | None = None,
    add_bos: bool | None = None,
    **settings: Any,
) -> tuple[Example, AnswerRule]:
    """Returns an example and its answer rule: a user's text with its question, one of the task's test examples, or the sample.

    `example` None means the first test example if `settings` names `prompts`, and else the text of `data.sample` with its
    question. `add_bos` is as in `DataConfig`. A user's question is answered by the default `AnswerRule`, in which
    `settings` may change the `ANSWER_FIELDS`; None keeps the default. Raises ValueError for a question without a text,
    for an index without an example, and as `example_of` does.
    """
    if text is not None:
        lines, strip = settings.get("lines"), settings.get("strip_leading")
        rule = AnswerRule(**drop_none(max_tokens=settings.get("answer_tokens"), lines=lines, strip_leading=strip))
        return example_of(tokenizer, text, question, config, add_bos), rule
    sentence = f"question can only be set together with text, got {quote(question)}"
    if question is not None:
        raise ConfigError("question", question, "none unless text is set", sentence)
    if example is None and settings.get("prompts") is None:
        return sample_example(tokenizer, add_bos), AnswerRule(**drop_none(max_tokens=settings.get("answer_tokens")))
    example = example or 0
    require(0 <= example < len(task.test), "example", example, f"from 0 to {len(task.test) - 1}")
    return task.test[example], task.rule


def sample_example(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None = None) -> Example:
    """Returns the text of `data.sample` and its question as an example; `add_bos` as in `DataConfig`."""
    sample = sample_document()
    example = example_of(tokenizer, sample.document, sample.question, add_bos=add_bos)
    return replace(example, name="sample", answers=(sample.answer.strip(),))


def trace_prompt(
    model: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    configs: Sequence[TTTRunConfig],
    rule: AnswerRule,
    *,
    held_out: float = 0.0,
) -> PromptTrace:
    """Adapts to one prompt with each method, prints every step, answers, and restores the weights.

    The last configuration of each method is used. All methods read and answer the prompt in one dtype, that of the
    first. `held_out`: the share of the document, before the question, that is its unseen remainder; the model is then adapted
    only to the part before it, and loss and entropy of a step are those of that part (see `HeldOutRest`). Raises
    ValueError as `adapted` and `hold_out` do.
    """
    prompt = torch.tensor(example.prompt_ids)
    held = hold_out(example.question_start, held_out) if held_out else None
    last = {config.method: config for config in configs if config.ttt is not None}
    dtype = next((config.dtype for config in last.values()), "float32")

    def read() -> Reading:
        with autocast(model.device, dtype):
            return read_prompt(model, prompt)

    def answer_after(method: str) -> None:
        with autocast(model.device, dtype):
            text = answer(model, tokenizer, [example], rule)[0]
        row = answer_row(example, text, method=method, seed=0, seconds=0.0)
        answers.append({name: row[name] for name in ("method", "answer", "references", *SCORES)})
        print(f"{method}: the answer is {text!r}", flush=True)

    readings, steps, answers, rests = {"none": read()}, [], [], {}
    answer_after("none")
    for method, config in last.items():
        assert config.ttt is not None
        readings[method] = readings["none"]

        def report(update: Update, method: str = method) -> None:
            before, readings[method] = readings[method], read()
            steps.append(_step_row(method, update, before, readings[method], held))
            print(_step_line(steps[-1]), flush=True)

        ids = adapt_ids(example, config.adapt_on) if held is None else prompt[: held.first]
        with adapted(model, ids, config.ttt, report):
            answer_after(method)
        if held is not None:
            losses = (held.rest(readings[name].losses).double().numpy() for name in ("none", method))
            rests[method] = rest_change(*losses, seed=config.seed)
            print(f"{method}: {rests[method].sentence}", flush=True)
    tokens = [str(tokenizer.decode([token])) for token in example.prompt_ids]
    return PromptTrace(tokens, pd.DataFrame(steps), pd.DataFrame(answers), readings, rests)


def _step_row(method: str, update: Update, before: Reading, after: Reading, held: HeldOutRest | None) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "step": update.number}
    for when, reading in (("before", before), ("after", after)):
        losses, entropies = reading.losses, reading.entropies
        if held is not None:
            row[f"rest_{when}"] = float(held.rest(losses).mean())
            losses, entropies = held.adapted(losses), held.adapted(entropies)
        row |= {f"loss_{when}": float(losses.mean()), f"entropy_{when}": float(entropies.mean())}
    reward = update.metrics.get("reward_mean", float("nan"))
    return row | {"reward": reward, "tokens_per_second": update.tokens_per_second}


def _step_line(row: dict[str, Any]) -> str:
    labels = {"rest": "remainder", "loss": "loss", "entropy": "entropy"}
    names = [name for name in labels if f"{name}_before" in row]
    changes = [f"{labels[name]} {row[f'{name}_before']:.4f} -> {row[f'{name}_after']:.4f}" for name in names]
    changes += [] if math.isnan(row["reward"]) else [f"reward {row['reward']:.3f}"]
    return f"{row['method']} step {row['step']}: {', '.join(changes)}, {row['tokens_per_second']:,.0f} tokens/s"
