"""The TTT panel: adapts a model to the first part of a document, and shows what it gains on the held-out remainder."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from refine_lab.data.sample import sample_document
from refine_lab.data.tasks.prompts import Example
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.explore.client import Worker, shared_worker
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.futures import finished, together
from refine_lab.explore.reading import DocumentReading
from refine_lab.recipes import ttt_per_prompt
from refine_lab.refine_config import RefineConfig
from refine_lab.runs.environment import display_path
from refine_lab.statistics.rest_change import RestChange, rest_change
from refine_lab.text import replace_surrogates
from refine_lab.training.held_out_rest import SHARE, HeldOutRest, hold_out
from refine_lab.ttt_config import TTTConfig
from widgets.core.page import save_page
from widgets.core.panel import Panel
from widgets.parts.answers import Answers
from widgets.parts.controls import in_rows, ttt_fields
from widgets.parts.document_metrics import change_metrics, entropy_metric, loss_metric, rest_metric
from widgets.parts.live_curves import Curves
from widgets.parts.rest_result import RestResult
from widgets.parts.ttt_curves import ttt_curves
from widgets.token_map import TokenMap, token_text

INTERVAL = 0.25
"""Minimum number of seconds between two updates of the curves."""
STEPS = 20
"""Default number of steps, more than in the recipe, so that progress can be watched."""
_PANELS: WeakSet[TTTPanel] = WeakSet()
"""All panels, since several may update the weights of one model."""


class TTTPanel(Panel):
    """Adapts to the first part of a document with REFINE or SFT; shows the loss on its held-out remainder, and both answers.

    The remainder is the last part of the document before the question. Nothing is adapted to it, and its loss is that of
    one forward pass over the document from its beginning. The weights stay adapted after a stop or the last step, until `reset`
    restores them bit for bit. Everything works without a page: `start`, `stop`, `reset`, `rest`, `answers`, `steps` and
    the traits of `curves` and `token_map`. Raises FileNotFoundError or ValueError for a missing model.
    """

    _held: HeldOutRest | None = None
    _job: Future[Any] | None = None
    _chain: Future[Any] | None = None
    _stopping = False
    _sent = 0.0

    def __init__(
        self,
        model: str = "tiny-deltanet",
        text: str | None = None,
        question: str | None = None,
        *,
        prompt: Example | None = None,
        config: TTTConfig | None = None,
        rule: AnswerRule | None = None,
        adapt_on: str = "prompt",
        held_out: float = SHARE,
        worker: Worker | None = None,
        add_bos: bool | None = None,
    ) -> None:
        """Shows the initial prompt and the settings.

        `prompt`: an example in place of text and question, whose exact tokens are used until either is edited.
        `config`: initial values of the fields, and of settings without a field; none: the recipe `per_prompt`. `rule`:
        how `prompt` is answered; an edited text uses the default `AnswerRule`. `adapt_on`: `prompt`, or the `document`
        alone, if nothing is held out. `held_out`: the share of the document that is held out, from 0 (none) to 0.9.
        `add_bos`: as in `DataConfig`, for typed texts.
        """
        super().__init__()
        self.worker = worker or shared_worker()
        recipe = ttt_per_prompt().ttt
        assert recipe is not None and recipe.refine is not None
        self._initial = config or replace(recipe, steps=STEPS)
        self._refine = _refine_of(self._initial) or recipe.refine  # used if REFINE is selected
        self.exploration = Exploration(self.worker, model, add_bos=add_bos)
        self.model = model
        self.steps: list[dict[str, float]] = []
        """One entry per step, from 0 (before): `step`, `loss` and `entropy` of the adapted tokens, `rest_loss` if there is
        a remainder, and `reward` if there are rollouts."""
        self.rest: RestChange | None = None
        "The change of the loss on the held-out remainder, once known."
        self.answers: dict[str, str] = {}
        "The answers `before` and `after`, once known."
        self.curves, self.result, self._beside, self.token_map = Curves(), RestResult(), Answers(), TokenMap()
        self._prompt, self._adapt_on, self._rule = prompt, adapt_on, rule or AnswerRule()
        if prompt is not None:
            text, question = prompt.parts(self.exploration.tokenizer)
        if text is None:
            text, question, _ = sample_document()
        answer_tokens = self._rule.max_tokens
        self.fields = ttt_fields(text, question or "", self._initial, self._refine.reward, answer_tokens, held_out)
        told = "Adapt to the part of the document that is not held out"
        told += "; if nothing is held out, to the whole document and the question"
        self.buttons = {
            "start": self.button("start", told, "Adapt", "primary"),
            "stop": self.button("stop", "Stop after the current step and keep the adapted weights"),
            "reset": self.button("reset", "Restore the original weights"),
        }
        self._first = self._texts()
        _PANELS.add(self)
        self._lay_out()
        self._enable(running=False)
        self._show_weights()
        self.shown: Future[Any] = self.read() if "".join(self._first).strip() else self.after(lambda: None)
        "Completes when the first document is shown."

    # -- public methods ------------------------------------------------------------------------------------------------

    def read(self) -> Future[Any]:
        """Shows the statistics of document and question under the current weights; the future completes when it is shown.

        Raises ValueError while the panel adapts; the future raises for a text that cannot be read.
        """
        self._require_idle()

        def ask() -> Future[Any]:
            self._ids = ids = self._prompt_ids()
            return together([self.worker.submit("read", model=self.model, token_ids=ids), finished(ids)])

        def show(results: list[Any]) -> None:
            reading, ids = results
            if not self.running and ids is self._ids:
                self._show_reading(reading)
                self._show_weights()
                self.report(f"{len(self._ids):,} tokens, mean entropy {np.nanmean(reading.entropies):.4f} nats.")

        return self.after(ask, show)

    def start(self) -> Future[Any]:
        """Answers, adapts, answers again, and shows the change; the future completes at the end.

        Adaptation continues from weights that are already adapted. Invalid settings raise through the future, and
        appear in `error`. Raises ValueError if the panel is already running.
        """
        self._require_idle()
        self.steps, self.answers, self.rest = [], {}, None
        self._stopping = False
        self._beside.before = self._beside.after = ""
        self.result.show(None)
        self._enable(running=True)
        chain = self._chain = self.after(self._begin, self._adapt, self._finish, self._show_change)
        chain.add_done_callback(self._ended)
        return chain

    def stop(self) -> None:
        """Stops after the current step and keeps the adapted weights; does nothing if nothing is running.

        If this panel is not adapting, it stops the steps of another panel of the same worker.
        """
        if not self.running:
            if self.worker.stop_steps():
                self.report("Asked the other panel to stop after its current step.")
            return
        self._stopping = True
        if self._job is not None:
            self.report("Stopping after this step…")
            self.worker.stop(self._job)

    def reset(self) -> Future[Any]:
        """Restores the weights; the future returns the number of updates undone, and the status confirms the restoration.

        Raises ValueError while this panel adapts them; the future raises while another panel does.
        """
        self._require_idle()

        def show(results: list[Any]) -> int:
            undone, same = results
            state = "Original weights restored exactly" if same else "The weights differ from the original weights"
            self.report(f"{state} ({undone} update{'' if undone == 1 else 's'} undone).")
            self._show_weights_everywhere()
            return undone

        def ask() -> Future[Any]:
            return together([self.worker.submit(method, model=self.model) for method in ("reset", "as_loaded")])

        return self.after(ask, show)

    def close(self) -> None:
        _PANELS.discard(self)
        if self.running:
            self.stop()
        super().close()

    @property
    def config(self) -> TTTConfig:
        """Returns the configuration in the fields. Raises ValueError for an invalid one."""
        values = {name: field.value for name, field in self.fields.items()}
        refine = {"REFINE": replace(self._refine, reward=values["reward"]), "SFT": None}.get(
            values["method"], self._initial.refine
        )
        return replace(self._initial, refine=refine, steps=values["steps"], lr=values["lr"])

    @property
    def running(self) -> bool:
        """Returns whether part of a start is still pending."""
        return self._chain is not None and not self._chain.done()

    def save_html(self, path: Path | str, title: str = "Test-time training") -> Path:
        """Writes one offline HTML file with the result on the remainder, curves, answers and document."""
        return save_page(path, self.result, self.curves, self._beside, self.token_map, title=title)

    def __repr__(self) -> str:
        lines = [
            f"TTTPanel of {display_path(self.model)}: {self.fields['method'].value}, {max(len(self.steps) - 1, 0)} steps"
        ]
        lines += [] if self.rest is None else [f"  {self.rest.sentence}"]
        lines += [f"  {name}: {answer!r}" for name, answer in self.answers.items()]
        for row in [*self.steps[:1], *self.steps[1:][-1:]]:
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")
            lines.append(f"  step {row['step']}: {numbers}")
        return "\n".join([*lines, *self.notice.lines(), repr(self.token_map)])

    def _lay_out(self) -> None:
        names = ("method", "reward", "steps", "lr", "answer_tokens")
        settings = in_rows([self.fields[name] for name in names])
        actions = in_rows([*self.buttons.values(), self.fields["weights"]])
        texts = [self.fields[name] for name in ("document", "question", "held_out")]
        shown = [self.notice, self.result, self.curves, self._beside, self.token_map]
        self.children = [*texts, settings, actions, *shown]

    # -- requests and their results ------------------------------------------------------------------------------------

    def _texts(self) -> tuple[str, str]:
        return self.fields["document"].value, self.fields["question"].value

    def _prompt_ids(self) -> np.ndarray:
        """Returns the tokens of document and question. Raises ValueError for too few or too many."""
        if self._prompt is not None and self._texts() == self._first:
            return np.array(self._prompt.prompt_ids, dtype=np.int32)
        return self.exploration.tokens_of("".join(self._texts()))

    def _document_tokens(self, ids: np.ndarray) -> int:
        """Returns how many of the prompt's tokens are the document's; one that reaches into the question is not."""
        document, question = self._texts()
        if self._prompt is not None and (document, question) == self._first:
            return self._prompt.question_start
        if not question:
            return len(ids)
        own = self.exploration.tokens_of(document)[: len(ids)]
        same = own == ids[: len(own)]
        return len(own) if same.all() else int(same.argmin())

    def _begin(self) -> Future[Any]:
        """Requests the statistics and the answer before the first step."""
        self._config, self._ids = self.config, self._prompt_ids()
        share, self._held = self.fields["held_out"].value / 100, None
        self._adapted = len(self._ids)  # how many of the first tokens are adapted to
        if share or self._adapt_on == "document":
            self._adapted = self._document_tokens(self._ids)
        if share:
            self._held = hold_out(self._adapted, share)
            self._adapted = self._held.first
        self.report(f"Reading {len(self._ids):,} tokens…")
        return self._read_and_answer()

    def _adapt(self, results: list[Any]) -> Future[Any]:
        self._before, answer = results
        self._show_answer("before", answer)
        self._show_reading(self._before)
        self._add({"step": 0, **self._levels(self._before)})
        self._began = time.monotonic()
        self.report(f"Step 1 of {self._config.steps}…")
        parts = {"token_ids": self._ids[: self._adapted]}
        if self._held is not None:
            parts["rest"] = self._ids[self._held.first : self._held.stop]
        self._job = self.worker.submit("adapt", self._stepped, model=self.model, config=self._config, **parts)
        if self._stopping:
            self.worker.stop(self._job)
        return self._job

    def _stepped(self, step: Any) -> None:
        row = {"step": step.number, "loss": step.loss, "entropy": step.entropy}
        if step.rest_loss is not None:
            row["rest_loss"] = step.rest_loss
        if "reward_mean" in step.metrics:
            row["reward"] = step.metrics["reward_mean"]
        self._add(row)
        left = (time.monotonic() - self._began) / step.number * (self._config.steps - step.number)
        note = f" {step.note}." if step.note else ""
        if not self._stopping:
            progress = f"Step {step.number} of {self._config.steps}, {step.tokens_per_second:,.0f} tokens/s"
            self.report(f"{progress}, {left:.0f} s left.{note}")

    def _finish(self, _: Any) -> Future[Any]:
        self._draw()
        return self._read_and_answer()

    def _read_and_answer(self) -> Future[Any]:
        """Requests the model's current statistics of the prompt and its answer."""
        rule = self._rule if self._texts() == self._first else AnswerRule()
        rule = replace(rule, max_tokens=self.fields["answer_tokens"].value)
        prompt = {"model": self.model, "token_ids": self._ids}
        return together([self.worker.submit("read", **prompt), self.worker.submit("answer", **prompt, rule=rule)])

    def _show_reading(self, reading: DocumentReading) -> None:
        text = token_text(self.exploration.tokenizer, self._ids)
        self.token_map.show(text, [entropy_metric(reading), loss_metric(reading)])

    def _show_change(self, results: list[Any]) -> None:
        after, answer = results
        self._show_answer("after", answer)
        levels = [entropy_metric(self._before, "before"), entropy_metric(after, "after")]
        changes, held = change_metrics(self._before, after), self._held
        if held is not None:
            losses = (held.rest(reading.losses[1:]) for reading in (self._before, after))
            self.rest = rest_change(*losses, seed=self._config.seed)
            changes.insert(0, rest_metric(self._before, after, held))
        self.result.show(self.rest)
        text = token_text(self.exploration.tokenizer, self._ids)
        self.token_map.show(text, [*changes, *levels])
        if held is not None:
            self.token_map.view = held.first
        steps = len(self.steps) - 1
        end = " (stopped)" if self._stopping else " (stopping criterion reached)" if steps < self._config.steps else ""
        first, last = self._levels(self._before), self._levels(after)
        told = ", ".join(f"{name} {first[name]:.3f} → {last[name]:.3f}" for name in ("loss", "entropy"))
        unit = "nats per token" if held is None else "nats per token of the adapted part"
        self.report(f"After {steps} step{'s' if steps != 1 else ''}{end}: {told} ({unit}).")

    def _levels(self, reading: DocumentReading) -> dict[str, float]:
        """Returns the means of a reading that a step reports."""
        losses, entropies = reading.losses[1:], reading.entropies[1:]
        levels = {"loss": losses[: self._adapted - 1].mean(), "entropy": entropies[: self._adapted - 1].mean()}
        if self._held is not None:
            levels["rest_loss"] = self._held.rest(losses).mean()
        return {name: float(value) for name, value in levels.items()}

    def _show_answer(self, when: str, text: str) -> None:
        self.answers[when] = text
        self._beside.set_trait(when, replace_surrogates(text))

    def _add(self, row: dict[str, float]) -> None:
        self.steps.append(row)
        if len(self.steps) <= 2 or time.monotonic() - self._sent >= INTERVAL:
            self._draw()

    def _draw(self) -> None:
        """Sends the curves."""
        self._sent = time.monotonic()
        self.curves.curves = ttt_curves(self.steps, self._config.refine.method if self._config.refine else "sft")

    # -- state of the weights and buttons ------------------------------------------------------------------------------

    def _require_idle(self) -> None:
        if self.running:
            raise ValueError("this panel is already adapting: press Stop first")

    def _ended(self, chain: Future[Any]) -> None:
        if chain.exception() is None:
            self.error = ""  # of a request that was refused during adaptation
        self._enable(running=False)
        self._show_weights_everywhere()

    def _show_weights_everywhere(self) -> None:
        """Updates the weights' status in every panel of the same model and worker."""
        for panel in [*_PANELS]:
            if (panel.worker, panel.model) == (self.worker, self.model):
                panel._show_weights()

    def _show_weights(self) -> None:
        """Shows the number of updates that the worker reports."""

        def show(future: Future[Any]) -> None:
            weights = {"updates": 0, "adapting": False} if future.exception() else future.result()
            updates = weights["updates"]
            if not self.running:
                self.buttons["stop"].disabled = not weights["adapting"]
            adapted = f"Adapted ({updates} update{'' if updates == 1 else 's'}). Reset restores the original weights."
            self.fields["weights"].value = adapted if updates else "Original weights."

        self.worker.submit("open", model=self.model).add_done_callback(show)

    def _enable(self, *, running: bool) -> None:
        self.buttons["stop"].disabled = not running
        for name in ("start", "reset"):
            self.buttons[name].disabled = running


def _refine_of(config: TTTConfig) -> RefineConfig | None:
    """Returns the settings of REFINE in a configuration; None if its method is another."""
    refine = config.refine
    return refine if refine is not None and refine.method in ("refine", "refine_memory") else None
