"""Files that are no text, and git-lfs pointers where content should be: each is named wherever a file is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from refine_lab.config import DataConfig, TaskConfig
from refine_lab.data.files import read_text
from refine_lab.data.sources import documents
from refine_lab.data.tasks.examples import load_task
from refine_lab.data.tokens import token_array
from refine_lab.experiments.configs import method_configs
from refine_lab.experiments.runs import create_runs
from refine_lab.explore.client import Worker
from refine_lab.explore.exploration import Exploration
from refine_lab.models.hub import SHIPPED
from refine_lab.models.loading import load_model, load_tokenizer
from refine_lab.runs.durable import digest
from tests.support.refusals import naming

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 123456\n".format("0" * 64)


def pointer(path: Path) -> Path:
    path.write_text(POINTER, encoding="utf-8")
    return path


def named(path: Path) -> pytest.RaisesExc[Exception]:
    """Expects the error that names the pointer, and the command that fetches what it points to."""
    return naming(ValueError, repr(str(path)), "`git lfs pull`")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pointer_is_no_source_of_text(tmp_path: Path, name: str) -> None:
    path = pointer(tmp_path / name)
    with named(path):
        next(documents(str(path), "train"))
    runs = tmp_path / "runs"
    with named(path):  # before anything is made
        create_runs(method_configs("midtrain", [0], data=str(path)), runs)
    assert not runs.exists()


def test_a_pointer_among_the_files_of_a_folder_is_named(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"text {number}", encoding="utf-8")
    for split in ("train", "validation"):  # whichever split it would be in
        with named(pointer(tmp_path / "29.txt")):
            documents(str(tmp_path), split)


@pytest.mark.parametrize("source", ["{}/a.jsonl", "{}/a.parquet", "ruler:{}/a.json"])
def test_a_pointer_holds_no_prompts(tmp_path: Path, source: str) -> None:
    pytest.importorskip("lm_eval", reason="RULER's questions need lm_eval")
    path = pointer(Path(source.format(tmp_path).removeprefix("ruler:")))
    config = TaskConfig(source=source.format(tmp_path), train=0, test=1)
    with named(path):
        load_task(config, load_tokenizer("tiny-deltanet"), DataConfig())


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "manifest.json.gz"]
)
def test_a_pointer_is_no_part_of_a_model(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(SHIPPED / "tiny-deltanet", tmp_path / "model")
    path = pointer(folder / name)
    if name == "manifest.json.gz":
        with named(path):
            create_runs(method_configs("midtrain", [0], model=str(folder)), tmp_path / "runs")
        return
    with named(path):
        load_model(folder, device="cpu")


def test_pointers_of_sharded_and_pickled_weights_are_named(tmp_path: Path) -> None:
    folder = shutil.copytree(SHIPPED / "tiny-deltanet", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    path = pointer(folder / "pytorch_model.bin")
    with named(path):
        load_model(folder, device="cpu", allow_pickle=True)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', encoding="utf-8"
    )
    shutil.copy(SHIPPED / "tiny-deltanet" / "model.safetensors", folder / "one.safetensors")
    path = pointer(folder / "two.safetensors")
    with named(path):
        load_model(folder, device="cpu")


def test_the_explorer_names_a_pointer_too(tmp_path: Path) -> None:
    folder = shutil.copytree(SHIPPED / "tiny-deltanet", tmp_path / "model")
    with named(pointer(folder / "tokenizer.json")):
        Exploration(Worker("cpu"), str(folder))  # which starts no process before it is asked


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"fine \xff not", ("byte 5", "0xff")),
        (b"\x7fELF\0\0", ("byte 4", "0x00")),
        ("text".encode("utf-16"), ("byte 0", "0xff")),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, data: bytes, wrong: tuple[str, str]) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    reading: tuple[Callable[[], object], ...] = (
        lambda: read_text(tmp_path / "a.txt"),
        lambda: next(documents(str(tmp_path), "train")),
    )
    for read in reading:
        with naming(ValueError, tmp_path / "a.txt", *wrong):
            read()


def test_a_digest_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    before = digest(tmp_path / "a.txt")
    shutil.copy(tmp_path / "a.txt", tmp_path / "copy.txt")  # another name, another time of change
    assert digest(tmp_path / "copy.txt") == before
    (tmp_path / "a.txt").write_text("two", encoding="utf-8")
    assert digest(tmp_path / "a.txt") != before


# -- folders that cannot be written --------------------------------------------------------------------------------------


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home below a file, so that nobody can write there, root included."""
    (tmp_path / "file").touch()
    for name in ("REFINE_CACHE", "REFINE_RUNS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    return tmp_path


def test_a_home_that_cannot_be_written_names_refine_cache(no_home: Path) -> None:
    (no_home / "a.txt").write_text("a text of some words " * 100, encoding="utf-8")
    with naming(OSError, no_home / "file" / "home", "REFINE_CACHE"):
        token_array(str(no_home / "a.txt"), "train", load_tokenizer("tiny-deltanet"), max_tokens=100)


def test_no_home_at_all_names_refine_cache(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    (no_home / "a.txt").write_text("a text of some words " * 100, encoding="utf-8")
    with naming(ValueError, "Could not determine home directory", "REFINE_CACHE"):
        token_array(str(no_home / "a.txt"), "train", load_tokenizer("tiny-deltanet"), max_tokens=100)


def test_a_runs_folder_that_cannot_be_written_names_refine_runs(no_home: Path) -> None:
    (no_home / "a.txt").write_text("a text of some words " * 100, encoding="utf-8")
    with naming(OSError, no_home / "file" / "runs", "REFINE_RUNS"):
        create_runs(method_configs("midtrain", [0], data=str(no_home / "a.txt")), no_home / "file" / "runs")
