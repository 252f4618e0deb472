"""The reward explorer: a document's tokens, rollouts from any of them, and their rewards, in linked views."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd

from refine_lab.data.sample import sample_document
from refine_lab.explore.client import Worker, shared_worker
from refine_lab.explore.exploration import Document, Exploration
from refine_lab.explore.futures import ending
from refine_lab.explore.reading import DocumentReading
from refine_lab.explore.reward_job import RewardJob
from refine_lab.explore.saved import save_rollouts
from refine_lab.method.rewards import REWARDS
from refine_lab.runs.environment import display_path
from refine_lab.text import replace_surrogates
from refine_lab.types import RewardFunction, SelectionFunction
from refine_lab.validation import require
from widgets.core.base import Widget, guarded
from widgets.core.page import save_page
from widgets.core.panel import FileField
from widgets.memory_links import memory_of_explorer
from widgets.memory_view import MemoryView
from widgets.parts.click_result import ClickResult
from widgets.parts.controls import in_rows, text_field
from widgets.parts.explorer_settings import ONLY_READ, SettingsPanel
from widgets.parts.explorer_view import map_content, summarize
from widgets.parts.model_picker import model_picker
from widgets.parts.page_about import fields_about, rollouts_sentence
from widgets.parts.reward_summary import RewardSummary
from widgets.rollout_inspector import RolloutInspector
from widgets.state_view import StateView
from widgets.token_map import TokenMap, TokenText, token_text


class RewardExplorer(SettingsPanel):
    """Shows where a model is uncertain in a document, and rollouts with their rewards from any clicked token.

    `text`: the initial document; none: a sample document. `rewards` and `selections`: custom functions, by name or by the
    name of their definition. `settings`: initial values of `controls`, by name. `add_bos`: as in `DataConfig`. Everything
    works without a page: `read`, `explore`, `change`, `preset`, `undo`, `cancel`, `save_rollouts`, and the traits of
    `token_map`, `click_result`, `inspector` and `summary`. Raises FileNotFoundError or ValueError for a missing model.
    """

    def __init__(
        self,
        model: str = "tiny-deltanet",
        text: str | None = None,
        *,
        rewards: Mapping[str, RewardFunction] | Sequence[RewardFunction] = (),
        settings: Mapping[str, Any] | None = None,
        worker: Worker | None = None,
        add_bos: bool | None = None,
        selections: Mapping[str, SelectionFunction] | Sequence[SelectionFunction] = (),
    ) -> None:
        functions = _by_name("rewards", rewards), add_bos, _by_name("selections", selections)
        exploration = Exploration(worker or shared_worker(), model, *functions)
        exploration.set(**(settings or {}))
        super().__init__(exploration)
        self.add_class("explorer")
        self._state_views: list[StateView] = []
        self._compared: str | None = None
        self._other: DocumentReading | None = None
        self._text = TokenText("", [0])
        self.token_map = TokenMap()
        self.click_result = ClickResult(decode=exploration.tokenizer)
        self.inspector = RolloutInspector(decode=self.exploration.tokenizer)
        self.summary = RewardSummary()
        self._latest: object = None
        self._job_settings: dict[str, Any] = {}
        if text is None:
            sample = sample_document()
            text = sample.document + sample.question
        self._source = text_field("Document", text, 4)
        self._compare_field = model_picker("compare with", width="48em")
        upload = FileField(accept=".txt,.md,.py,.json,.csv,.html", description="Open a file")
        read = self.button("read", "Read the document above", style="primary")
        fields = in_rows([*self.controls.values()])
        head = [self._source, in_rows([read, upload, self._compare_field]), fields, self.bar]
        self.token_map.layout.flex, self.token_map.layout.min_width = "1 1 380px", "0"
        self.click_result.layout.flex, self.click_result.layout.max_width = "1 1 270px", "420px"
        beside = ipywidgets.Box([self.token_map, self.click_result], layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.children = [ipywidgets.VBox(head), self.notice, beside, self.summary, self.inspector]
        self._compare_field.observe(self._on_compare, "value")
        upload.observe(self._on_upload, "value")
        self.token_map.observe(self._on_token, "selected")
        self.click_result.observe(self._on_chosen, "chosen")
        self.inspector.observe(self._on_rollout, "selected")
        self.inspector.observe(self._on_filters, "filters")
        self.shown = self.read()
        "Completes when the first document is shown, with rollouts."

    # -- public methods -----------------------------------------------------------------------------------------------

    def read(self, text: str | None = None) -> Future[Any]:
        """Reads and shows a document (none: the one in the text field), and rolls out from the sampled positions.

        The future completes when everything is shown; errors also appear in `error`.
        """
        began, cancellations = time.monotonic(), self._cancellations
        if text is not None:
            self._source.value = replace_surrogates(text)
        self.report("Reading…")
        self._compare_field.update()  # runs may have been trained since

        def show(known: Document | None) -> Future[Any] | None:
            if known is None or known is not self.exploration.document:
                return None  # the reading was cancelled, or a later request has replaced the document
            with self._lock:
                self._wanted, self._shown = None, None
                self.inspector.show(self.inspector.rollouts.iloc[:0])
                self.click_result.show(self.inspector.rollouts, -1, self.exploration.reward)
                self.summary.show(None)
                self._text = token_text(self.exploration.tokenizer, known.token_ids)
                self._clicked, self._other = [], None
                self._show_map()
                self.report(f"{len(self._text):,} tokens read in {time.monotonic() - began:.1f} s.")
                for view in self._state_views:
                    view.follow(self.exploration)
                if cancellations != self._cancellations:  # after the document had been read
                    self.report(ONLY_READ)
                    return None
                return self._roll_out(
                    self._wanted_positions()
                )  # under the lock, so that `cancel` comes before or after

        def compare(_: Any) -> Future[Any] | None:
            wanted = self._compared is not None and self._other is None
            return self._read_other(self.token_map.metric) if wanted else None

        def begin() -> Future[Document | None]:
            asked = self.exploration.read(self._source.value)
            self.exploration.cancel()
            if self._job is not None:
                self._job.cancel()
            return asked

        return self.after(begin, show, compare)

    def explore(self, position: int) -> Future[Any]:
        """Rolls out from the prefix that ends at `position`, and shows only those rollouts in the list.

        If the settings do not select the position, its rollouts are marked as clicked, and excluded from all
        statistics.
        """
        document = self.exploration.document

        def show(_: Any) -> None:
            if self._wanted != position or document is not self.exploration.document:
                return  # a later request has replaced the position or the document
            rows = np.flatnonzero(self.inspector.rollouts["position"].to_numpy() == position)
            self.inspector.filters = {"position": [position, position]}
            self.inspector.selected = int(rows[0]) if len(rows) else -1

        def begin() -> Future[Any]:
            if document is not None and not self.exploration.can_start(position):
                k = self.exploration.refine.rollout_length
                raise ValueError(f"position {position} is too close to the end: k = {k} tokens must follow it")
            self._wanted, self._clicked = position, [*dict.fromkeys([*self._clicked, position])]
            return self._roll_out(self._wanted_positions())

        return self.after(begin, show)

    def cancel(self) -> None:
        """Cancels what is pending, as `SettingsPanel.cancel`; tells if the document shown is not that in the field."""
        super().cancel()
        if self._other_text():
            self.report("Cancelled. The document that was read before is still shown.")

    def _other_text(self) -> bool:
        known = self.exploration.document
        return known is not None and replace_surrogates(known.text) != self._source.value

    def _outdated(self) -> bool:
        return super()._outdated() or self._other_text()

    def compare(self, model: str | None) -> Future[Any]:
        """Compares with another model: a shipped model, a run or a checkpoint; None ends the comparison.

        Adds its entropy and loss minus this model's as metrics, for this document and later ones. The future completes
        when they are shown; for a missing model it raises, and `error` is set.
        """
        self._compared, self._other = model, None
        self._compare_field.value = model or ""
        metric = "entropy_change" if model else self.token_map.metric
        if self.exploration.document is None:  # when the first has been read
            return self.after(lambda: self.shown, lambda _: self._read_other(metric))
        return self._read_other(metric)

    def state_view(self) -> StateView:
        """Returns a view of the states of the current document and of every later one."""
        view = StateView()
        self._state_views.append(view)
        if self.exploration.document is not None:
            view.follow(self.exploration)
        return view

    def memory_view(self) -> MemoryView:
        """Returns a view that shows which writes to the memory the selected rollout of the current document depends on."""
        return memory_of_explorer(self)

    def save_html(self, path: Path | str, title: str = "Reward explorer", *, more: Sequence[Widget] = ()) -> Path:
        """Writes one offline HTML file with the map, rewards and rollouts, and `more` widgets below."""
        from_map = (self.token_map, "selected", self.inspector, "token")
        to_result = (self.token_map, "selected", self.click_result, "token")
        from_inspector = (self.inspector, "passing", self.summary, "passing")
        to_map = (self.inspector, "status", self.token_map, "status")
        parts = (self.token_map, self.click_result, self.summary, self.inspector, *more)
        values = self._shown_settings | {"compare": self._compared if self._other else None}
        said = rollouts_sentence(self.inspector.rollouts, self._shown_settings["reward"])
        fields = self.controls | {"compare": self._compare_field}
        about = fields_about(said, self.exploration.model, self._text, fields, values=values)
        return save_page(path, *parts, title=title, links=[from_map, to_result, from_inspector, to_map], about=about)

    def save_rollouts(self, path: Path | str) -> Path:
        """Writes the rollouts that the list shows to a Parquet file, which `explore.saved.load_rollouts` reads back."""
        return save_rollouts(path, self.inspector.filtered(), self.inspector.origin)

    def __repr__(self) -> str:
        parts = [repr(part) for part in (self.token_map, self.click_result, self.summary, self.inspector)]
        return "\n".join([f"RewardExplorer of {display_path(self.exploration.model)}", *self.notice.lines(), *parts])

    # -- requests and their results ------------------------------------------------------------------------------------

    def _wanted_positions(self) -> list[int]:
        """Returns the selected positions and the clicked ones that can start a rollout; empty before a document is read.

        Raises ValueError if the settings select none.
        """
        if self.exploration.document is None:
            return []
        return [*self.exploration.targets(), *filter(self.exploration.can_start, self._clicked)]

    def _read_other(self, metric: str) -> Future[Any]:
        """Requests the compared model's statistics of the document, and shows the change, coloured by `metric`."""
        model, document = self._compared, self.exploration.document

        def show(reading: DocumentReading | None) -> None:
            if model == self._compared and document is not None and document is self.exploration.document:
                with self._lock:
                    self._other = reading
                    if reading is None:  # cancelled
                        self._compared, self._compare_field.value = None, ""
                    self._show_map()
                    self.token_map.metric = metric if metric in self.token_map.metrics else "entropy"

        def ended(asked: Future[Any]) -> None:
            if asked.exception() is not None and model == self._compared:
                self._compared = None  # later documents are not compared with a model that cannot read this one
                if document is not None and document is self.exploration.document:
                    with self._lock:
                        self._show_map()

        def ask() -> Future[DocumentReading | None] | None:
            return None if model is None or document is None else self.exploration.read_by(model)

        return ending(self.after(ask, show), ended)

    def _roll_out(self, positions: Sequence[int]) -> Future[Any]:
        """Requests missing rollouts from these positions, and shows all rollouts that are wanted."""
        began, exploration, cancellations = time.monotonic(), self.exploration, self._cancellations
        asked = (exploration.document, exploration.refine, exploration.seed)

        def reward(_: Any) -> Any:
            with self._lock:
                if asked[0] is not exploration.document or cancellations != self._cancellations:
                    return None
                if asked == (exploration.document, exploration.refine, exploration.seed):
                    return self._rewarded()
                # A later change has requested its own rollouts, unless there was no position yet to request.
                return self._roll_out(self._wanted_positions()) if self._latest is reward else None

        def show(rewarded: tuple[str, pd.DataFrame] | None) -> None:
            with self._lock:
                current = (exploration.document, exploration.refine, exploration.seed, exploration.reward)
                kept = cancellations == self._cancellations
                if rewarded is not None and kept and current == (*asked, rewarded[0]):
                    self._show_rollouts(rewarded[1])
                    k = exploration.refine.rollout_length
                    self.report(summarize(rewarded[1], rewarded[0], k, time.monotonic() - began))

        if not positions:  # no document is shown yet; the settings apply once one is
            return self.after(lambda: None)
        self.report("Rolling out…" if self._wanted is None else f"Rolling out from token {self._wanted + 1}…")
        exploration.cancel({*positions, *self._wanted_positions()})
        if self._job is not None and self._job_settings != exploration.settings:
            self._job.cancel()
        self._latest = reward
        return self.after(lambda: self.exploration.roll_out(positions), reward, show)

    def _rewarded(self) -> tuple[str, Any] | Future[tuple[str, Any]] | None:
        """Returns the reward's name and the frame of the wanted rollouts; as a future for a custom reward (`RewardJob`).

        Returns None while rollouts of a selected position are still pending: their own request will show everything.
        """
        exploration = self.exploration
        selected = exploration.targets()
        if not all(map(exploration.covers, selected)):
            return None
        name, clicked = exploration.reward, [*filter(exploration.covers, self._clicked)]
        if name in REWARDS:
            return name, exploration.framing(selected, clicked)()
        if self._job is not None:
            self._job.cancel()
        total = len({*selected, *clicked})
        job = RewardJob(
            exploration.refine.group_size,
            lambda done: self.report(f"Reward {name!r}: {done} of {total} position{'' if total == 1 else 's'}…"),
        )
        frame = exploration.framing(selected, clicked, job.by_position)
        self._job, self._job_settings = job, exploration.settings
        return job.start(lambda: (name, frame()))

    def _show_map(self) -> None:
        rewarded = self.inspector.rollouts, self._shown_settings["reward"]
        metrics, marks = map_content(self.exploration, *rewarded, self._other, self._compared)
        self.token_map.show(self._text, metrics, **marks)

    def _show_rollouts(self, frame: pd.DataFrame) -> None:
        exploration = self.exploration
        self._settings_shown()  # before the inspector's events, which name the reward
        self.inspector.origin = {"model": exploration.model, "settings": exploration.settings}
        self.inspector.show(frame, keep=True)
        self.click_result.show(frame, self.token_map.selected, exploration.reward)
        with self.summary.hold_sync():
            self.summary.show(frame, self.exploration.reward)
            self._on_filters(None)
        self._show_map()

    # -- events of the page --------------------------------------------------------------------------------------------

    @guarded
    def _on_token(self, change: Any) -> None:
        token = change["new"]
        self.click_result.show(self.inspector.rollouts, token, self._shown_settings["reward"])
        if token > 0 and token != self._selected_token():  # equal if the map follows the inspector
            self.explore(token - 1)

    @guarded
    def _on_chosen(self, change: Any) -> None:
        frame = self.inspector.rollouts
        position, sample = self.click_result.token - 1, change["new"]
        rows = np.flatnonzero((frame["position"] == position) & (frame["sample_index"] == sample))
        if len(rows):
            self.inspector.selected = int(rows[0])

    def _selected_token(self) -> int | None:
        """Returns the first token of the selected rollout."""
        row = self.inspector.selected
        return int(self.inspector.rollouts["position"].iloc[row]) + 1 if row >= 0 else None

    @guarded
    def _on_rollout(self, change: Any) -> None:
        if (token := self._selected_token()) is not None:
            self.token_map.selected = token

    @guarded
    def _on_filters(self, change: Any) -> None:
        if len(self.inspector.rollouts):
            self.summary.passing = self.inspector.passing.tobytes()

    @guarded
    def _on_compare(self, change: Any) -> None:
        wanted = change["new"].strip() or None
        if wanted != self._compared:
            self.compare(wanted)

    @guarded
    def _on_upload(self, change: Any) -> None:
        for file in change["new"]:
            try:
                text = bytes(file["content"]).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file['name']!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None
            self.read(text)


def _by_name(what: str, functions: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    named = dict(functions) if isinstance(functions, Mapping) else {_name(function): function for function in functions}
    require(len(named) == len(functions), what, [*map(_name, functions)], "functions with different names")
    return named


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))
