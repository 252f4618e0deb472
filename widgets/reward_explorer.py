"""The reward explorer: a document's tokens, rollouts from any of them, and their rewards, in linked views."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd

from refine_lab.config import BUILT_IN_SELECTIONS
from refine_lab.data.sample import sample_document
from refine_lab.explore.client import Worker, shared_worker
from refine_lab.explore.exploration import Document, Exploration
from refine_lab.explore.reading import DocumentReading
from refine_lab.method.rewards import REWARDS
from refine_lab.runs.environment import display_path
from refine_lab.text import replace_surrogates
from refine_lab.types import RewardFunction, SelectionFunction
from refine_lab.validation import require
from widgets.core.base import Widget, guarded
from widgets.core.page import save_page
from widgets.core.panel import FileField, Panel
from widgets.parts.controls import explorer_fields, field, in_rows, text_field
from widgets.parts.document_metrics import change_metrics, reading_metrics, reward_metric
from widgets.parts.page_about import fields_about, rollouts_sentence
from widgets.parts.reward_summary import RewardSummary
from widgets.rollout_inspector import RolloutInspector
from widgets.state_view import StateView
from widgets.token_map import Target, TokenMap, TokenText, token_text


class RewardExplorer(Panel):
    """Shows where a model is uncertain in a document, and rollouts with their rewards from any clicked token.

    `text`: the initial document; none: a sample document. `rewards` and `selections`: custom functions, by name or by the
    name of their definition. `settings`: initial values of `controls`, by name. `add_bos`: as in `DataConfig`. Everything works
    without a page: `read`, `explore`, `change`, and the traits of `token_map`, `inspector` and `summary`. Raises
    FileNotFoundError or ValueError for a missing model.
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
        super().__init__()
        self.exploration = Exploration(worker or shared_worker(), model, *functions)
        self.exploration.set(**(settings or {}))
        self._state_views: list[StateView] = []
        self._clicked: list[int] = []
        self._compared: str | None = None
        self._other: DocumentReading | None = None
        self._text = TokenText("", [0])
        self._lock = threading.RLock()
        self.token_map = TokenMap()
        self.inspector = RolloutInspector(decode=self.exploration.tokenizer)
        self.summary = RewardSummary()
        self._wanted: int | None = None
        self._latest: object = None
        self._custom_rewards = ThreadPoolExecutor(1, "custom-rewards")
        if text is None:
            sample = sample_document()
            text = sample.document + sample.question
        self._source = text_field("Document", text, 4)
        self.controls = explorer_fields(
            [*self.exploration.rewards], [*BUILT_IN_SELECTIONS, *self.exploration.selections], self._setting
        )
        options = {"placeholder": "a shipped model, a run, a checkpoint", "continuous_update": False}
        self._compare_field = field(ipywidgets.Text, "compare with", "", "36em", **options)
        upload = FileField(accept=".txt,.md,.py,.json,.csv,.html", description="Open a file")
        read = self.button("read", "Read the document above", style="primary")
        head = [self._source, ipywidgets.HBox([read, upload, self._compare_field]), in_rows([*self.controls.values()])]
        self.children = [ipywidgets.VBox(head), self.notice, self.token_map, self.summary, self.inspector]
        for name, control in self.controls.items():
            control.observe(partial(self._on_control, name), "value")
        self._compare_field.observe(self._on_compare, "value")
        upload.observe(self._on_upload, "value")
        self.token_map.observe(self._on_token, "selected")
        self.inspector.observe(self._on_rollout, "selected")
        self.inspector.observe(self._on_filters, "filters")
        self.shown = self.read()
        "Completes when the first document is shown, with rollouts."

    # -- public methods -----------------------------------------------------------------------------------------------

    def read(self, text: str | None = None) -> Future[Any]:
        """Reads and shows a document (none: the one in the text field), and rolls out from the sampled positions.

        The future completes when everything is shown; errors also appear in `error`.
        """
        began = time.monotonic()
        if text is not None:
            self._source.value = replace_surrogates(text)
        self.report("Reading…")

        def show(known: Document) -> Future[Any] | None:
            if known is not self.exploration.document:
                return None  # a later request has replaced the document
            with self._lock:
                self._wanted = None
                self.inspector.show(self.inspector.rollouts.iloc[:0])
                self.summary.show(None)
                self._text = token_text(self.exploration.tokenizer, known.token_ids)
                self._clicked, self._other = [], None
                self._show_map()
                self.report(f"{len(self._text):,} tokens read in {time.monotonic() - began:.1f} s.")
                for view in self._state_views:
                    view.follow(self.exploration)
            return self._roll_out(self._wanted_positions())

        def compare(_: Any) -> Future[Any] | None:
            return self._read_other(self.token_map.metric) if self._compared is not None else None

        return self.after(lambda: self.exploration.read(self._source.value), show, compare)

    def explore(self, position: int) -> Future[Any]:
        """Rolls out from the prefix that ends at `position`, and shows only those rollouts in the list.

        If the settings do not select the position, its rollouts are marked as clicked, and excluded from all
        statistics.
        """
        self.report(f"Rolling out after token {position}…")
        self._wanted, document = position, self.exploration.document

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
            self._clicked = [*dict.fromkeys([*self._clicked, position])]
            return self._roll_out([position])

        return self.after(begin, show)

    def change(self, name: str, value: Any) -> Future[Any]:
        """Sets a control by name, as in the page. Raises ValueError for an invalid value, and then changes nothing."""
        require(name in self.controls, "a control", name, f"one of {', '.join(self.controls)}")
        control, before = self.controls[name], self._setting(name)
        if hasattr(control, "min"):
            require(control.min <= value <= control.max, name, value, f"from {control.min:g} to {control.max:g}")
        self.exploration.set(**{name: value})
        try:
            wanted = self._wanted_positions()
        except (ValueError, RuntimeError):  # a custom selection raises RuntimeError
            self.exploration.set(**{name: before})
            raise
        control.value = value
        return self._roll_out(wanted)

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

    def save_html(self, path: Path | str, title: str = "Reward explorer", *, more: Sequence[Widget] = ()) -> Path:
        """Writes one offline HTML file with the map, rewards and rollouts, and `more` widgets below."""
        from_map = (self.token_map, "selected", self.inspector, "token")
        from_inspector = (self.inspector, "passing", self.summary, "passing")
        to_map = (self.inspector, "status", self.token_map, "status")
        parts = (self.token_map, self.summary, self.inspector, *more)
        said = rollouts_sentence(self.inspector.rollouts, self.exploration.reward)
        about = fields_about(said, self.exploration.model, self._text, self.controls | {"compare": self._compare_field})
        return save_page(path, *parts, title=title, links=[from_map, from_inspector, to_map], about=about)

    def close(self) -> None:
        self._custom_rewards.shutdown(wait=False, cancel_futures=True)
        super().close()

    def __repr__(self) -> str:
        parts = [repr(part) for part in (self.token_map, self.summary, self.inspector)]
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
                    self._show_map()
                    self.token_map.metric = metric if metric in self.token_map.metrics else "entropy"

        def ended(asked: Future[Any]) -> None:
            if asked.exception() is not None and model == self._compared:
                self._compared = None  # later documents are not compared with a model that cannot read this one
                self._compare_field.value = ""
                if document is not None and document is self.exploration.document:
                    with self._lock:
                        self._show_map()

        def ask() -> Future[DocumentReading] | None:
            return None if model is None or document is None else self.exploration.read_by(model)

        asked = self.after(ask, show)
        asked.add_done_callback(ended)
        return asked

    def _roll_out(self, positions: Sequence[int]) -> Future[Any]:
        """Requests missing rollouts from these positions, and shows all rollouts that are wanted."""
        began, exploration = time.monotonic(), self.exploration
        asked = (exploration.document, exploration.refine, exploration.seed)

        def reward(_: Any) -> Any:
            with self._lock:
                if asked[0] is not exploration.document:
                    return None
                if asked == (exploration.document, exploration.refine, exploration.seed):
                    return self._rewarded()
                # A later change has requested its own rollouts, unless there was no position yet to request.
                return self._roll_out(self._wanted_positions()) if self._latest is reward else None

        def show(rewarded: tuple[str, pd.DataFrame] | None) -> None:
            with self._lock:
                current = (exploration.document, exploration.refine, exploration.seed, exploration.reward)
                if rewarded is not None and current == (*asked, rewarded[0]):
                    self._show_rollouts(rewarded[1])
                    self.report(self._summarize(time.monotonic() - began))

        if not positions:  # no document is shown yet; the settings apply once one is
            return self.after(lambda: None)
        self._latest = reward
        return self.after(lambda: self.exploration.roll_out(positions), reward, show)

    def _rewarded(self) -> tuple[str, Any] | Future[tuple[str, Any]] | None:
        """Returns the reward's name and the frame of the wanted rollouts; as a future for a custom reward, which may be slow.

        Returns None while rollouts of a selected position are still pending: their own request will show everything.
        """
        exploration = self.exploration
        selected = exploration.targets()
        if not all(map(exploration.covers, selected)):
            return None
        name, frame = exploration.reward, exploration.framing(selected, [*filter(exploration.covers, self._clicked)])
        return (name, frame()) if name in REWARDS else self._custom_rewards.submit(lambda: (name, frame()))

    def _show_map(self) -> None:
        exploration, reading, rollouts = self.exploration, self.exploration._known.reading, self.inspector.rollouts
        positions, borders, chance = [], [], None
        if len(self._text) > exploration.refine.rollout_length:  # else no position has room for a rollout
            positions, borders, chance = exploration.targets(), exploration.chunk_borders(), exploration.probabilities()
        metrics = reading_metrics(reading, chance)
        if self._other is not None:
            metrics += change_metrics(reading, self._other, Path(self._compared or "").name)
        if len(rollouts):
            metrics.append(reward_metric(rollouts, exploration.reward, len(self._text)))
        targets = [Target(position + 1, f"sampled position of chunk {i}") for i, position in enumerate(positions, 1)]
        borders = [position + 1 for position in borders]  # the first token that can be the chunk's target
        self.token_map.show(
            self._text, metrics, targets=targets, chunk_borders=borders, alternatives=self._alternatives
        )

    def _alternatives(self, tokens: Sequence[int]) -> list[list[tuple[str, float]]]:
        """Returns the most likely alternatives to each token."""
        reading, decode = self.exploration._known.reading, self.exploration.tokenizer.decode
        pairs = [zip(reading.alternatives[token], reading.probabilities[token], strict=True) for token in tokens]
        return [
            [(str(decode([int(other)])), float(chance)) for other, chance in row if token > 0]
            for token, row in zip(tokens, pairs, strict=True)
        ]

    def _show_rollouts(self, frame: pd.DataFrame) -> None:
        self.inspector.show(frame, keep=True)
        with self.summary.hold_sync():
            self.summary.show(frame, self.exploration.reward)
            self._on_filters(None)
        self._show_map()

    def _summarize(self, seconds: float) -> str:
        """Describes the selected positions, which alone enter the mean, and the clicked ones."""
        parts, rollouts = [], self.inspector.rollouts
        mean = f"mean {self.exploration.reward} reward {rollouts.loc[~rollouts['clicked'], 'reward'].mean():.3f}"
        for clicked, kind, note in ((False, "sampled", mean), (True, "clicked", "excluded from all statistics")):
            frame = rollouts[rollouts["clicked"] == clicked]
            count = frame["position"].nunique()
            if count:
                where = f"{len(frame):,} rollouts at {count} {kind} position{'' if count == 1 else 's'}"
                parts.append(f"{where}, {note}, {self._matches(frame)}")
        return "; ".join([*parts, f"{1000 * seconds:.0f} ms."])

    def _matches(self, frame: pd.DataFrame) -> str:
        """Describes the mean reward `exact` and the probability that it estimates: that of the reference at temperature 1."""
        k = self.exploration.refine.rollout_length
        matched, probability = (frame[name].mean() for name in ("exact", "target_probability"))
        return f"exact match {matched:.3g}, expected {probability:.3g} (mean joint probability of the next {k} tokens)"

    # -- events of the page --------------------------------------------------------------------------------------------

    @guarded
    def _on_token(self, change: Any) -> None:
        if change["new"] > 0 and change["new"] != self._selected_token():  # equal if the map follows the inspector
            self.explore(change["new"] - 1)

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
    def _on_control(self, name: str, change: Any) -> None:
        if change["new"] == self._setting(name):
            return
        try:
            self.change(name, change["new"])
        except (ValueError, RuntimeError):
            self.controls[name].value = self._setting(name)
            raise

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

    def _setting(self, name: str) -> Any:
        own = ("reward", "seed", "selection")
        return getattr(self.exploration if name in own else self.exploration.refine, name)


def _by_name(what: str, functions: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    named = dict(functions) if isinstance(functions, Mapping) else {_name(function): function for function in functions}
    require(len(named) == len(functions), what, [*map(_name, functions)], "functions with different names")
    return named


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))
