"""The scripts and style sheets of the widgets, each inlined into one text."""

from __future__ import annotations

import re
from pathlib import Path

STATIC = Path(__file__).parent.parent / "static"
IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+)\.js";\n', re.MULTILINE)


def script(name: str) -> str:
    """The module `static/<name>.js` with the modules that it imports from beside it written into it, each once.

    A widget's module is one text to the page, which has no address to import others from.
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


def style(*names: str) -> str:
    """The style sheets `static/<name>.css` one after the other, the shared one first."""
    return "\n".join((STATIC / f"{name}.css").read_text(encoding="utf-8") for name in ("shared", *names))
