"""Frames of rollouts as `records.Run.rollouts` gives them, and the cases that Python and the page are both held to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from refine_lab.runs.schema import COLUMNS
from tests.support.paths import TESTS
from widgets.core.page import page
from widgets.rollout_inspector import RolloutInspector

WORDS = [
    " very",
    " laid",
    " back",
    " lodge",
    " perfect",
    " hill",
    " A",
    "a",
    "\n",
    "</script>",
    "\x00",
    "\u202e",
    "|",
    "ß",
    "İ",
]


def decode(ids: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in ids)


def rows(*rollouts: Sequence[int], target: Sequence[int] = (0, 1, 2), **columns: object) -> pd.DataFrame:
    """Rollouts of one position."""
    count = len(rollouts)
    frame = {
        "step": [3] * count,
        "sequence_id": [5] * count,
        "position": [20] * count,
        "sample_index": [*range(count)],
        "prefix_ids": [[3, 4]] * count,
        "rollout_ids": [list(ids) for ids in rollouts],
        "target_ids": [list(target)] * count,
        "logprobs": [[-0.5] * len(ids) for ids in rollouts],
        "entropy": [1.5] * count,
        **{name: [0.25 * i for i in range(count)] for name in ("cosine", "binary", "reward", "advantage")},
        **{column.name: [column.older] * count for column in COLUMNS if column.since > 1},
        **columns,
    }
    return pd.DataFrame(frame)


def random_frame(count: int, size: int, seed: int = 0) -> pd.DataFrame:
    """`count` rollouts, `size` a position, of 0 to 4 tokens, with values that repeat, are no number, or are -0."""
    draw = np.random.default_rng(seed)
    group = np.arange(count) // size
    targets = draw.integers(0, len(WORDS), (group[-1] + 1, 4))
    lengths = draw.integers(0, 5, count)
    parts = [
        rows(
            draw.integers(0, len(WORDS), lengths[i]).tolist(),
            target=targets[group[i]].tolist(),
            step=[int(group[i]) // 3],
            position=[int(group[i] * 7 % 11)],
            sequence_id=[int(group[i])],
            sample_index=[int(draw.integers(0, 9))],
            **{
                name: [float(draw.choice([-1.0, -0.0, 0.0, 0.1, 0.7, 1e-30, math.nan, math.inf, draw.normal()]))]
                for name in ("entropy", "cosine", "binary", "reward", "advantage")
            },
        )
        for i in range(count)
    ]
    return pd.concat(parts, ignore_index=True).sample(frac=1, random_state=seed).reset_index(drop=True)


CASES: dict[str, Any] = json.loads((TESTS / "fixtures" / "rollout_cases.json").read_text(encoding="utf-8"))
"""`shown`: filters and sort, and the rows that are then shown; `tables`: the lines of table F.1."""
FIND_CASES = """(js, { columns, shown, tables }) => {
    const data = js.unpackRollouts(js.unpacked(columns));
    const rows = ({ filters, sort }) => js.shownRows(data, filters, sort);
    const table = (case_) => js.tableF1(data, rows(case_), case_.examples, case_.samples);
    const lines = (case_) => js.markdownF1(table(case_)).split("\\n").slice(2, -1);
    return { shown: shown.map((each) => [...rows(each)]), tables: tables.map(lines) }; }"""
"""A function of the page's modules `js` that finds what `CASES` expects."""


def case_inspector() -> RolloutInspector:
    """The rollouts of `CASES`; null is NaN."""

    def one(rollout: dict[str, Any]) -> pd.DataFrame:
        numbers = {
            name: [math.nan if value is None else value] for name, value in rollout.items() if name[-3:] != "ids"
        }
        return rows(rollout["rollout_ids"], target=rollout["target_ids"], **numbers)

    words = CASES["words"]
    frame = pd.concat(map(one, CASES["rollouts"]), ignore_index=True)
    return RolloutInspector(frame, decode=lambda ids: "".join(words[token] for token in ids))


def page_columns(widget: RolloutInspector) -> dict[str, str]:
    """The columns as a page without Python gets them."""
    text = page(widget).partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return json.loads(text)["widgets"][0]["state"]["columns"]


def given_cases() -> dict[str, Any]:
    """What `FIND_CASES` is given."""
    return {"columns": page_columns(case_inspector()), "shown": CASES["shown"], "tables": CASES["tables"]}


def check_page_cases(found: Any) -> None:
    """What `FIND_CASES` found is what `CASES` expects."""
    for kind, name in (("shown", "rows"), ("tables", "lines")):
        for case, its in zip(CASES[kind], found[kind], strict=True):
            assert its == case[name], case["case"]
