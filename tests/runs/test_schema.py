"""One specification of a rollout's columns: what is written, what older and newer files give, and what pages get of it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refine_lab.config import TrainConfig
from refine_lab.runs import schema
from refine_lab.runs.run import Run
from refine_lab.runs.schema import (
    COLUMNS,
    ROLLOUT_TYPES,
    Column,
    completed,
    cut_rollouts,
    read_rollouts,
    write_rollouts,
)
from refine_lab.runs.writer import RunWriter
from tests.support.rollout_frames import decode, rows
from widgets.core.assets import STATIC
from widgets.parts import rollout_columns
from widgets.rollout_inspector import RolloutInspector

NEXT = schema.FORMAT_VERSION + 1


def given(frame: pd.DataFrame) -> dict[str, list[Any]]:
    return {name: frame[name].tolist() for name in ROLLOUT_TYPES}


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> tuple[Column, ...]:
    """The columns of a next version: a number and a list that older files lack."""
    added = (
        Column("length_ratio", pa.float32(), "length ratio", digits=2, since=NEXT, older=0.5),
        Column("seen_ids", pa.list_(pa.int32()), "seen", since=NEXT, older=[]),
    )
    monkeypatch.setattr(schema, "COLUMNS", COLUMNS + added)
    return added


def test_a_file_has_the_specified_columns_and_its_format_version(tmp_path: Path) -> None:
    frame = rows([0, 1, 2], [0, 4])
    write_rollouts(tmp_path, [(1, given(frame)), (2, given(frame))])
    stored = pq.read_schema(tmp_path / "1-2.parquet")
    assert stored.names == [column.name for column in COLUMNS if column.dtype is not None]
    assert stored.types == [column.dtype for column in COLUMNS if column.dtype is not None]
    assert stored.metadata[schema.VERSION_KEY] == str(schema.FORMAT_VERSION).encode()
    found = read_rollouts(tmp_path / "1-2.parquet")
    assert found["step"].tolist() == [1, 1, 2, 2]
    assert found["rollout_ids"].map(list).tolist() == [[0, 1, 2], [0, 4]] * 2


def test_an_older_file_gets_the_columns_that_it_lacks(tmp_path: Path, next_version: tuple[Column, ...]) -> None:
    write_rollouts(tmp_path, [(1, given(rows([0], [1])))])
    table = pq.read_table(tmp_path / "1-1.parquet")
    if schema.FORMAT_VERSION == 1:
        table = table.replace_schema_metadata(None)  # the first files do not tell their version
    pq.write_table(table, tmp_path / "1-1.parquet")
    found = read_rollouts(tmp_path / "1-1.parquet")
    assert found["length_ratio"].tolist() == [0.5, 0.5]
    assert found["length_ratio"].dtype == "float32"
    assert found["seen_ids"].map(list).tolist() == [[], []]
    assert completed(found) is not found and completed(found).equals(found)


def test_a_run_of_files_of_two_versions_is_one_frame(tmp_path: Path, next_version: tuple[Column, ...]) -> None:
    """A run that an older version began and a newer one went on with."""
    with RunWriter.create(TrainConfig(recipe="tiny", steps=8, batch_size=2, mini_batch_size=2), tmp_path) as writer:
        writer.rollouts(1, given(rows([0], [1])))
        writer.flush()
        newer = rows([2], [3], step=[2, 2], length_ratio=[0.25, math.nan], seen_ids=[[7], []])
        fields = [(column.name, column.dtype) for column in schema.COLUMNS if column.dtype is not None]
        table = pa.Table.from_pandas(newer[[name for name, _ in fields]], pa.schema(fields), preserve_index=False)
        pq.write_table(
            table.replace_schema_metadata({schema.VERSION_KEY: str(NEXT)}), writer.path / "rollouts" / "2-2.parquet"
        )
    found = Run(writer.path).rollouts()
    assert found["length_ratio"].tolist()[:3] == [0.5, 0.5, 0.25]
    assert found["length_ratio"].dtype == "float32"
    assert len(RolloutInspector(found, decode=decode).filtered()) == 4


def test_a_column_of_a_later_version_is_kept_and_not_in_the_way(tmp_path: Path) -> None:
    write_rollouts(tmp_path, [(1, given(rows([0], [1]))), (2, given(rows([2], [3])))])
    path = tmp_path / "1-2.parquet"
    table = pq.read_table(path).append_column("from_later", pa.array(["a", "b", "c", "d"]))
    pq.write_table(table.replace_schema_metadata({schema.VERSION_KEY: "9"}), path)
    found = read_rollouts(path)
    assert found["from_later"].tolist() == ["a", "b", "c", "d"]
    widget = RolloutInspector(found, decode=decode)
    widget.filters = {"text": "back"}
    assert widget.filtered()["from_later"].tolist() == ["c"]
    cut_rollouts(tmp_path, 1)
    assert read_rollouts(tmp_path / "1-1.parquet")["from_later"].tolist() == ["a", "b"]
    assert pq.read_schema(tmp_path / "1-1.parquet").metadata[schema.VERSION_KEY] == b"9"


@pytest.mark.parametrize("lost", [["reward"], ["step", "logprobs"]])
def test_a_file_that_lacks_a_column_of_its_own_version_is_damaged(tmp_path: Path, lost: list[str]) -> None:
    write_rollouts(tmp_path, [(1, given(rows([0], [1])))])
    path = tmp_path / "1-1.parquet"
    pq.write_table(pq.read_table(path).drop_columns(lost), path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: rollouts lack the columns {', '.join(lost)}")):
        read_rollouts(path)


def test_the_inspector_lists_sorts_and_filters_by_the_specification() -> None:
    numbers = [column for column in COLUMNS if column.digits is not None]
    assert {column.dtype for column in numbers} == {pa.float32(), None}
    widget = RolloutInspector(rows([0], [1]), decode=decode)
    sent = {field["name"]: field for field in widget.page_state()["fields"]}
    assert [*sent] == rollout_columns.SORTS[1:]
    for column in numbers:
        widget.sort = (column.name, True)
        assert sent[column.name] == {name: getattr(column, name) for name in sent[column.name]}
    assert rollout_columns.RANGES == [column.name for column in COLUMNS if column.filtered]
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    assert [column.look for column in numbers].count("best") == 1


def test_no_script_names_a_number_of_its_own() -> None:
    """The page gets the columns as data; only table F.1, which is of the cosine reward, names one."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(STATIC.glob("rollout_*.js")))
    numbers = [column.name for column in COLUMNS if column.digits is not None]
    assert re.findall(rf"""numbers\.({"|".join(numbers)})\b|\[["']({"|".join(numbers)})["'],""", text) == [
        ("cosine", "")
    ]
