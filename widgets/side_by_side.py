"""Two models side by side on one document: differences per token, losses, likely tokens, and rollouts in pairs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from ipywidgets import IntText, Layout

from refine_lab.data.sample import sample_document
from refine_lab.experiments.compare import tokenizer_of
from refine_lab.explore.client import Worker, shared_worker
from refine_lab.explore.futures import then
from refine_lab.explore.rollout_pairs import recorded_pairs
from refine_lab.explore.side_by_side import ReadingPair, TwoModels
from refine_lab.models.hub import own_folder
from refine_lab.runs.environment import display_path
from refine_lab.runs.run import Run
from refine_lab.text import replace_surrogates
from refine_lab.validation import MOST_SEED, require
from widgets.core.base import Widget, guarded
from widgets.core.page import save_page
from widgets.parts.cancelling_panel import CancellingPanel
from widgets.parts.controls import field, in_rows, number_field, text_field
from widgets.parts.likely_tokens import LikelyTokens
from widgets.parts.measure_table import measure_table
from widgets.parts.model_picker import model_choices, model_picker, run_picker
from widgets.parts.number_field import NumberField, show_refusals
from widgets.parts.page_about import fields_about
from widgets.parts.pair_metrics import SCALE, pair_metrics
from widgets.parts.rollout_pairs import RolloutPairs
from widgets.parts.text_tables import TextTables
from widgets.parts.token_text import Decode, TokenText, token_decoder, token_text
from widgets.token_map import TokenMap

DEFAULTS = {"n": 4, "k": 8, "temperature": 1.0, "seed": 0, "scale": SCALE}
"""Default values of the settings."""
WAITING = "Enter a second model, a run or a checkpoint as B, and press Compare."


class SideBySide(CancellingPanel):
    """Compares two models or checkpoints, A and B, on one document. Every difference is B minus A.

    Shows the difference of each token as colour, the loss, perplexity and LongPPL of both, and at a selected token the most
    likely tokens of both and rollouts of both with the same random numbers. `compare_steps` shows recorded rollouts of two
    steps of training in the same way.

    `a`, `b`: names as `load_model` takes them; without `b`, nothing is read yet. `text`: the document; none: a sample
    document. `key_model`: the model that chooses the key tokens of LongPPL; none: A. `settings`: initial values by name
    (`DEFAULTS`). `add_bos`: as in `DataConfig`. Everything works without a page: `compare`, `roll_out`, `compare_steps`,
    `change`, `pair`, `measures` and `pairs`.
    """

    def __init__(
        self,
        a: str = "tiny-deltanet",
        b: str | None = None,
        text: str | None = None,
        *,
        key_model: str | None = None,
        settings: Mapping[str, Any] | None = None,
        worker: Worker | None = None,
        add_bos: bool | None = None,
    ) -> None:
        super().__init__()
        self.worker, self.add_bos = worker or shared_worker(), add_bos
        self.pair: ReadingPair | None = None
        "The document under both models, once both have read it."
        self._models: TwoModels | None = None
        self._read: dict[str, str] = {}  # the models and the document of `pair`, as the fields had them
        self._rolling: list[Future[Any]] = []
        self._request, self._token = object(), -1
        self._text, self._string = TokenText("", [0]), token_decoder(str)
        self.token_map, self.measure_table = TokenMap(), TextTables()
        self.likely, self.rollout_pairs = LikelyTokens(), RolloutPairs()
        if text is None:
            sample = sample_document()
            text = sample.document + sample.question
        self._source = text_field("Document", text, 3)
        self.fields = _model_fields(a, b, key_model)
        self.controls = _setting_fields()
        self.steps = _step_fields()
        for name, value in (settings or {}).items():
            self._check(name, value)
            self.controls[name].value = value
        self._lay_out()
        self.shown: Future[Any] = self.compare() if b else self.after(lambda: self.report(WAITING))
        "Completes when the first comparison is shown."

    # -- public methods -----------------------------------------------------------------------------------------------

    def compare(
        self, a: str | None = None, b: str | None = None, text: str | None = None, *, key_model: str | None = None
    ) -> Future[Any]:
        """Reads the document with both models and shows the differences; an argument replaces the value of its field.

        The token whose log p differs most is selected, as by `roll_out`. The future completes when everything is shown.
        It raises for a missing model and for models that tokenise the document differently; `error` then holds the
        sentence.
        """
        for name, value in (("a", a), ("b", b), ("key_model", key_model)):
            if value is not None:
                self.fields[name].value = value
        if text is not None:
            self._source.value = replace_surrogates(text)
        began, request = time.monotonic(), object()
        wanted = self._wanted()
        names = {name: wanted[name].strip() for name in self.fields}
        self.report("Reading with both models…")
        listed = model_choices()  # runs may have been trained since
        for control in self.fields.values():
            control.show_choices(listed)

        def ask() -> Future[Any]:
            for name in ("a", "b"):
                require(
                    bool(names[name]), f"model {name.upper()}", names[name], "a shipped model, a run or a checkpoint"
                )
            settings = {"key_model": names["key_model"] or None, "add_bos": self.add_bos, "submit": self._submit}
            models = TwoModels(self.worker, names["a"], names["b"], **settings)
            self._request = request
            self._cancel([*self._requests])
            return then(lambda pair: (pair, models), models.read(wanted["document"]))

        def show(found: tuple[ReadingPair, TwoModels]) -> Future[Any] | None:
            if request is not self._request:
                return None  # a later request has replaced it
            (self.pair, self._models), self._read = found, wanted
            self._show_pair()
            self.report(f"{len(self.pair.token_ids):,} tokens read by both in {time.monotonic() - began:.1f} s.")
            token = self._most_changed()
            return self.roll_out(token) if token else None

        return self.after(ask, show)

    def roll_out(self, token: int) -> Future[Any]:
        """Shows what both models expect in place of a token, and rolls out both from the prefix before it.

        The future completes when the rollouts are shown. It raises ValueError for a token without k - 1 tokens after it.
        """
        self._token = token
        pair, models, settings = self.pair, self._models, self._rollout_settings()

        def ask() -> Future[Any]:
            if pair is None or models is None:
                raise ValueError("no document has been compared yet")
            self.rollout_pairs.remove_class("recorded")
            self.rollout_pairs.show(pd.DataFrame(), self._string, "")
            last = len(pair.token_ids) - settings["k"]
            allowed = f"from 1 to {last}, since k = {settings['k']} reference tokens are compared with"
            require(1 <= token <= last, "a token to roll out from", token, allowed)
            self.token_map.selected = self.likely.selected = token
            self.report(f"Rolling out both models before token {token:,}…")
            self._cancel(self._rolling)
            self._rolling = []
            return models.roll_out(pair, token - 1, **settings)

        def show(pairs: pd.DataFrame) -> None:
            if pair is self.pair and token == self._token and settings == self._rollout_settings():
                title = f"Rollouts before token {token:,} with the same random numbers (cosine reward)"
                self.rollout_pairs.show(pairs, self._string, title)
                self.report(f"{len(pairs):,} pairs of rollouts before token {token:,}.")

        return self.after(ask, show)

    def cancel(self) -> None:
        """Cancels what is pending; a document and rollouts that are shown stay. The same token can be selected again."""
        if not all(asked.done() for asked in self._rolling):
            self._token = self.token_map.selected = -1
        super().cancel()

    def compare_steps(
        self,
        run: str | Path | None = None,
        step: int | None = None,
        other_step: int | None = None,
        other_run: str | Path | None = None,
    ) -> Future[Any]:
        """Shows recorded rollouts of two steps of a run in pairs, or of a step of one run and a step of another.

        Rollouts are paired as by `rollout_pairs.recorded_pairs`; an argument replaces the value of its field. The future
        raises ValueError if the steps have no prefix in common.
        """
        given = {"run": run, "step": step, "other_step": other_step, "other_run": other_run}
        for name, value in given.items():
            if value is not None:
                self.steps[name].value = str(value) if isinstance(value, Path) else value
        values = {name: control.value for name, control in self.steps.items()}
        for name in ("run", "other_run"):
            self.steps[name].update()  # runs may have been started since
        self._token = -1
        self._cancel(self._rolling)

        def show() -> None:
            require(bool(values["run"].strip()), "run", values["run"], "a run directory, such as runs/NAME")
            one = _run(values["run"])
            other = _run(values["other_run"]) if values["other_run"].strip() else one
            pairs = recorded_pairs(one, values["step"], values["other_step"], other)
            place = "" if other.path == one.path else f" of {other.name}"
            both = f"step {values['step']} of {one.name} (A) and step {values['other_step']}{place} (B)"
            title = f"Recorded rollouts at {both}"
            self.rollout_pairs.add_class("recorded")
            self.rollout_pairs.show(pairs, _decoder(one), title)
            self.report(f"{len(pairs):,} pairs of recorded rollouts.")

        return self.after(show)

    def change(self, name: str, value: Any) -> Future[Any]:
        """Changes a setting by name. Raises ValueError for an invalid value, and then changes nothing.

        The future completes when rollouts with the new setting are shown, if a token is selected.
        """
        self._check(name, value)
        if self.controls[name].value != value:
            self.controls[name].value = value  # `_on_setting` shows the result
            return self._changed
        return self.after(lambda: None)

    @property
    def measures(self) -> pd.DataFrame:
        """Returns `ReadingPair.measures` of the document; empty before the first comparison."""
        return self.pair.measures() if self.pair is not None else pd.DataFrame()

    @property
    def pairs(self) -> pd.DataFrame:
        """Returns the pairs of rollouts that are shown, as `rollout_pairs.pair_rollouts` does."""
        return self.rollout_pairs.pairs

    @property
    def parts(self) -> tuple[Widget, ...]:
        """Returns the widgets that a saved page shows."""
        return self.measure_table, self.token_map, self.likely, self.rollout_pairs

    def save_html(self, path: Path | str, title: str = "Side by side") -> Path:
        """Writes one offline HTML file; a click on a token shows the likely tokens of both models there too."""
        links = [(self.token_map, "selected", self.likely, "selected")]
        models = self._models
        names = {"model A": models.a, "model B": models.b, "key tokens by": models.key_model} if models else {}
        said = f"{self.pair.loss.verdict}. {self.pair.details()}" if self.pair else self.notice.status
        about = fields_about(said, "", self._text, self.controls, names)
        return save_page(path, *self.parts, title=f"{title}: {self._heading()}", links=links, about=about)

    def __repr__(self) -> str:
        lines = [f"SideBySide: {self._heading()}", *self.notice.lines()]
        if self.pair is not None:
            lines += [repr(self._measure_table()), *map(repr, (self.token_map, self.likely, self.rollout_pairs))]
        elif len(self.pairs):
            lines.append(repr(self.rollout_pairs))
        return "\n".join(lines)

    # -- showing ------------------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        self.add_class("side-by-side")
        compare = self.button("compare", "Read the document with both models", style="primary")
        steps = self.button("compare_steps", "Pair the recorded rollouts of both steps", "Compare steps")
        more = ipywidgets.Accordion([in_rows([*self.steps.values(), steps])], titles=["Recorded rollouts of training"])
        self.token_map.layout = Layout(flex="3 1 420px", min_width="0")
        beside = ipywidgets.VBox([self.likely, self.rollout_pairs])
        beside.layout = Layout(flex="4 1 480px", min_width="0", margin="0 0 0 16px")
        views = ipywidgets.Box([self.token_map, beside], layout=Layout(flex_flow="row wrap", align_items="flex-start"))
        head = [
            self._source,
            in_rows([*self.fields.values(), compare, self.cancel_button]),
            in_rows([*self.controls.values()]),
        ]
        self.children = [ipywidgets.VBox(head), self.notice, self.measure_table, views, more]
        for name, control in self.controls.items():
            control.observe(partial(self._on_setting, name), "value")
        show_refusals(self, self.controls.values())
        for control in (self._source, *self.fields.values()):
            control.observe(lambda _: self._show_stale(), "value")
        self.token_map.observe(self._on_token, "selected")
        self._changed: Future[Any] = self.after(lambda: None)

    def _show_pair(self) -> None:
        """Shows another document or other models; the selection and the rollouts are emptied."""
        assert self.pair is not None and self._models is not None
        self._show_stale()
        self._token, self._string = -1, token_decoder(self._models.tokenizer)
        self._text = token_text(self._models.tokenizer, self.pair.token_ids)
        self.rollout_pairs.show(pd.DataFrame(), self._string, "")
        self.likely.show(self.pair, self._string, [self._models.a, self._models.b])
        self.measure_table.tables = TextTables.of([self._measure_table()]).tables
        self._show_map()

    def _most_changed(self) -> int:
        """Returns the token whose log p differs most among those that can be rolled out from; 0 if there is none."""
        assert self.pair is not None
        changes = np.abs(self.pair.changes()["logprob"][1 : len(self.pair.token_ids) - self.controls["k"].value + 1])
        return 1 + int(changes.argmax()) if changes.size else 0

    def _show_map(self) -> None:
        if self.pair is not None:
            metrics = pair_metrics(self.pair, float(self.controls["scale"].value))
            self.token_map.show(self._text, metrics)

    def _measure_table(self) -> Any:
        assert self.pair is not None
        return measure_table(self.pair, self._heading())

    def _heading(self) -> str:
        models = self._models
        names = (models.a, models.b) if models else (self.fields["a"].value, self.fields["b"].value or "none yet")
        return " and ".join(f"{side} = {display_path(name)}" for side, name in zip("AB", names, strict=True))

    def _wanted(self) -> dict[str, str]:
        """Returns the values of the fields of models and document."""
        return {name: control.value for name, control in self.fields.items()} | {"document": self._source.value}

    def _show_stale(self) -> None:
        """Marks what is shown as stale while the fields name another document or other models."""
        self.notice.stale = self.pair is not None and self._wanted() != self._read

    def _submit(self, method: str, **arguments: Any) -> Future[Any]:
        asked = self.request(self.worker, method, **arguments)
        if method == "rollouts":
            self._rolling.append(asked)
        return asked

    def _cancel(self, requests: Sequence[Future[Any]]) -> None:
        for asked in requests:
            self.worker.cancel(asked)

    # -- settings and events of the page -------------------------------------------------------------------------------

    def _check(self, name: str, value: Any) -> None:
        require(name in self.controls, "a setting", name, f"one of {', '.join(self.controls)}")
        self.controls[name].checked(value, name)

    def _rollout_settings(self) -> dict[str, Any]:
        return {name: self.controls[name].value for name in ("n", "k", "temperature", "seed")}

    @guarded
    def _on_setting(self, name: str, change: Any) -> None:
        if name == "scale":
            self._show_map()
        elif self._token > 0:
            self._changed = self.roll_out(self._token)

    @guarded
    def _on_token(self, change: Any) -> None:
        token = change["new"]
        self.likely.selected = token
        if token > 0 and token != self._token:
            self.roll_out(token)


def _run(name: str) -> Run:
    """Returns the run of that name or path; `runs/NAME` is found from any folder."""
    return Run(own_folder(name.strip()) or name.strip())


def _decoder(run: Run) -> Decode:
    """Returns the map from the ids of a run's tokens to text; without its tokenizer here, the ids themselves."""
    try:
        return token_decoder(tokenizer_of(run))
    except (OSError, ValueError):
        return token_decoder(str)


def _model_fields(a: str, b: str | None, key_model: str | None) -> dict[str, Any]:
    """Returns the fields of the names of the models."""
    listed = model_choices()
    labels = {"a": ("model A", a), "b": ("model B", b), "key_model": ("key tokens by", key_model)}
    fields = {name: model_picker(label, value or "", "36em", choices=listed) for name, (label, value) in labels.items()}
    fields["key_model"].placeholder = "model A"
    return fields


def _setting_fields() -> dict[str, NumberField]:
    """Returns the fields of the settings, by name, with their defaults."""
    kinds: dict[str, tuple[str, float, float, dict[str, Any]]] = {
        "n": ("pairs (n)", 1, 64, {}),
        "k": ("tokens (k)", 1, 64, {}),
        "temperature": ("temperature", 0.01, 10, {"step": 0.1, "whole": False}),
        "seed": ("seed", 0, MOST_SEED, {}),
        "scale": ("colours to ± nats", 0.01, 100, {"step": 0.5, "whole": False}),
    }
    return {
        name: number_field(label, DEFAULTS[name], low, high, **options)
        for name, (label, low, high, options) in kinds.items()
    }


def _step_fields() -> dict[str, Any]:
    """Returns the fields of the recorded rollouts that are compared."""
    return {
        "run": run_picker("run", "a run with recorded rollouts", "34em"),
        "step": field(IntText, "step", 1),
        "other_run": run_picker("other run", "the same run", "34em"),
        "other_step": field(IntText, "step of the other", 2),
    }
