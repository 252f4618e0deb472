"""Resolves a model name to a folder: a shipped model, a run, a local folder, or part of a repository on the hub."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] -- of the hub's client, httpx or httpx2

from refine_lab.runs.checkpoints import MANIFEST, OPTIMIZER, check_files, newest_whole, read_manifest
from refine_lab.runs.files import read_json
from refine_lab.runs.run import runs_dir
from refine_lab.text import quote, shorten

SHIPPED = Path(__file__).parent / "shipped"
"""Folder of the models that come with the package."""

DIGESTS = SHIPPED / "digests.json"
"""Size and digest of each file that a shipped model is loaded from."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files each of which is enough to define a tokenizer."""

TOKENIZER_SETTINGS = (
    *(*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
SMALL_FILES = ("config.json", "generation_config.json", "*.index.json", "manifest.json.gz", *TOKENIZER_SETTINGS)
"""Files fetched from a repository before any large ones: enough to decide whether its weights are needed, and which."""

MOST_LETTERS = 500
"""Maximum length of a name on the hub."""

IN_RUNS = "runs/"
"""Beginning of the names of runs and their checkpoints in the folder of runs."""

MOST_LISTED = 3
"""Maximum number of runs that an error lists."""

SECONDS_TO_ANSWER = 10.0
"""The hub is considered unreachable after this many seconds."""

_NAME = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<subfolder>[^@:*?\[\]]+))?(@(?P<revision>[^@:]+))?", re.ASCII
)


@dataclass(frozen=True)
class HubName:
    """A parsed hub name: `org/repo`, `org/repo:subfolder`, `org/repo@revision`, `org/repo:subfolder@revision`.

    A subfolder and a revision (a branch, a tag, a commit) may contain slashes. The default revision is the main branch.
    """

    repo: str
    subfolder: str = ""
    revision: str | None = None

    @staticmethod
    def parse(name: str) -> HubName | None:
        """Returns the parts of `name`, or None if it does not have this form."""
        found = _NAME.fullmatch(name) if len(name) <= MOST_LETTERS else None
        subfolder = ((found and found["subfolder"]) or "").strip("/")
        if found is None or ".." in Path(subfolder).parts:
            return None
        return HubName(found["repo"], subfolder, found["revision"])


@dataclass(frozen=True)
class Place:
    """The location of a model's files: its folder, the hub repository it mirrors, and its tokenizer's location if different."""

    folder: Path
    hub: HubName | None = None
    "Pinned to the commit of the folder, so that all files come from the same one."
    elsewhere: Place | None = None

    @property
    def tokenizer(self) -> Place:
        return self.elsewhere or self

    def fetch(self, files: Sequence[str]) -> None:
        """Downloads matching files from the hub; does nothing for a local folder."""
        if self.hub is not None and not all((self.folder / file).is_file() for file in files):
            _snapshot(self.hub, files)

    def files(self) -> list[str]:
        """Returns the names of the files in the folder, or of those on the hub, downloaded or not."""
        if self.hub is None or constants.is_offline_mode():
            return sorted(path.name for path in self.folder.iterdir())
        prefix = f"{self.hub.subfolder}/" if self.hub.subfolder else ""
        try:
            listed = [file.rfilename for file in _ask(self.hub).siblings or []]
        except HTTPError as error:
            raise FileNotFoundError(f"{constants.ENDPOINT} {_cause(error, self.hub)}") from error
        inside = (path.removeprefix(prefix) for path in listed if path.startswith(prefix))
        return sorted(name for name in inside if "/" not in name)


def locate(name: str, revision: str | None = None, *, cached: bool = False) -> Place:
    """Finds the model of that name; for a repository on the hub only the small files are fetched.

    `name` is looked up among the shipped models, then as a run directory (its last checkpoint) or a folder, then on the
    hub, where `revision` may be given separately. A run's NAME, or `runs/NAME`, is also looked up in the folder of runs,
    whatever the current folder is, and is never looked up on the hub. A subfolder without a tokenizer uses the
    repository's. With `cached`, the hub is not asked, and a repository must be in its cache.

    Raises FileNotFoundError if nothing is found, naming every place searched and what is wrong there, and ValueError
    for a revision of a model that is not on the hub, for two revisions, and for a folder with anything but regular files.
    """
    folder, asked = _local(name), HubName.parse(name)
    if folder is not None and revision is not None:
        raise ValueError(f"revision {revision!r} is for models on the hub, but {name!r} is the folder {folder}")
    if folder is not None:
        _refuse_special_files(folder)
        _check(folder)
        return Place(folder)
    if name.startswith(IN_RUNS):
        raise FileNotFoundError(_no_run(name))
    if asked is None:
        form = "org/repo, org/repo:subfolder, org/repo@revision or org/repo:subfolder@revision"
        raise FileNotFoundError(f"{_looked_for(name)}, and on the hub names have the form {form}")
    if revision is not None:
        if asked.revision not in (None, revision):
            raise ValueError(f"two revisions are asked for: {asked.revision!r} by {name!r}, and revision={revision!r}")
        asked = replace(asked, revision=revision)
    return _download(name, asked, cached)


def _refuse_special_files(folder: Path) -> None:
    """Raises ValueError for a named pipe or a device, which would block or feed whoever reads it."""
    special = next((path for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())), None)
    if special is not None:
        raise ValueError(f"the model's folder {folder} holds {special.name!r}, which is not a regular file")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def resolve(name: str) -> Path:
    """Returns the local folder of the model of that name; for a repository on the hub it holds at least the small files."""
    return locate(name).folder


def shipped(name: str) -> Path | None:
    """Returns the folder of the shipped model of that name, or None."""
    return next((folder for folder in SHIPPED.iterdir() if folder.name == name and folder.is_dir()), None)


def own_folder(name: str) -> Path | None:
    """Returns the folder at that path, which may begin with ~, or None.

    A run's name, `runs/NAME` and NAME/checkpoints/step-N, if they are not in the current folder, are looked up in
    `runs_dir()`: notebooks run in a folder of their own.
    """
    path = os.path.expanduser(name)  # as it is where there is no such user
    if os.path.isdir(path):  # False for what no file system takes, too
        return Path(path)
    inside = str(runs_dir() / name.removeprefix(IN_RUNS)) if name.startswith(IN_RUNS) or _is_bare(name) else ""
    return Path(inside) if os.path.isdir(inside) else None


def _is_bare(name: str) -> bool:
    """Returns whether a name may be that of a run, or of one of its checkpoints, without a folder before it."""
    first, *rest = name.split("/")
    return first not in ("", ".", "..", "~") and (not rest or (len(rest) == 2 and rest[0] == "checkpoints"))


def _local(name: str) -> Path | None:
    folder = shipped(name) or own_folder(name)
    if folder is None or not _is_run(folder):
        return folder
    found, damaged = newest_whole(folder, leave_out=[OPTIMIZER])
    if found is None and damaged:
        raise ValueError(f"the run {folder} has no undamaged checkpoint: {damaged[0][1]}")
    if found is None:
        raise FileNotFoundError(f"the run {folder} has no checkpoint yet")
    for _, sentence in damaged:
        warnings.warn(f"{sentence}; the checkpoint {found[1].name} is used", stacklevel=2)
    return found[1]


def _check(folder: Path) -> None:
    """Raises ValueError, naming the file, if one of a shipped model or of a checkpoint is damaged."""
    if folder.parent == SHIPPED:
        check_files(folder, read_json(DIGESTS)[folder.name])
    elif (manifest := read_manifest(folder)) is not None:
        try:
            check_files(folder, manifest["files"], leave_out=[OPTIMIZER])
        except ValueError as error:
            raise ValueError(f"{error}; if the change is intended, delete {MANIFEST} in that folder") from None


def _is_run(folder: Path) -> bool:
    """Returns whether the folder's config.json belongs to a run: a model's folder may also contain `checkpoints`."""
    try:
        fields = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return "format_version" in fields and "model_type" not in fields


def _looked_for(name: str) -> str:
    known = ", ".join(sorted(path.name for path in SHIPPED.glob("*") if path.is_dir())) or "none"
    path = quote(str(Path(os.path.expanduser(name)).absolute()))[1:-1]
    beside = f", no run of that name in {runs_dir()}" if _is_bare(name) else ""
    return (
        f"there is no model {quote(name)}: not one of the shipped models ({known}), no run or folder at {path}{beside}"
    )


def _no_run(name: str) -> str:
    """Returns a sentence for a name that begins with `runs/` where there is no such folder; it lists the newest runs."""
    folder = runs_dir()
    newest = sorted((path.name for path in folder.glob("*") if _is_run(path)), reverse=True)[:MOST_LISTED]
    known = f"the newest runs in the latter are {', '.join(newest)}" if newest else "the latter has no runs"
    return f"there is no run or checkpoint {quote(name)}, neither in the current folder nor in {folder}; {known}"


def _download(name: str, asked: HubName, cached: bool) -> Place:
    try:
        root = _snapshot(asked, SMALL_FILES, cached)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{_looked_for(name)}, {error}") from error
    pinned = replace(asked, revision=root.name)  # a snapshot is named by its commit
    place = Place(root / asked.subfolder, pinned)
    if not (place.folder / "config.json").is_file():
        inside = f"its folder {asked.subfolder!r}" if asked.subfolder else "its root"
        revision = "" if asked.revision is None else f" at revision {asked.revision!r}"
        source = f"{asked.repo}{revision} on {constants.ENDPOINT}"
        raise FileNotFoundError(f"{source} has no model in {inside}: no config.json")
    if not asked.subfolder or has_tokenizer(place.folder) or (place.folder / "tokenizer_config.json").is_file():
        return place
    repository = Place(root, replace(pinned, subfolder=""))
    if not cached:
        repository.fetch(TOKENIZER_SETTINGS)
    return replace(place, elsewhere=repository)


def _ask(asked: HubName) -> Any:
    """Requests the repository's information; unlike snapshot_download, with a time limit."""
    try:
        return HfApi().repo_info(asked.repo, revision=asked.revision, timeout=SECONDS_TO_ANSWER)
    except (JSONDecodeError, LookupError, TypeError) as error:
        raise HTTPError("the response does not come from a Hub; it may be a network's login page") from error


def _snapshot(asked: HubName, files: Sequence[str], cached: bool = False) -> Path:
    """Returns the local copy of the repository with the matching files, downloading those missing from the cache.

    If the hub does not answer, or with `cached`, the cached files are used. Subfolders are excluded by name because a star
    in a pattern also matches slashes.

    Raises FileNotFoundError, naming the cache, the hub's address and what is wrong there.
    """
    prefix = f"{asked.subfolder}/" if asked.subfolder else ""
    wanted = {"allow_patterns": [prefix + file for file in files], "ignore_patterns": [f"{prefix}*/*"]}
    get = partial(snapshot_download, asked.repo, revision=asked.revision, **wanted)
    where = f"not complete in the cache {constants.HF_HUB_CACHE}"
    if cached:
        try:
            return Path(get(local_files_only=True))
        except (OSError, errors.HFValidationError) as error:
            raise FileNotFoundError(f"{where}, and {constants.ENDPOINT} is not queried") from error
    try:
        try:
            _ask(asked)
        except errors.RevisionNotFoundError:
            raise
        except (HTTPError, errors.OfflineModeIsEnabled) as error:
            try:
                return Path(get(local_files_only=True))
            except errors.LocalEntryNotFoundError:
                raise error from None
        return Path(get())
    except (HTTPError, OSError, errors.HFValidationError) as error:
        raise FileNotFoundError(f"{where}, and {constants.ENDPOINT} {_cause(error, asked)}") from error


CAUSES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (errors.OfflineModeIsEnabled, "is not queried, since HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"),
    (errors.GatedRepoError, "requires access to {hub.repo}: request it there, and log in"),
    (errors.RevisionNotFoundError, "has no revision {hub.revision!r} of {hub.repo}"),
    (errors.RepositoryNotFoundError, "has no repository {hub.repo}, or it is private and requires a login"),
    (errors.HfHubHTTPError, "answers {error.response.status_code} {error.response.reason_phrase}"),
    (errors.HFValidationError, "does not accept this name ({reason})"),
    ((HTTPError, errors.LocalEntryNotFoundError), "cannot be reached ({reason})"),
    (Exception, "returned files that cannot be stored ({reason})"),
)
"""Kind of error -> description of the hub's failure, to follow its address in a sentence; the first that fits is used."""


def _cause(error: Exception, hub: HubName) -> str:
    reason = shorten(" ".join(str(error).split())) or type(error).__name__
    return next(text for kind, text in CAUSES if isinstance(error, kind)).format(error=error, hub=hub, reason=reason)
