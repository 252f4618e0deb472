"""Tokens as text: the string of one token, and token offsets in a document that never split a character."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if chr(b) not in _BYTE_OF)}
"""Letter of a byte-level vocabulary -> byte: printable bytes map to themselves, others to letters from U+0100 on."""

Decode = Callable[[Sequence[int]], str]
"""Token ids -> their text."""


@dataclass(frozen=True, eq=False)
class TokenText:
    """A document and the offsets of its tokens.

    `offsets` [T + 1]: the index of the code point of `text` at which each token begins, and the end. A token that ends
    inside a character may be empty. Any text is allowed, including lone surrogates and NUL.

    Raises ValueError unless the offsets increase from 0 to the length of the text.
    """

    text: str
    offsets: Sequence[int] | np.ndarray

    def __post_init__(self) -> None:
        offsets = np.array(self.offsets)
        if offsets.ndim != 1 or not len(offsets) or not np.issubdtype(offsets.dtype, np.integer):
            raise ValueError(f"offsets must be a row of T + 1 whole numbers, got {offsets.dtype} {offsets.shape}")
        if offsets[0] != 0 or offsets[-1] != len(self.text):
            raise ValueError(
                f"offsets must go from 0 to the text's {len(self.text)} characters, got {offsets[0]} to {offsets[-1]}"
            )
        if (falls := np.flatnonzero(np.diff(offsets) < 0)).size:
            raise ValueError(f"offsets must not fall, but token {falls[0]} ends before it begins")
        object.__setattr__(self, "offsets", offsets.astype(np.int64))

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return len(self.offsets) - 1

    def __getitem__(self, token: int) -> str:
        """Returns the text of one token. Raises IndexError if the index is out of range."""
        if not 0 <= token < len(self):
            raise IndexError(f"token {token} is not among the {len(self)} tokens")
        return self.text[self.offsets[token] : self.offsets[token + 1]]


def token_text(tokenizer: Any, token_ids: Any) -> TokenText:
    """Returns the text of `token_ids` [T] and the offset of each token in it.

    The text is the joint decoding of all tokens. A character that spans several tokens belongs to the one that
    completes it; the others are empty. Invalid bytes become U+FFFD, as in decoding; an id that the tokenizer lacks is
    empty.

    `tokenizer`: a fast one of transformers, byte-level or with word starts (`▁`) and byte fallback. Raises ValueError
    for any other, and for ids that are not one row of numbers from 0.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"token_ids must be one row of whole numbers [T], got {ids.dtype} {ids.shape}")
    if ids.size and ids.min() < 0:
        raise ValueError(f"token_ids must be at least 0, got {ids.min()}")
    distinct, places = np.unique(ids.astype(np.int64), return_inverse=True)
    names = tokenizer.convert_ids_to_tokens(distinct.tolist())
    in_bytes, strips_first = _vocabulary(tokenizer)
    known = [b"" if name is None else in_bytes(name) for name in names]
    parts = [known[place] for place in places.tolist()]
    if strips_first and parts:
        parts[0] = parts[0].removeprefix(b" ")
    text, ends = _decoded(b"".join(parts))
    bounds = np.cumsum([0, *map(len, parts)])
    return TokenText(text, np.searchsorted(ends, bounds, side="right"))


def token_decoder(decode: Any) -> Decode:
    """Returns a function from one token to its string; `decode` maps token ids to text, or is a transformers tokenizer.

    With a tokenizer, tokens keep their leading space, and a token that is part of a character shows its bytes, as
    `\\xe2`. Raises ValueError for anything else.
    """
    if hasattr(decode, "convert_ids_to_tokens"):
        return lambda ids: _tokenizer_string(decode, int(ids[0]))
    if not callable(decode):
        raise ValueError(f"decode must be a function from token ids to text, or a tokenizer, got {decode!r}")
    return cast(Decode, decode)


def _tokenizer_string(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    name = tokenizer.convert_ids_to_tokens(token) or ""
    if "\ufffd" in text and (part := _spelled_bytes(name)) is not None:
        return part.decode("utf-8", "backslashreplace")
    if name.startswith(_WORD_START) and not text.startswith(" "):  # a lone token loses its space in decoding
        return " " + text
    return text


def code_points(text: str) -> np.ndarray:
    """Returns the code points of a text [characters], including lone surrogates."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def utf16_offsets(text: TokenText) -> np.ndarray:
    """Returns the offsets [T + 1] in UTF-16 units, as in JavaScript."""
    astral = np.concatenate([[0], np.cumsum(code_points(text.text) > 0xFFFF)])
    return text.offsets + astral[text.offsets]


def _vocabulary(tokenizer: Any) -> tuple[Any, bool]:
    """Returns the map from a token's name to its bytes, and whether decoding drops a leading space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    steps: list[dict[str, Any]] = []
    if decoder is not None:
        state = json.loads(decoder.__getstate__())
        steps = state.get("decoders", [state])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level, False
    if kinds & {"Metaspace", "ByteFallback"}:
        stripped = any(step["type"] == "Strip" and step["start"] for step in steps)
        return _word_starts, stripped or any(step.get("prepend_scheme", "never") != "never" for step in steps)
    raise ValueError(
        f"the tokenizer must be a fast one, byte-level or with byte fallback; it decodes by {kinds or None}"
    )


def _spelled_bytes(name: str) -> bytes | None:
    """Returns the bytes of a byte-level token; None for an added token, which is written literally."""
    return bytes(map(_BYTE_OF.__getitem__, name)) if set(name) <= set(_BYTE_OF) else None


def _byte_level(name: str) -> bytes:
    return _spelled_bytes(name) or name.encode()


def _word_starts(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_WORD_START, " ").encode()


def _decoded(data: bytes) -> tuple[str, np.ndarray]:
    """Returns the text of UTF-8 bytes, and the byte offset at which each of its characters ends."""
    codes = code_points(data.decode("utf-8", "surrogateescape"))  # a byte that is no character becomes U+DC80 and on
    wrong = (codes >= 0xDC80) & (codes <= 0xDCFF)
    lengths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    ends = np.cumsum(np.where(wrong, 1, lengths))
    if not wrong.any():
        return data.decode(), ends
    kept = ~wrong
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wrong, [0]])))
    for first, stop in edges.reshape(-1, 2).tolist():
        run = bytes((codes[first:stop] - 0xDC00).tolist())
        at = 0
        while at < len(run):  # one U+FFFD for the longest beginning of a character
            at += _longest_beginning(run[at : at + 4])
            kept[first + at - 1] = True
    return data.decode("utf-8", "replace"), ends[kept]


def _longest_beginning(data: bytes) -> int:
    """Returns the length of the incomplete character at the start of the bytes."""
    if not 0xC2 <= data[0] <= 0xF4 or len(data) == 1 or not 0x80 <= data[1] <= 0xBF:
        return 1
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.end
    return len(data)
