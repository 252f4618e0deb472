"""The TTT panel: adapts a model to a document, shows each step, can be stopped and reset, and compares the answers."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from refine_lab.config import BUILT_IN_REWARDS
from refine_lab.data.tasks.prompts import Example
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.data.text import replace_surrogates
from refine_lab.explore.client import Worker, shared_worker
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.futures import finished, together
from refine_lab.explore.reading import DocumentReading
from refine_lab.explore.sample import sample_document
from refine_lab.recipes import ttt_per_prompt
from refine_lab.runs.environment import shown
from refine_lab.ttt_config import TTTConfig
from widgets.core.base import guarded
from widgets.core.page import save_page
from widgets.core.panel import Panel
from widgets.figures.series import decimate, method_styles
from widgets.parts.answers import Answers
from widgets.parts.controls import button, in_rows, ttt_fields
from widgets.parts.document_metrics import change_metrics, entropy_metric, loss_metric
from widgets.parts.live_curves import Curves
from widgets.token_map import TokenMap, token_text

CURVES = (
    ("loss", "NTP loss of the prompt", "nats per token"),
    ("entropy", "Mean entropy of the prompt", "nats per token"),
)
"""Curves with a value before the first step and after each: key, title, unit."""
INTERVAL = 0.25
"""Minimum number of seconds between two updates of the curves."""
STEPS = 20
"""Default number of steps, more than in the recipe, so that progress can be watched."""
_PANELS: WeakSet[TTTPanel] = WeakSet()
"""All panels, since several may update the weights of one model."""


class TTTPanel(Panel):
    """Adapts to a document and its question by REFINE or SFT, and shows loss, reward and entropy per step, and both answers.

    The weights stay adapted after a stop or the last step, until `reset` restores them bit for bit. Everything works
    without a page: `start`, `stop`, `reset`, `answers`, `steps` and the traits of `curves` and `token_map`. Raises
    FileNotFoundError or ValueError for a missing model.
    """

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
        worker: Worker | None = None,
        add_bos: bool | None = None,
    ) -> None:
        """Shows the initial prompt and the settings.

        `prompt`: an example in place of text and question, whose exact tokens are used until either is edited.
        `config`: initial values of the fields, and of settings without a field; none: the recipe `per_prompt`. `rule`:
        how `prompt` is answered; an edited text uses the default `AnswerRule`. `adapt_on`: `prompt`, or the `document`
        alone. `add_bos`: as in `DataConfig`, for typed texts.
        """
        super().__init__()
        self.worker = worker or shared_worker()
        recipe = ttt_per_prompt().ttt
        assert recipe is not None and recipe.refine is not None
        self._given = config or replace(recipe, steps=STEPS)
        self._method = self._given.refine or recipe.refine  # where REFINE is chosen
        self.exploration = Exploration(self.worker, model, add_bos=add_bos)
        self.model = model
        self.steps: list[dict[str, float]] = []
        "One entry per step, from 0 (before): `step`, `loss`, `entropy`, and `reward` if there are rollouts."
        self.answers: dict[str, str] = {}
        "The answers `before` and `after`, once given."
        self._job: Future[Any] | None = None
        self._chain: Future[Any] | None = None
        self._stopping = False
        self._sent = 0.0
        self.curves, self._beside, self.token_map = Curves(), Answers(), TokenMap()
        self._prompt, self._adapt_on, self._rule = prompt, adapt_on, rule or AnswerRule()
        if prompt is not None:
            text, question = prompt.parts(self.exploration.tokenizer)
        begin = sample_document(self.exploration.tokenizer)
        self.fields = ttt_fields(
            *((begin.document, begin.question) if text is None else (text, question or "")), self._method.reward,
            [*BUILT_IN_REWARDS], refine=self._given.refine is not None, steps=self._given.steps, lr=self._given.lr,
            tokens=self._rule.max_tokens,
        )  # fmt: skip
        self._first = self._texts()
        _PANELS.add(self)
        self.children = self._laid_out()
        self._show_answers()
        self._enable(running=False)
        self._show_weights()
        given = text is None or bool((text + (question or "")).strip())
        self.shown: Future[Any] = self.read() if given else self.after(lambda: None)
        "Completes when the first document is shown."

    # -- what can be done, with a page or without ---------------------------------------------------------------------

    def read(self) -> Future[Any]:
        """Shows the reading of document and question under the current weights; the future completes when it is shown.

        Raises ValueError while the panel adapts; the future raises for a text that cannot be read.
        """
        self._require_idle()

        def ask() -> Future[Any]:
            self._ids = ids = self._tokens()[0]
            asked = self.worker.submit("read", model=self.model, token_ids=ids)
            return together([asked, finished(ids)])

        def show(known: list[Any]) -> None:
            reading, ids = known
            if not self.running and ids is self._ids:
                self._show_reading(reading)
                self._show_weights()
                self.say(f"{len(self._ids):,} tokens, mean entropy {np.nanmean(reading.entropies):.4f} nats.")

        return self.after(ask, show)

    def start(self) -> Future[Any]:
        """Answers, adapts, answers again, and shows the change; the future completes at the end.

        Adaptation continues from weights that are already adapted. Invalid settings raise through the future, and
        appear in `error`. Raises ValueError if the panel is already running.
        """
        self._require_idle()
        self.steps, self.answers = [], {}
        self._stopping = False
        self._show_answers()
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
                self.say("Asked the other panel to stop after its step.")
            return
        self._stopping = True
        if self._job is not None:
            self.say("Stopping after this step…")
            self.worker.stop(self._job)

    def reset(self) -> Future[Any]:
        """Restores the weights; the future returns the number of updates undone, and the status confirms the restoration.

        Raises ValueError while this panel adapts them; the future raises while another panel does.
        """
        self._require_idle()

        def told(done: list[Any]) -> int:
            undone, same = done
            state = "Original weights restored exactly" if same else "The weights differ from the original weights"
            self.say(f"{state} ({undone} update{'' if undone == 1 else 's'} undone).")
            self._weights_moved()
            return undone

        def ask() -> Future[Any]:
            return together([self.worker.submit(method, model=self.model) for method in ("reset", "as_loaded")])

        return self.after(ask, told)

    def close(self) -> None:
        _PANELS.discard(self)
        if self.running:
            self.stop()
        super().close()

    @property
    def config(self) -> TTTConfig:
        """Returns the configuration in the fields. Raises ValueError for an invalid one."""
        fields = {name: field.value for name, field in self.fields.items()}
        refine = replace(self._method, reward=fields["reward"]) if fields["method"] == "REFINE" else None
        return replace(self._given, refine=refine, steps=fields["steps"], lr=fields["lr"])

    @property
    def running(self) -> bool:
        """Returns whether part of a start is still pending."""
        return self._chain is not None and not self._chain.done()

    def save_html(self, path: Path | str, title: str = "Test-time training") -> Path:
        """Writes one offline HTML file with curves, answers and document."""
        return save_page(path, self.curves, self._beside, self.token_map, title=title)

    def __repr__(self) -> str:
        lines = [f"TTTPanel of {shown(self.model)}: {self.fields['method'].value}, {max(len(self.steps) - 1, 0)} steps"]
        lines += [f"  {name}: {answer!r}" for name, answer in self.answers.items()]
        for row in self.steps[:1] + self.steps[-1:] if len(self.steps) > 1 else self.steps:
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")
            lines.append(f"  step {row['step']}: {numbers}")
        return "\n".join([*lines, *self.told(), repr(self.token_map)])

    # -- what happens then --------------------------------------------------------------------------------------------

    def _texts(self) -> tuple[str, str]:
        return self.fields["document"].value, self.fields["question"].value

    def _tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the prompt's tokens, and those to adapt to. Raises ValueError for too few or too many."""
        document, question = self._texts()
        if self._prompt is not None and (document, question) == self._first:
            ids, start = np.array(self._prompt.prompt_ids, dtype=np.int32), self._prompt.question_start
            return ids, ids[: start if self._adapt_on == "document" else None]
        ids = self.exploration.tokens_of(document + question)
        return ids, self.exploration.tokens_of(document) if self._adapt_on == "document" else ids

    def _begin(self) -> Future[Any]:
        """Requests the reading and the answer before the first step."""
        self._config = self.config
        self._ids, self._moving_ids = self._tokens()
        self.say(f"Reading {len(self._ids):,} tokens…")
        return together(self._look())

    def _adapt(self, known: list[Any]) -> Future[Any]:
        self._before, answer = known
        self._answered("before", answer)
        self._show_reading(self._before)
        self._add({"step": 0, **_means(self._before)})
        self._began = time.monotonic()
        arguments = {"token_ids": self._moving_ids, "config": self._config}
        self.say(f"Step 1 of {self._config.steps}…")
        self._job = self.worker.submit("adapt", self._stepped, model=self.model, **arguments)
        if self._stopping:
            self.worker.stop(self._job)
        return self._job

    def _stepped(self, step: Any) -> None:
        row = {"step": step.number, "loss": step.loss, "entropy": step.entropy}
        if "reward_mean" in step.metrics:
            row["reward"] = step.metrics["reward_mean"]
        self._add(row)
        left = (time.monotonic() - self._began) / step.number * (self._config.steps - step.number)
        note = f" {step.note}." if step.note else ""
        if not self._stopping:
            self.say(
                f"Step {step.number} of {self._config.steps}, {step.tokens_per_second:,.0f} tokens/s, {left:.0f} s left.{note}"
            )

    def _finish(self, _: Any) -> Future[Any]:
        self._draw()
        return together(self._look())

    def _look(self) -> list[Future[Any]]:
        """Requests the model's current reading of the prompt and its answer."""
        rule = self._rule if self._texts() == self._first else AnswerRule()
        rule = replace(rule, max_tokens=self.fields["answer_tokens"].value)
        return [
            self.worker.submit("read", model=self.model, token_ids=self._ids),
            self.worker.submit("answer", model=self.model, token_ids=self._ids, rule=rule),
        ]

    def _show_reading(self, reading: DocumentReading) -> None:
        text = token_text(self.exploration.tokenizer, self._ids)
        self.token_map.show(text, [entropy_metric(reading), loss_metric(reading)])

    def _show_change(self, known: list[Any]) -> None:
        after, answer = known
        self._answered("after", answer)
        levels = [entropy_metric(self._before, "before"), entropy_metric(after, "after")]
        text = token_text(self.exploration.tokenizer, self._ids)
        self.token_map.show(text, [*change_metrics(self._before, after), *levels])
        made = len(self.steps) - 1
        ended = " (stopped)" if self._stopping else " (stopping criterion reached)" if made < self._config.steps else ""
        loss, entropy = (
            f"{name} {before[name]:.3f} → {now[name]:.3f}"
            for before, now in [(_means(self._before), _means(after))]
            for name in ("loss", "entropy")
        )
        self.say(f"After {made} step{'s' if made != 1 else ''}{ended}: {loss}, {entropy} (nats per token).")

    def _answered(self, when: str, text: str) -> None:
        self.answers[when] = text
        self._show_answers()

    def _show_answers(self) -> None:
        for when in ("before", "after"):
            self._beside.set_trait(when, replace_surrogates(self.answers.get(when, "")))

    def _add(self, row: dict[str, float]) -> None:
        self.steps.append(row)
        if len(self.steps) > 2 and time.monotonic() - self._sent < INTERVAL:
            return  # the page need not know every step of a quick model
        self._draw()

    def _draw(self) -> None:
        """Sends the curves, thinned by `decimate`."""
        self._sent = time.monotonic()
        method = "refine" if self._config.refine else "sft"
        style = method_styles([method])[method]
        panels = []
        for key, title, unit in (*CURVES, ("reward", "Mean reward of the step's rollouts", "mean")):
            found = [(each["step"], each[key]) for each in self.steps if key in each]
            if found:
                points = np.array(found, dtype="<f4")
                x, y = points[decimate(points[:, 1])].T
                lines = [{"method": method, "seed": 0, "x": x.tobytes(), "y": y.tobytes()}]
                panels.append({"name": key, "title": title, "unit": unit, "marks": True, "lines": lines})
        methods = [
            {"method": method, "label": style.label, "symbol": style.symbol, "look": 2 if method == "refine" else 1}
        ]
        self.curves.curves = {"methods": methods, "panels": panels}

    # -- the page -----------------------------------------------------------------------------------------------------

    def _require_idle(self) -> None:
        if self.running:
            raise ValueError("this panel is already adapting: press Stop first")

    def _ended(self, chain: Future[Any]) -> None:
        if chain.exception() is None:
            self.error = ""  # of what was refused meanwhile
        self._enable(running=False)
        self._weights_moved()

    def _weights_moved(self) -> None:
        """Updates the weights' status in every panel of the same model and worker."""
        for panel in [*_PANELS]:
            if (panel.worker, panel.model) == (self.worker, self.model):
                panel._show_weights()

    def _show_weights(self) -> None:
        """Shows the number of updates that the worker reports."""

        def told(future: Future[Any]) -> None:
            known = {"updates": 0, "adapting": False} if future.exception() else future.result()
            updates = known["updates"]
            if not self.running:
                self.buttons["stop"].disabled = not known["adapting"]
            adapted = f"Adapted ({updates} update{'' if updates == 1 else 's'}). Reset restores the original weights."
            self.fields["weights"].value = adapted if updates else "Original weights."

        self.worker.submit("open", model=self.model).add_done_callback(told)

    @guarded
    def _pressed(self, name: str) -> None:
        getattr(self, name)()

    def _enable(self, *, running: bool) -> None:
        self.buttons["stop"].disabled = not running
        for name in ("start", "reset"):
            self.buttons[name].disabled = running

    def _laid_out(self) -> list[Any]:
        self.buttons = {
            "start": button(
                "Adapt", partial(self._pressed, "start"), "Adapt to the document and the question", "primary"
            ),
            "stop": button(
                "Stop", partial(self._pressed, "stop"), "Stop after the current step and keep the adapted weights"
            ),
            "reset": button("Reset", partial(self._pressed, "reset"), "Restore the original weights"),
        }
        settings = in_rows([self.fields[name] for name in ("method", "reward", "steps", "lr", "answer_tokens")])
        actions = in_rows([*self.buttons.values(), self.fields["weights"]])
        texts = [self.fields["document"], self.fields["question"]]
        return [*texts, settings, actions, self.notice, self.curves, self._beside, self.token_map]


def _means(reading: Any) -> dict[str, float]:
    return {"loss": float(np.nanmean(reading.losses)), "entropy": float(np.nanmean(reading.entropies))}
