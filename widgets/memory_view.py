"""The memory view: which writes to the fast-weight memory made a prediction, and what the model says without them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from refine_lab.data.sample import sample_document
from refine_lab.explore.attribution import Cell, WriteAttribution
from refine_lab.explore.client import Worker, shared_worker
from refine_lab.explore.erasing import Prediction
from refine_lab.explore.exploration import Document, Exploration
from refine_lab.explore.futures import ending, finished, then, together
from refine_lab.explore.targets import Target
from refine_lab.runs.environment import display_path
from refine_lab.text import replace_surrogates
from refine_lab.validation import require
from widgets.core.base import Widget, guarded
from widgets.core.page import save_page
from widgets.parts.document_metrics import entropy_metric, loss_metric
from widgets.parts.memory_erasing import ErasingPanel
from widgets.parts.memory_fields import answer_wanted, memory_fields, memory_layout, token_wanted
from widgets.parts.memory_grid import MemoryGrid
from widgets.parts.memory_layers import MemoryLayers
from widgets.parts.memory_metrics import attribution_metrics, listed, loss_change_metric, tokens_in
from widgets.parts.memory_result import MemoryResult, explained
from widgets.parts.memory_rollouts import MemoryRollouts
from widgets.parts.model_picker import model_words
from widgets.parts.number_field import show_refusals
from widgets.parts.page_about import fields_about
from widgets.parts.token_text import token_decoder
from widgets.token_map import Target as Mark
from widgets.token_map import TokenMap, TokenText, token_text

HEADS = "Sum of the absolute effects of all writes in each head (nats)"
"""Title of the grid of layers and heads."""
HEIGHT = 360
"""Maximum height of the document in pixels."""
CONTEXT = 60
"""Number of tokens that are visible before the strongest write."""
FACT = "The secret word for hand is width.", "The secret word for hand is block."
"""A fact of the sample document, and another one that replaces it in the counterfactual."""


class MemoryView(ErasingPanel):
    """Shows which tokens' writes to the memory a prediction depends on, in which layers and heads, and erases writes.

    `text`: the initial document; none: a sample document. `answer`: a continuation of the whole document, which is
    explained first; empty: the model's own next token. `against`: another continuation, for the contrast of the two.
    `add_bos`: as in `DataConfig`. Everything works without a page: `read`, `switch`, `explain`, `cancel`, `choose`, `erase`,
    `erase_random`, `undo`, `restore`, `save_state`, `rollouts`, `layers`, and the traits of `token_map` and `grid`.
    Raises FileNotFoundError or ValueError for a missing model.
    """

    def __init__(
        self,
        model: str = "tiny-deltanet",
        text: str | None = None,
        *,
        answer: str = "",
        against: str = "",
        worker: Worker | None = None,
        add_bos: bool | None = None,
        read: bool = True,
    ) -> None:
        """Reads the document at once, unless `read` is False, as for a view that follows a panel and keeps its model."""
        super().__init__()
        self.add_class("memory")
        self.exploration = Exploration(worker or shared_worker(), model, add_bos=add_bos)
        self.target: Target | None = None
        "What is explained."
        self.attribution: WriteAttribution | None = None
        "Effects of all writes on the target, once known."
        self.prediction: Prediction | None = None
        "The prediction with all writes, once known."
        self._settings: dict[str, Any] = {}
        "Values of the fields that chose what is explained: `answer` and `against`, or `tokens`; empty for a rollout."
        self._version: str | None = None
        self._earlier: WriteAttribution | None = None
        self._text = TokenText("", [0])
        self._asked: object = None
        self._reading: object = None
        self._switching: object = None
        self._named = model
        self._filled = {"answer", "against"}
        "Fields of answers that hold what the view was created with, which belongs to the first document."
        self._decode = token_decoder(self.exploration.tokenizer)
        self.token_map, self.grid, self.result = TokenMap(), MemoryGrid(), MemoryResult()
        self.layers, self.rollouts = MemoryLayers(self.exploration), MemoryRollouts(self.exploration)
        if text is None:
            sample = sample_document()
            text = sample.document + sample.question
            self.layers.fields["replace"].value, self.layers.fields["by"].value = FACT
        self.fields = memory_fields(model, text, answer, against)
        self.fields["model"].disabled = not read
        self._first_text = self.fields["document"].value
        for name in self._filled:
            self.fields[name].observe(lambda _, name=name: self._filled.discard(name), "value")
        self.token_map.height = HEIGHT
        self.buttons, self.children = memory_layout(self)
        show_refusals(self, self.fields.values())
        self.fields["model"].observe(self._on_model, "value")
        self.token_map.observe(self._on_token, "selected")
        self.grid.observe(self._on_chosen, "chosen")
        self.result.observe(self._on_place, "place")
        self.fields["erased"].observe(self._on_marks, "value")
        self.shown: Future[Any] = self.read() if read else finished(None)
        "Completes when the first prediction is explained."

    # -- public methods -----------------------------------------------------------------------------------------------

    def read(self, text: str | None = None) -> Future[Any]:
        """Reads and shows a document (none: the one in the text field), and explains the answer to it.

        It is read with the model that the field names, also after an attempt to switch to that model has failed.
        """
        if text is not None:
            self.fields["document"].value = replace_surrogates(text)
        if self.fields["model"].value.strip() != self.exploration.model:
            return self.switch(self.fields["model"].value)
        self.report("Reading…")
        return self._read_field(self.exploration)

    def switch(self, model: str) -> Future[Any]:
        """Reads the document with another model, a run or a checkpoint, and explains its answer.

        What is shown stays until the other model has read the document. If that fails or is cancelled, the name stays in the
        field with a sentence that says so. The future raises FileNotFoundError or ValueError for a missing model.
        """
        model, token = model.strip(), object()
        before, field = self.exploration, self.fields["model"]
        self._named, field.error = model, ""
        field.value, self._switching = model, token
        self.report("Reading…")

        def begin() -> Future[Any]:
            require(bool(model), "model", model, "a shipped model, a run or a checkpoint")
            return self._read_field(Exploration(before.worker, model, add_bos=before.add_bos))

        def end(_: Any) -> None:
            if self._switching is token:
                self._switching = None
                if self.exploration is before and field.value == model:
                    still = f": the view below still shows {model_words(before.model)}" if before.document else ""
                    field.error = f"This model is not read{still}."

        return ending(self.after(begin), end)

    def follow(self, text: str, token_ids: np.ndarray) -> Future[Any]:
        """Shows the document of another panel, and explains the answer to it.

        For the same document under other weights, explains the same target again, with the change of the effects.
        """
        self.fields["document"].value = replace_surrogates(text)
        return self._read(self.exploration, lambda: (text, token_ids), following=True)

    def explain(self, token: int | None = None) -> Future[Any]:
        """Colours the document by the effect of each write on a token's prediction; None: on the answer after the document.

        At a token, as many tokens are explained as the field `tokens` says. The future raises ValueError for one of the
        first two tokens, which no earlier write can explain.
        """
        if token is None:
            settings = {name: self.fields[name].value for name in ("answer", "against")}
            return self._explain(lambda: answer_wanted(self.fields, self.exploration), settings)
        settings = {"tokens": self.fields["tokens"].value}
        return self._explain(lambda: token_wanted(self.fields, self.exploration, token), settings)

    def explain_continuation(self, position: int, token_ids: Sequence[int], against: Sequence[int] = ()) -> Future[Any]:
        """Colours the document by the effect of each write on a continuation of the prefix that ends at `position`."""
        return self._explain(lambda: (position, tuple(token_ids), tuple(against)), {})

    def cancel(self) -> None:
        """Cancels what is pending: the reading of a document, the search for writes, or an erasure. What is shown stays."""
        super().cancel()
        if self.exploration.document is None:
            self._text = TokenText("", [0])
            self.token_map.show(self._text)
            self.report("Cancelled. No document is shown: press Read.")
        elif self.target is not None:
            self.report(f"Cancelled. Still shown: {explained(self.target, self._decode)}{self._before()}.")

    def choose(self, cells: Collection[Cell] | None) -> None:
        """Restricts the colours, and what is erased next, to some heads; None: all of them."""
        self.grid.choose(cells)

    def save_html(self, path: Path | str, title: str = "Memory", *, more: Sequence[Widget] = ()) -> Path:
        """Writes one offline HTML file with the prediction, the grid, the document and what the layers show."""
        links = [(self.result, "place", self.token_map, "highlight")]
        shown = [self.result, self.grid, self.token_map, *self.rollouts.shown(), *self.layers.shown()]
        settings = {name: field for name, field in self.fields.items() if name not in ("model", "path")}
        erased = {"erased": listed(self.erasures[-1].erased)} if self.erasures else {}
        values = self._settings | erased
        about = fields_about(self.result.conclusion, self.exploration.model, self._text, settings, values=values)
        return save_page(path, *shown, *more, title=title, links=links, about=about)

    def __repr__(self) -> str:
        parts = [repr(part) for part in (self.result, self.grid, self.token_map)]
        lines = [f"MemoryView of {display_path(self.exploration.model)}", *self.notice.lines(), *parts]
        return "\n".join([*lines, *(repr(part) for part in (self.rollouts, self.layers) if part.shown())])

    # -- requests and their results ------------------------------------------------------------------------------------

    def _submit(self, method: str, **arguments: Any) -> Future[Any]:
        exploration = self.exploration
        known = exploration._known
        document = {"model": exploration.model, "token_ids": known.token_ids, "version": known.reading.version}
        return self.request(exploration.worker, method, **document | arguments)

    def _read_field(self, exploration: Exploration) -> Future[Any]:
        source = self.fields["document"].value
        return self._read(exploration, lambda: (source, exploration.tokens_of(source)))

    def _read(self, exploration: Exploration, tokens: Any, following: bool = False) -> Future[Any]:
        """Requests the statistics of a document, and explains the answer to it, or the same target under other weights.

        What is shown is replaced, and `exploration` is used, once it has been read; a later request replaces this one.
        """

        def ask() -> Future[list[Any]]:
            text, ids = tokens()
            asked = self._reading = self.request(exploration.worker, "read", model=exploration.model, token_ids=ids)
            return together([asked, finished((text, ids, asked))])

        def show(results: list[Any]) -> Future[Any] | None:
            reading, (text, ids, asked) = results
            if asked is not self._reading:
                return None
            known, target = self.exploration.document if exploration is self.exploration else None, self.target
            exploration.document = Document(text=text, token_ids=ids, reading=reading)
            if exploration is not self.exploration:
                self.exploration, self._decode = exploration, token_decoder(exploration.tokenizer)
                for part in (self.layers, self.rollouts):
                    part.use(exploration)
            if known is not None and target is not None and np.array_equal(known.token_ids, ids):
                if known.reading.version != reading.version:
                    return self._again(target)
                if following:
                    return None
            self._forget()
            self.grid.show([], np.zeros((0, 0)), "")
            self.layers.follow(None)
            self._text = token_text(self.exploration.tokenizer, ids)
            self.fields["erased"].value = ""
            self._show()
            if replace_surrogates(text) != self._first_text:
                self._forget_answer()
            return self.explain()

        return self.after(ask, show)

    def _forget(self) -> None:
        """Forgets what is explained and erased."""
        self.target = self.prediction = self.attribution = self._earlier = self._asked = self._version = None
        self._settings = {}
        self._forget_erasures()

    def _forget_answer(self) -> None:
        """Empties the fields of answers that belong to the first document, so that the model's own answer is explained."""
        for name in [*self._filled]:
            self.fields[name].value = ""

    def _again(self, target: Target) -> Future[Any]:
        """Explains the same target under other weights, and shows the change of the effects as well."""
        wanted = target.position, target.token_ids, target.against
        return self._explain(lambda: wanted, self._settings, self.attribution)

    def _explain(self, wanted: Any, settings: dict[str, Any], earlier: WriteAttribution | None = None) -> Future[Any]:
        """Requests prediction and attribution; a later valid request replaces this one. `earlier`: those of other weights."""
        asked = object()
        self.report("Finding the writes…")

        def ask() -> Future[tuple[Target, Prediction]]:
            position, continuation, against = wanted()
            self._asked = asked
            return self._submit("predict", position=position, continuation=continuation, against=against)

        def attribute(found: tuple[Target, Prediction]) -> Future[Any] | None:
            if asked is not self._asked:
                return None  # a later request has replaced the target or the document
            target, prediction = found
            effects = self._submit("attribute", target=target)
            effects.add_done_callback(
                lambda _: self._show_alone(asked, found, settings) if effects.exception() else None
            )
            return then(lambda effects: (target, prediction, effects), effects)

        def show(found: Any) -> None:
            if found is None or asked is not self._asked:
                return
            target, self.prediction, self.attribution = found
            self.target, self._earlier, self._settings = target, earlier, settings
            self._version = self.exploration._known.reading.version
            self._forget_erasures()
            self.grid.show(found[2].parts, found[2].by_cell(), HEADS)
            self._show()
            if self.token_map.metric in ("loss", "entropy", "loss_change"):
                self.token_map.metric = "signed"
            if target.position == len(self._text) - 1:  # the answer: no token was clicked that must stay in view
                self.token_map.view = max(found[2].top(1)[0] - CONTEXT, 0)
            self.layers.follow(target)
            self.report("")

        return self.after(ask, attribute, show)

    def _before(self) -> str:
        """Returns words about what is shown if the fields have another model or document, or the weights have changed."""
        known, model = self.exploration.document, self.fields["model"].value.strip()
        if known is None:
            return ""
        if model != self.exploration.model:
            return f", of the model {model_words(self.exploration.model)}"
        if self.fields["document"].value != replace_surrogates(known.text):
            return ", in the document that was read before"
        changed = self._version not in (None, known.reading.version)
        return ", with the weights before they changed" if changed else ""

    def busy_changed(self, busy: bool) -> None:
        """Shows whether a request is pending, and whether what is shown belongs to earlier fields or weights."""
        edited = any(self.fields[name].value != value for name, value in self._settings.items() if name != "tokens")
        self.notice.stale = edited or self._before() != ""
        super().busy_changed(busy)

    def _show_alone(self, asked: object, found: tuple[Target, Prediction], settings: dict[str, Any]) -> None:
        """Shows a prediction whose writes cannot be attributed, unless another one is shown."""
        if asked is self._asked and self.attribution is None:
            self.target, self.prediction = found
            self._settings, self._version = settings, self.exploration._known.reading.version
            self._show()

    def _show(self) -> None:
        """Shows the map, the prediction and the strongest writes."""
        cells, erasure = self.grid.cells, self.erasures[-1] if self.erasures else None
        reading, metrics = self.exploration._known.reading, []
        if self.attribution is not None:
            metrics = attribution_metrics(self.attribution, len(self._text), cells, self._earlier)
        if self.prediction is not None and self.target is not None:
            shown = {"cells": cells, "erasure": erasure, "control": self.control, "tokens": reading.token_ids}
            shown["model"] = model_words(self.exploration.model)
            self.result.show(self.attribution, self.prediction, self.target, self._decode, **shown)
        else:
            self.result.clear()
        if erasure is not None:
            metrics.append(loss_change_metric(erasure.losses_before, erasure.losses_after))
        self.rollouts.follow(self.target, self.prediction, erasure, self._version)
        marks = [Mark(token, "marked to erase") for token in self._marked()]
        metrics += [loss_metric(reading), entropy_metric(reading)]
        self.token_map.show(self._text, metrics, targets=marks, mark="marked to erase")

    # -- events of the page --------------------------------------------------------------------------------------------

    @guarded
    def _on_token(self, change: Any) -> None:
        if change["new"] >= 0:
            self.explain(change["new"])

    @guarded
    def _on_place(self, change: Any) -> None:
        if change["new"]:
            self.token_map.highlight = list(change["new"])

    @guarded
    def _on_chosen(self, change: Any) -> None:
        if self.attribution is not None:
            self._show()

    @guarded
    def _on_marks(self, change: Any) -> None:
        tokens_in(change["new"], len(self._text))  # raises for what is no list of tokens
        if self.exploration.document is not None:
            self._show()

    @guarded
    def _on_model(self, change: Any) -> None:
        if change["new"] == self.exploration.model:
            self._named, self.error = change["new"], ""
            if self._switching is not None:
                self.cancel()
            self.busy_changed(self.notice.busy)
        elif change["new"] != self._named:
            self.shown = self.switch(change["new"])
