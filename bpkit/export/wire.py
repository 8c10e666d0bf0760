"""A first look at an ONNX file, before any parser sees it: is it protobuf, and how much would it become in memory?

Two bytes can become a message of hundreds, so that a file of bearable size fills the memory while it is parsed. What
the definition of ONNX does not know is refused, since another parser might know it. So is external data, wherever.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

MOST_FIELDS = 200_000
MOST_PACKED = 1 << 20
"""Bytes of packed integers, each of which may become eight."""

_ANEW = "download it or export it again"
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_STRING = 9
_WIRES = {1: _FIXED64, 2: _FIXED32, 9: _LENGTH, 11: _LENGTH, 12: _LENGTH}
"""By type of field: double, float, string, message, bytes. All others are integers."""


class _Field(NamedTuple):
    name: str
    wire: int
    repeated: bool
    text: bool
    message: Any


class Refused(Exception):
    """What is wrong with a file, and how to mend it."""


def scan(data: bytes) -> None:
    """Walk over every field of the file. Raises Refused."""
    import onnx

    places, fields, packed = [(0, len(data), onnx.ModelProto.DESCRIPTOR)], 0, 0
    while places:
        at, end, kind = places.pop()
        known = _fields_of(kind)
        while at < end:
            key, at = _varint(data, at, end)
            field = known.get(key >> 3)
            fields += 1
            if field is None or key & 7 not in ({field.wire, _LENGTH} if field.repeated else {field.wire}):
                raise Refused(f"is no valid ONNX file (field {key >> 3} of {kind.name} is unknown): export it again")
            if fields > MOST_FIELDS:
                raise Refused(f"has more than {MOST_FIELDS:,} fields: a policy is a small network; export one")
            start, at, value = _skip(data, at, end, key & 7)
            if kind.name == "TensorProto" and (
                field.name == "external_data" or (field.name == "data_location" and value)
            ):
                raise Refused(
                    "keeps weights in another file (external data), which is never read: export it as one file, with "
                    "`external_data=False`"
                )
            if field.message is not None:
                places.append((start, at, field.message))
            elif field.text:
                try:
                    data[start:at].decode()
                except UnicodeDecodeError:
                    raise Refused(f"is no valid ONNX file (a name is not UTF-8): {_ANEW}") from None
            elif field.wire == _VARINT and key & 7 == _LENGTH:
                packed += at - start
                if packed > MOST_PACKED:
                    raise Refused(f"has over {MOST_PACKED:,} bytes of packed integers: store them as raw_data")


def _skip(data: bytes, at: int, end: int, wire: int) -> tuple[int, int, int]:
    """Where a value starts, where it ends, and the value itself if it is an integer."""
    value = 0
    start = at
    if wire == _LENGTH:
        length, start = _varint(data, at, end)
        at = start + length
    elif wire == _VARINT:
        value, at = _varint(data, at, end)
    else:
        at += 8 if wire == _FIXED64 else 4
    if at > end:
        raise Refused(f"is no valid ONNX file (a field ends behind the end): {_ANEW}")
    return start, at, value


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise Refused(f"is no valid ONNX file (it is not protobuf): {_ANEW}")


@cache
def _fields_of(kind: Any) -> dict[int, _Field]:
    return {
        f.number: _Field(f.name, _WIRES.get(f.type, _VARINT), _repeated(f), f.type == _STRING, f.message_type)
        for f in kind.fields
    }


def _repeated(field: Any) -> bool:
    # Protobuf has the first since 6.31, and drops the second.
    found: bool = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
    return found
