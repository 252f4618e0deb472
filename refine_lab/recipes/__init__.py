"""Recipes: one function per experiment, each returning a complete configuration with the paper's numbers.

No other module contains these numbers. Each value names its source: a table of the paper, `release` (the paper's code),
or `ours`. Within a recipe, SFT differs from REFINE only in `method`: it uses the same sequences and the same number of
optimizer updates. `release_updates` gives SFT fewer updates, as in the paper's released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from refine_lab.recipes.compute import compute_updates as compute_updates
from refine_lab.recipes.memory import MEMORY as MEMORY
from refine_lab.recipes.memory import by_memory as by_memory
from refine_lab.recipes.methods import METHODS, Phase
from refine_lab.recipes.midtraining import midtrain, paper_midtrain
from refine_lab.recipes.posttraining import paper_posttrain, posttrain, posttrain_searched, posttrain_searched_lact
from refine_lab.recipes.pretraining import pretrain, pretrain_lact
from refine_lab.recipes.release import release_updates as release_updates
from refine_lab.recipes.testtime import ttt_paper, ttt_per_prompt, ttt_per_prompt_searched, ttt_per_prompt_searched_lact
from refine_lab.validation import unknown


class Recipe(NamedTuple):
    """A recipe and its phase."""

    phase: Phase
    make: Callable[..., Any]
    "(method, seed) -> `TrainConfig`, or `TTTRunConfig` for `ttt`; for `pretrain`: (model, prose) -> `TrainConfig` per stage."


_MAKERS: dict[Phase, Sequence[Callable[..., Any]]] = {
    "pretrain": (pretrain, pretrain_lact),
    "midtrain": (midtrain, paper_midtrain),
    "posttrain": (posttrain, posttrain_searched, posttrain_searched_lact, paper_posttrain),
    "ttt": (ttt_per_prompt, ttt_per_prompt_searched, ttt_per_prompt_searched_lact, ttt_paper),
}
RECIPES = {
    make.__name__.removeprefix("ttt_"): Recipe(phase, make) for phase, makers in _MAKERS.items() for make in makers
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
