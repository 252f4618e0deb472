"""What the tests of the browser tier share: a notebook open in JupyterLab (`benchmarks.jupyterlab`), and pictures of it."""

from __future__ import annotations

import os

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
    "change_theme",
    "opened",
    "serve",
    "take_shots",
    "write_notebook",
]


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
