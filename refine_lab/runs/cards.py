"""Result cards of a run: which evaluations of the run exist, their main metrics, and where the full results are.

An evaluation writes one JSON file per folder of results to the run's folder `evaluations/`, and replaces it when it
continues. Cards are records beside a run: nothing that trains or resumes reads them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refine_lab.runs.durable import make_folder
from refine_lab.runs.files import is_run, read_json, write_json

FOLDER = "evaluations"
FORMAT_VERSION = 1


def evaluated_run(model: Path) -> tuple[Path, int | None] | None:
    """Returns the run of a checkpoint's folder, and the step of the checkpoint; None for a folder outside a run."""
    run = model.parent.parent
    if model.parent.name != "checkpoints" or not is_run(run):
        return None
    found = re.fullmatch(r"step-(\d+)", model.name)
    return run, int(found[1]) if found else None


def write_card(run: Path, out: Path, values: Mapping[str, Any]) -> None:
    """Writes the card of the evaluation whose results are in the folder `out`.

    Raises OSError if the run cannot be written.
    """
    path = run / FOLDER
    make_folder(path)
    results = os.path.relpath(out.resolve(), run.resolve())
    key = hashlib.sha256(results.encode(errors="surrogateescape")).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "_", out.resolve().name)[:60]
    write_json(path / f"{name}-{key}.json", {"format_version": FORMAT_VERSION, **values, "results": results})


def read_cards(run: Path) -> list[dict[str, Any]]:
    """Returns the cards of a run by date, the oldest first. Raises ValueError for a damaged one."""
    cards = [read_json(path) for path in sorted((run / FOLDER).glob("*.json"))]
    return sorted(cards, key=lambda card: str(card.get("date")))
