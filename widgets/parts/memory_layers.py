"""The layer lens and the counterfactual: after which layer a prediction is formed, and which heads carry a fact."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import ipywidgets
import numpy as np

from refine_lab.explore.exploration import Document, Exploration
from refine_lab.explore.futures import finished, then, together
from refine_lab.explore.lens import LayerLens
from refine_lab.explore.targets import Target
from refine_lab.explore.transplant import Counterfactual
from refine_lab.text import replace_surrogates
from refine_lab.validation import require
from widgets.core.base import Widget
from widgets.figures.tables import visible
from widgets.parts.cancelling_panel import CancellingPanel
from widgets.parts.controls import in_rows, text_field
from widgets.parts.memory_grid import NAMES, MemoryGrid
from widgets.parts.memory_result import number
from widgets.parts.text_tables import TextTables
from widgets.parts.token_text import texts_of, token_decoder, token_text


class MemoryLayers(CancellingPanel):
    """The prediction after each layer, and what one replaced stretch of the document changes, head by head.

    `follow` says which document and target are meant; everything works without a page: `lens`, `counterfactual`.
    """

    def __init__(self, exploration: Exploration) -> None:
        super().__init__()
        self.exploration, self.target = exploration, None
        self._explains: tuple[Target | None, Document | None] = (None, None)
        self.layer_lens: LayerLens | None = None
        "The lens that is shown, once known."
        self.changed: Counterfactual | None = None
        "The counterfactual that is shown, once known."
        self._decode = token_decoder(exploration.tokenizer)
        self.table, self.grid = TextTables(), MemoryGrid(selectable=False)
        self.fields = {
            "replace": text_field("Replace", "", 1),
            "by": text_field("by", "", 1),
            "answer": text_field("Changed answer", "", 0, "empty: what the model answers to the changed document"),
        }
        self._open = ipywidgets.ToggleButton(description="Layer lens and counterfactual", icon="caret-right")
        self._open.layout = ipywidgets.Layout(width="auto", align_self="flex-start")
        ask = self.button("ask", "Read both documents and exchange the memory head by head", "Compare documents")
        lens = self.button("lens", "What each layer would predict at the explained position", "Layer lens")
        ask.layout.width = lens.layout.width = "auto"
        parts = [in_rows([lens]), self.table, *self.fields.values(), in_rows([ask, self.cancel_button]), self.grid]
        self._box = ipywidgets.VBox([self.notice, *parts])
        self._box.layout.display = "none"
        self._open.observe(self._on_open, "value")
        self.children = [self._open, self._box]

    def use(self, exploration: Exploration) -> None:
        """Uses another model, of which nothing is explained yet."""
        self.exploration, self._decode = exploration, token_decoder(exploration.tokenizer)
        self.follow(None)

    def follow(self, target: Target | None) -> None:
        """Sets the explained target; what was shown for another one, another document or other weights is removed."""
        explains = (
            target,
            self.exploration.document,
        )  # a document that was read again, under other weights, is another
        if explains != self._explains:
            self._explains = explains
            self.target, self.layer_lens, self.changed = target, None, None
            self.table.tables = []
            self.grid.show([], np.zeros((0, 0)), "")
            if self._open.value and target is not None:
                self.lens()

    def lens(self) -> Future[Any]:
        """Shows what each layer would predict at the explained position; the future then completes."""
        explains, exploration = self._explains, self.exploration

        def show(lens: LayerLens) -> None:
            if explains == self._explains and exploration is self.exploration:
                self.layer_lens = lens
                self.table.tables = [self._lens_table(lens)]

        def ask() -> Future[LayerLens]:
            known, wanted = self._known(), self._explained()
            return self.request(
                self.exploration.worker,
                "lens",
                model=self.exploration.model,
                token_ids=known.token_ids,
                position=wanted.position,
                token=wanted.token_ids[0],
                version=known.reading.version,
            )

        return self.after(ask, show)

    def counterfactual(self, replace: str, by: str, answer: str = "") -> Future[Any]:
        """Replaces one stretch of the document, and shows which heads carry the difference; the future then completes.

        The question is the last line of the document. `answer` is the answer to the changed document; empty: the model's
        own. The future raises ValueError for a stretch that does not occur exactly once before the question.
        """
        for name, text in (("replace", replace), ("by", by), ("answer", answer)):
            self.fields[name].value = replace_surrogates(text)
        return self.ask()

    def ask(self) -> Future[Any]:
        """Compares the documents that the fields describe (see `counterfactual`)."""
        exploration, began = self.exploration, self._explains
        common = {"model": exploration.model, "version": self._known().reading.version}
        replaced = self.fields["replace"].value, self.fields["by"].value
        self.report("Reading both documents…")

        def begin() -> Future[Any]:
            documents = original, changed, question = self._documents(self._known().text)
            wanted = exploration.tokenizer(self.fields["answer"].value, add_special_tokens=False)["input_ids"]
            asked = [finished(documents)]
            for ids, continuation in ((original, ()), (changed, tuple(wanted))):
                prompt = {"token_ids": np.append(ids, question), "position": len(ids) + len(question) - 1}
                asked.append(self.request(exploration.worker, "predict", **common, **prompt, continuation=continuation))
            return together(asked)

        def exchange(results: list[Any]) -> Future[Any]:
            (original, changed, question), *predictions = results
            answers = tuple(target.token_ids for target, _ in predictions)
            allowed = "another one than to the original document: enter the changed answer"
            answer = self._text(answers[1])
            require(answers[0] != answers[1], "the model's answer to the changed document", answer, allowed)
            pair = {"token_ids": original, "changed": changed, "question": question.tolist()}
            asked = self.request(exploration.worker, "counterfactual", **common, **pair, answers=answers)
            return then(lambda found: (found, answers), asked)

        def show(results: tuple[Counterfactual, Any]) -> None:
            found, answers = results
            if began == self._explains and exploration is self.exploration:
                self.changed = found
                title = "Change of the contrast when one head's memory is exchanged (nats)"
                note = counterfactual_sentence(found, *map(self._text, answers), replaced=replaced)
                self.grid.show(found.parts, found.effects, title, diverging=True, of_part=found.of_part, note=note)
                self.report("")

        return self.after(begin, exchange, show)

    def shown(self) -> list[Widget]:
        """Returns the parts that have something to show."""
        return [part for part, known in ((self.table, self.layer_lens), (self.grid, self.changed)) if known is not None]

    def __repr__(self) -> str:
        lines = ["MemoryLayers", *self.notice.lines()]
        for table in self.table.tables:
            lines += [f"  {table['caption']}", *("  " + " | ".join(row) for row in table["rows"])]
        lines += [repr(self.grid)] if self.changed is not None else []
        return "\n".join(lines)

    def _known(self) -> Document:
        return self.exploration._known

    def _explained(self) -> Target:
        if self.target is None:
            raise ValueError("no prediction is explained yet: click a token first")
        return self.target

    def _documents(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the tokens of the document before the question, of the changed one, and of the question."""
        cut = text.rstrip("\n").rfind("\n") + 1
        body, question = text[:cut], text[cut:]
        replace, by = self.fields["replace"].value, self.fields["by"].value
        count = body.count(replace) if replace else 0
        require(
            count == 1,
            "the stretch to replace",
            replace,
            f"one that occurs once before the last line, not {count} times",
        )
        ids, new = (self.exploration.tokens_of(each) for each in (text, body.replace(replace, by) + question))
        starts = token_text(self.exploration.tokenizer, ids).offsets[:-1]
        offset = len(token_text(self.exploration.tokenizer, ids).text) - len(text)  # of a BOS token's text
        asked = len(ids) - int(np.searchsorted(starts, cut + offset))
        same = asked > 0 and len(new) > asked and (ids[-asked:] == new[-asked:]).all()
        require(
            bool(same), "the last line of the document", question, "a question with the same tokens in both documents"
        )
        return ids[:-asked], new[:-asked], ids[-asked:]

    def _lens_table(self, lens: LayerLens) -> dict[str, Any]:
        rows = []
        for layer, (logprob, rank) in enumerate(zip(lens.logprobs.tolist(), lens.ranks.tolist(), strict=True)):
            likely = zip(lens.alternatives[layer].tolist(), lens.probabilities[layer].tolist(), strict=True)
            best = "   ".join(f"{self._text([token])} {100 * chance:.1f} %" for token, chance in likely)
            rows.append(["embedding" if layer == 0 else f"layer {layer - 1}", number(logprob), f"{rank:,}", best])
        caption = f"Layer lens after token {lens.position:,}: {lens_sentence(lens, self._text([lens.token]))}"
        return {"caption": caption, "columns": ["after", "log p (nats)", "rank", "most likely tokens"], "rows": rows}

    def _text(self, tokens: Any) -> str:
        return visible(replace_surrogates("".join(texts_of(self._decode, tokens))))

    def _on_open(self, change: Any) -> None:
        self._box.layout.display = "" if change["new"] else "none"
        self._open.icon = "caret-down" if change["new"] else "caret-right"
        if change["new"] and self.layer_lens is None and self.target is not None:
            self.lens()


def lens_sentence(lens: LayerLens, text: str) -> str:
    """Returns one sentence: from which layer on the token is the most likely one, and which layer raises it most."""
    steps = np.diff(lens.logprobs)
    raised = f"layer {int(steps.argmax())} raises its log p most, by {number(float(steps.max()))} nats"
    behind = np.flatnonzero(lens.ranks > 1)
    if len(behind) and behind[-1] == len(lens.ranks) - 1:
        return f"“{text}” is not the most likely token after the last layer (rank {lens.ranks[-1]:,}); {raised}."
    first = int(behind[-1]) if len(behind) else -1
    since = "the embedding" if first < 0 else f"layer {first}"
    return f"“{text}” is the most likely token after {since} and later; {raised}."


def counterfactual_sentence(found: Counterfactual, answer: str, changed: str, replaced: tuple[str, str]) -> str:
    """Returns what was replaced by what, what the whole memory changes, and the part and head that change most of it alone."""
    part = found.parts[int(found.of_part.argmax())]
    row, head = np.unravel_index(int(np.nanargmax(found.effects)), found.effects.shape)
    best = found.parts[int(row)]
    text = "The changed document has “{1}” instead of “{0}”: ".format(*map(visible, replaced))
    text += f"log p of “{changed}” minus log p of “{answer}” is {number(found.original)} nats in the original document"
    text += f"; with the whole memory of the changed document it moves by {number(found.total, sign=True)}"
    text += f", with that of layer {part.layer} ({NAMES.get(part.name, part.name)}) alone"
    text += f" by {number(float(found.of_part.max()), sign=True)}, and with that of the strongest head"
    return f"{text} (layer {best.layer}, head {head}) by {number(float(np.nanmax(found.effects)), sign=True)}."
