"""Runs the checks in order, from the cheapest to two training steps, and turns each into one finding."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from refine_lab.doctor.fault import Fault
from refine_lab.doctor.kernels import check_kernels
from refine_lab.doctor.memory import GIB
from refine_lab.doctor.packages import check_packages
from refine_lab.doctor.steps import Training, check_memory, check_steps
from refine_lab.doctor.weights import check_head, check_weights
from refine_lab.models import FastWeightLM, load_model
from refine_lab.models.loading import prepared, resolve_device
from refine_lab.parity import parity
from refine_lab.parity.gate import quiet
from refine_lab.text import printable
from refine_lab.validation import require

LEAST = 256
"""Fewest tokens of a row: REFINE needs room for its rollouts, and the estimate of memory two lengths."""


@dataclass(frozen=True)
class Request:
    """What is examined: a model by name, on a device, with rows of `length` tokens.

    `memory` is how many GiB a step can use; None stands for what is free on the device. With `activation_checkpointing`
    None, as many parts are recomputed as the model allows, as in the paper's recipe here.
    """

    model: str
    length: int = 2048
    device: str = "auto"
    activation_checkpointing: str | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        require(self.length >= LEAST, "length", self.length, f"at least {LEAST}")
        require(self.memory is None or self.memory > 0, "memory", self.memory, "above 0")


@dataclass(frozen=True)
class Finding:
    """The result of one check, in one line."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<9} {self.status:<8} {self.detail}"


def examine(request: Request) -> Iterator[Finding]:
    """Yields one finding per check as soon as it is known; a check that needs a failed one is skipped.

    Raises ConfigError for an unknown device.
    """
    quiet()
    device = resolve_device(request.device)
    yield _finding("packages", lambda: check_packages(_model_type(request), _capability(device)))
    yield from _loaded_model(request, device)
    gc.collect()  # the weights that were read make room for random ones
    yield from _training(request, device)


def _finding(name: str, check: Callable[[], str]) -> Finding:
    """Runs a check; every error it raises is a finding, since broken installations raise errors of every kind."""
    try:
        return Finding(name, "ok", check())
    except Fault as fault:
        return Finding(name, "failed", printable(str(fault)))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        return Finding(name, "failed", printable(kind + first))


def _skipped(names: str, failed: str) -> Iterator[Finding]:
    yield from (Finding(name, "skipped", f"needs the check of {failed}") for name in names.split())


def _model_type(request: Request) -> str | None:
    """Returns the family of the model, or None for a model that cannot be used, which the check of the weights reports."""
    try:
        return prepared(request.model, device=request.device)[1].get_text_config().model_type
    except (ValueError, OSError, ImportError):
        return None


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _loaded_model(request: Request, device: torch.device) -> Iterator[Finding]:
    """Yields the findings about the model as it is stored."""
    loaded: list[tuple[FastWeightLM, PreTrainedTokenizerBase]] = []

    def weights() -> str:
        with warnings.catch_warnings(action="ignore"):  # a head that differs is reported by its own check
            loaded.append(load_model(request.model, device=str(device)))
        return check_weights(loaded[0][0], request.model)

    finding = _finding("weights", weights)
    yield finding
    if finding.status == "failed":
        yield from _skipped("head kernels parity", "weights")
        return
    (model, tokenizer), trained = loaded[0], not request.model.startswith("new:")
    config: Any = prepared(request.model, device=str(device))[1]
    yield _finding("head", lambda: check_head(model, tokenizer, config, trained=trained))
    yield _finding("kernels", lambda: check_kernels(model))
    yield _finding("parity", lambda: _parity(model))


def _parity(model: FastWeightLM) -> str:
    found = parity(model)
    if not found.holds:
        raise Fault(f"{found.sentence}: do not train it; python -m refine_lab.parity prints all comparisons")
    return found.sentence


def _training(request: Request, device: torch.device) -> Iterator[Finding]:
    """Yields the findings about training the model from random weights."""
    made: list[Any] = []

    def memory() -> str:
        random_weights = f"new:{request.model.removeprefix('new:')}"
        policy = load_model(random_weights, device=str(device))[0]
        training = Training.of(policy, request.activation_checkpointing or policy.RECOMPUTABLE[-1])
        free = None if request.memory is None else int(request.memory * GIB)
        estimate, sentence = check_memory(training, request.length, free)
        made.append((training, estimate))
        return sentence

    finding = _finding("memory", memory)
    yield finding
    if finding.status == "failed":
        yield from _skipped("steps", "memory")
        return
    training, estimate = made[0]
    yield _finding("steps", lambda: check_steps(training, request.length, estimate))
