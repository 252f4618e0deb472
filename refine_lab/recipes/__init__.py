"""Recipes: one function an experiment, returning a whole configuration. The only home of the paper's numbers.

Each value names its place: a table of the paper, `release` (the paper's code), or `ours`. The SFT arm of a recipe
differs from the REFINE arm in `method` alone: the same sequences, the same number of optimizer updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from refine_lab.config import TrainConfig, unknown
from refine_lab.recipes.midtraining import midtrain, paper_midtrain, paper_midtrain_release_updates
from refine_lab.recipes.posttraining import (
    WAYS,
    paper_posttrain,
    paper_posttrain_release_updates,
    posttrain,
    posttrain_release_updates,
    posttrain_searched,
    posttrain_searched_lact,
)
from refine_lab.recipes.pretraining import Stage, pretrain, pretrain_lact
from refine_lab.recipes.testtime import (
    TTT_WAYS,
    release_updates,
    ttt_paper,
    ttt_paper_release_updates,
    ttt_per_prompt,
    ttt_per_prompt_release_updates,
    ttt_per_prompt_searched,
    ttt_per_prompt_searched_lact,
)
from refine_lab.ttt.config import TTTRunConfig

__all__ = [
    "CURRICULA",
    "POSTTRAINING",
    "RECIPES",
    "TTT_RECIPES",
    "TTT_WAYS",
    "WAYS",
    "Stage",
    "curriculum",
    "midtrain",
    "paper_midtrain",
    "paper_midtrain_release_updates",
    "paper_posttrain",
    "paper_posttrain_release_updates",
    "posttrain",
    "posttrain_release_updates",
    "posttrain_searched",
    "posttrain_searched_lact",
    "posttraining_recipe",
    "pretrain",
    "pretrain_lact",
    "recipe",
    "release_updates",
    "ttt_paper",
    "ttt_paper_release_updates",
    "ttt_per_prompt",
    "ttt_per_prompt_release_updates",
    "ttt_per_prompt_searched",
    "ttt_per_prompt_searched_lact",
    "ttt_recipe",
]

Recipe = Callable[..., TrainConfig]
"""(arm, seed) -> TrainConfig; the arm is `sft` or `refine`, in post-training one of `WAYS`."""

T = TypeVar("T")

RECIPES: dict[str, Recipe] = {
    "midtrain": midtrain,
    "paper_midtrain": paper_midtrain,
    "paper_midtrain_release_updates": paper_midtrain_release_updates,
}


POSTTRAINING: dict[str, Recipe] = {
    "posttrain": posttrain,
    "posttrain_release_updates": posttrain_release_updates,
    "posttrain_searched": posttrain_searched,
    "posttrain_searched_lact": posttrain_searched_lact,
    "paper_posttrain": paper_posttrain,
    "paper_posttrain_release_updates": paper_posttrain_release_updates,
}
"""Recipes of post-training, whose arms are `WAYS`."""


TTT_RECIPES: dict[str, Callable[..., TTTRunConfig]] = {
    "per_prompt": ttt_per_prompt,
    "per_prompt_searched": ttt_per_prompt_searched,
    "per_prompt_searched_lact": ttt_per_prompt_searched_lact,
    "per_prompt_release_updates": ttt_per_prompt_release_updates,
    "paper": ttt_paper,
    "paper_release_updates": ttt_paper_release_updates,
}
"""(way of `TTT_WAYS`, seed) -> one configuration."""


Curriculum = Callable[[str, str | None], list[TrainConfig]]
"""(model, prose) -> one configuration a stage."""


CURRICULA: dict[str, Curriculum] = {
    "pretrain": pretrain,
    "pretrain_lact": pretrain_lact,
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; raises ValueError that names the nearest and all there are."""
    return _named("recipe", name, RECIPES)


def posttraining_recipe(name: str) -> Recipe:
    """The recipe of post-training of that name; raises ValueError as `recipe` does."""
    return _named("recipe of post-training", name, POSTTRAINING)


def ttt_recipe(name: str) -> Callable[..., TTTRunConfig]:
    """The recipe of test-time training of that name; raises ValueError as `recipe` does."""
    return _named("recipe", name, TTT_RECIPES)


def curriculum(name: str) -> Curriculum:
    """The curriculum of that name; raises ValueError as `recipe` does."""
    return _named("curriculum", name, CURRICULA)


def _named(what: str, name: str, there: dict[str, T]) -> T:
    if name not in there:
        raise unknown(what, name, there)
    return there[name]
