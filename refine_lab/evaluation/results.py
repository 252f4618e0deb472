"""The files of an evaluation: one JSON and one Parquet file per task and length, and one of each for all results combined.

`units/<task>-<length>.json` contains the metrics of one task at one length, `samples/<task>-<length>.parquet` the ends
of its prompts, its answers and scores. `results.json` and `results.parquet` contain all metrics; `settings.json`
contains the settings that they depend on.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa

from refine_lab.evaluation.benchmark import Measured, Metric
from refine_lab.evaluation.catalogue import BENCHMARKS, Unit
from refine_lab.evaluation.lengths import effective_length, nolima_length
from refine_lab.evaluation.short import short_average
from refine_lab.runs.durable import make_folder, replace_text
from refine_lab.runs.files import read_json, write_parquet
from refine_lab.validation import ConfigError, require

FORMAT_VERSION = 1
PROMPT_END = 500
"""Characters of the end of a prompt that are stored with a sample."""


def unit_record(unit: Unit, measured: Measured, seconds: float) -> dict[str, Any]:
    """Returns the record of an evaluated unit."""
    return {
        "task": unit.task,
        "length": unit.length,
        "group": BENCHMARKS[unit.task].group,
        "status": "done",
        "main": BENCHMARKS[unit.task].main,
        "metrics": {name: dataclasses.asdict(metric) for name, metric in measured.metrics.items()},
        "samples": measured.count,
        "different_samples": measured.items,
        "facts": dict(measured.facts),
        "seconds": round(seconds, 3),
    }


def gap_record(unit: Unit, reason: str) -> dict[str, Any]:
    """Returns the record of a unit that could not run, with a sentence that names what is missing."""
    names = {"task": unit.task, "length": unit.length, "group": BENCHMARKS[unit.task].group}
    return {**names, "status": "missing", "main": BENCHMARKS[unit.task].main, "reason": reason}


def write_unit(out: Path, unit: Unit, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes a unit's samples, then its record: a unit whose record exists is complete."""
    for folder in ("units", "samples"):
        make_folder(out / folder)
    if rows:
        short = [{**row, "prompt": row["prompt"][-PROMPT_END:]} if "prompt" in row else dict(row) for row in rows]
        write_parquet(out / "samples" / f"{unit.name}.parquet", pa.Table.from_pylist(short))
    replace_text(out / "units" / f"{unit.name}.json", as_json(record))


def read_unit(out: Path, unit: Unit) -> dict[str, Any] | None:
    """Returns the record of a unit that has been measured in an earlier call, or None."""
    path = out / "units" / f"{unit.name}.json"
    record = read_json(path) if path.is_file() else None
    return record if record is not None and record["status"] == "done" else None


def begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of an evaluation and writes its settings, unless an earlier call did.

    Raises OSError if the folder cannot be written.
    """
    try:
        make_folder(out)
        if not (out / "settings.json").is_file():
            replace_text(out / "settings.json", as_json(settings))
    except OSError as error:
        raise OSError(f"no results can be written in the folder {str(out)!r}: {error.strerror}") from error


def require_same(out: Path, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if `out` is a file or has results with other settings; the error names the first of them."""
    require(out.is_dir() or not out.exists(), "out", str(out), "a folder, or a path where one can be created")
    path, now = out / "settings.json", json.loads(as_json(settings))
    before = read_json(path) if path.is_file() else now
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            other = f"{name} {before.get(name)!r}, not {now.get(name)!r}"
            sentence = f"{str(out)!r} already contains results with {other}; choose a different folder"
            raise ConfigError(name, now.get(name), repr(before.get(name)), sentence)


def result_of(records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of `results.json` for all records."""
    return {"format_version": FORMAT_VERSION, **about, "figures": figures(records), "units": list(records)}


def write_results(out: Path, result: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.parquet`."""
    replace_text(out / "results.json", as_json(result))
    table = [{**row, "answers": result["answers"]} for record in result["units"] for row in metric_rows(record)]
    write_parquet(out / "results.parquet", pa.Table.from_pylist(table, schema=SCHEMA))


SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("task", "group", "metric", "status", "reason", "answers")),
        *(("length", pa.int64()), ("samples", pa.int64()), ("different_samples", pa.int64())),
        *(("value", pa.float64()), ("stderr", pa.float64()), ("main", pa.bool_()), ("seconds", pa.float64())),
    ]
)
"""Columns of `results.parquet`: one row per metric of a unit, and one row with a reason per unit that could not run."""


def metric_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a unit in `results.parquet`."""
    shared = {name: record.get(name) for name in SCHEMA.names if name not in ("metric", "value", "stderr", "main")}
    if record["status"] != "done":
        return [{**shared, "metric": record["main"], "main": True}]
    return [
        {**shared, "metric": name, "value": each["value"], "stderr": each["stderr"], "main": name == record["main"]}
        for name, each in record["metrics"].items()
    ]


def figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the figures that summarise several units: effective lengths, and the average of table E.1."""
    by_task: dict[str, dict[int, float]] = {}
    for record in records:
        if record["status"] == "done" and record["length"] is not None and record["group"] == "ruler":
            score = record["metrics"][record["main"]]["value"]
            by_task.setdefault(record["task"], {})[record["length"]] = score
    needles = [scores for task, scores in by_task.items() if task.startswith("niah")]
    shared = set.intersection(*map(set, needles)) if needles else set()
    if len(needles) > 1 and shared:
        by_task["mean of the needle tasks"] = {n: fmean(scores[n] for scores in needles) for n in shared}
    found: dict[str, Any] = {
        "effective_length": {task: effective_length(scores) for task, scores in by_task.items()},
        "nolima_length": {task: nolima_length(scores) for task, scores in by_task.items()},
    }
    average = short_average(records)
    return found | ({} if average is None else {"short_average": average})


def metric_of(record: Mapping[str, Any], name: str) -> Metric:
    """Returns a metric of a measured unit."""
    return Metric(**record["metrics"][name])


def as_json(value: Mapping[str, Any]) -> str:
    """Returns strict JSON; numbers that are not finite become null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
