"""Nested data with arrays in it as one buffer: what a widget sends to its page.

Some hosts, Google Colab among them, drop binary buffers that stand inside a dict or a list of a widget's state, and keep those
that are the value of a trait. So a trait that holds arrays is sent as a single buffer, which `shared.js` unpacks:

    4 bytes: length of the header, little-endian    the header: UTF-8 JSON    the arrays' bytes, one after the other

In the header an array's bytes are `{"$bytes": [first, length]}`, counted from the end of the header.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

MARK = "$bytes"


def pack(value: Any) -> bytes:
    """Dicts, lists, texts, numbers and bytes as one buffer. A number that is not finite becomes null.

    Raises TypeError for a value of another kind, and ValueError for a dict that has the key `$bytes`.
    """
    parts: list[bytes] = []
    header = json.dumps(_without_bytes(value, parts), allow_nan=False).encode("ascii")
    return b"".join([struct.pack("<I", len(header)), header, *parts])


def unpack(data: bytes | memoryview) -> Any:
    """What `pack` was given, except that tuples are lists and that numbers which were not finite are None."""
    whole = bytes(data)
    begin = 4 + struct.unpack_from("<I", whole)[0]

    def revived(found: dict[str, Any]) -> Any:
        if MARK not in found:
            return found
        first, length = found[MARK]
        return whole[begin + first : begin + first + length]

    return json.loads(whole[4:begin], object_hook=revived)


def _without_bytes(value: Any, parts: list[bytes]) -> Any:
    """The value as JSON has it; the bytes in it are added to `parts`."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        first = sum(map(len, parts))
        parts.append(bytes(value))
        return {MARK: [first, len(parts[-1])]}
    if isinstance(value, Mapping):
        if MARK in value:
            raise ValueError(f"a dict that is sent to a page must not have the key {MARK!r}")
        return {str(name): _without_bytes(item, parts) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_bytes(item, parts) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


PACKED: dict[str, Any] = {
    "sync": True,
    "to_json": lambda value, widget: pack(value),
    "from_json": lambda value, widget: unpack(value),
}
"""Metadata of a trait that is sent to the page as one buffer."""
