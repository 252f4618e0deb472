"""Estimates the time and the disk space that the cells of a grid need, by timing a part of each kind of run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from refine_lab.config import TrainConfig, to_json
from refine_lab.experiments.estimate import Rates, answering_rates, notebook_rates, start_seconds, training_rates
from refine_lab.sweep.cells import Cell
from refine_lab.sweep.configs import cell_configs
from refine_lab.text import duration

PARAMETER_BYTES = 12
"""Bytes of a parameter in a checkpoint: its value and the two moments of AdamW in float32."""
ROLLOUT_BYTES = 100
"""Bytes of a rollout in a run's records, compressed."""
CELL_BYTES = 3_000_000
"""Bytes of a cell besides its runs: the notebook before and after, its page, tokenizers and logs."""


@dataclass(frozen=True)
class Estimate:
    """What the unfinished cells of a grid need; None where it is not known."""

    seconds: float | None
    "Total, if one cell is executed at a time."
    bytes: int | None
    cells: int
    "Number of unfinished cells."

    def sentence(self, processes: int = 1) -> str:
        """Returns the estimate as text, for that many cells at a time."""
        if not self.cells:
            return "all cells have finished."
        processes = min(processes, self.cells)
        time = "an unknown time" if self.seconds is None else f"about {duration(self.seconds / processes)}"
        disk = "an unknown amount of disk space" if self.bytes is None else f"about {size(self.bytes)} on disk"
        where = f" with {processes} at a time (if the cores suffice)" if processes > 1 else ""
        cells = "1 cell" if self.cells == 1 else f"{self.cells} cells"
        return f"{cells} to execute: {time}{where}, {disk}."


def estimated(cells: Sequence[Cell], log: Callable[[str], object] = print) -> Estimate:
    """Estimates what the unfinished cells need: their runs, and the start, checks and evaluations of their notebooks.

    If cells of the same notebook have finished in this folder, the estimate is scaled by the ratio of their time to
    their estimate. A notebook that does not create runs from a recipe is estimated by the mean of its finished cells.
    """
    left = [cell for cell in cells if cell.state != "finished"]
    if not left:
        return Estimate(seconds=0.0, bytes=0, cells=0)
    done = [cell for cell in cells if cell.state == "finished" and cell.seconds]
    clocks = _Clocks()
    timed = {cell.folder: clocks.seconds(cell) for cell in [*left, *done]}
    known = [seconds for cell in left if (seconds := timed[cell.folder]) is not None]
    pairs = [(cell.seconds or 0.0, timed[cell.folder] or 0.0) for cell in done]
    taken, expected = (sum(part) for part in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    if len(known) == len(left):
        seconds: float | None = sum(known) * (taken / expected if expected else 1.0)
    else:
        seconds = taken / len(done) * len(left) if done else None
        log(
            "This notebook does not create runs from a recipe, so its time is estimated from finished cells, if there are any."
        )
    sizes = [clocks.bytes(cell) for cell in left]
    return Estimate(seconds, None if None in sizes else sum(filter(None, sizes)), len(left))


class _Clocks:
    """Times each kind of run and of notebook once."""

    def __init__(self) -> None:
        self._runs: dict[str, Rates] = {}
        self._notebooks: dict[str, tuple[float, float]] = {}

    def seconds(self, cell: Cell) -> float | None:
        """Returns the seconds of a cell, or None for a notebook that does not create runs from a recipe."""
        if not (configs := cell_configs(cell)):
            return None
        runs = sum(self._rates(config).seconds(config) for config in configs)
        processes = len(configs) if isinstance(configs[0], TrainConfig) else 1  # runs that answer share one
        key = json.dumps([configs[0].model, json.loads(to_json(configs[0]))["data"]])
        if key not in self._notebooks:
            self._notebooks[key] = notebook_rates(configs[-1])
        parity, measures = self._notebooks[key]
        return runs + start_seconds() * (1 + processes) + parity + measures * (1 + len(configs))

    def bytes(self, cell: Cell) -> int | None:
        """Returns the disk space of a cell's folder when it has finished."""
        configs = cell_configs(cell)
        return CELL_BYTES + sum(run_bytes(each, self._rates(each).parameters) for each in configs) if configs else None

    def _rates(self, config: Any) -> Rates:
        key = _kind(config)
        if key not in self._runs:
            self._runs[key] = training_rates(config) if isinstance(config, TrainConfig) else answering_rates(config)
        return self._runs[key]


def _kind(config: Any) -> str:
    """Returns what determines the speed of a configuration: everything but the seed and the amount of work."""
    values = json.loads(to_json(config))
    free = {
        "seed",
        "lr",
        "schedule",
        "steps",
        "batch_size",
        "mini_batch_size",
        "eval_every",
        "checkpoint_every",
        "count",
    }
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    parts += [part for outer in parts[1:] for part in outer.values() if isinstance(part, dict)]
    for part in parts:
        for name in free & part.keys():
            del part[name]
    return json.dumps(values, sort_keys=True)


def run_bytes(config: Any, parameters: int) -> int:
    """Returns the disk space of a finished run: its checkpoints and the records of its rollouts."""
    if not isinstance(config, TrainConfig):
        return 2 * PARAMETER_BYTES * parameters * (config.reset == "never")
    written = -(-config.steps // config.checkpoint_every)
    kept = min(written, config.keep_checkpoints + 1)  # the one of lowest held-out loss is kept, too
    if config.keep_every:
        kept = min(written, kept + config.steps // config.keep_every)
    refine = config.refine
    per_row = refine.num_chunks * refine.group_size if refine is not None and refine.rolls_out else 0
    rollouts = config.steps * config.batch_size * per_row
    return kept * PARAMETER_BYTES * parameters + rollouts * ROLLOUT_BYTES


def size(count: int) -> str:
    """Returns a number of bytes with its unit."""
    number = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
