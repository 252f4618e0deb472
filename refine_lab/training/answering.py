"""A run of test-time training: adapts to each batch of prompts and answers it; resumable.

If `reset` is "prompt", weights and optimizer moments are reset after each prompt, and a resumed run answers the
unanswered prompts. If it is "never", both persist from batch to batch, as in the paper's release, so that the weights
drift over the test set: a checkpoint is written after each batch, and a resumed run starts from it. In both cases an
interrupted run gives the same results as an uninterrupted one, and the model is finally restored bit for bit.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig
from refine_lab.data.tasks.examples import Example
from refine_lab.data.tasks.prompts import TextPrompt, encode, within_limit
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.models.base import FastWeightLM
from refine_lab.ops.precision import autocast
from refine_lab.runs.run import Run
from refine_lab.runs.writer import RunProgress, RunWriter, write_status
from refine_lab.training.adaptation import Adapter, Update, fewer_chunks, preserve_weights, prompt_batch, read_prompt
from refine_lab.training.answers import answer, answer_row
from refine_lab.training.optim import load_optimizer_tensors, optimizer_tensors
from refine_lab.ttt_config import TTTRunConfig as TTTRunConfig
from refine_lab.validation import require


@dataclass(frozen=True, eq=False, kw_only=True)
class Progress:
    """A progress report of a run: one completed step, or one answered batch."""

    names: tuple[str, ...]
    "Names of the examples in the batch."
    update: Update | None
    "The step; none if the batch has been answered and its answers stored."
    rows: tuple[dict[str, Any], ...] = ()
    "The answers, as rows of the run's `answers`."


Report = Callable[[Progress], object]
"""Called after each step and each batch; if it returns a true value, the run stops there and can be resumed.

A string is stored as the reason.
"""


def batches_of(examples: Sequence[Example], batch_size: int) -> tuple[list[list[Example]], list[Example]]:
    """Returns the examples in complete batches, in order, and the last incomplete batch, which is dropped.

    Raises ValueError if there is no complete batch.
    """
    whole = len(examples) // batch_size
    require(whole >= 1, "the number of prompts", len(examples), f"at least {batch_size}, a whole batch")
    parts = [list(examples[i * batch_size : (i + 1) * batch_size]) for i in range(whole)]
    return parts, list(examples[whole * batch_size :])


def adapt_ids(example: Example, adapt_on: str) -> Int[Tensor, "_"]:
    """Returns the tokens to adapt to. Raises ValueError for `adapt_on` "document" if no question is found."""
    tokens = torch.tensor(example.prompt_ids)
    if adapt_on == "prompt":
        return tokens
    if example.question_start == len(tokens) or not example.question.strip():
        raise ValueError(
            f"adapt_on 'document' needs to know where the question begins, and {example.name!r} has no question that "
            "can be told apart from its document"
        )
    return tokens[: example.question_start]


def check_prompts(model: FastWeightLM, config: TTTRunConfig, examples: Sequence[Example]) -> list[str]:
    """Returns sentences about prompts that are too short for all chunks.

    Raises ValueError, naming the prompt, for one that cannot be read or adapted to, and for a model or parameters that
    cannot be adapted, before anything is changed or written.
    """
    if config.ttt is not None:
        Adapter(model, config.ttt)
    found = []
    for example in examples:
        try:
            ids = adapt_ids(example, config.adapt_on)
            prompt_batch(model, [ids, torch.tensor(example.prompt_ids)], (0, 1))
            if config.ttt is not None and (sentence := fewer_chunks(config.ttt, len(ids))):
                found.append(f"{example.name}: {sentence}")
        except ValueError as error:
            raise ValueError(f"{example.name!r} cannot be used: {error}") from None
    return found


def example_of(
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: str | None = None,
    task: TaskConfig | None = None,
    add_bos: bool | None = None,
) -> Example:
    """Builds an example from a user's text, with the question on a separate line after it; `add_bos` as in `DataConfig`.

    Raises ValueError for an empty text, an empty question, and a prompt over `task.prompt_tokens` if that is refused.
    """
    require(bool(document.strip()), "a prompt", document, "a text that is not empty")
    require(question is None or bool(question.strip()), "a question", question, "a text, or none")
    text = document if question is None else f"{document.rstrip()}\n{question.strip()}"
    start = len(text) if question is None else len(document.rstrip()) + 1
    given = TextPrompt(
        name="own",
        text=text,
        question_start=start,
        answers=(),
        question=(question or "").strip(),
        documents=(document,),
    )
    example = encode(given, tokenizer, add_bos)
    if task is None:
        return example
    kept, _ = within_limit([example], task, 1)
    tokens = len(example.prompt_ids)
    require(bool(kept), "a prompt's tokens", tokens, f"at most prompt_tokens {task.prompt_tokens}, or it is dropped")
    return kept[0]


def run_prompts(
    run: Run,
    model: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    rule: AnswerRule,
    report: Report = lambda progress: None,
) -> bool:
    """Answers the unanswered `examples` by `rule`; returns True if all are answered, False if `report` stopped it.

    The model must be as the run's configuration specifies; it is restored afterwards, even after an exception or an
    interrupt. The caller must hold the run's lock (`runs.files.locked`). Files are written atomically: whatever ends
    the process, calling this again resumes the run. Raises ValueError, before anything is written, for prompts that
    cannot be used (`check_prompts`).
    """
    config = run.config
    parts, _ = batches_of(examples, config.batch_size)
    check_prompts(model, config, examples)
    work = _Work(run, model, tokenizer, parts, rule, report)
    return work.drifting() if config.ttt is not None and config.reset == "never" else work.one_by_one()


class _Work:
    """One process's work on a run."""

    def __init__(
        self,
        run: Run,
        model: FastWeightLM,
        tokenizer: PreTrainedTokenizerBase,
        parts: list[list[Example]],
        rule: AnswerRule,
        report: Report,
    ) -> None:
        self.run, self.config, self.model, self.tokenizer = run, run.config, model, tokenizer
        self.parts, self.rule, self.report = parts, rule, report
        self.answered, self.before = 0, 0
        self.reason: object = None

    def one_by_one(self) -> bool:
        """Answers every batch from the initial model: reset after each, or not adapted at all."""
        names = self.run.log.done
        done = {number for number, part in self._numbered() if all(example.name in names for example in part)}
        if len(done) < len(self.parts):
            with RunWriter.open(self.run.path, done=done) as writer:
                self._begin(writer, len(done))
                for number, part in self._numbered():
                    if number in done:
                        continue
                    ttt = self.config.ttt
                    with nullcontext() if ttt is None else preserve_weights(self.model, ttt.parameters):
                        rows = self._adapt_and_answer(number, part, self._adapter())
                    if rows is None or self._keep(number, part, rows):
                        break
        return self._end()

    def drifting(self) -> bool:
        """Answers every batch with the weights and moments that the previous one left."""
        run, size, ttt = self.run, self.config.batch_size, self.config.ttt
        assert ttt is not None
        (first, folder), names = run.latest_checkpoint() or (0, None), run.log.done
        if not all(example.name in names for part in self.parts[:first] for example in part):
            first, folder = 0, None  # an answer was lost, which the weights of now would not give again
        if first < len(self.parts):
            with RunWriter.open(run.path, first) as writer, preserve_weights(self.model, ttt.parameters):
                run.log.cut(first * size)
                self._begin(writer, first)
                adapter = self._adapter()
                assert adapter is not None
                if folder is not None:
                    _load(adapter, folder)
                for number, part in list(self._numbered())[first:]:
                    rows = self._adapt_and_answer(number, part, adapter)
                    if rows is None or self._keep(number, part, rows, adapter):
                        break
        return self._end()

    def _begin(self, writer: RunWriter, before: int) -> None:
        """Starts reporting; `before` batches are already answered."""
        self.writer, self.progress, self.before = writer, RunProgress(writer, before), before
        self.progress.report(before)

    def _end(self) -> bool:
        """Writes the run's final status; returns True if everything is answered."""
        names = self.run.log.done
        whole = all(example.name in names for part in self.parts for example in part)
        if whole:
            write_status(self.run, "finished", step=len(self.parts))
        else:
            reason = self.reason if isinstance(self.reason, str) else "a stop was requested"
            write_status(self.run, "stopped", error=reason, step=self.before + self.answered)
        return whole

    def _numbered(self) -> Iterator[tuple[int, list[Example]]]:
        return enumerate(self.parts, start=1)

    def _adapter(self) -> Adapter | None:
        """Returns an adapter with a fresh optimizer, or None without adaptation."""
        if self.config.ttt is None:
            return None
        sizes = {"mini_batch_size": self.config.mini_batch_size, "micro_batch_size": self.config.micro_batch_size}
        return Adapter(self.model, self.config.ttt, **sizes)

    def _adapt_and_answer(
        self, number: int, part: list[Example], adapter: Adapter | None
    ) -> list[dict[str, Any]] | None:
        """Returns the rows of a batch's answers, or None if `report` asked to stop."""
        updates: list[Update] = []
        before = self._measured(part)
        if adapter is not None:
            ids = tuple(range((number - 1) * len(part), number * len(part)))
            batch = prompt_batch(self.model, [adapt_ids(example, self.config.adapt_on) for example in part], ids)
            for update in adapter.adapt(batch):
                updates.append(update)
                self.writer.update(number, update_line(update, [example.name for example in part]))
                if self._tell(part, update=update):
                    return None
        after = before if adapter is None else self._measured(part)
        began = time.monotonic()
        with autocast(self.model.device, self.config.dtype):
            said = answer(self.model, self.tokenizer, part, self.rule, self.config.micro_batch_size)
        seconds = time.monotonic() - began + sum(update.seconds for update in updates)
        facts = {"method": self.config.method, "seed": self.config.seed, "seconds": seconds / len(part)}
        return [
            answer_row(example, text, **facts) | self._columns(number, updates, old, new)
            for example, text, old, new in zip(part, said, before, after, strict=True)
        ]

    def _measured(self, part: list[Example]) -> list[tuple[float, float]]:
        """Returns mean loss and entropy of each prompt, in the run's arithmetic."""
        with autocast(self.model.device, self.config.dtype):
            return [measured(self.model, example) for example in part]

    def _columns(
        self, number: int, updates: list[Update], before: tuple[float, float], after: tuple[float, float]
    ) -> dict[str, Any]:
        """Returns an answer's columns specific to test-time training; losses and entropies are means over the prompt."""
        refine = updates[-1].refine if updates else None
        return {
            "batch": number,
            "reset": self.config.reset,
            "adapt_on": self.config.adapt_on,
            "updates": int(sum(update.metrics["updates"] for update in updates)),
            "num_chunks": 0 if refine is None else refine.num_chunks,
            "margin": 0 if refine is None else refine.margin,
            "loss_before": before[0],
            "loss_after": after[0],
            "entropy_before": before[1],
            "entropy_after": after[1],
        }

    def _keep(
        self, number: int, part: list[Example], rows: list[dict[str, Any]], adapter: Adapter | None = None
    ) -> bool:
        """Writes a batch's answers, then its checkpoint; returns whether `report` asks to stop."""
        self.run.log.write(rows)
        if adapter is not None:
            with self.writer.checkpoint(number) as folder:
                _save(adapter, folder)
            for _, earlier in self.run.checkpoints()[:-1]:
                shutil.rmtree(earlier)
        self.answered += 1
        return self._tell(part, rows=tuple(rows))

    def _tell(self, part: list[Example], update: Update | None = None, rows: tuple[dict[str, Any], ...] = ()) -> bool:
        self.progress.report(self.before + self.answered)
        self.reason = self.report(
            Progress(
                names=tuple(example.name for example in part),
                update=update,
                rows=rows,
            )
        )
        return bool(self.reason)


def _trainable(adapter: Adapter) -> dict[str, nn.Parameter]:
    moving = {id(p) for p in adapter.trainable}
    return {name: p for name, p in adapter.model.named_parameters() if id(p) in moving}


def _save(adapter: Adapter, folder: Path) -> None:
    """Saves the updated weights and the optimizer's moments."""
    weights = {name: p.detach().contiguous() for name, p in _trainable(adapter).items()}
    save_file(weights, folder / "weights.safetensors")
    save_file(optimizer_tensors(adapter.optimizers), folder / "optimizer.safetensors")


def _load(adapter: Adapter, folder: Path) -> None:
    """Loads a checkpoint's weights and moments into the model and the optimizer."""
    weights = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, p in _trainable(adapter).items():
            p.copy_(weights[name])
    load_optimizer_tensors(adapter.optimizers, load_file(folder / "optimizer.safetensors"))


def measured(model: FastWeightLM, example: Example) -> tuple[float, float]:
    """Returns mean loss and mean entropy of the tokens of a prompt, in nats."""
    reading = read_prompt(model, torch.tensor(example.prompt_ids))
    return float(reading.losses.mean()), float(reading.entropies.mean())


def update_line(update: Update, names: Sequence[str]) -> dict[str, Any]:
    """Returns a metrics line of kind `update`: the step's number on its batch, the prompts, and the step's metrics."""
    chunks = None if update.refine is None else update.refine.num_chunks
    times = {"seconds": update.seconds, "tokens_per_second": update.tokens_per_second}
    return {"number": update.number, "names": list(names), "num_chunks": chunks, **update.metrics, **times}
