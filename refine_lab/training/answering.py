"""A run of test-time training: adapts to each batch of prompts and answers it; resumable.

If `reset` is "prompt", weights and optimizer moments are reset after each prompt, and a resumed run answers the
unanswered prompts. If it is "never", both persist from batch to batch, as in the paper's release, so that the weights
drift over the test set: a checkpoint is written after each batch, and a resumed run starts from it. In both cases an
interrupted run gives the same results as an uninterrupted one, and the model is finally restored bit for bit.

Several workers answer different prompts at the same time, without an exchange. Where weights are not reset, they share the
prompts of each update instead. The first worker writes what all have found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_lab.config import TaskConfig
from refine_lab.data.tasks.examples import Example
from refine_lab.data.tasks.prompts import TextPrompt, encode, within_limit
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.models.base import FastWeightLM
from refine_lab.ops.precision import autocast
from refine_lab.runs.checkpoints import drop_checkpoints, resume_point, wait_for_checkpoint
from refine_lab.runs.run import Run
from refine_lab.runs.started import continues_after
from refine_lab.runs.writer import NoWriter, RunProgress, RunWriter, write_status
from refine_lab.text import refuse_surrogates
from refine_lab.training import optim
from refine_lab.training.adaptation import Adapter, Update, fewer_chunks, padded_batch, preserve_weights, read_prompt
from refine_lab.training.answers import answer, answer_row
from refine_lab.ttt_config import TTTRunConfig as TTTRunConfig
from refine_lab.validation import MOST_CHARACTERS, require
from refine_lab.workers import ALONE, Workers

Report = Callable[[tuple[str, ...], Update | None], object]
"""Called after each step, and again once a batch is answered and its answers are stored.

Its arguments are the names of the batch's examples, and the step or None. If it returns a true value, the run stops
there and can be resumed; a string is stored as the reason.
"""


def batches_of(examples: Sequence[Example], batch_size: int) -> tuple[list[list[Example]], list[Example]]:
    """Returns the examples in complete batches, in order, and the last incomplete batch, which is dropped.

    Raises ValueError if there is no complete batch.
    """
    end = len(examples) - len(examples) % batch_size
    require(end > 0, "the number of prompts", len(examples), f"at least {batch_size}, one complete batch")
    batches = [list(examples[i : i + batch_size]) for i in range(0, end, batch_size)]
    return batches, list(examples[end:])


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
            padded_batch(model, [ids, torch.tensor(example.prompt_ids)], (0, 1))
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

    Raises ValueError for an empty or a very long text or question, for one with an unpaired surrogate, and for a prompt
    over `task.prompt_tokens` that may not be cut.
    """
    require(bool(document.strip()), "a prompt", document, "a non-empty string")
    require(question is None or bool(question.strip()), "a question", question, "a string, or none")
    for name, part in (("a prompt", document), ("a question", question or "")):
        require(len(part) <= MOST_CHARACTERS, f"{name}'s characters", len(part), f"at most {MOST_CHARACTERS:,}")
        refuse_surrogates(part, name)
    text = document if question is None else f"{document.rstrip()}\n{question.strip()}"
    start = len(text) if question is None else len(document.rstrip()) + 1
    prompt = TextPrompt(
        name="own",
        text=text,
        question_start=start,
        answers=(),
        question=(question or "").strip(),
        documents=(document,),
    )
    example = encode(prompt, tokenizer, add_bos)
    if task is None:
        return example
    kept, _ = within_limit([example], task, 1)
    tokens = len(example.prompt_ids)
    require(bool(kept), "a prompt's tokens", tokens, f"at most prompt_tokens {task.prompt_tokens}")
    return kept[0]


def run_prompts(
    run: Run,
    model: FastWeightLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    rule: AnswerRule,
    report: Report = lambda names, update: None,
    workers: Workers = ALONE,
) -> bool:
    """Answers the unanswered `examples` by `rule`; returns True if all are answered, False if `report` stopped it.

    The model must be as the run's configuration specifies; it is restored afterwards, even after an exception or an
    interrupt. Each of several workers calls this, and `report` stops all of them. The caller, with several the first of
    them, must hold the run's lock (`runs.files.take_lock`). Files are written atomically: whatever ends the process, calling
    this again resumes the run. Raises ValueError, before anything is written, for prompts that cannot be used
    (`check_prompts`).
    """
    batches, _ = batches_of(examples, run.config.batch_size)
    check_prompts(model, run.config, examples)
    return _Work(run, model, tokenizer, dict(enumerate(batches, start=1)), rule, report, workers).execute()


@dataclass(eq=False)
class _Work:
    """One process's work on a run; `batches` are numbered from 1."""

    run: Run
    model: FastWeightLM
    tokenizer: PreTrainedTokenizerBase
    batches: dict[int, list[Example]]
    rule: AnswerRule
    report: Report
    workers: Workers
    done: set[int] = field(default_factory=set)
    reason: object = None
    lines: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    "Lines of updates that the first worker still has to write, by batch."
    writer: RunWriter | NoWriter = field(init=False)
    progress: RunProgress = field(init=False)

    def execute(self) -> bool:
        """Answers the unanswered batches, writes the run's final status, and returns whether everything is answered.

        If weights are reset, every batch is answered from the initial model; otherwise, with the weights and moments
        that the previous one left.
        """
        ttt, drifts = self.run.config.ttt, self.run.config.drifts
        first, folder = self._starting_point()
        preserved = nullcontext if ttt is None else partial(preserve_weights, self.model, ttt.parameters)
        per_run, per_batch = (preserved, nullcontext) if drifts else (nullcontext, preserved)
        left, at_once = sorted(self.batches.keys() - self.done), 1 if drifts else self.workers.count
        if left:
            with self._open(first, left[0] - 1) as self.writer, per_run():
                self.progress = RunProgress(self.writer, len(self.done))
                self.progress.report(len(self.done))
                adapter = self._adapter() if drifts else None
                if adapter is not None and self.workers.first:
                    self.run.log.cut(first * self.run.config.batch_size)
                if adapter is not None and folder is not None:
                    _load(adapter, folder)
                for start in range(0, len(left), at_once):
                    with per_batch():
                        rows = self._answered_by_this_worker(left[start : start + at_once], adapter)
                    if self._write(left[start : start + at_once], rows, adapter):
                        break
        finished = bool(self.workers.decide(len(self.done) == len(self.batches)))
        reasons = self.workers.gather_json(self.reason if isinstance(self.reason, str) else None)
        if self.workers.first:
            reason = next(filter(None, reasons), "a stop was requested")
            state, error = ("finished", None) if finished else ("stopped", reason)
            write_status(self.run, state, error, len(self.done))
        return finished

    def _starting_point(self) -> tuple[int, Path | None]:
        """Finds the batches that are done; returns the one after which weights drift on, and its checkpoint, if any."""
        first, folder = 0, None
        if self.workers.first:
            names = self.run.log.done
            answered = (
                number for number, batch in self.batches.items() if all(example.name in names for example in batch)
            )
            self.done = set(answered)
            if self.run.config.drifts:
                first, folder = resume_point(self.run.path) or (0, None)
                # the checkpoint's weights would not give a missing answer again
                if not self.done.issuperset(range(1, first + 1)):
                    first, folder = 0, None
                self.done = set(range(1, first + 1))
        done, first, resumes = self.workers.gather_json([sorted(self.done), first, folder is not None])[0]
        if not self.workers.first:
            self.done = set(done)
            folder = wait_for_checkpoint(self.run.path, first) if resumes else None
        return first, folder

    def _open(self, first: int, before: int) -> RunWriter | NoWriter:
        """Opens the run directory, whose records then end at batch `first` if weights drift, or have the done ones."""
        if not self.workers.first:
            return NoWriter(self.run.path)
        continues_after(self.run, before)
        return RunWriter.open(self.run.path, first, done=self.done)

    def _adapter(self) -> Adapter | None:
        """Returns an adapter with a fresh optimizer, or None without adaptation; workers share its updates if weights drift."""
        if self.run.config.ttt is None:
            return None
        config = self.run.config
        sizes = {"mini_batch_size": config.mini_batch_size, "micro_batch_size": config.micro_batch_size}
        return Adapter(self.model, config.ttt, **sizes, workers=self.workers if config.drifts else ALONE)

    def _answered_by_this_worker(self, numbers: list[int], adapter: Adapter | None) -> list[dict[str, Any]] | None:
        """Returns this worker's rows of answers to batches, or None if `report` asked to stop.

        The `adapter` is that of weights that drift. The workers then answer equal shares of one batch, and otherwise one
        batch each.
        """
        if adapter is not None:
            return self._adapt_and_answer(numbers[0], adapter, slice(*self.workers.share(self.run.config.batch_size)))
        rank = self.workers.rank
        return [] if rank >= len(numbers) else self._adapt_and_answer(numbers[rank], self._adapter(), slice(None))

    def _adapt_and_answer(self, number: int, adapter: Adapter | None, mine: slice) -> list[dict[str, Any]] | None:
        """Adapts to a batch and returns the rows of the answers to `mine` of its prompts, or None if `report` asked to stop.

        Losses and entropies are means over the prompt.
        """
        config, batch = self.run.config, self.batches[number]
        examples, updates = batch[mine], list[Update]()
        before = after = self._measured(examples)
        if adapter is not None:
            ids = tuple(range((number - 1) * len(batch), number * len(batch)))
            rows = padded_batch(self.model, [adapt_ids(example, config.adapt_on) for example in batch], ids)
            for update in adapter.adapt(rows):
                updates.append(update)
                self._add_line(number, update)
                if adapter.workers.any(self._reported(number, update)):
                    return None
            after = self._measured(examples)
        began = time.monotonic()
        with autocast(self.model.device, config.dtype):
            texts = answer(self.model, self.tokenizer, examples, self.rule, config.micro_batch_size)
        answering, adapting = time.monotonic() - began, sum(update.seconds for update in updates)
        seconds = answering / len(examples) + adapting / len(batch)
        common = {"method": config.method, "seed": config.seed, "seconds": seconds}
        refine = updates[-1].refine if updates else None
        adaptation = {
            "batch": number,
            "reset": config.reset,
            "adapt_on": config.adapt_on,
            "updates": int(sum(update.metrics["updates"] for update in updates)),
            "num_chunks": 0 if refine is None else refine.num_chunks,
            "margin": 0 if refine is None else refine.margin,
        }
        columns = ("loss_before", "entropy_before", "loss_after", "entropy_after")
        return [
            answer_row(example, text, **common) | adaptation | dict(zip(columns, (*old, *new), strict=True))
            for example, text, old, new in zip(examples, texts, before, after, strict=True)
        ]

    def _measured(self, examples: list[Example]) -> list[tuple[float, float]]:
        """Returns mean loss and entropy of each prompt, in the run's arithmetic."""
        with autocast(self.model.device, self.run.config.dtype):
            return [measured(self.model, example) for example in examples]

    def _add_line(self, number: int, update: Update) -> None:
        """Writes the line of an update, or keeps it for the first worker."""
        line = update_line(update, [example.name for example in self.batches[number]])
        if isinstance(self.writer, RunWriter):
            self.writer.update(number, line)
        elif not self.run.config.drifts:  # else the first worker has made the same update
            self.lines.append((number, line))

    def _write(self, numbers: list[int], rows: list[dict[str, Any]] | None, adapter: Adapter | None) -> bool:
        """Writes the answers of all workers, then the checkpoint of `adapter`, if any; returns whether to stop."""
        everyone = self.workers.gather_json([rows, self.lines])
        self.lines.clear()
        # batches after an interrupted one are answered again, so that answers are stored in the order of the batches
        kept = [*takewhile(lambda given: given[0] is not None, everyone)]
        found = [row for rows, _ in kept for row in rows]
        answered = [number for number in numbers if any(row["batch"] == number for row in found)]
        if isinstance(self.writer, RunWriter) and found:
            for number, line in (line for _, lines in kept for line in lines):
                self.writer.update(number, line)
            self.writer.flush()  # the lines of updates, which count once their batch is answered
            for number in answered:
                self.run.log.write([row for row in found if row["batch"] == number])
            if adapter is not None:
                with self.writer.checkpoint(numbers[0]) as folder:
                    _save(adapter, folder)
                drop_checkpoints(self.run.path, newest=2)
        stops = [rows is None for rows, _ in everyone]
        for number in answered:
            self.done.add(number)
            stops.append(self._reported(number))
        return self.workers.any(any(stops))

    def _reported(self, number: int, update: Update | None = None) -> bool:
        """Reports progress on a batch; returns whether `report` asks to stop."""
        self.progress.report(len(self.done))
        self.reason = self.report(tuple(example.name for example in self.batches[number]), update) or self.reason
        return bool(self.reason)


def _save(adapter: Adapter, folder: Path) -> None:
    """Saves the updated weights and the optimizer's moments."""
    weights = {name: p.detach().contiguous() for name, p in adapter.trainable.items()}
    save_file(weights, folder / "weights.safetensors")
    optim.save(adapter.optimizers, folder)


def _load(adapter: Adapter, folder: Path) -> None:
    """Loads a checkpoint's weights and moments into the model and the optimizer."""
    weights = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, p in adapter.trainable.items():
            p.copy_(weights[name])
    optim.load(adapter.optimizers, folder)


def measured(model: FastWeightLM, example: Example) -> tuple[float, float]:
    """Returns mean loss and mean entropy of the tokens of a prompt, in nats."""
    reading = read_prompt(model, torch.tensor(example.prompt_ids))
    return float(reading.losses.mean()), float(reading.entropies.mean())


def update_line(update: Update, names: Sequence[str]) -> dict[str, Any]:
    """Returns a metrics line of kind `update`: the step's number on its batch, the prompts, and the step's metrics."""
    chunks = None if update.refine is None else update.refine.num_chunks
    times = {"seconds": update.seconds, "tokens_per_second": update.tokens_per_second}
    return {"number": update.number, "names": list(names), "num_chunks": chunks, **update.metrics, **times}
