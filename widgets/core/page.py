"""Writes one HTML file that shows widgets without Python or a network, with scripts, styles and data included."""

from __future__ import annotations

import base64
import html
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from refine_lab.runs.durable import replace_text
from refine_lab.runs.environment import display_path
from refine_lab.validation import path_of
from widgets.core.assets import STATIC
from widgets.core.packing import json_values


class PageWidget(Protocol):
    """The interface that a page requires of a widget; `widgets.core.base.Widget` implements it."""

    _esm: Any
    _css: Any
    page_heading: str

    def page_state(self) -> dict[str, Any]: ...


MARK = b'<meta name="generator" content="refine_lab">'
"""Marker by which our own pages are recognised."""
Link = tuple[PageWidget, str, PageWidget, str]
"""A trait that follows another: source widget, its trait, following widget, its trait."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What the top of a page says about its content, below the heading."""

    conclusion: str = ""
    "One sentence with the result."
    facts: Mapping[str, object] = field(default_factory=dict)
    "The model and the settings, by name. Empty values are left out."

    def lines(self) -> list[list[str]]:
        """Returns pairs of name and value as text, the last of them the date."""
        facts = [[name, display_path(value)] for name, value in self.facts.items() if value not in (None, "")]
        return [*facts, ["Saved", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"]]


def page(
    *widgets: PageWidget, title: str = "refine_lab", links: Sequence[Link] = (), about: About | None = None
) -> str:
    """Returns the text of an HTML file with the widgets' current views, one below the other, under `title` and `about`.

    Features that need no Python work on the page: `links` define which trait follows which. Nothing is loaded from
    elsewhere, and the page forbids it. Text from models and documents is included as data, never as markup: every `<`
    in it is escaped.
    """
    about = about or About()
    parts = [
        {"esm": widget._esm, "css": widget._css, "heading": widget.page_heading, "state": widget.page_state()}
        for widget in widgets
    ]
    follows = [[widgets.index(one), name, widgets.index(other), its] for one, name, other, its in links]
    head = {"title": title, "conclusion": about.conclusion, "facts": about.lines()}
    content = json_values(
        {"head": head, "widgets": parts, "links": follows}, lambda data: {"base64": base64.b64encode(data).decode()}
    )
    template, script = ((STATIC / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    texts = {"TITLE": html.escape(title), "SCRIPT": script, "DATA": data}
    return re.sub("%(TITLE|SCRIPT|DATA)%", lambda match: texts[match[1]], template)


def page_path(path: Path | str, **names: object) -> Path:
    """Checks that a page can be written to the path, before long work begins, and returns the path.

    `{name}` in the file name is replaced by the last part of that value, as in `explore-{model}.html`, so that pages of
    different models do not replace each other.

    Raises ValueError if another kind of file exists there, FileNotFoundError if its folder does not exist, and OSError
    if no file can be written in it.
    """
    path = path_of("the page", path)
    for name, value in names.items():
        last = re.sub(r"[^\w.-]+", "-", Path(str(value)).name)[:80].strip("-.")
        if f"{{{name}}}" in path.name:
            path = path.with_name(path.name.replace(f"{{{name}}}", last))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for the page {path.name}")
    if path.exists() and not (path.is_file() and MARK in path.read_bytes()[:1000]):
        raise ValueError(f"{path} already exists and was not written by refine_lab; choose another file name")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as trial:
            trial.write(MARK)
    except OSError as error:
        raise OSError(f"the page {path} cannot be written: {error.strerror}") from None
    return path


def save_page(
    path: Path | str,
    *widgets: PageWidget,
    title: str = "refine_lab",
    links: Sequence[Link] = (),
    about: About | None = None,
) -> Path:
    """Writes `page` to a file atomically, and returns its path.

    An existing page of ours is replaced. Raises as `page_path`, and OSError if the page cannot be written.
    """
    path = page_path(path)
    replace_text(path, page(*widgets, title=title, links=links, about=about))
    return path
