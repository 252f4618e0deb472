"""The Python corpus: which files it takes, and what becomes of files that differ."""

from __future__ import annotations

import gzip
import importlib.metadata
import re
from dataclasses import replace
from pathlib import Path

import pytest

from refine_lab.data import corpus
from refine_lab.data.corpus import (
    CorpusReport,
    File,
    Manifest,
    compare,
    current_manifest,
    load_manifest,
    python_documents,
)
from tests.support.paths import ROOT
from tests.support.refusals import naming

PACKAGES = ("networkx", "jinja2")


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return current_manifest(PACKAGES)


def altered(manifest: Manifest, count: int, digest: str = "0" * 12) -> Manifest:
    """`manifest` with another hash for its first `count` files."""
    changed = tuple(replace(file, digest=digest) for file in manifest.files[:count])
    return replace(manifest, files=changed + manifest.files[count:])


def test_the_packages_are_all_in_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    locked = {re.split("[=@ ]", line)[0].lower().replace("_", "-") for line in lock.splitlines()}
    assert set(corpus.PACKAGES) <= locked


def test_it_takes_sources_of_the_library_and_of_the_packages(manifest: Manifest) -> None:
    by_package = {name: {file.path for file in manifest.files if file.package == name} for name in manifest.versions}
    assert "dataclasses.py" in by_package["python"] or "argparse.py" in by_package["python"]
    assert "networkx/algorithms/dag.py" in by_package["networkx"]
    assert manifest.versions["jinja2"] == importlib.metadata.version("jinja2")
    assert not any("/tests/" in f"/{file.path}" or "site-packages" in file.path for file in manifest.files)


def test_no_package_gives_more_than_its_share() -> None:
    sizes: dict[str, int] = {}
    root = corpus._root("networkx")
    assert root is not None
    for file in corpus._chosen("networkx", root, set()):
        sizes[file.path] = (root / file.path).stat().st_size
    assert 1_000_000 < sum(sizes.values()) <= corpus.PACKAGE_BYTES
    assert max(sizes.values()) <= corpus.FILE_BYTES[1]


def test_about_three_files_of_a_hundred_are_held_out_whatever_else_is_there(manifest: Manifest) -> None:
    held_out = {file.path for file in manifest.files if file.split == "validation"}
    assert 0.01 < len(held_out) / len(manifest.files) < 0.06
    alone = current_manifest(("jinja2",))
    assert {f for f in alone.files if f.package == "jinja2"} == {f for f in manifest.files if f.package == "jinja2"}


def test_equal_files_are_taken_once(manifest: Manifest) -> None:
    digests = [file.digest for file in manifest.files]
    assert len(digests) == len(set(digests))


def test_documents_are_the_files_of_one_split(manifest: Manifest) -> None:
    held_out, train = list(python_documents("validation", manifest)), list(python_documents("train", manifest))
    assert len(held_out) + len(train) == len(manifest.files)
    assert not set(held_out) & set(train)
    root = corpus._root("jinja2")
    assert root is not None
    assert (root / "jinja2/lexer.py").read_text(encoding="utf-8") in train + held_out


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.gz"])
def test_a_manifest_comes_back_from_disk(manifest: Manifest, tmp_path: Path, name: str) -> None:
    manifest.save(tmp_path / name)
    assert load_manifest(tmp_path / name) == manifest
    first = (tmp_path / name).read_bytes()
    manifest.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == first


def test_files_that_differ_are_counted_and_left_out(manifest: Manifest) -> None:
    report = compare(altered(manifest, 7))
    assert (len(report.differing), len(report.missing)) == (7, 0)
    assert len(report.present) == len(manifest.files) - 7
    texts = [text for split in ("train", "validation") for text in python_documents(split, altered(manifest, 7))]
    assert len(texts) == len(manifest.files) - 7


def test_files_that_are_missing_are_counted(manifest: Manifest) -> None:
    absent = (
        File(package="no-such-package", path="a.py", digest="0" * 12, split="train"),
        File(package="jinja2", path="jinja2/no_such_file.py", digest="0" * 12, split="train"),
        File(package="jinja2", path="../../outside.py", digest="0" * 12, split="train"),
    )
    report = compare(replace(manifest, files=manifest.files + absent))
    assert report.missing == absent
    assert report.present == manifest.files


def test_below_nine_tenths_the_report_says_that_the_figures_do_not_apply(manifest: Manifest) -> None:
    good, poor = compare(altered(manifest, 1)), compare(altered(manifest, len(manifest.files) // 5))
    assert good.comparable
    assert "1 that differ and 0 that are missing are excluded" in str(good)
    assert "do not apply" not in str(good)
    assert not poor.comparable
    assert "do not apply here" in str(poor)
    assert CorpusReport(present=(), differing=(), missing=()).share == 0


def test_a_manifest_that_is_not_there_or_is_none_is_refused(tmp_path: Path) -> None:
    with naming(FileNotFoundError, tmp_path / "manifest.json"):
        load_manifest(tmp_path / "manifest.json")
    for name, data in (("a.json", b"[]"), ("b.json", b"{"), ("c.json.gz", b"no gzip"), ("d.json", b'{"packages": {}}')):
        (tmp_path / name).write_bytes(data)
        with naming(ValueError, tmp_path / name):
            load_manifest(tmp_path / name)


@pytest.mark.parametrize("packages", ("[]", '{"jinja2": {}}', '{"jinja2": []}', '{"jinja2": {"train": 1}}'))
def test_a_manifest_of_other_contents_is_refused(tmp_path: Path, packages: str) -> None:
    (tmp_path / "manifest.json").write_text(f'{{"format_version": 1, "packages": {packages}}}')
    with naming(ValueError, tmp_path / "manifest.json", "packages"):
        load_manifest(tmp_path / "manifest.json")


def test_a_damaged_archive_is_no_manifest(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"format_version": 1, "packages": {}}' * 50)
    flipped = whole[:12] + bytes(255 - byte for byte in whole[12:20]) + whole[20:]
    for data in (whole[:-12], whole[:5], flipped):
        (tmp_path / "manifest.json.gz").write_bytes(data)
        with naming(ValueError, tmp_path / "manifest.json.gz", "corpus manifest"):
            load_manifest(tmp_path / "manifest.json.gz")


def test_tables_and_bytes_that_are_no_text_are_no_documents() -> None:
    assert corpus._readable(b"def f(x):\n    return x\n")
    assert not corpus._readable(b"\xff\xfe\x00")
    assert not corpus._readable(b"table = [0x1234, 0x5678, 0x9abc]\n" * 9)
