"""Held-out texts, tokenised: the books in a folder, or the validation split of the Python corpus."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np

from refine_lab.data.batches import padded
from refine_lab.data.files import read_text
from refine_lab.data.sources import documents
from refine_lab.evaluation.benchmark import Missing, Setting
from refine_lab.evaluation.prompts import Encoder
from refine_lab.types import Batch


def book_files(setting: Setting) -> list[Path]:
    """Returns the .txt files of the folder of books. Raises `Missing` if there are none."""
    if setting.books is None:
        raise Missing(
            "no books folder is set: pass a folder of .txt files with --books, for example BookSum's test split"
        )
    files = sorted(setting.books.rglob("*.txt")) if setting.books.is_dir() else []
    if not files:
        raise Missing(f"the --books folder {str(setting.books)!r} contains no .txt files")
    return files


def book_sequences(setting: Setting, encoder: Encoder, length: int) -> list[list[int]]:
    """Returns sequences of at most `length` tokens: the first of every book, then the second, and so on.

    A book is cut into consecutive sequences; a remainder of one token is dropped, since nothing in it is predicted.
    """
    cut = [
        [part for i in range(0, len(ids), length) if len(part := ids[i : i + length]) > 1]
        for ids in (encoder.prompt(read_text(file)) for file in book_files(setting))
    ]
    every = (part for parts in zip_longest(*cut) for part in parts if part is not None)
    return list(islice(every, setting.limit))


def long_documents(setting: Setting, encoder: Encoder, length: int) -> Iterator[list[int]]:
    """Yields the first `length` tokens of each document that is long enough: books if a folder is set, else Python files."""
    if setting.books is not None:
        texts: Iterator[str] = (read_text(file) for file in book_files(setting))
    else:
        texts = documents("python", "validation", setting.manifest)
    for text in texts:
        ids = encoder.prompt(text)
        if len(ids) >= length:
            yield ids[:length]


def document_batch(setting: Setting, encoder: Encoder, length: int, count: int) -> Batch:
    """Returns the first `count` long documents as a batch. Raises `Missing` if no document is long enough."""
    rows = list(islice(long_documents(setting, encoder, length), setting.limit or count))
    if not rows:
        raise Missing(
            f"no held-out document has {length} tokens: choose a shorter length, or longer texts with --books"
        )
    return padded([np.array(row) for row in rows], tuple(range(len(rows))))


def text_facts(setting: Setting) -> dict[str, str]:
    """Returns where long documents come from."""
    return {"texts": "held-out text of the Python corpus" if setting.books is None else setting.books.name}
