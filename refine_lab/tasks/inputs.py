"""What a run over a task is begun with: names of files outlive their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from refine_lab.models.loading import resolve
from refine_lab.tasks.prompts import Example


def inputs_of(model: str, examples: Iterable[Example]) -> dict[str, Any]:
    """Number and digest of the examples, and a digest of the model's files (name, size, time of change).

    Runs keep it beside their configuration: one is gone on from only where both are what they were.
    """
    examples = tuple(examples)
    weights, folder = hashlib.sha256(), resolve(model.removeprefix("new:"))
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        size = path.stat()
        weights.update(repr((path.name, size.st_size, size.st_mtime_ns)).encode())
    digests = {"prompts_digest": prompts_digest(examples), "weights_digest": weights.hexdigest()}
    return {"prompts": len(examples), **digests}


def prompts_digest(examples: Iterable[Example]) -> str:
    """A digest of the examples' names, prompts and answers."""
    prompts = hashlib.sha256()
    for example in examples:
        facts = (example.name, example.prompt_ids, example.question_start, example.answers)
        prompts.update(repr(facts).encode())
    return prompts.hexdigest()
