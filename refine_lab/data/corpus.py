"""The Python corpus, available in every installation: sources of the standard library and of installed packages."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from refine_lab.data.files import existing_file
from refine_lab.validation import require

Split = Literal["train", "validation"]

STANDARD_LIBRARY = "python"
PACKAGES = tuple(
    """
    anyio arrow attrs babel beartype beautifulsoup4 cffi charset-normalizer click debugpy filelock fsspec httpcore httpx
    huggingface-hub idna ipykernel ipython ipywidgets jaxtyping jedi jinja2 jsonschema jupyter-client jupyter-server
    jupyterlab lark markdown-it-py mistune mpmath narwhals nbconvert nbformat networkx numpy packaging pandas papermill
    parso pexpect platformdirs plotly prometheus-client prompt-toolkit psutil pyarrow pycparser pygments pytest
    python-dateutil pyyaml pyzmq requests rich soupsieve sympy torch tornado tqdm traitlets transformers typer
    urllib3
    """.split()
)
"""Packages of the lock file that are installed on every system (not fla or triton) and whose text is useful for training."""

PACKAGE_BYTES = 4_000_000
"""Maximum number of bytes kept of one package, so that large packages do not dominate; the standard library, which
differs between Python versions, stays below a tenth of the files.
"""
FILE_BYTES = (300, 150_000)
VALIDATION_SHARE = 0.03
SKIPPED = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|_vendored|site-packages|dist-packages|encodings|lib2to3|idlelib|pydoc_data"
    r"|turtledemo|config-[^/]*|graph_objs|validators|unicode_versions|_unicode|__pycache__)/|_pb2\.py$|(^|/)test_[^/]*$|^\.\."
)
"""Skipped folders and files: tests, copies of other packages, tables and generated code."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the corpus: its `path` within the package's root and the first 12 hexadecimal digits of its sha256."""

    package: str
    path: str
    digest: str
    split: Split


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a corpus, with the versions of their packages."""

    versions: Mapping[str, str]
    files: tuple[File, ...]

    def save(self, path: str | Path) -> None:
        """Writes the manifest as JSON, compressed if the name ends in `.gz` (always the same bytes)."""
        packages = {
            name: {"version": version, "train": {}, "validation": {}} for name, version in self.versions.items()
        }
        for file in self.files:
            packages[file.package][file.split][file.path] = file.digest
        data = json.dumps({"format_version": 1, "packages": packages}, separators=(",", ":")).encode()
        Path(path).write_bytes(gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def load_manifest(path: str | Path) -> Manifest:
    """Returns the manifest that `Manifest.save` wrote.

    Raises FileNotFoundError if there is no such file, and ValueError if it is not a manifest.
    """
    path = existing_file(Path(path), f"there is no manifest at {path}")
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        version = content.get("format_version")
        packages = content["packages"] if version == 1 else {}
        files = [
            File(package=name, path=file, digest=digest, split=split)
            for name, package in packages.items()
            for split in get_args(Split)
            for file, digest in package[split].items()
        ]
        versions = {name: package["version"] for name, package in packages.items()}
    except (OSError, EOFError, zlib.error, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        needed = "packages, each with version, train and validation"
        raise ValueError(f"{path} is not a corpus manifest, which must contain {needed}: {error!r}") from error
    require(version == 1, f"format_version of {path}", version, "1")
    return Manifest(versions=versions, files=_sorted(files))


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """Which files of a manifest are installed here; `share` counts files."""

    present: tuple[File, ...]
    differing: tuple[File, ...]
    missing: tuple[File, ...]

    @property
    def share(self) -> float:
        return len(self.present) / max(1, len(self.present) + len(self.differing) + len(self.missing))

    @property
    def comparable(self) -> bool:
        """Returns whether results measured on the manifest's corpus can be expected here."""
        return self.share >= 0.9

    def __str__(self) -> str:
        counts = f"{len(self.present)} files of the corpus are present on this machine ({self.share:.1%})"
        left_out = f"{len(self.differing)} that differ and {len(self.missing)} that are missing are excluded"
        verdict = "" if self.comparable else "; below 90 %, so the results in the model card do not apply here"
        return f"{counts}, {left_out}{verdict}."


def compare(manifest: Manifest) -> CorpusReport:
    """Compares a manifest with this installation: unchanged, differing and missing files."""
    found: dict[str, list[File]] = {"present": [], "differing": [], "missing": []}
    for file in manifest.files:
        data = _read(file)
        state = "missing" if data is None else "present" if _digest(data) == file.digest else "differing"
        found[state].append(file)
    return CorpusReport(**{state: tuple(files) for state, files in found.items()})


def current_manifest(packages: tuple[str, ...] = PACKAGES) -> Manifest:
    """Returns the manifest of this installation: the standard library and `packages`, without files of equal content."""
    seen: set[str] = set()
    files: list[File] = []
    versions = {}
    for package in (STANDARD_LIBRARY, *packages):
        if (root := _root(package)) is not None:
            python = package == STANDARD_LIBRARY
            versions[package] = platform.python_version() if python else importlib.metadata.version(package)
            files.extend(_chosen(package, root, seen))
    return Manifest(versions=versions, files=_sorted(files))


def python_documents(split: Split, manifest: Manifest | None = None) -> Iterator[str]:
    """Yields the Python files of one split, in a fixed hash order that mixes the packages.

    With `manifest`, only files that match it exactly; without, those of `current_manifest`.
    """
    files = (current_manifest() if manifest is None else manifest).files
    for file in sorted((f for f in files if f.split == split), key=lambda f: _order(f.package, f.path)):
        data = _read(file)
        if data is not None and _digest(data) == file.digest:
            yield data.decode("utf-8")


def _chosen(package: str, root: Path, seen: set[str]) -> Iterator[File]:
    """Yields files of a package in hash order, up to PACKAGE_BYTES; `seen` holds the digests already included."""
    left = PACKAGE_BYTES
    for path in sorted(_paths(package, root), key=lambda path: _order(package, path)):
        data = (root / path).read_bytes()
        digest = _digest(data)
        if digest not in seen and len(data) <= left and _readable(data):
            seen.add(digest)
            left -= len(data)
            held_out = int(_order(package, path), 16) / 16**16 < VALIDATION_SHARE
            yield File(package=package, path=path, digest=digest, split="validation" if held_out else "train")


def _paths(package: str, root: Path) -> list[str]:
    """Returns the usable .py files of a package, relative to `root`."""
    if package == STANDARD_LIBRARY:
        names = _library_files(root)
    else:
        names = (path.as_posix() for path in importlib.metadata.files(package) or [] if path.suffix == ".py")
    smallest, largest = FILE_BYTES
    found = [name for name in names if not SKIPPED.search(name) and (root / name).is_file()]
    return [name for name in found if smallest <= (root / name).stat().st_size <= largest]


def _library_files(root: Path) -> Iterator[str]:
    """Yields the .py files below `root` without entering skipped folders, such as that of the installed packages."""
    for folder, subfolders, names in os.walk(root):
        place = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if not SKIPPED.search(f"{(place / name).as_posix()}/")]
        yield from ((place / name).as_posix() for name in names if name.endswith(".py"))


def _readable(data: bytes) -> bool:
    """Returns whether the bytes are UTF-8 text and not a table of numbers."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    digits = len(data) - len(data.translate(None, b"0123456789"))
    return digits <= 0.12 * len(data)


def _sorted(files: list[File]) -> tuple[File, ...]:
    return tuple(sorted(files, key=lambda file: (file.package, file.split, file.path)))


def _order(package: str, path: str) -> str:
    return hashlib.sha256(f"{package}/{path}".encode()).hexdigest()[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


@cache
def _root(package: str) -> Path | None:
    """Returns the folder that a package's paths are relative to; None if it is not installed."""
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(file: File) -> bytes | None:
    root = _root(file.package)
    if root is None or ".." in PurePosixPath(file.path).parts or not (root / file.path).is_file():
        return None
    return (root / file.path).read_bytes()
