"""Checkpoints of a run: the manifest that records whether one is intact, which one is used, and which are kept.

`checkpoint.json` in each checkpoint contains the size and digest of its files, and those of the run's records at that
step: `metrics.jsonl` up to its last line at that time, and every closed file of rollouts and answers.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from refine_lab.runs.durable import digest, remove_folder, replace_bytes, short_digest, sync
from refine_lab.runs.files import open_file, parquet_parts, read_json

MANIFEST = "checkpoint.json"
OPTIMIZER = "optimizer.safetensors"
"""File in a checkpoint that contains the optimizers' moments."""

SEEN_SECONDS = 60.0
"""Maximum time until a machine shows a file that another one has written to a network file system."""

Facts = Mapping[str, Any]
"""Size and digest of a file: `bytes` and `digest`."""


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Returns step and folder of every checkpoint of a run, in order; other names than `step-<n>` are ignored."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((int(f.name[5:]), f) for f in folders if re.fullmatch(r"step-[0-9]+", f.name) and f.is_dir())


def facts_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "digest": digest(path)}


def write_manifest(folder: Path, step: int, records: Mapping[str, Facts], held_out_loss: float | None) -> None:
    """Writes the manifest of a checkpoint whose other files are complete."""
    files = {
        path.relative_to(folder).as_posix(): facts_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    values = {"format_version": 1, "step": step, "held_out_loss": held_out_loss, "files": files, "records": records}
    text = json.dumps(values | {"digest": _digest_of(values)}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _digest_of(values: Mapping[str, Any]) -> str:
    return short_digest(hashlib.sha256(json.dumps(values, sort_keys=True).encode()))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns a checkpoint's manifest, or None if it has none. Raises ValueError if it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    values = read_json(path)
    if values.pop("digest", None) != _digest_of(values):
        raise ValueError(f"{path} is damaged: its digest does not match its content")
    parts = [values.get(name) for name in ("files", "records")]
    facts = [each for part in parts if isinstance(part, dict) for each in part.values()]
    described = all(isinstance(each, dict) and {"bytes", "digest"} <= each.keys() for each in facts)
    if not (described and all(isinstance(part, dict) for part in parts) and type(values.get("step")) is int):
        raise ValueError(f"{path} is damaged: it is not a checkpoint manifest")
    return values


def check_files(folder: Path, files: Mapping[str, Facts], *, leave_out: Collection[str] = ()) -> None:
    """Raises ValueError, naming the file, unless the files in `folder` have the sizes and digests in `files`."""
    for name, facts in files.items():
        path = folder / name
        if name in leave_out:
            continue
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise ValueError(f"{path} is damaged: it has {size:,} bytes instead of {facts['bytes']:,}")
        if digest(path) != facts["digest"]:
            raise ValueError(f"{path} is damaged: its content has changed since it was written")


def check_checkpoint(folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Raises ValueError, naming the file, if a checkpoint is damaged; without a manifest, only file formats are checked."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return check_files(folder, manifest["files"], leave_out=leave_out)
    for path in folder.iterdir():
        if path.suffix in (".json", ".safetensors"):
            open_file(path).close()  # raises ValueError for a pipe
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                safe_open(path, "np").__exit__(None, None, None)  # checks that the tensors fill the file
        except (ValueError, RecursionError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def newest_whole(
    run: Path, *, leave_out: Collection[str] = ()
) -> tuple[tuple[int, Path] | None, list[tuple[Path, str]]]:
    """Returns step and folder of the newest undamaged checkpoint, or None, and the newer ones, each with its damage."""
    damaged: list[tuple[Path, str]] = []
    saved = checkpoints(run)
    described = [step for step, folder in saved if (folder / MANIFEST).exists()]
    for step, folder in reversed(saved):
        try:
            if described and step > described[0] and step not in described:
                raise ValueError(f"{folder / MANIFEST} is missing")
            check_checkpoint(folder, leave_out=leave_out)
        except ValueError as error:
            damaged.append((folder, str(error)))
        else:
            return (step, folder), damaged
    return None, damaged


def resume_point(run: Path) -> tuple[int, Path] | None:
    """Returns step and folder of the checkpoint to resume from, or None; sets newer, damaged ones aside and prints why.

    The caller must hold the run's lock.
    """
    found, damaged = newest_whole(run)
    where = "from the beginning" if found is None else f"from step {found[0]}"
    for folder, sentence in damaged:
        aside = _free(folder.with_name(f"damaged-{folder.name}"))
        folder.rename(aside)
        sync(aside.parent)
        print(f"{sentence}. The checkpoint is kept as {aside.name}, and the run continues {where}.", flush=True)
    if found is not None and read_manifest(found[1]) is None:
        print(
            f"{found[1]} has no {MANIFEST} because an earlier version wrote it; only the file format was checked.",
            flush=True,
        )
    return found


def wait_for_checkpoint(run: Path, step: int) -> Path:
    """Returns the checkpoint of a step that another worker has chosen, once this worker's machine shows it.

    Raises FileNotFoundError if it does not within `SEEN_SECONDS`.
    """
    deadline = time.monotonic() + SEEN_SECONDS
    while (folder := dict(checkpoints(run)).get(step)) is None:
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"the run continues from step {step}, but {platform.node()} finds no checkpoint of it in {run}: the machines "
                "of all workers must share this folder"
            )
        time.sleep(0.2)
    return folder


def _free(path: Path) -> Path:
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in range(1, 10**6))
    return next(name for name in names if not name.exists())


def drop_checkpoints(run: Path, newest: int, every: int = 0) -> None:
    """Removes checkpoints except the `newest` ones, the one of lowest held-out loss, and those of every `every` steps."""
    saved = checkpoints(run)
    losses = {step: loss for step, folder in saved if (loss := _held_out_loss(folder)) is not None}
    kept = {step for step, _ in saved[-newest:]}
    kept |= {min(losses, key=lambda step: (losses[step], step))} if losses else set()
    for step, folder in saved:
        if step not in kept and not (every and step % every == 0):
            remove_folder(folder)


def _held_out_loss(folder: Path) -> float | None:
    return _whole_manifest(folder).get("held_out_loss")


def _whole_manifest(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest; an empty one if it is missing or damaged."""
    try:
        return read_manifest(folder) or {}
    except ValueError:
        return {}


# -- records ---------------------------------------------------------------------------------------------------------


def closed_files(run: Path) -> dict[str, Facts]:
    """Returns size and digest of every closed file of rollouts and answers, by its path in the run directory."""
    parts = [path for name in ("rollouts", "answers") for _, _, path in parquet_parts(run / name)]
    return {path.relative_to(run).as_posix(): facts_of(path) for path in parts}


def restore_records(run: Path, manifest: Mapping[str, Any]) -> None:
    """Reduces a run's records to those in a checkpoint's manifest, so that later ones are written again.

    Raises ValueError, before anything is changed, if one of them is damaged or missing.
    """
    records = manifest["records"]
    check_records(run, manifest)
    size, path = records["metrics.jsonl"]["bytes"], run / "metrics.jsonl"
    if path.stat().st_size > size:
        replace_bytes(path, _beginning(path, size))
    for name in closed_files(run):
        if name not in records:
            (run / name).unlink()


def drop_records(run: Path) -> None:
    """Removes all records of a run, which then starts from the beginning."""
    path = run / "metrics.jsonl"
    if path.exists() and path.stat().st_size:
        replace_bytes(path, b"")
    for name in ("rollouts", "answers"):
        for _, _, part in parquet_parts(run / name):
            part.unlink()


def check_records(run: Path, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the file and what can be done, unless a run's records up to a checkpoint are unchanged."""
    if (sentence := _damage(run, manifest)) is None:
        return
    step = manifest["step"]
    earlier = (folder for number, folder in reversed(checkpoints(run)) if number < step)
    whole = next((each["step"] for each in map(_whole_manifest, earlier) if each and _damage(run, each) is None), None)
    advice = "start a new run"
    if whole is not None:
        advice = f"delete the checkpoints after step {whole}, from which the run then continues"
    raise ValueError(f"{sentence}, so the run cannot continue: restore the file, or {advice}")


def _damage(run: Path, manifest: Mapping[str, Any]) -> str | None:
    """Returns which record differs from a manifest, or None."""
    for name, facts in manifest["records"].items():
        path = run / name
        if not path.is_file():
            return f"{path}, which contained the records up to step {manifest['step']}, is missing"
        unchanged = facts_of(path) == facts
        if name == "metrics.jsonl":
            beginning = _beginning(path, facts["bytes"])
            unchanged = len(beginning) == facts["bytes"] and short_digest(hashlib.sha256(beginning)) == facts["digest"]
        if not unchanged:
            return f"{path} was modified: its records up to step {manifest['step']} do not match the checkpoint"
    return None


def _beginning(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)
