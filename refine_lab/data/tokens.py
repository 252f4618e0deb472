"""Token arrays: each source is tokenised once and cached on disk for later runs."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from refine_lab.data.corpus import Manifest, Split
from refine_lab.data.sources import documents, identity
from refine_lab.data.tokenizer import end_of_text
from refine_lab.runs.durable import digest, make_folder, replace_text, replacing
from refine_lab.validation import path_of, require

CACHE_VERSION = 1
STALE_SECONDS = 3600.0
"""Age at which a temporary file of the cache counts as left behind by a killed process."""
BATCH_CHARACTERS = 2_000_000
"""Characters tokenised at once, which bounds the memory for offsets."""
LONGEST_PIECE = 200_000
"""Maximum characters tokenised as one text; a whole book in one piece would leave all but one processor idle."""


def cache_folder() -> Path:
    """Returns the folder of the token arrays: `REFINE_CACHE`, or the platform's cache folder.

    Raises ValueError if REFINE_CACHE is a relative path, or if it is not set and there is no home folder.
    """
    if named := os.environ.get("REFINE_CACHE"):
        path = path_of("REFINE_CACHE", named)
        require(path.is_absolute(), "REFINE_CACHE", named, "an absolute path")
        return path
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "refine_lab"
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "refine_lab" / "cache"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refine_lab"
    except RuntimeError as error:  # from Path.home
        raise ValueError(
            f"the home directory, where tokens are cached by default, cannot be determined ({error}): "
            "set REFINE_CACHE to a folder"
        ) from error


def token_array(
    source: str,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    min_tokens: int = 1,
    manifest: Manifest | None = None,
    beginning: tuple[int, ...] = (),
    row_tokens: int | None = None,
) -> Int[np.ndarray, "tokens"]:
    """Returns a source's tokens, int32 [at most max_tokens]: per document `beginning`, its own tokens and end-of-text.

    Documents of fewer than `min_tokens` tokens are left out. With `row_tokens`, a document has at most so many tokens,
    `beginning` included, and the array also has their lengths: `document_rows` reads it. The array is memory-mapped
    from the cache folder, and written there first if it is missing or damaged.

    Raises what `documents` raises; ValueError if every document is shorter than `min_tokens`, or the tokenizer is not
    a fast one (from the library `tokenizers`) or lacks an end-of-text token; and OSError if the cache folder cannot be written.
    """
    encoder, end = _encoder(tokenizer), end_of_text(tokenizer)
    settings = [CACHE_VERSION, split, max_tokens, min_tokens, end, encoder.to_str()]
    settings += [source, identity(source, manifest), *([list(beginning)] if beginning else [])]
    settings += [] if row_tokens is None else [f"rows of {row_tokens}"]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
    path = cache_folder() / f"tokens-{key}.npy"
    if (kept := _kept(path)) is None:
        encoded = _encoded(documents(source, split, manifest), encoder)
        whole = ([*beginning, *ids] for ids in encoded if len(ids) >= min_tokens)
        if row_tokens is None:
            numbers = islice(chain.from_iterable([*ids, end] for ids in whole), max_tokens)
        else:
            numbers = _with_lengths((ids[:row_tokens] for ids in whole), end, max_tokens)
        tokens = np.fromiter(numbers, dtype=np.int32)
        if not len(tokens):
            raise ValueError(f"no {split} document of {source!r} has at least {min_tokens} tokens (min_tokens)")
        try:
            _drop_stale(path.parent)
            _write(path, tokens)
        except OSError as error:
            advice = "set REFINE_CACHE to a writable folder"
            raise OSError(f"tokens cannot be stored in {path.parent} ({error}): {advice}") from error
        kept = np.load(path, mmap_mode="r")
    return kept


def _with_lengths(rows: Iterable[list[int]], end: int, max_tokens: int) -> Iterator[int]:
    """Yields rows of at most `max_tokens` tokens together, `end` after each, then their lengths and their number.

    A row of one token is left out, since nothing in it is predicted.
    """
    lengths: list[int] = []
    total = 0
    for row in (row for row in rows if len(row) > 1):
        if (total := total + len(row)) > max_tokens:
            break
        lengths.append(len(row))
        yield from (*row, end)
    if lengths:
        yield from (*lengths, len(lengths))


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The rows of a source: row i is `tokens[starts[i] : ends[i]]`."""

    tokens: Int[np.ndarray, "tokens"]
    starts: Sequence[int] | Int[np.ndarray, "rows"]
    ends: Sequence[int] | Int[np.ndarray, "rows"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Int[np.ndarray, "T"]:
        return self.tokens[self.starts[index] : self.ends[index]]


def packed_rows(tokens: Int[np.ndarray, "tokens"], length: int) -> TokenRows:
    """Cuts a stream of tokens into consecutive rows of `length` tokens; a shorter rest is left out."""
    stop = len(tokens) // length * length
    return TokenRows(tokens, range(0, stop, length), range(length, stop + length, length))


def document_rows(stored: Int[np.ndarray, "stored"]) -> TokenRows:
    """Returns one row per document from the array that `token_array` made with `row_tokens`.

    In the rows' `tokens`, end-of-text follows each row and belongs to none.
    """
    count = int(stored[-1])
    lengths = np.asarray(stored[-1 - count : -1], dtype=np.int64)
    ends = np.cumsum(lengths + 1) - 1
    return TokenRows(stored[: -1 - count], ends - lengths, ends)


def _kept(path: Path) -> Int[np.ndarray, "tokens"] | None:
    """Returns the array at `path`, or None if it is missing or, with a warning, if it is damaged."""
    try:
        written = path.with_suffix(".digest").read_text(encoding="utf-8", errors="replace")
        if digest(path) == written:
            return np.load(path, mmap_mode="r")
    except OSError:
        return None
    warnings.warn(f"{path} is damaged; its source is tokenised again", stacklevel=2)
    return None


def _drop_stale(folder: Path) -> None:
    """Removes the temporary files that killed processes left in the cache folder."""
    for left in folder.glob("*.tmp"):
        with suppress(OSError):  # another process removes it too, or another user owns it
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Returns the tokenizer's own encoder, without padding or truncation that an earlier call may have left on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"the tokenizer must be a fast one (from the library `tokenizers`), got {type(tokenizer).__name__}"
        )
    encoder = Tokenizer.from_str(backend.to_str())
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def _encoded(texts: Iterable[str], encoder: Tokenizer) -> Iterator[list[int]]:
    """Yields the tokens of each text, encoding many at a time."""
    for group in _groups(texts):
        pieces = [_pieces(text) for text in group]
        encodings = iter(encoder.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False))
        for parts in pieces:
            yield [token for _ in parts for token in next(encodings).ids]


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pieces(text: str) -> list[str]:
    """Splits `text` before the first letter of a line, where no token can cross the cut."""
    cuts = [0]
    while len(text) - cuts[-1] > LONGEST_PIECE:
        end = cuts[-1] + LONGEST_PIECE
        while end < len(text) and not (text[end - 1] == "\n" and text[end].isalpha()):
            end += 1
        cuts.append(end)
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True) if end > start] or [""]


def _write(path: Path, tokens: np.ndarray) -> None:
    """Writes the array and then, beside it, its digest, without which it does not count."""
    make_folder(path.parent)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, tokens)
    replace_text(path.with_suffix(".digest"), digest(path))
