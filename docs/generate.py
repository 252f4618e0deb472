"""Write what the documents take from the code: `python docs/generate.py`, or `make docs`.

`docs/api.md` lists the names that `refine_lab` exports; the table of files in `docs/architecture.md` holds the first
sentence of each module's docstring; `docs/glossary.md` is the glossary of the tooltips; the tables of `docs/scale.md` hold
what `refine_lab.estimate` returns, and the recorded peaks. With `--check`, nothing is
written, and the exit status is 1 where something differs.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- files: written by docs/generate.py -->", "<!-- end of files -->"
PEAKS, ESTIMATES, END_TABLE = (
    "<!-- peaks: written by docs/generate.py -->",
    "<!-- estimates: written by docs/generate.py -->",
    "<!-- end of table -->",
)


def first_sentence(docstring: str | None) -> str:
    """The first sentence of a docstring, in one line."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    end = paragraph.find(". ")
    return (paragraph if end < 0 else paragraph[: end + 1]).replace("|", "\\|")


def api() -> str:
    """The text of docs/api.md."""
    import refine_lab

    lines = [
        "# Public names",
        "",
        "Import these names from `refine_lab` itself, as in `from refine_lab import load_model`. Names are loaded on first",
        "use, so that `import refine_lab` loads neither torch nor transformers. `make docs` writes this page.",
        "",
        "| name | what it is | home |",
        "|---|---|---|",
    ]
    for name in sorted(refine_lab.__all__, key=str.lower):
        value = getattr(refine_lab, name)
        home = getattr(value, "__module__", None) or value.__name__
        lines.append(f"| `{name}` | {first_sentence(inspect.getdoc(value))} | `{home}` |")
    return "\n".join(lines) + "\n"


def files() -> str:
    """The table of files, folder by folder."""
    lines = ["| file | what it does |", "|---|---|"]
    for package in ("refine_lab", "widgets"):
        for path in sorted((ROOT / package).rglob("*.py"), key=lambda path: (path.parent.parts, path.name)):
            sentence = first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
            if path.name != "__init__.py" or path.parent.name == package:
                lines.append(f"| `{path.relative_to(ROOT)}` | {sentence} |")
    return "\n".join(lines) + "\n"


def peaks() -> str:
    """The table of counted and estimated peaks."""
    record = json.loads((ROOT / "benchmarks" / "results" / "estimate.json").read_text(encoding="utf-8"))
    lines = ["| model | tokens | recomputed | counted GiB | estimated GiB | difference |", "|---|---|---|---|---|---|"]
    for each in record["pairs"]:
        counted, estimated = (each[name]["total"] for name in ("counted_gib", "estimated_gib"))
        case = f"{each['model']} | {each['length']:,} | {each['activation_checkpointing']}"
        lines.append(f"| {case} | {counted:.1f} | {estimated:.1f} | {each['error']:+.1%} |")
    return "\n".join(lines) + "\n"


def estimates() -> str:
    """The table of estimates for one GPU, one node and two nodes."""
    from refine_lab.estimate import estimate
    from refine_lab.estimate.memory import PARTS
    from refine_lab.estimate.models import PUBLISHED

    head = ["model", "tokens of a row", "GPUs", *PARTS, "peak GiB", "s a step", "tokens/s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model, length, count in product(PUBLISHED, (16_384, 65_536), (1, 8, 16)):
        found = estimate(model, length, count)
        sizes = [f"{found.memory[part]:.1f}" for part in PARTS]
        row = [model, f"{length:,}", str(count), *sizes, f"{found.peak:.1f}", f"{found.seconds:.2f}"]
        lines.append(f"| {' | '.join(row)} | {round(found.tokens_per_second, -3):,.0f} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, begin: str, table: str, end: str = END_TABLE) -> str:
    """A document with the table after a marker replaced."""
    before, _, rest = text.partition(begin + "\n")
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}{end}{after}"


def documents() -> dict[Path, str]:
    """What the generated documents hold, by path."""
    from widgets.core import glossary

    architecture, scale = ROOT / "docs" / "architecture.md", ROOT / "docs" / "scale.md"
    scaled = with_table(scale.read_text(encoding="utf-8"), PEAKS, peaks())
    return {
        ROOT / "docs" / "api.md": api(),
        architecture: with_table(architecture.read_text(encoding="utf-8"), BEGIN, files(), END),
        scale: with_table(scaled, ESTIMATES, estimates()),
        ROOT / "docs" / "glossary.md": glossary.page(),
    }


def main() -> int:
    wrong = [
        path for path, text in documents().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in wrong:
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} differs from the code: run `make docs`", file=sys.stderr)
        else:
            path.write_text(documents()[path], encoding="utf-8")
    return 1 if wrong and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
