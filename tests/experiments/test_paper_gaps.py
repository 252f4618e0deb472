"""Gaps of the paper's tables: the command of each, and that the notebook accepts every one."""

from __future__ import annotations

import shlex

import pandas as pd
import pytest

from refine_lab.experiments.paper_gaps import gaps
from refine_lab.experiments.paper_rows import FIELDS
from refine_lab.experiments.paper_runs import PaperPlan, plan_of
from refine_lab.experiments.paper_tables import cells
from refine_lab.experiments.parameters import convert, declared_parameters
from refine_lab.recipes.paper_results import PAPER_MODELS, table_names
from tests.support.paths import ROOT

_, DELTANET = PAPER_MODELS
LAUNCH = "papermill notebooks/paper.ipynb out.ipynb -p launch true"
NOTHING = pd.DataFrame(columns=[*FIELDS])
NO_REASONS = pd.DataFrame(columns=["task", "length", "reason"])


@pytest.mark.parametrize(
    ("table", "measure", "options"),
    [
        ("table 4", "SQuADQA", "-p tasks niah,recall,ruler_qa -p data FOLDER"),
        ("table 4", "recall questions", ""),
        ("table 5", "Avg", "-p tasks niah,recall,longbench -p data FOLDER"),
        ("table 6", "Avg. Score", "-p tasks niah,recall,longbench -p ablations reward -p data FOLDER"),
        ("table 7", "exact recall, 12 facts", "-p ablations selection"),
        ("table E.1", "Avg", "-p tasks niah,recall,short -p data FOLDER"),
        ("table E.2", "Avg. Score", "-p tasks niah,recall,longbench -p data FOLDER"),
        ("figure 5", "exact recall, 12 facts", "-p ablations c,k"),
        ("figure E.3", "mean", "-p ablations k"),
    ],
)
def test_a_gap_has_the_command_that_fills_it(table: str, measure: str, options: str) -> None:
    found = gaps(cells(table, NOTHING, DELTANET), NO_REASONS, PaperPlan())
    (how,) = found.loc[[measure in names.split(", ") or measure == names for names in found["measures"]], "how"]
    assert how == f"`{f'{LAUNCH} {options}'.strip()}`"


@pytest.mark.parametrize("table", table_names())
def test_every_command_is_one_that_the_notebook_accepts(table: str) -> None:
    declared = declared_parameters(ROOT / "notebooks" / "paper.ipynb")
    left = gaps(cells(table, NOTHING, DELTANET), NO_REASONS, PaperPlan(steps=1, seeds=(3,)), "/runs of mine")
    assert len(left) > 0
    for how in left["how"]:
        words = shlex.split(how.strip("`"))
        given = dict(zip(words[4::3], words[5::3], strict=True))
        assert words[:3] == LAUNCH.split()[:3] and set(words[3::3]) == {"-p"}
        typed = {name: convert(name, declared[name].hint, value) for name, value in given.items()}
        assert (typed.pop("launch"), typed.pop("output")) == (True, "/runs of mine")
        plan = plan_of(**{"tasks": "niah,recall", **typed})
        assert (plan.steps, plan.seeds) == (1, (3,))
        assert (plan.data == "FOLDER") == any(name in plan.tasks for name in ("ruler_qa", "longbench", "short"))
