"""Vectors derived from `vector_tables`: every property in every packet, every cut, every flag, every reason code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs

from tests.protocol import vector_tables as t
from tests.protocol.vector_tables import unhex

OK: Final = None
MALFORMED, PROTOCOL, ALIAS = 0x81, 0x82, 0x94

METHOD: Final = bytes.fromhex("1500016d")
"""Authentication Method m, which every AUTH has to carry and CONNECT needs beside Authentication Data."""


@attrs.frozen
class Vector:
    """One packet and what 5.0 says about it: a reason code, or OK."""

    name: str
    packet_type: int
    frame: bytes
    code: int | None


def _type_of(owner: int | str) -> int:
    return t.CONNECT if owner == t.WILL else int(owner)


def _vector(name: str, owner: int | str, block: bytes, code: int | None) -> Vector:
    needs_method = owner == t.AUTH and not block.startswith(METHOD)
    return Vector(name, _type_of(owner), t.with_block(owner, (METHOD if needs_method else b"") + block), code)


def property_vectors(owner: int | str, *, to_server: bool) -> Iterator[Vector]:
    """Every property, right and wrong, once and twice, in the packet of `owner`."""
    for row in t.PROPERTY_VECTORS:
        name = f"{row.identifier:#04x}"
        if owner not in row.belongs:
            yield _vector(f"{name} does not belong", owner, row.block(), MALFORMED)
            continue
        block = METHOD + row.block() if (owner, row.identifier) == (t.CONNECT, 0x16) else row.block()
        code = _direction(owner, row.identifier, to_server)
        yield _vector(f"{name} belongs", owner, block, code)
        twice = block + row.block()
        repeatable = row.identifier == 0x26 or (owner == t.PUBLISH and row.identifier == 0x0B)
        yield _vector(f"{name} twice", owner, twice, (code if repeatable else PROTOCOL))
        for value in row.bad:
            yield _vector(f"{name} = {value}", owner, row.block(value), ALIAS if row.identifier == 0x23 else PROTOCOL)
        for size in range(1, len(row.block())):
            yield _vector(f"{name} cut after {size}", owner, row.block()[:size], MALFORMED)
    for identifier in t.UNKNOWN_IDENTIFIERS:
        yield _vector(f"unknown {identifier:#04x}", owner, bytes((identifier, 0)), MALFORMED)


def _direction(owner: int | str, identifier: int, to_server: bool) -> int | None:
    """Some properties belong to a packet of one sender only."""
    if to_server:
        if (owner, identifier) == (t.PUBLISH, 0x0B):
            return PROTOCOL  # [MQTT5-3.3.4-6]
        if (owner, identifier) == (t.DISCONNECT, 0x1C):
            return MALFORMED
    elif (owner, identifier) == (t.DISCONNECT, 0x11):
        return PROTOCOL  # [MQTT5-3.14.2-2]
    return OK


def reason_vectors(packet_type: int, allowed: tuple[int, ...], undecided: tuple[int, ...] = ()) -> Iterator[Vector]:
    """Every value of the reason code byte."""
    for number in range(256):
        if number in undecided:
            continue
        code = bytes((number,))
        if packet_type == t.CONNACK:
            body = b"\0" + code + b"\0"
        elif packet_type in (t.SUBACK, t.UNSUBACK):
            body = b"\0\x01\0" + code
        elif packet_type == t.AUTH:
            body = code + b"\x04" + METHOD
        else:
            body = (b"" if packet_type == t.DISCONNECT else b"\0\x01") + code
        yield Vector(
            f"reason {number:#04x}", packet_type, t.frame(packet_type, body), OK if number in allowed else PROTOCOL
        )


def flag_vectors(packet_type: int) -> Iterator[Vector]:
    """Every value of the four flags of the fixed header, behind which the packet itself is good."""
    good = (
        t.with_block(packet_type, METHOD if packet_type == t.AUTH else b"") if packet_type in t.WITH_PROPERTIES else b""
    )
    body = good[2:] if good else b""
    for flags in range(16):
        if packet_type == t.PUBLISH:
            code = MALFORMED if flags & 6 == 6 or (flags & 8 and not flags & 6) else OK
            body = unhex("0001 61 00 68 69") if not flags & 6 else unhex("0001 61 0001 00 68 69")
        else:
            code = OK if flags == t.FLAGS.get(packet_type, 0) else MALFORMED
        yield Vector(f"flags {flags:04b}", packet_type, t.frame(packet_type, body, flags), code)


SHAPES: Final[dict[str, tuple[int, str, dict[int, int | None]]]] = {
    "CONNECT": (t.CONNECT, "0004 4d515454 05 c6 003c 05 11 00000001 0001 63 00 0001 77 0001 21 0001 75 0001 70", {}),
    "CONNACK": (t.CONNACK, "01 00 03 21 0014", {}),
    "PUBLISH": (t.PUBLISH, "0001 61 0001 02 01 01 68 69", {8: OK, 9: OK}),
    "PUBACK": (t.PUBACK, "0001 10 04 1f 0001 78", {2: OK, 3: OK}),
    "PUBREC": (t.PUBREC, "0001 10 04 1f 0001 78", {2: OK, 3: OK}),
    "PUBREL": (t.PUBREL, "0001 92 04 1f 0001 78", {2: OK, 3: OK}),
    "PUBCOMP": (t.PUBCOMP, "0001 92 04 1f 0001 78", {2: OK, 3: OK}),
    "SUBSCRIBE": (t.SUBSCRIBE, "0001 02 0b 01 0001 61 01 0002 622f 00", {5: PROTOCOL, 9: OK}),
    "SUBACK": (t.SUBACK, "0001 04 1f 0001 78 00 01", {7: PROTOCOL, 8: OK}),
    "UNSUBSCRIBE": (t.UNSUBSCRIBE, "0001 00 0001 61 0002 622f", {3: PROTOCOL, 6: OK}),
    "UNSUBACK": (t.UNSUBACK, "0001 04 1f 0001 78 00 11", {7: PROTOCOL, 8: OK}),
    "DISCONNECT": (t.DISCONNECT, "00 04 1f 0001 78", {0: OK, 1: OK}),
    "AUTH": (t.AUTH, "18 04 15 0001 6d", {0: PROTOCOL, 1: PROTOCOL}),
}
"""A packet of each type with properties where it has them; what a packet is that ends after so many bytes of its body,
where it is not malformed: a shorter packet, or one without what it must have."""


def truncation_vectors(name: str) -> Iterator[Vector]:
    """The packet, cut after each byte of its body with a Remaining Length that agrees."""
    packet_type, text, otherwise = SHAPES[name]
    body, flags = unhex(text), 2 if name == "PUBLISH" else None
    yield Vector("whole", packet_type, t.frame(packet_type, body, flags), OK)
    for size in range(len(body)):
        cut = t.frame(packet_type, body[:size], flags)
        yield Vector(f"ends after {size}", packet_type, cut, otherwise.get(size, MALFORMED))


def length_vectors(owner: int | str) -> Iterator[Vector]:
    """Property Lengths that lie: beyond the packet, and in forms that Variable Byte Integers do not have."""
    whole = t.with_block(owner, b"")
    empty = t.with_block(owner, METHOD)
    at = next(i for i, (one, other) in enumerate(zip(whole[2:], empty[2:], strict=False)) if one != other) + 2
    assert whole[at] == 0
    before, after = whole[2:at], whole[at + 1 :]
    packet_type, flags = _type_of(owner), 2 if owner == t.PUBLISH else None
    for name, length in {
        "beyond the packet": b"\x7f",
        "of two bytes for 0": b"\x80\x00",
        "of five bytes": b"\x80\x80\x80\x80\x01",
        "far beyond the packet": b"\xff\xff\xff\x7f",
    }.items():
        yield Vector(
            f"Property Length {name}", packet_type, t.frame(packet_type, before + length + after, flags), MALFORMED
        )
