"""Packs nested data with arrays into one buffer, in which widgets send it to the page.

Some hosts, such as Google Colab, drop binary buffers inside a dict or a list of a widget's state, but keep those that
are the value of a trait. Therefore a trait with arrays is sent as a single buffer, which `shared.js` unpacks:

    4 bytes: length of the header, little-endian    the header: UTF-8 JSON    the arrays' bytes, one after the other

In the header, an array's bytes are `{"$bytes": [first, length]}`, counted from the end of the header.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

MARK = "$bytes"


def pack(value: Any) -> bytes:
    """Packs dicts, lists, strings, numbers and bytes into one buffer. A non-finite number becomes null.

    Raises TypeError for other values, and ValueError for a dict with the key `$bytes`.
    """
    parts: list[bytes] = []

    def place(data: bytes) -> dict[str, list[int]]:
        parts.append(data)
        return {MARK: [sum(map(len, parts[:-1])), len(data)]}

    header = json.dumps(json_values(value, place), allow_nan=False).encode("ascii")
    return b"".join([struct.pack("<I", len(header)), header, *parts])


def unpack(data: bytes | memoryview) -> Any:
    """Inverts `pack`, except that tuples become lists and non-finite numbers become None."""
    buffer = bytes(data)
    begin = 4 + struct.unpack_from("<I", buffer)[0]

    def restore(value: dict[str, Any]) -> Any:
        first, length = value.get(MARK, (0, 0))
        return buffer[begin + first : begin + first + length] if MARK in value else value

    return json.loads(buffer[4:begin], object_hook=restore)


def json_values(value: Any, of_bytes: Callable[[bytes], Any]) -> Any:
    """Converts a value to strict JSON: bytes to `of_bytes(value)`, non-finite numbers to null.

    Raises ValueError for a dict with the key `$bytes`.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return of_bytes(bytes(value))
    if isinstance(value, Mapping):
        if MARK in value:
            raise ValueError(f"a dict that is sent to a page must not have the key {MARK!r}")
        return {str(name): json_values(item, of_bytes) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item, of_bytes) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


PACKED: dict[str, Any] = {
    "sync": True,
    "to_json": lambda value, widget: pack(value),
    "from_json": lambda value, widget: unpack(value),
}
"""Metadata of a trait that is sent to the page as one buffer."""
