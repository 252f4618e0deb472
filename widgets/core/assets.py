"""Loads the widgets' scripts and style sheets, with imported modules inlined."""

from __future__ import annotations

import re
from pathlib import Path

from widgets.core import palette

STATIC = Path(__file__).parent.parent / "static"
IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+)\.js";\n', re.MULTILINE)


def script(name: str) -> str:
    """Returns the module `static/<name>.js` with the neighbouring modules that it imports inlined, each once.

    The page receives a widget's module as a single text, without an address from which to import others.
    """
    done: set[str] = set()

    def inlined(stem: str) -> str:
        if stem in done:
            return ""
        done.add(stem)
        text = (STATIC / f"{stem}.js").read_text(encoding="utf-8")
        before = "".join(inlined(other) for other in IMPORT.findall(text))
        return before + IMPORT.sub("", text)

    return inlined(name)


def style(name: str) -> str:
    """Returns the colours of methods and the shared style sheet, followed by `static/<name>.css`."""
    return palette.style() + "\n".join(
        (STATIC / f"{sheet}.css").read_text(encoding="utf-8") for sheet in ("shared", name)
    )
