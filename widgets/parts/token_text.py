"""Tokens as text: the string of one token, and token offsets in a document that never split a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"
_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""Letter of a byte-level vocabulary -> byte."""

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
            raise ValueError(
                f"offsets must be a one-dimensional array of T + 1 integers, got {offsets.dtype} {offsets.shape}"
            )
        if (ends := (offsets[0], offsets[-1])) != (0, len(self.text)):
            raise ValueError(
                f"offsets must go from 0 to the text's {len(self.text)} characters, got {ends[0]} to {ends[1]}"
            )
        if (falls := np.flatnonzero(np.diff(offsets) < 0)).size:
            raise ValueError(f"offsets must not decrease, but token {falls[0]} ends before it begins")
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

    `tokenizer`: a fast tokenizer of transformers, byte-level or with word starts (`▁`) and byte fallback. Raises ValueError
    for any other, and for ids that are not a one-dimensional array of non-negative integers.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"token_ids must be a one-dimensional array of integers [T], got {ids.dtype} {ids.shape}")
    if ids.size and ids.min() < 0:
        raise ValueError(f"token_ids must be at least 0, got {ids.min()}")
    distinct, places = np.unique(ids.astype(np.int64), return_inverse=True)
    to_bytes, strips_first = _vocabulary(tokenizer)
    names = tokenizer.convert_ids_to_tokens(distinct.tolist())
    known = [b"" if name is None else to_bytes(name) for name in names]
    parts = [known[place] for place in places.tolist()]
    if strips_first and parts:
        parts[0] = parts[0].removeprefix(b" ")
    text, ends = _decoded(b"".join(parts))
    bounds = np.cumsum([0, *map(len, parts)])
    return TokenText(text, np.searchsorted(ends, bounds, side="right"))


class TokenStrings:
    """Maps one token, in a list, to its string, with its leading space; part of a character shows its bytes, as `\\xe2`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._strings: dict[int, str] = {}
        self._parts: dict[int, bytes | None] = {}
        try:
            self._bytes = _vocabulary(tokenizer)[0]
        except ValueError:  # a tokenizer whose tokens have no bytes
            self._bytes = lambda name: b""

    def __call__(self, ids: Sequence[int]) -> str:
        token = int(ids[0])
        if token not in self._strings:
            self._strings[token] = _tokenizer_string(self.tokenizer, token)
        return self._strings[token]

    def part(self, token: int) -> bytes | None:
        """Returns the bytes of a token that begins or ends inside a character; None for whole characters."""
        if token not in self._parts:
            data = self._bytes(self.tokenizer.convert_ids_to_tokens(token) or "")
            try:
                data.decode()
            except UnicodeDecodeError:
                self._parts[token] = data
            else:
                self._parts[token] = None
        return self._parts[token]


def token_decoder(decode: Any) -> Decode:
    """Returns a function from one token to its string; `decode` maps token ids to text, or is a transformers tokenizer.

    With a tokenizer, the result is `TokenStrings`. Raises ValueError for anything else.
    """
    if hasattr(decode, "convert_ids_to_tokens"):
        return TokenStrings(decode)
    if not callable(decode):
        raise ValueError(f"decode must be a function from token ids to text, or a tokenizer, got {decode!r}")
    return cast(Decode, decode)


def part_of(decode: Decode, token: int) -> bytes | None:
    """Returns the bytes of a token that holds part of a character (`TokenStrings.part`), if `decode` knows them."""
    return decode.part(token) if isinstance(decode, TokenStrings) else None


def texts_of(decode: Decode, ids: Sequence[int]) -> list[str]:
    """Returns the text of each of the tokens in turn, with whole characters.

    A character that spans several tokens belongs to the one that completes it; the others are empty. The bytes of a
    character that is never completed are written out, as `\\xe2`.
    """
    texts: list[str] = []
    pending = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    for token in map(int, ids):
        data = part_of(decode, token)
        if data is None or not 0x80 <= data[0] < 0xC0:  # it completes nothing
            if texts:
                texts[-1] += pending.decode(b"", final=True)
            pending.reset()
        texts.append(decode([token]) if data is None else pending.decode(data))
    if texts:
        texts[-1] += pending.decode(b"", final=True)
    return texts


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
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    state = {"decoders": []} if decoder is None else json.loads(decoder.__getstate__())
    steps = state.get("decoders", [state])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return lambda name: _spelled_bytes(name) or name.encode(), False
    if kinds & {"Metaspace", "ByteFallback"}:
        stripped = any(step["type"] == "Strip" and step["start"] for step in steps)
        return _word_starts, stripped or any(step.get("prepend_scheme", "never") != "never" for step in steps)
    allowed = "a fast tokenizer, byte-level or with byte fallback"
    raise ValueError(f"the tokenizer must be {allowed}; its decoder is {kinds or None}")


def _spelled_bytes(name: str) -> bytes | None:
    """Returns the bytes of a byte-level token; None for an added token, which is written literally."""
    return bytes(map(_BYTE_OF.__getitem__, name)) if set(name) <= set(_BYTE_OF) else None


def _word_starts(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_WORD_START, " ").encode()


def _mark_malformed(error: UnicodeError) -> tuple[str, int]:
    """Replaces a malformed part of UTF-8, which decoding writes as one U+FFFD, by U+DC00 plus its number of bytes."""
    assert isinstance(error, UnicodeDecodeError)
    return chr(0xDC00 + error.end - error.start), error.end


codecs.register_error("refine_lab.mark_malformed", _mark_malformed)


def _decoded(data: bytes) -> tuple[str, np.ndarray]:
    """Returns the text of UTF-8 bytes, and the byte offset at which each of its characters ends."""
    codes = code_points(data.decode("utf-8", "refine_lab.mark_malformed")).astype(np.int64)
    lengths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    malformed = (codes >= 0xDC00) & (codes <= 0xDFFF)  # UTF-8 encodes no surrogate
    return data.decode("utf-8", "replace"), np.cumsum(np.where(malformed, codes - 0xDC00, lengths))
