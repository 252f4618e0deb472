"""Every kind of source gives its documents, held-out ones apart; every kind of bad source one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refine_lab.data.sources import documents, identity
from tests.support.refusals import naming, refused

ROWS = [f"document number {number}" for number in range(45)]


def both(source: Path | str) -> tuple[list[str], list[str]]:
    return list(documents(str(source), "train")), list(documents(str(source), "validation"))


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_is_divided_by_file(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    for number in range(30):
        (tmp_path / ("deeper" if number % 2 else ".") / f"{number}.txt").write_text(ROWS[number])
    (tmp_path / "notes.md").write_text("not a text file")
    train, held_out = both(tmp_path)
    assert len(held_out) == 2
    assert sorted(train + held_out) == sorted(ROWS[:30])


def test_a_folder_of_two_files_has_one_of_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    train, held_out = both(tmp_path)
    assert sorted(train + held_out) == ["a", "b"]
    assert len(train) == 1


@pytest.mark.parametrize("folder", [True, False])
def test_of_a_single_file_the_end_is_held_out(tmp_path: Path, folder: bool) -> None:
    text = "".join(f"{number:09d}\n" for number in range(1000))
    (tmp_path / "a.txt").write_text(text)
    train, held_out = both(tmp_path if folder else tmp_path / "a.txt")
    assert len(held_out[0]) == 500
    assert train[0] + held_out[0] == text


def test_of_the_rows_of_a_jsonl_every_twentieth_is_held_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"other": 1, "text": text} for text in ROWS])
    train, held_out = both(path)
    assert held_out == [ROWS[0], ROWS[20], ROWS[40]]
    assert train == [text for text in ROWS if text not in held_out]


def test_a_parquet_is_read_likewise(tmp_path: Path) -> None:
    pq.write_table(pa.table({"other": range(45), "text": ROWS}), tmp_path / "a.parquet", row_group_size=7)
    train, held_out = both(tmp_path / "a.parquet")
    assert held_out == [ROWS[0], ROWS[20], ROWS[40]]
    assert train == [text for text in ROWS if text not in held_out]


def test_a_parquet_with_a_damaged_body_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ROWS}), path)
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(200) + data[204:])
    with pytest.raises(ValueError, match=r"a\.parquet' is damaged"):
        both(path)


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("held out", "", "  \n", "kept")])
    assert both(path) == (["kept"], ["held out"])


def test_a_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **options: object) -> Iterator[dict[str, str]]:
        asked.append((args, options))
        return iter([{"text": text} for text in ROWS])

    module = ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert next(documents("datasets:some/text:en", "train")) == ROWS[1]
    assert next(documents("datasets:some/text", "validation")) == ROWS[0]
    options = {"split": "train", "streaming": True}
    assert asked == [(("some/text", "en"), options), (("some/text", None), options)]


def test_a_data_set_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError("no network")

    module = ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    with naming(ValueError, "'some/text'", "no network"):
        documents("datasets:some/text", "train")


def test_a_data_set_with_a_loading_script_is_named(tmp_path: Path) -> None:
    """As the library itself refuses it, with an error of a kind that it raises nowhere else."""
    pytest.importorskip("datasets", reason="data sets by name need the package datasets")
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("import datasets\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^the data set '.*scripted' could not be read: .*[Ss]cripts are no longer"):
        documents(f"datasets:{tmp_path / 'scripted'}", "train")


def test_a_folder_that_hides_the_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("datasets")
    module.__path__ = [str(tmp_path / "datasets")]
    module.__file__ = None
    monkeypatch.setitem(sys.modules, "datasets", module)
    with naming(ValueError, tmp_path / "datasets", "`datasets`"):
        documents("datasets:some/text", "train")


def test_without_the_library_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with naming(ValueError, "'datasets:some/text'", "pip install datasets"):
        documents("datasets:some/text", "train")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with naming(FileNotFoundError, tmp_path / "nowhere", "'python'"):
        documents(str(tmp_path / "nowhere"), "train")
    with naming(FileNotFoundError, tmp_path / "nowhere", "'python'"):
        identity(str(tmp_path / "nowhere"))


def test_an_empty_folder(tmp_path: Path) -> None:
    with naming(FileNotFoundError, tmp_path, ".txt"):
        documents(str(tmp_path), "train")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with refused("source", str(tmp_path / "a.pdf"), "a folder of .txt files, or a .txt, .jsonl or .parquet file"):
        documents(str(tmp_path / "a.pdf"), "train")


def test_a_wrong_column_names_those_there_are(tmp_path: Path) -> None:
    rows = {"title": ROWS, "body": ROWS}
    path = jsonl(tmp_path / "a.jsonl", [{"title": text, "body": text} for text in ROWS])
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    for source in (path, tmp_path / "a.parquet"):
        with naming(ValueError, "'text'", "'title', 'body'"):
            documents(str(source), "train")


@pytest.mark.parametrize("value", [None, 7, ["a"]])
def test_a_column_without_text(tmp_path: Path, value: object) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": value}])
    with naming(ValueError, path, "'text'", "row 2", repr(value)):
        documents(str(path), "train")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine \xff not")
    with naming(ValueError, tmp_path / "a.txt", "byte 5", "0xff"):
        documents(str(tmp_path), "train")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine \xff not"}\n')
    with naming(ValueError, tmp_path / "a.jsonl", "line 1", "JSON"):
        documents(str(tmp_path / "a.jsonl"), "validation")
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with naming(ValueError, tmp_path / "a.parquet", "not a Parquet file"):
        documents(str(tmp_path / "a.parquet"), "train")


def test_a_line_that_is_no_object(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["a text", "another"])
    with naming(ValueError, path, "row 1", "'text'", "not an object"):
        documents(str(path), "validation")


def test_nothing_but_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"the source '.*' has no train document with any text in it"):
        documents(str(tmp_path), "train")


def test_the_identity_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = identity(str(tmp_path))
    assert identity(str(tmp_path)) == before
    (tmp_path / "a.txt").write_text("three")
    after = identity(str(tmp_path))
    assert after != before
    (tmp_path / "b.txt").write_text("one")
    assert identity(str(tmp_path)) not in (before, after)
