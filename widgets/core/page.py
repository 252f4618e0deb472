"""Writes one HTML file that shows widgets without Python or a network, with scripts, styles and data included."""

from __future__ import annotations

import base64
import html
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from refine_lab.runs.durable import replace_text
from refine_lab.validation import path_of
from widgets.core.assets import STATIC
from widgets.core.packing import json_values


class PageWidget(Protocol):
    """The interface that a page requires of a widget; `widgets.core.base.Widget` implements it."""

    _esm: Any
    _css: Any

    def page_state(self) -> dict[str, Any]: ...


MARK = b'<meta name="generator" content="refine_lab">'
"""Marker by which our own pages are recognised."""
Link = tuple[PageWidget, str, PageWidget, str]
"""A trait that follows another: source widget, its trait, following widget, its trait."""


def page(*widgets: PageWidget, title: str = "refine_lab", links: Sequence[Link] = ()) -> str:
    """Returns the text of an HTML file with the widgets' current views, one below the other.

    Features that need no Python work on the page: `links` define which trait follows which. Nothing is loaded from
    elsewhere, and the page forbids it. Text from models and documents is included as data, never as markup: every `<`
    in it is escaped.
    """
    parts = [{"esm": widget._esm, "css": widget._css, "state": widget.page_state()} for widget in widgets]
    follows = [[widgets.index(one), name, widgets.index(other), its] for one, name, other, its in links]
    content = json_values(
        {"widgets": parts, "links": follows}, lambda data: {"base64": base64.b64encode(data).decode()}
    )
    template, script = ((STATIC / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    texts = {"TITLE": html.escape(title), "SCRIPT": script, "DATA": data}
    return re.sub("%(TITLE|SCRIPT|DATA)%", lambda match: texts[match[1]], template)


def page_path(path: Path | str) -> Path:
    """Checks that a page can be written to the path, before long work begins.

    Raises ValueError if another kind of file exists there, FileNotFoundError if its folder does not exist, and OSError
    if no file can be written in it.
    """
    path = path_of("the page", path)
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


def save_page(path: Path | str, *widgets: PageWidget, title: str = "refine_lab", links: Sequence[Link] = ()) -> Path:
    """Writes `page` to a file atomically, and returns its path.

    An existing page of ours is replaced. Raises as `page_path`, and OSError if the page cannot be written.
    """
    path = page_path(path)
    replace_text(path, page(*widgets, title=title, links=links))
    return path
