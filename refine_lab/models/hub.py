"""From a name to the folder that holds a model: shipped, a run, a folder of one's own, or a part of a repository on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] -- of httpx or httpx2, whichever the hub's client is built on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from refine_lab.runs.files import checkpoints, read_json

SHIPPED = Path(__file__).parent / "shipped"
"""The models that come with the package, a folder each."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Any of them makes a tokenizer."""

NO_TOKENIZER = ("config.json", "generation_config.json", "*.index.json", "manifest.json.gz")
SMALL_FILES = (
    *NO_TOKENIZER,
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
"""What is fetched of a repository before anything large: enough to know whether its weights are wanted, and which."""

SECONDS_TO_ANSWER = 10.0
"""A hub that has not answered by then counts as out of reach."""

_NAME = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<subfolder>[^@:*?\[\]]+))?(@(?P<revision>[^@:]+))?", re.ASCII
)


@dataclass(frozen=True)
class HubName:
    """What a name asks of the hub: `org/repo`, `org/repo:subfolder`, `org/repo@revision`, `org/repo:subfolder@revision`.

    A subfolder and a revision (a branch, a tag, a commit) may hold slashes. Without a revision it is the main branch.
    """

    repo: str
    subfolder: str = ""
    revision: str | None = None

    @staticmethod
    def parse(name: str) -> HubName | None:
        """The parts of `name`, or None where it is not of that form."""
        found = _NAME.fullmatch(name)
        subfolder = ((found and found["subfolder"]) or "").strip("/")
        if found is None or ".." in Path(subfolder).parts:
            return None
        return HubName(found["repo"], subfolder, found["revision"])


@dataclass(frozen=True)
class Place:
    """Where a model's files are: its folder, what that is a copy of on the hub, and where its tokenizer is if elsewhere."""

    folder: Path
    hub: HubName | None = None
    "At the commit that the folder shows, so that all of its files are of one."
    elsewhere: Place | None = None

    @property
    def tokenizer(self) -> Place:
        return self.elsewhere or self

    def fetch(self, files: Sequence[str]) -> None:
        """Download those of the hub's files that match; nothing for a folder that is one's own."""
        if self.hub is not None and not all((self.folder / file).is_file() for file in files):
            _snapshot(self.hub, files)

    def files(self) -> list[str]:
        """The names of the files in the folder, or of those that the hub has there, downloaded or not."""
        if self.hub is None or constants.is_offline_mode():
            return sorted(path.name for path in self.folder.iterdir())
        prefix = f"{self.hub.subfolder}/" if self.hub.subfolder else ""
        try:
            listed = [file.rfilename for file in _ask(self.hub).siblings or []]
        except HTTPError as error:
            raise FileNotFoundError(f"{constants.ENDPOINT} {_cause(error, self.hub)}") from error
        inside = (path.removeprefix(prefix) for path in listed if path.startswith(prefix))
        return sorted(name for name in inside if "/" not in name)


def locate(name: str, revision: str | None = None) -> Place:
    """The place of the model of that name; of a repository on the hub only the small files are fetched.

    `name` is looked for among the shipped models, then as a run directory (its last checkpoint) or a folder, then on the
    hub, where `revision` may be given apart from it. A tokenizer that a subfolder does not have is the repository's.

    Raises FileNotFoundError where nothing is found, naming every place where it was looked for and what is wrong there,
    and ValueError for a revision of what is not on the hub, or for two.
    """
    folder, asked = _local(name), HubName.parse(name)
    if folder is not None:
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for models on the hub, but {name!r} is the folder {folder}")
        return Place(folder)
    if asked is None:
        form = "org/repo, org/repo:subfolder, org/repo@revision or org/repo:subfolder@revision"
        raise FileNotFoundError(f"{_looked_for(name)}, and on the hub names have the form {form}")
    if revision is not None:
        if asked.revision not in (None, revision):
            raise ValueError(f"two revisions are asked for: {asked.revision!r} by {name!r}, and revision={revision!r}")
        asked = replace(asked, revision=revision)
    return _download(name, asked)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def resolve(name: str) -> Path:
    """The local folder of the model of that name; of a repository on the hub it has the small files at least."""
    return locate(name).folder


def shipped(name: str) -> Path | None:
    """The folder of the shipped model of that name, or None where there is none."""
    return next((folder for folder in SHIPPED.iterdir() if folder.name == name and folder.is_dir()), None)


def own_folder(name: str) -> Path | None:
    """The folder at that path, which may begin with ~, or None where there is none."""
    path = os.path.expanduser(name)  # as it is where there is no such user
    return Path(path) if os.path.isdir(path) else None  # False for what no file system takes, too


def _local(name: str) -> Path | None:
    folder = shipped(name) or own_folder(name)
    if folder is None or not _is_run(folder):
        return folder
    steps = checkpoints(folder)
    if not steps:
        raise FileNotFoundError(f"the run {folder} has no checkpoint yet")
    return steps[-1][1]


def _is_run(folder: Path) -> bool:
    """Whether its config.json is a run's: a model's may have a folder `checkpoints` beside it."""
    try:
        fields = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return "format_version" in fields and "model_type" not in fields


def _looked_for(name: str) -> str:
    known = ", ".join(sorted(path.name for path in SHIPPED.glob("*"))) or "none"
    path = Path(os.path.expanduser(name)).absolute()
    return f"there is no model {name!r}: not among the shipped ones ({known}), no run or folder at {path}"


def _download(name: str, asked: HubName) -> Place:
    try:
        root = _snapshot(asked, SMALL_FILES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{_looked_for(name)}, {error}") from error
    pinned = replace(asked, revision=root.name)  # a snapshot is named by its commit
    place = Place(root / asked.subfolder, pinned)
    if not (place.folder / "config.json").is_file():
        inside = f"its folder {asked.subfolder!r}" if asked.subfolder else "its root"
        revision = "" if asked.revision is None else f" at revision {asked.revision!r}"
        raise FileNotFoundError(
            f"{asked.repo}{revision} on {constants.ENDPOINT} has no model in {inside}: no config.json"
        )
    if asked.subfolder and not any(
        (place.folder / file).is_file() for file in (*TOKENIZER_FILES, "tokenizer_config.json")
    ):
        whole = Place(root, replace(pinned, subfolder=""))
        whole.fetch([file for file in SMALL_FILES if file not in NO_TOKENIZER])
        return replace(place, elsewhere=whole)
    return place


def _ask(asked: HubName) -> Any:
    """What the hub says of the repository. snapshot_download asks too, but sets no limit to the wait."""
    try:
        return HfApi().repo_info(asked.repo, revision=asked.revision, timeout=SECONDS_TO_ANSWER)
    except (JSONDecodeError, LookupError, TypeError) as error:
        raise HTTPError("what answers is no hub, but perhaps a network's login page") from error


def _snapshot(asked: HubName, files: Sequence[str]) -> Path:
    """The local copy of the repository with those of its files that match, fetched where the cache lacks them.

    Where the hub does not answer, what the cache holds is taken. A pattern's star would match slashes too: folders below
    are left out by name.

    Raises FileNotFoundError, naming the cache, the hub's address and what is wrong there.
    """
    prefix = f"{asked.subfolder}/" if asked.subfolder else ""
    wanted = {"allow_patterns": [prefix + file for file in files], "ignore_patterns": [f"{prefix}*/*"]}
    get = partial(snapshot_download, asked.repo, revision=asked.revision, **wanted)
    try:
        try:
            _ask(asked)
        except RevisionNotFoundError:
            raise
        except (HTTPError, OfflineModeIsEnabled) as error:
            try:
                return Path(get(local_files_only=True))
            except LocalEntryNotFoundError:
                raise error from None
        return Path(get())
    except (HTTPError, OSError, HFValidationError) as error:
        where = f"not whole in the cache {constants.HF_HUB_CACHE}"
        raise FileNotFoundError(f"{where}, and {constants.ENDPOINT} {_cause(error, asked)}") from error


def _cause(error: Exception, asked: HubName) -> str:
    """What the hub did, to follow its address."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return "is not asked, since HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return f"gives {asked.repo} only to those whom it has granted access: ask for it there, and log in"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {asked.revision!r} of {asked.repo}"
    if isinstance(error, RepositoryNotFoundError):
        return f"has no repository {asked.repo}, or a private one that needs a login"
    if isinstance(error, HfHubHTTPError):
        return f"answers {error.response.status_code} {error.response.reason_phrase}"
    if isinstance(error, HFValidationError):
        return f"takes no such name ({reason})"
    if isinstance(error, (HTTPError, LocalEntryNotFoundError)):
        return f"cannot be reached ({reason})"
    return f"gives what cannot be kept ({reason})"
