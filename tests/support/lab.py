"""Shared by the browser tests: a notebook in JupyterLab (`benchmarks.jupyterlab`), faults of a page, and screenshots."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")

from benchmarks.jupyterlab import FLAGS, PATIENCE, TOKEN, Lab, opened, serve, write_notebook  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

__all__ = [
    "FLAGS",
    "PATIENCE",
    "ROOT",
    "TOKEN",
    "Lab",
    "Notebook",
    "change_theme",
    "faultless_page",
    "faults",
    "opened",
    "serve",
    "settle",
    "take_shots",
    "write_notebook",
]


@dataclass(kw_only=True)
class Notebook:
    """A notebook in JupyterLab; test modules add what they do in it."""

    lab: Lab

    @property
    def page(self) -> playwright.Page:
        return self.lab.page


def faults(page: playwright.Page) -> list[str]:
    """Returns a list to which a page's errors, dialogs and requests for anything but files are added from now on."""
    found: list[str] = []
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda message: message.type == "error" and found.append(message.text))
    page.on("dialog", lambda dialog: (found.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: request.url.startswith(("file:", "blob:")) or found.append(request.url))
    return found


@contextmanager
def faultless_page(browser: Any, **options: Any) -> Iterator[Any]:
    """Opens a page with `browser.new_page`'s options; in the end, it must have had no fault."""
    page = browser.new_page(**options)
    found = faults(page)
    yield page
    page.close()
    assert found == []


def settle(page: playwright.Page) -> None:
    """Waits two frames, until the last changes are painted."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def change_theme(page: playwright.Page, theme: str) -> None:
    """To `Light` or `Dark`."""
    page.evaluate(f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})")
    page.wait_for_selector(f"body[data-jp-theme-light='{str(theme == 'Light').lower()}']", state="attached")
    page.wait_for_timeout(700)  # the style sheet comes later than the attribute


def take_shots(page: playwright.Page, name: str) -> None:
    """Pictures in light and dark, where REFINE_SHOTS names a folder."""
    if folder := os.environ.get("REFINE_SHOTS"):
        for theme in ("Light", "Dark"):
            change_theme(page, theme)
            page.screenshot(path=f"{folder}/{name}_{theme.lower()}.png")
