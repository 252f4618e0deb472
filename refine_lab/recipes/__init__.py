"""Recipes: one function per experiment, each returning a complete configuration with the paper's numbers.

No other module contains these numbers. Each value names its source: a table of the paper, `release` (the paper's code),
or `ours`. Within a recipe, SFT differs from REFINE only in `method`: it uses the same sequences and the same number of
optimizer updates. `release_updates` gives SFT fewer updates, as in the paper's released code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from refine_lab.recipes.midtraining import midtrain, paper_midtrain
from refine_lab.recipes.posttraining import paper_posttrain, posttrain, posttrain_searched, posttrain_searched_lact
from refine_lab.recipes.pretraining import pretrain, pretrain_lact
from refine_lab.recipes.release import release_updates as release_updates
from refine_lab.recipes.testtime import ttt_paper, ttt_per_prompt, ttt_per_prompt_searched, ttt_per_prompt_searched_lact
from refine_lab.validation import unknown

Phase = Literal["pretrain", "midtrain", "posttrain", "ttt"]

METHODS: dict[Phase, tuple[str, ...]] = {
    "midtrain": ("sft", "refine"),  # section 4.2
    "posttrain": ("sft", "nested_sft", "nested_refine"),  # section 4.3
    "ttt": ("none", "sft", "refine"),  # section 4.4
}
"""The methods that a phase compares; nested ones make updates on the prompts before the update on the answers."""


class Recipe(NamedTuple):
    """A recipe and its phase."""

    phase: Phase
    make: Callable[..., Any]
    "(method, seed) -> `TrainConfig`, or `TTTRunConfig` for `ttt`; for `pretrain`: (model, prose) -> `TrainConfig` per stage."


RECIPES: dict[str, Recipe] = {
    "pretrain": Recipe("pretrain", pretrain),
    "pretrain_lact": Recipe("pretrain", pretrain_lact),
    "midtrain": Recipe("midtrain", midtrain),
    "paper_midtrain": Recipe("midtrain", paper_midtrain),
    "posttrain": Recipe("posttrain", posttrain),
    "posttrain_searched": Recipe("posttrain", posttrain_searched),
    "posttrain_searched_lact": Recipe("posttrain", posttrain_searched_lact),
    "paper_posttrain": Recipe("posttrain", paper_posttrain),
    "per_prompt": Recipe("ttt", ttt_per_prompt),
    "per_prompt_searched": Recipe("ttt", ttt_per_prompt_searched),
    "per_prompt_searched_lact": Recipe("ttt", ttt_per_prompt_searched_lact),
    "paper": Recipe("ttt", ttt_paper),
}


def named(phase: Phase) -> list[str]:
    """Returns the names of a phase's recipes."""
    return [name for name, entry in RECIPES.items() if entry.phase == phase]


def recipe(name: str, phase: Phase | None = None) -> Recipe:
    """Returns the recipe of that name.

    Raises ValueError that suggests the nearest name and lists the allowed ones, those of `phase` if it is given.
    """
    allowed = named(phase) if phase else [each for each in RECIPES if RECIPES[each].phase in METHODS]
    if name not in allowed:
        raise unknown(f"{phase} recipe" if phase else "recipe", name, allowed)
    return RECIPES[name]
