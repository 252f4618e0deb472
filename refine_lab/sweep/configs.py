"""The configurations of the runs that a cell creates, for notebooks whose parameters name a recipe."""

from __future__ import annotations

from typing import Any

from refine_lab.config import TrainConfig
from refine_lab.experiments.configs import method_configs, setting_names
from refine_lab.recipes import METHODS, RECIPES, Phase, recipe
from refine_lab.recipes.methods import compared
from refine_lab.sweep.cells import Cell
from refine_lab.ttt_config import TTTRunConfig

ARGUMENTS = frozenset(
    {"recipe", "updates", "model", "data", "task", "test_source", "prompts", "count", "seeds", "methods"}
)
"""Parameters that `method_configs` accepts besides the fields of a configuration."""


def cell_configs(cell: Cell) -> list[Any]:
    """Returns the configurations of a cell's runs; none for a notebook that creates no runs from a recipe.

    Raises ValueError for a value that a configuration rejects.
    """
    values = dict(cell.values)
    own: Phase | None = next((phase for phase in METHODS if phase == cell.notebook.name), None)
    if not {"recipe", "seeds"} <= values.keys() or (own is None and values["recipe"] not in RECIPES):
        return []
    phase = recipe(values["recipe"], own).phase
    values["parameters"] = values.pop("trainable", None)
    values["methods"] = compared(values["recipe"], phase, values.get("methods"), sft=values.pop("sft", True))
    allowed = ARGUMENTS | setting_names(TTTRunConfig if phase == "ttt" else TrainConfig)
    return method_configs(**{name: value for name, value in values.items() if name in allowed}, phase=phase)
