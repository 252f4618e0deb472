"""Static pictures beside the plotly figures of executed notebooks, for viewers that run no plotly.

    python -m benchmarks.static_figures docs/results/*.ipynb

The notebooks show figures in plotly's own type, `application/vnd.plotly.v1+json`: interactive in JupyterLab, and left out by
GitHub and nbconvert, which do not know that type. This command adds an `image/png` to each output that has the figure and no
picture. Everything else in the file stays as it is. kaleido (the `dev` extra) draws the pictures in Chromium: the one on the
path, or the one that the environment variable CHROMIUM names.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat.reader import NotJSONError

from refine_lab.runs.durable import replace_text

FIGURE = "application/vnd.plotly.v1+json"
PICTURES = ("image/png", "image/svg+xml")
WIDTH = 1000
"""Pixels of a figure that has no width of its own; its height is its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK", help="an executed notebook")
    paths: list[Path] = parser.parse_args().notebooks
    name = os.environ.get("CHROMIUM") or "chromium"
    chromium = shutil.which(name)
    if not chromium:
        parser.error(f"{name} is no program here: install Chromium, or name it in the environment variable CHROMIUM")
    for path in paths:
        try:
            added = add_pictures(path, chromium)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        print(f"{path}: pictures added: {added}; size: {path.stat().st_size / 1e6:.2f} MB")


def add_pictures(path: Path, chromium: str) -> int:
    """Add a PNG to every output of a notebook that has a plotly figure and no picture; return how many were added.

    The file is written once, after the last picture is drawn, and not at all where there is none to add. Raises
    FileNotFoundError for a path without a file, and ValueError for a file that is no notebook, a `chromium` that does not
    start, and an environment without kaleido.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (NotJSONError, nbformat.ValidationError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no Jupyter notebook") from error
    outputs = without_picture(notebook)
    for output, picture in zip(outputs, draw([output["data"][FIGURE] for output in outputs], chromium), strict=True):
        output["data"]["image/png"] = base64.b64encode(picture).decode("ascii")
    if outputs:
        replace_text(path, nbformat.writes(notebook))
    return len(outputs)


def without_picture(notebook: Any) -> list[Any]:
    """The outputs of a notebook that have a plotly figure and no picture, in order."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    kinds = [set(output.get("data", ())) for output in outputs]
    return [output for output, has in zip(outputs, kinds, strict=True) if FIGURE in has and not has & set(PICTURES)]


def draw(figures: Sequence[Any], chromium: str) -> list[bytes]:
    """A PNG of each figure, one pixel a pixel, on the figure's own ground. One Chromium draws them all; no network."""
    return asyncio.run(_draw(figures, chromium)) if figures else []


async def _draw(figures: Sequence[Any], chromium: str) -> list[bytes]:
    try:
        from kaleido import Kaleido
        from kaleido.errors import BrowserFailedError
    except ImportError as error:
        raise ValueError("kaleido is not installed: pip install 'refine_lab[dev]'") from error
    try:
        async with Kaleido(path=chromium, mathjax=False) as browser:
            return [
                await browser.calc_fig(dict(figure), {"format": "png", "scale": 1, "width": _width(figure)})
                for figure in figures
            ]
    except BrowserFailedError as error:
        raise ValueError(f"{chromium} did not start as a browser: name Chromium in CHROMIUM") from error


def _width(figure: Any) -> int | float:
    return figure.get("layout", {}).get("width") or WIDTH


if __name__ == "__main__":
    main()
