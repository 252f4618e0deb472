"""The TTT panel: adapts a model to the first part of a document, and shows what each method gains on the held-out remainder."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import traitlets

from refine_lab.data.sample import sample_document
from refine_lab.data.tasks.prompts import Example
from refine_lab.data.tasks.rules import AnswerRule
from refine_lab.explore.client import Worker, shared_worker
from refine_lab.explore.futures import finished, together
from refine_lab.recipes import ttt_per_prompt
from refine_lab.runs.environment import display_path
from refine_lab.training.held_out_rest import SHARE
from refine_lab.ttt_config import TTTConfig
from refine_lab.validation import require
from widgets.core.page import save_page
from widgets.figures.tables import Table
from widgets.memory_links import memory_of_ttt
from widgets.memory_view import MemoryView
from widgets.parts.controls import in_rows, method_boxes, show_kept, ttt_fields
from widgets.parts.number_field import show_refusals
from widgets.parts.page_about import field_values, fields_about
from widgets.parts.rest_result import sentence
from widgets.parts.text_tables import TextTables
from widgets.parts.ttt_adapting import ORIGINAL, AdaptingPanel, Asked, Weights, how_adapted, weights_sentence
from widgets.parts.ttt_prompt import BETWEEN, PromptFields, refine_of
from widgets.token_map import TokenMap

STEPS = 20
"""Default number of steps, more than in the recipe, so that progress can be watched."""
_PANELS: WeakSet[TTTPanel] = WeakSet()
"""All panels, since several may update the weights of one model."""


class TTTPanel(AdaptingPanel):
    """Adapts to the first part of a document with one method or several; shows the loss on its held-out remainder, and answers.

    The remainder is the last part of the document before the question. Nothing is adapted to it, and its loss is that of
    one forward pass over the document from its beginning. "Before" always means the original weights. The weights stay
    adapted after a stop or the last step, until `reset` restores them bit for bit. Everything works without a page:
    `start`, `compare`, `stop`, `reset`, `save_weights`, `results`, `steps`, `rest`, `answers` and the traits of `curves` and
    `token_map`. Raises FileNotFoundError or ValueError for a missing model.
    """

    weights_seen = traitlets.Int(0)
    "How often the panel has asked which weights the model has; it changes after every adaptation and reset."

    def __init__(
        self,
        model: str = "tiny-deltanet",
        text: str | None = None,
        question: str | None = None,
        *,
        prompt: Example | None = None,
        reference: str = "",
        config: TTTConfig | None = None,
        rule: AnswerRule | None = None,
        adapt_on: str = "prompt",
        held_out: float = SHARE,
        worker: Worker | None = None,
        add_bos: bool | None = None,
    ) -> None:
        """Shows the initial prompt and the settings.

        `prompt`: an example in place of text and question, whose exact tokens are used until either is edited; its answers
        are the reference. `reference`: the reference answer to another question; several are separated by " | ".
        `config`: initial values of the fields, and of settings without a field; none: the recipe `per_prompt`. `rule`:
        how `prompt` is answered; an edited text uses the default `AnswerRule`. `adapt_on`: `prompt`, or the `document`
        alone, if nothing is held out. `held_out`: the share of the document that is held out, from 0 (none) to 0.9.
        `add_bos`: as in `DataConfig`, for typed texts.
        """
        super().__init__(model, worker or shared_worker(), add_bos)
        self.token_map = TokenMap()
        recipe = ttt_per_prompt().ttt
        assert recipe is not None and recipe.refine is not None
        self._initial = config or replace(recipe, steps=STEPS)
        self._refine = refine_of(self._initial) or recipe.refine  # used if REFINE is selected
        if prompt is not None:
            (text, question), reference = prompt.parts(self.exploration.tokenizer), BETWEEN.join(prompt.answers)
        if text is None:
            text, question, reference = sample_document()
        rule = rule or AnswerRule()
        texts = text, question or "", reference.strip()
        self.fields = ttt_fields(texts, self._initial, self._refine.reward, rule.max_tokens, held_out)
        self.compared = method_boxes(self.fields["method"].options)
        self._prompt_fields = PromptFields(self.fields, self.exploration, prompt, rule, adapt_on)
        show_refusals(self, self.fields.values())
        self.add_class("ttt")
        for field in self.fields.values():
            field.observe(lambda _: self._show_stale(), "value")
        _PANELS.add(self)
        self._adapted = False
        self.worker.death_observers.add(_after_death)
        self._lay_out()
        self._enable(running=False)
        self._show_weights()
        self.shown: Future[Any] = self.read() if "".join(texts[:2]).strip() else self.after(lambda: None)
        "Completes when the first document is shown."

    # -- public methods ------------------------------------------------------------------------------------------------

    def read(self) -> Future[Any]:
        """Shows the statistics of document and question under the current weights; the future completes when it is shown.

        Raises ValueError while the panel adapts; the future raises for a text that cannot be read.
        """
        self._require_idle()

        def ask() -> Future[Any]:
            self._ids = ids = self._prompt_fields.ids()
            return together([self.worker.submit("read", model=self.model, token_ids=ids), finished(ids)])

        def show(results: list[Any]) -> None:
            reading, ids = results
            if not self.running and ids is self._ids:
                self._show_reading(reading)
                self._show_weights()
                self.report(f"{len(self._ids):,} tokens, mean entropy {np.nanmean(reading.entropies):.4f} nats.")

        return self.after(ask, show)

    def ask(self) -> Future[Any]:
        """Adapts as `start`, unless the weights are adapted already: then buttons ask whether to continue or to start over."""
        self._require_idle()

        method = self.fields["method"].value
        asked: list[Asked] = []  # at the press of the button

        def decide(weights: dict[str, Any]) -> Future[Any] | None:
            if not weights["updates"]:
                self._withdraw_question()
                return self._run([method], None, *asked)
            self.question.layout.display = "flex"
            how = how_adapted(weights)
            self.report(
                f"The weights are already adapted {how}. Continue from them, or start over from the original weights?"
            )
            return None

        def now() -> Future[Any]:
            asked.append(self._ask([method]))
            return self.worker.submit("open", model=self.model)

        return self.after(now, decide)

    def start(self, weights: Weights | None = None) -> Future[Any]:
        """Answers, adapts, answers again, and shows the change; the future completes at the end.

        `weights`: `original` restores the original weights first, `adapted` continues from the current ones. Without it,
        the future raises ValueError if the weights are adapted already. Invalid settings raise through the future, and
        appear in `error`. Raises ValueError if the panel is already running.
        """
        return self._begin_run([self.fields["method"].value], weights)

    def compare(self, methods: Sequence[str] | None = None) -> Future[Any]:
        """Adapts with each method in turn, each from the original weights, and shows their results together.

        `methods`: two or more of those that the panel offers, such as `["SFT", "REFINE"]`; none: those that are ticked.
        Steps and learning rate are the same for all. The weights are then those of the last method; a copy of each method's
        is kept until `reset` or the next comparison, and `save_weights` saves any of them. The future completes at the
        end; it raises for invalid settings. Raises ValueError for other methods, and if the panel is running.
        """
        self._require_idle()
        ticked = [label for label, box in self.compared.items() if box.value]
        chosen = ticked if methods is None else [*dict.fromkeys(methods)]
        allowed = f"two or more of {', '.join(self.compared)}"
        require(len(chosen) > 1 and {*chosen} <= {*self.compared}, "the methods to compare", chosen, allowed)
        return self._begin_run(chosen, "original")

    def continue_adapted(self) -> Future[Any]:
        """Continues from the adapted weights, as an answer to the question of `ask`."""
        return self.start("adapted")

    def start_over(self) -> Future[Any]:
        """Starts over from the original weights, as an answer to the question of `ask`."""
        return self.start("original")

    def cancel(self) -> None:
        """Withdraws the question of `ask`."""
        self._withdraw_question()
        self.report("")

    def stop(self) -> None:
        """Stops after the current step and keeps the adapted weights; a comparison ends too.

        Before the first step, it adapts nothing, and the weights stay as they were.
        If this panel is not adapting, it stops the steps of another panel of the same worker, if there is one.
        """
        if not self.running:
            if self.worker.stop_steps():
                self.report("Asked the other panel to stop after its current step.")
            return
        self._stopping = True
        self.report("Stopping…" if self._job is None or self._job.done() else "Stopping after this step…")
        if self._before_steps is not None:
            self.worker.cancel(self._before_steps)
        if self._job is not None:
            self.worker.stop(self._job)

    def reset(self) -> Future[Any]:
        """Restores the weights; the future returns the number of updates undone, and the status confirms the restoration.

        Raises ValueError while this panel adapts them; the future raises while another panel does.
        """
        self._require_idle()
        self._withdraw_question()

        def show(results: list[Any]) -> int:
            undone, same = results
            state = "Original weights restored exactly" if same else "The weights differ from the original weights"
            self.report(f"{state} ({undone} update{'' if undone == 1 else 's'} undone).")
            self._show_weights_everywhere()
            return undone

        def ask() -> Future[Any]:
            return together([self.worker.submit(method, model=self.model) for method in ("reset", "as_loaded")])

        return self.after(ask, show)

    def save_weights(self, folder: Path | str | None = None, method: str | None = None) -> Future[Path]:
        """Saves adapted weights as a new folder that `refine_lab.load_model` reads; the future returns its path.

        `folder`: a name under runs/ or an absolute path; none: that in the field. `method`: one of the methods of the last
        comparison, each of whose weights are kept until `reset`; none: the choice in the field, at first the current
        weights. The folder also holds configuration, tokenizer and `adaptation.json`, a record of the model of origin and
        of every adaptation since. The future raises ValueError for a folder that exists, for weights that are not adapted
        and for a method whose weights are not kept. Raises ValueError while this panel adapts them.
        """
        self._require_idle()
        place = self.fields["folder"].value if folder is None else str(folder)
        name = (self.fields["saved"].value or None) if method is None else method

        def show(path: Path) -> Path:
            which = f"The weights of {name} are saved" if name else "Saved"
            self.report(f"{which} to {display_path(path)}, which refine_lab.load_model reads as a model.")
            return path

        return self.after(lambda: self.worker.submit("save", model=self.model, folder=place, name=name), show)

    def close(self) -> None:
        _PANELS.discard(self)
        if self.running:
            self.stop()
        super().close()

    @property
    def config(self) -> TTTConfig:
        """Returns the configuration in the fields. Raises ValueError for an invalid one."""
        return self._config_of(self.fields["method"].value)

    def memory_view(self) -> MemoryView:
        """Returns a view of what the answer to the prompt depends on, shown again whenever the weights have changed."""
        return memory_of_ttt(self)

    def save_html(
        self, path: Path | str, title: str = "Test-time training", *, more: Sequence[Table] = (), conclusion: str = ""
    ) -> Path:
        """Writes one offline HTML file with the result on the remainder, curves, answers and document.

        `more`: tables below them, such as those over all prompts, and `conclusion`: a sentence about them.
        """
        said = " ".join([conclusion, *map(sentence, self.result.results)]).strip() or self.notice.status
        values = field_values(self.fields) | {**self.settings}
        about = fields_about(said, self.model, self.token_map.text, self.fields, values=values)
        tables = TextTables.of(more)
        try:
            shown = [self.result, self.curves, self._beside, self.token_map, *([tables] if tables.tables else [])]
            return save_page(path, *shown, title=title, about=about)
        finally:
            tables.close()  # an executed notebook stores every open widget

    def __repr__(self) -> str:
        methods = ", ".join(self.results) or self.fields["method"].value
        lines = [f"TTTPanel of {display_path(self.model)}: {methods}, {max(len(self.steps) - 1, 0)} steps"]
        lines += [f"  {sentence(result)}" for result in self.result.results]
        lines += [f"  {line}" for line in (repr(self._beside).split("\n") if self._beside.rows else [])]
        for label, each in self.results.items():
            for row in [*each.steps[:1], *each.steps[1:][-1:]]:
                numbers = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")
                lines.append(f"  {label}, step {row['step']}: {numbers}")
        return "\n".join([*lines, *self.notice.lines(), repr(self.token_map)])

    def _lay_out(self) -> None:
        tooltip = "Adapt to the part of the document that is not held out"
        tooltip += "; if nothing is held out, to the whole document and the question"
        compare = (
            "Adapt with each ticked method in turn, each from the original weights; unsaved adapted weights are lost"
        )
        save = "Save the adapted weights as a new folder that refine_lab.load_model reads"
        self.buttons = {
            "start": self.button("ask", tooltip, "Adapt", "primary"),
            "stop": self.button("stop", "Stop after the current step and keep the adapted weights"),
            "reset": self.button("reset", "Restore the original weights"),
            "compare": self.button("compare", compare, "Compare methods", "primary"),
            "save": self.button("save_weights", save, "Save weights"),
        }
        self.buttons["save"].disabled = True  # until the weights are adapted
        choices = {
            "continue_adapted": "Continue from the adapted weights",
            "start_over": "Start over",
            "cancel": "Cancel",
        }
        self.question = in_rows([self.button(name, text, text) for name, text in choices.items()])
        for button in self.question.children:
            button.layout.width = "auto"
        self._withdraw_question()
        settings = in_rows([self.fields[name] for name in ("method", "reward", "steps", "lr", "answer_tokens")])
        actions = in_rows(
            [*(self.buttons[name] for name in ("start", "stop", "reset", "compare")), *self.compared.values()]
        )
        weights = in_rows([*(self.fields[name] for name in ("weights", "saved", "folder")), self.buttons["save"]])
        texts = [self.fields[name] for name in ("document", "question", "reference", "held_out")]
        shown = [self.notice, self.question, self.result, self.curves, self._beside, self.token_map]
        self.children = [*texts, settings, actions, weights, *shown]

    # -- requests and their results ------------------------------------------------------------------------------------

    def _config_of(self, method: str) -> TTTConfig:
        values = {name: self.fields[name].value for name in ("reward", "steps", "lr")}
        refine = {"REFINE": replace(self._refine, reward=values["reward"]), "SFT": None}.get(
            method, self._initial.refine
        )
        return replace(self._initial, refine=refine, steps=values["steps"], lr=float(values["lr"]))

    def _settings_of(self, methods: Sequence[str]) -> dict[str, Any]:
        names = ("document", "question", "reference", "reward", "steps", "lr", "answer_tokens", "held_out")
        return {"method": ", ".join(methods)} | {name: self.fields[name].value for name in names}

    def _show_stale(self) -> None:
        made = self.settings.get("method", "")
        now = self._settings_of(
            [made if ", " in made else self.fields["method"].value]
        )  # a comparison has no such field
        self.notice.stale = bool(made) and now != self.settings

    def _begin_run(self, methods: Sequence[str], weights: Weights | None) -> Future[Any]:
        self._require_idle()
        self._withdraw_question()
        return self._run(methods, weights)

    # -- state of the weights and buttons ------------------------------------------------------------------------------

    def _withdraw_question(self) -> None:
        self.question.layout.display = "none"

    def _show_weights_everywhere(self) -> None:
        """Updates the weights' status in every panel of the same model and worker."""
        for panel in [*_PANELS]:
            if (panel.worker, panel.model) == (self.worker, self.model):
                panel._show_weights()

    def _show_weights(self) -> None:
        """Shows the updates that the worker reports."""

        def show(future: Future[Any]) -> None:
            weights = ORIGINAL if future.exception() else future.result()
            self._show_state(weights)

        self.worker.submit("open", model=self.model).add_done_callback(show)

    def _show_state(self, weights: dict[str, Any]) -> None:
        """Shows which weights the model has; `weights` is the result of `Session.open`."""
        self._adapted = bool(weights["updates"] or weights["kept"])
        if not self.running:
            self.buttons["stop"].disabled = not weights["adapting"]
            self.buttons["save"].disabled = not self._adapted
        show_kept(self.fields["saved"], weights["kept"])
        self.fields["weights"].value = weights_sentence(weights, self.results)
        self.weights_seen += 1

    def lose_weights(self, reason: str) -> None:
        """Shows that adapted weights were lost with the worker; `reason` is the sentence on how it ended."""
        if self._adapted:  # no request is sent otherwise, so that a worker that dies on loading is not started for ever
            self._withdraw_question()
            self._show_state(ORIGINAL)
            self.error = f"{reason}. Its adapted weights are lost: the next request begins with the original ones"

    def _enable(self, *, running: bool) -> None:
        self.buttons["stop"].disabled = not running
        for name in ("start", "reset", "compare"):
            self.buttons[name].disabled = running
        if running:
            self.buttons["save"].disabled = True


def _after_death(worker: Worker, reason: str) -> None:
    """Tells the panels of a worker that has ended that its adapted weights are lost."""
    for panel in [*_PANELS]:
        if panel.worker is worker:
            panel.lose_weights(reason)
