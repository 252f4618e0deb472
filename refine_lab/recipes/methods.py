"""The methods that runs compare: their names in order, and the settings in which each differs from REFINE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from refine_lab.recipes.memory import MEMORY
from refine_lab.refine_config import EXPECTED_REWARDS, RefineConfig
from refine_lab.validation import require, unknown

Phase = Literal["pretrain", "midtrain", "posttrain", "ttt"]

METHODS: dict[Phase, tuple[str, ...]] = {
    "midtrain": ("sft", "refine"),  # section 4.2
    "posttrain": ("sft", "nested_sft", "nested_refine"),  # section 4.3
    "ttt": ("none", "sft", "refine"),  # section 4.4
}
"""The methods that the paper compares; nested ones make updates on the prompts before the update on the answers."""

COMPARED: Mapping[str, tuple[str, ...]] = {"midtrain": (*METHODS["midtrain"], "refine_memory", "expected")}
"""Recipes whose notebook compares other methods by default -> these methods."""

PLACES: Mapping[str, Any] = {"selection": "memory", **MEMORY}
"""Settings of the positions of `weighted`, `expected` and `refine_memory`: where the next tokens need the memory."""

ROLLOUTS: Mapping[str, Any] = {"group_size": 8, "group_by": "prefix", "reward": "binary"}
"""Settings of the rollouts of `refine_memory`: eight from each position, which are compared with each other."""

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "placebo": {"placebo": True},
    "dft": {"estimator": "dft", "ntp_coef": 0.0, "nsp_coef": 1.0},  # its loss replaces the next-token loss
    "longce": {"estimator": "longce", "ntp_coef": 0.0, "nsp_coef": 1.0},  # likewise
    "weighted": {"estimator": "weighted", "nsp_coef": 1.0, **PLACES},  # ours
    "refine": {},
    "refine_memory": {**ROLLOUTS, "nsp_coef": 1.0, **PLACES},  # ours
    "expected": {"estimator": "expected", "reward": "exact", "nsp_coef": 1.0, **PLACES},  # ours
}
"""The methods with a next-sequence loss -> the settings in which each differs from the REFINE of its phase."""

UPDATES = ("release", "compute")
"""Suffixes of SFT with another number of updates (see `release_updates` and `compute_updates`)."""

_SFT = ("sft_release", "sft", "sft_compute")
_ALONE = (*_SFT, *CHANGES)
_NESTED = tuple(f"nested_{name}" for name in _ALONE)
ORDER = ("base", "none", *_ALONE, *_NESTED)
"""All methods in order; comparisons compare each with those before it. `base` is a model before training."""

KNOWN: dict[Phase, tuple[str, ...]] = {
    "midtrain": _ALONE,
    "posttrain": ("sft", *_NESTED),
    "ttt": ("none", *_ALONE),
}
"""All methods of a phase."""


def compared(recipe: str, phase: Phase, methods: Sequence[str] | None = None, *, sft: bool = True) -> list[str]:
    """Returns the methods that a notebook compares: `methods`, or those of the recipe, and without SFT if `sft` is false.

    Raises ConfigError if no method is left.
    """
    found = [name for name in methods or COMPARED.get(recipe, METHODS[phase]) if sft or name != "sft"]
    require(len(found) > 0, "methods", list(methods or ()), "at least one method other than sft if sft is false")
    return found


def known_method(name: str, phase: Phase) -> str:
    """Returns the name of a method of a phase; in post-training, `expected` and all others but `sft` mean the nested method.

    Raises ConfigError for an unknown name.
    """
    nested = f"nested_{name}"
    found = name if name in KNOWN[phase] else nested
    if found not in KNOWN[phase]:
        raise unknown("method", name, KNOWN[phase])
    return found


def split_updates(name: str) -> tuple[str, str | None]:
    """Returns a method's name without the suffix for its number of updates, and that suffix, one of `UPDATES`, or None."""
    base, _, suffix = name.rpartition("_")
    return (base, suffix) if suffix in UPDATES else (name, None)


def changes_of(method: str) -> Mapping[str, Any] | None:
    """Returns the settings in which a method differs from the REFINE of its phase; None for one without such a loss."""
    return CHANGES.get(method.removeprefix("nested_"))


def applicable(refine: RefineConfig | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of an experiment's settings that apply to one of its methods, whose recipe has the settings `refine`.

    A reward applies to rollouts and, if it has a formula, to `expected`; settings of sampled tokens apply to rollouts
    alone. The weight of a loss that replaces the next-token loss stays 1. A selection other than the method's own has the
    temperature and margin of REFINE. A single rollout from each position is compared with those from the other positions.
    """
    found = dict(settings)
    if refine is None:
        return found
    if not refine.rolls_out and not (refine.estimator == "expected" and found.get("reward") in EXPECTED_REWARDS):
        found.pop("reward", None)
    if not refine.ntp_coef:
        found.pop("nsp_coef", None)
    if not refine.rolls_out:
        for name in ("temperature", "kl_coef", "entropy_coef", "placebo"):
            found.pop(name, None)
    if not refine.has_places:
        found.pop("prefix_gradient", None)
    if found.get("group_size") == 1 and refine.group_by == "prefix":
        found.setdefault("group_by", "sequence")
    if refine.selection == "memory" != found.get("selection", "memory"):
        found = {name: getattr(RefineConfig(), name) for name in ("tau", "margin")} | found
    return found
