"""Adapts the model of the TTT panel with one method or several, each from the same prompt, and shows what they change."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from refine_lab.explore.adapted import MOST_KEPT, MeasuredPrompt
from refine_lab.explore.client import Worker
from refine_lab.explore.exploration import Exploration
from refine_lab.explore.futures import RequestCancelled, ending
from refine_lab.explore.reading import DocumentReading
from refine_lab.statistics.rest_change import RestChange
from refine_lab.ttt_config import TTTConfig
from widgets.core.panel import Panel
from widgets.parts.answers import Answers
from widgets.parts.document_metrics import entropy_metric, loss_metric
from widgets.parts.live_curves import Curves
from widgets.parts.rest_result import RestResult
from widgets.parts.token_text import token_text
from widgets.parts.ttt_curves import ttt_curves
from widgets.parts.ttt_prompt import PanelPrompt, PromptFields
from widgets.parts.ttt_results import (
    Adaptation,
    answer_rows,
    differences,
    end_sentence,
    in_turn,
    method_name,
    token_metrics,
)

INTERVAL = 0.25
"""Minimum number of seconds between two updates of the curves."""
Weights = Literal["original", "adapted"]
"""The weights that an adaptation begins with."""
ORIGINAL = {"updates": 0, "methods": [], "adapting": False, "kept": []}
"""State of weights that have not been adapted, as in the result of `Session.open`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Asked:
    """What is to be adapted and how, as the fields had it when the button was pressed; later edits change nothing of it."""

    prompt: PanelPrompt
    configs: Mapping[str, TTTConfig]
    "The configuration of each method, by its label."
    settings: Mapping[str, Any]
    "The values of the fields by name."


class AdaptingPanel(Panel):
    """A panel that adapts a model to a prompt, with the views of what that changes; subclasses have its fields and buttons.

    "Before" always means the original weights, also when an adaptation continues from adapted ones.
    """

    _job: Future[Any] | None = None
    _before_steps: Future[Any] | None = None
    "The request that precedes the first step."
    _chain: Future[Any] | None = None
    _current: Adaptation | None = None
    _stopping = False
    _sent = 0.0
    _asked: Asked
    _prompt_fields: PromptFields
    token_map: Any
    "The document as coloured text, a `TokenMap` that the subclass creates."

    def __init__(self, model: str, worker: Worker, add_bos: bool | None) -> None:
        super().__init__()
        self.model, self.worker = model, worker
        self.exploration = Exploration(worker, model, add_bos=add_bos)
        self.prompt: PanelPrompt | None = None
        "The prompt of the last adaptation."
        self.before: MeasuredPrompt | None = None
        "How the original weights read and answer this prompt."
        self.results: dict[str, Adaptation] = {}
        "The last adaptation, or those of the last comparison, by method as the panel calls it."
        self.settings: Mapping[str, Any] = {}
        "The values that the fields had for `results`, by the fields' names; empty before the first adaptation."
        self.curves, self.result, self._beside = Curves(), RestResult(), Answers()

    @property
    def running(self) -> bool:
        """Returns whether part of a start is still pending."""
        return self._chain is not None and not self._chain.done()

    @property
    def steps(self) -> list[dict[str, float]]:
        """Returns the steps of the last method (see `Adaptation`); empty before the first adaptation."""
        return [*self.results.values()][-1].steps if self.results else []

    @property
    def rest(self) -> RestChange | None:
        """Returns the change of the loss on the remainder with the last method, once known."""
        return [*self.results.values()][-1].rest if self.results else None

    @property
    def answers(self) -> dict[str, str]:
        """Returns the answer `before` adaptation, and the one after each method by the method, once known."""
        after = {label: each.after.answer for label, each in self.results.items() if each.after is not None}
        return {} if self.before is None else {"before": self.before.answer} | after

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def _config_of(self, method: str) -> TTTConfig:
        """Returns the configuration of a method that the panel offers. Raises ValueError for an invalid one."""
        raise NotImplementedError

    def _settings_of(self, methods: Sequence[str]) -> dict[str, Any]:
        """Returns the values of the fields that an adaptation with these methods depends on, by name."""
        raise NotImplementedError

    def _show_stale(self) -> None:
        """Marks what is shown as stale while the fields differ from `settings`."""
        raise NotImplementedError

    def _enable(self, *, running: bool) -> None:
        """Enables the buttons that can be pressed while the panel adapts, or while it does not."""
        raise NotImplementedError

    def _show_weights_everywhere(self) -> None:
        """Shows how often the weights have been updated, in every panel of the model."""
        raise NotImplementedError

    # -- requests and their results ------------------------------------------------------------------------------------

    def _require_idle(self) -> None:
        if self.running:
            raise ValueError("this panel is already adapting: press Stop first")

    def _ask(self, methods: Sequence[str]) -> Asked:
        """Returns the adaptation that the fields describe. Raises ValueError for invalid settings."""
        configs = {method: self._config_of(method) for method in methods}
        return Asked(prompt=self._prompt_fields.prompt(), configs=configs, settings=self._settings_of(methods))

    def _run(self, methods: Sequence[str], weights: Weights | None, asked: Asked | None = None) -> Future[Any]:
        """Adapts with each method; `asked`: what to adapt to, read from the fields already."""
        self._require_idle()
        self._stopping, self._current, self._job, self._before_steps = False, None, None, None
        self._enable(running=True)
        ends = (self._measure, self._keep, self._keep_weights, self._weights_kept)
        each = [(partial(self._adapt, method, weights), *ends) for method in methods]

        def begin() -> Future[Any]:
            self._asked = asked or self._ask(methods)
            return self._submit_before("open")

        chain = self._chain = self.after(
            begin,
            partial(self._begin, weights),
            self._show_before,
            *(step for steps in each for step in steps),
            self._show_end,
        )
        return ending(chain, self._ended)

    def _submit_before(self, method: str, **arguments: Any) -> Future[Any]:
        """Requests what precedes the first step, which a stop cancels."""
        asked = self._before_steps = self.worker.submit(method, model=self.model, **arguments)
        if self._stopping:
            self.worker.cancel(asked)
        return asked

    def _unless_stopped(self) -> None:
        """Ends the requests if they are stopped before anything is shown or changed."""
        if self._stopping:
            self.report("Stopped before the first step: the weights and what is shown have not changed.")
            raise RequestCancelled

    def _begin(self, weights: Weights | None, now: dict[str, Any]) -> Future[Any]:
        """Requests the statistics and the answer of the original weights."""
        self._unless_stopped()
        if weights is None and now["updates"]:
            raise ValueError(
                f"the weights are already adapted {how_adapted(now)}: start('adapted') continues from them, and "
                "start('original') starts over"
            )
        prompt, self._updates, self._methods = self._asked.prompt, now["updates"], now["methods"]
        same = weights == "adapted" and prompt.same(self.prompt) and len(self.results) > 0
        self._earlier = self.steps if same and self.steps[-1]["step"] == now["updates"] else []
        self._report_unless_stopping(f"Reading {len(prompt.ids):,} tokens…")
        return self._submit_before("measure", weights="original", **_measurement(prompt))

    def _show_before(self, before: MeasuredPrompt | None) -> None:
        """Shows the original weights' answer in place of the earlier results."""
        self._unless_stopped()
        assert before is not None
        self.prompt = prompt = self._asked.prompt
        self.before, self.results, self.settings = before, {}, self._asked.settings
        self._ids = prompt.ids
        self.result.show({})
        self._beside.rows = answer_rows(prompt, before, [])
        self._show_reading(before.reading)
        self._show_stale()

    def _adapt(self, method: str, weights: Weights | None, _: Any) -> Future[Any] | None:
        if self._stopping:
            self._current = None
            return None
        assert self.prompt is not None and self.before is not None
        config, before = self._asked.configs[method], self._updates if weights == "adapted" else 0
        name = method_name(config)
        self._current = each = Adaptation(
            label=in_turn([*self._methods, name]) if before else method,
            method=name,
            config=config,
            steps=[*self._earlier] or [{"step": 0, **self.prompt.levels(self.before.reading)}],
            before=before,
        )
        self.results[each.label] = each
        self._began = time.monotonic()
        self._draw()
        self._report_unless_stopping(f"{each.label}, step 1 of {config.steps}…")
        asked = {"model": self.model, "config": config, "weights": weights or "original", **self.prompt.parts}
        self._job = self.worker.submit("adapt", partial(self._stepped, each), **asked)
        if self._stopping:
            self.worker.stop(self._job)
        return self._job

    def _stepped(self, each: Adaptation, step: Any) -> None:
        row = {"step": each.before + step.number, "loss": step.loss, "entropy": step.entropy}
        if step.rest_loss is not None:
            row["rest_loss"] = step.rest_loss
        if "reward_mean" in step.metrics:
            row["reward"] = step.metrics["reward_mean"]
        each.steps.append(row)
        each.made, steps = step.number, each.config.steps
        if step.number <= 1 or time.monotonic() - self._sent >= INTERVAL:
            self._draw()
        left = (time.monotonic() - self._began) / step.number * (steps - step.number)
        note = f" {step.note}." if step.note else ""
        method = f"{each.label}, step" if len(self.results) > 1 else "Step"
        progress = f"{method} {step.number} of {steps}, {step.tokens_per_second:,.0f} tokens/s"
        self._report_unless_stopping(f"{progress}, {left:.0f} s left.{note}")

    def _measure(self, _: Any) -> Future[Any] | None:
        each = self._current
        if each is not None and not each.made:  # stopped before its first step: the weights are not its own
            del self.results[each.label]
            self._current = None
        self._draw()
        if self._current is None:
            return None
        return self.worker.submit("measure", model=self.model, weights="adapted", **_measurement(self._asked.prompt))

    def _keep(self, after: MeasuredPrompt | None) -> None:
        if self._current is not None and after is not None:
            assert self.prompt is not None and self.before is not None
            self._current.finish(self.prompt, self.before, after)
            self._beside.rows = answer_rows(self.prompt, self.before, [*self.results.values()])

    def _keep_weights(self, _: Any) -> Future[Any] | None:
        """Keeps a copy of the weights of each compared method, so that any of them can be saved afterwards."""
        if self._current is None or len(self._asked.configs) < 2:
            return None
        first = len(self.results) == 1
        return self.worker.submit("keep", model=self.model, name=self._current.label, first=first)

    def _weights_kept(self, kept: bool | None) -> None:
        if self._current is not None:
            self._current.kept = kept

    def _show_end(self, _: Any) -> None:
        assert self.prompt is not None and self.before is not None
        prompt, done = self.prompt, [each for each in self.results.values() if each.after is not None]
        changes = {each.label: each.rest for each in done if each.rest is not None}
        self.result.show(changes, differences(prompt, done), {each.label: each.method for each in done})
        text = token_text(self.exploration.tokenizer, prompt.ids)
        self.token_map.show(text, token_metrics(prompt, self.before, done))
        if prompt.held is not None:
            self.token_map.view = prompt.held.first
        if done:
            stopped = self._stopping and (len(done) < len(self._asked.configs) or done[-1].made < done[-1].config.steps)
            self.report(end_sentence(prompt, self.before, done, stopped))
        else:
            self.report("Stopped before the first step: the weights have not changed.")

    def _show_reading(self, reading: DocumentReading) -> None:
        text = token_text(self.exploration.tokenizer, reading.token_ids)
        self.token_map.show(text, [entropy_metric(reading), loss_metric(reading)])

    def _report_unless_stopping(self, progress: str) -> None:
        if not self._stopping:
            self.report(progress)

    def _draw(self) -> None:
        """Sends the curves."""
        self._sent = time.monotonic()
        self.curves.curves = ttt_curves([*self.results.values()])

    def _ended(self, chain: Future[Any]) -> None:
        if chain.exception() is None:
            self.error = ""  # of a request that was refused during adaptation
        self._enable(running=False)
        self._show_weights_everywhere()


def _measurement(prompt: PanelPrompt) -> dict[str, Any]:
    """Returns the arguments of `Session.measure` for a prompt."""
    return {"token_ids": prompt.ids, "rule": prompt.rule, "reference_ids": prompt.reference_ids}


def how_adapted(weights: dict[str, Any]) -> str:
    """Returns the methods and the number of updates of adapted weights; `weights` is the result of `Session.open`."""
    updates = weights["updates"]
    return f"with {in_turn(weights['methods'])} ({updates} update{'' if updates == 1 else 's'})"


def weights_sentence(weights: dict[str, Any], results: Mapping[str, Adaptation]) -> str:
    """Returns which weights a model has, and which of the compared ones were not kept for saving."""
    if not weights["updates"]:
        return "Original weights."
    sentence = f"Adapted {how_adapted(weights)}. Reset restores the original weights."
    lost = [label for label, each in results.items() if each.kept is False]
    large = f"{MOST_KEPT / 2**30:.0f} GiB"
    return f"{sentence} No copy of {' and '.join(lost)} is kept: all would exceed {large}." if lost else sentence
