"""One HTML file that shows widgets without Python, without a network and still works: scripts, styles and data in it."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from widgets.core.assets import STATIC


class PageWidget(Protocol):
    """What a page needs of a widget; `widgets.core.base.Widget` has it."""

    _esm: Any
    _css: Any

    def page_state(self) -> dict[str, Any]: ...


MARK = b'<meta name="generator" content="refine_lab">'
"""By which a page of ours is known."""
Link = tuple[PageWidget, str, PageWidget, str]
"""A trait that another one follows: widget, trait, the widget that follows, its trait."""


def page(*widgets: PageWidget, title: str = "refine_lab", links: Sequence[Link] = ()) -> str:
    """The text of an HTML file with the widgets one under the other, as they look now.

    What needs no Python works there: `links` say which trait follows which. Nothing is loaded from anywhere, and the page
    forbids it. Text of models and documents is data in it, never markup: no `<` of it is written as such.
    """
    order = {id(widget): index for index, widget in enumerate(widgets)}
    parts = [
        {"esm": str(widget._esm), "css": str(widget._css), "state": _plain(widget.page_state())} for widget in widgets
    ]
    follows = [[order[id(one)], name, order[id(other)], its] for one, name, other, its in links]
    data = json.dumps({"widgets": parts, "links": follows}, allow_nan=False).replace("<", "\\u003c")
    template = (STATIC / "page.html").read_text(encoding="utf-8")
    script = (STATIC / "page.js").read_text(encoding="utf-8")
    parts_of = {"TITLE": html.escape(title), "SCRIPT": script, "DATA": data}
    return re.sub("%(TITLE|SCRIPT|DATA)%", lambda match: parts_of[match[1]], template)


def page_path(path: Path | str) -> Path:
    """Where a page can be written: asked before long work, so that it does not end in vain.

    Raises ValueError where a file of another kind stands there, FileNotFoundError where its folder is not.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for the page {path.name}")
    if path.exists() and not (path.is_file() and MARK in path.read_bytes()[:1000]):
        raise ValueError(f"{path} is there already and no page of refine_lab: name another file")
    return path


def save_page(path: Path | str, *widgets: PageWidget, title: str = "refine_lab", links: Sequence[Link] = ()) -> Path:
    """Write `page` to a file, whole or not at all, and return its path.

    A page of ours is replaced. Raises as `page_path`, and OSError where the page cannot be written.
    """
    path = page_path(path)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(page(*widgets, title=title, links=links), encoding="utf-8")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return path


def _plain(value: Any) -> Any:
    """As JSON has it: bytes as base64, numbers that are not finite as null."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"base64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
