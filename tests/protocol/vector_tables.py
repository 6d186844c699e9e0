"""The tables of the 5.0 specification as test vectors: written by hand, used by nothing but tests.

A second opinion on purpose: nothing here comes from `mqtt_trio.protocol.properties` or `codes`.
"""

from __future__ import annotations

from typing import Final

import attrs

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 1, 2, 3, 4, 5, 6, 7
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = 8, 9, 10, 11, 12, 13, 14, 15
WILL: Final = "Will"

ACKS: Final = (PUBACK, PUBREC, PUBREL, PUBCOMP)
FROM_CLIENT: Final = (CONNECT, PUBLISH, *ACKS, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT, AUTH)
FROM_SERVER: Final = (CONNACK, PUBLISH, *ACKS, SUBACK, UNSUBACK, PINGRESP, DISCONNECT, AUTH)
WITH_PROPERTIES: Final = (
    CONNECT,
    WILL,
    CONNACK,
    PUBLISH,
    *ACKS,
    SUBSCRIBE,
    SUBACK,
    UNSUBSCRIBE,
    UNSUBACK,
    DISCONNECT,
    AUTH,
)
_REASONED: Final = (CONNACK, *ACKS, SUBACK, UNSUBACK, DISCONNECT, AUTH)


@attrs.frozen
class PropertyVector:
    """One row of table 2-4: identifier, a good value, where it belongs, values that its text forbids."""

    identifier: int
    value: str
    """Hex of a good value, without the identifier."""
    belongs: tuple[int | str, ...]
    bad: tuple[str, ...] = ()
    """Hex of values that are a Protocol Error."""

    def block(self, value: str | None = None) -> bytes:
        """Return identifier and value."""
        return bytes((self.identifier,)) + unhex(self.value if value is None else value)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


PROPERTY_VECTORS: Final = (
    PropertyVector(0x01, "01", (PUBLISH, WILL), ("02", "ff")),
    PropertyVector(0x02, "00000e10", (PUBLISH, WILL)),
    PropertyVector(0x03, "0001 74", (PUBLISH, WILL)),
    PropertyVector(0x08, "0001 72", (PUBLISH, WILL), ("0001 23", "0003 612f2b")),
    PropertyVector(0x09, "0002 00ff", (PUBLISH, WILL)),
    PropertyVector(0x0B, "01", (PUBLISH, SUBSCRIBE), ("00",)),
    PropertyVector(0x11, "0000000a", (CONNECT, CONNACK, DISCONNECT)),
    PropertyVector(0x12, "0001 69", (CONNACK,)),
    PropertyVector(0x13, "001e", (CONNACK,)),
    PropertyVector(0x15, "0001 6d", (CONNECT, CONNACK, AUTH)),
    PropertyVector(0x16, "0001 64", (CONNECT, CONNACK, AUTH)),
    PropertyVector(0x17, "01", (CONNECT,), ("02",)),
    PropertyVector(0x18, "00000001", (WILL,)),
    PropertyVector(0x19, "00", (CONNECT,), ("02",)),
    PropertyVector(0x1A, "0001 72", (CONNACK,)),
    PropertyVector(0x1C, "0001 73", (CONNACK, DISCONNECT)),
    PropertyVector(0x1F, "0002 6e6f", _REASONED),
    PropertyVector(0x21, "0014", (CONNECT, CONNACK), ("0000",)),
    PropertyVector(0x22, "0005", (CONNECT, CONNACK)),
    PropertyVector(0x23, "0001", (PUBLISH,), ("0000",)),
    PropertyVector(0x24, "01", (CONNACK,), ("02",)),
    PropertyVector(0x25, "00", (CONNACK,), ("02",)),
    PropertyVector(0x26, "0001 6b 0001 76", (*WITH_PROPERTIES,)),
    PropertyVector(0x27, "00010000", (CONNECT, CONNACK), ("00000000",)),
    PropertyVector(0x28, "01", (CONNACK,), ("02",)),
    PropertyVector(0x29, "00", (CONNACK,), ("02",)),
    PropertyVector(0x2A, "01", (CONNACK,), ("02",)),
)
UNKNOWN_IDENTIFIERS: Final = (0x00, 0x04, 0x07, 0x0A, 0x0C, 0x10, 0x14, 0x1B, 0x1D, 0x1E, 0x20, 0x2B, 0x7F)

REASON_CODES: Final[dict[int, tuple[int, ...]]] = {
    CONNACK: (0, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F),
    PUBACK: (0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99),
    PUBREC: (0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99),
    PUBREL: (0, 0x92),
    PUBCOMP: (0, 0x92),
    SUBACK: (0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2),
    UNSUBACK: (0, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91),
    AUTH: (0, 0x18, 0x19),
}
"""Table 2-6, by packet type, whoever sends it."""
DISCONNECT_FROM_CLIENT: Final = (0, 4, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99)
DISCONNECT_FROM_SERVER: Final = (
    *(0, 0x80, 0x81, 0x82, 0x83, 0x87, 0x89, 0x8B, 0x8D, 0x8E, 0x8F, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99),
    *range(0x9A, 0xA3),
)

FLAGS: Final = {PUBREL: 2, SUBSCRIBE: 2, UNSUBSCRIBE: 2}
"""Fixed header flags that are not 0 (PUBLISH apart)."""


def varint(number: int) -> bytes:
    """Encode a Variable Byte Integer by the specification's algorithm."""
    encoded = bytearray()
    while True:
        number, digit = divmod(number, 128)
        encoded.append(digit | 0x80 if number else digit)
        if not number:
            return bytes(encoded)


def frame(packet_type: int, body: bytes, flags: int | None = None) -> bytes:
    """Put a fixed header in front of a body."""
    first = packet_type << 4 | (FLAGS.get(packet_type, 0) if flags is None else flags)
    return bytes((first,)) + varint(len(body)) + body


def with_block(owner: int | str, block: bytes) -> bytes:
    """Return a good 5.0 packet of `owner` (WILL: a CONNECT) whose properties are `block`."""
    properties = varint(len(block)) + block
    if owner == CONNECT:
        return frame(CONNECT, unhex("0004 4d515454 05 02 0000") + properties + unhex("0001 63"))
    if owner == WILL:
        body = unhex("0004 4d515454 05 06 0000 00 0001 63") + properties + unhex("0001 77 0001 21")
        return frame(CONNECT, body)
    assert isinstance(owner, int)
    before = {CONNACK: "00 00", PUBLISH: "0001 61 0001", SUBSCRIBE: "0001", SUBACK: "0001", UNSUBSCRIBE: "0001"}
    before |= dict.fromkeys(ACKS, "0001 00") | {UNSUBACK: "0001", DISCONNECT: "00", AUTH: "18"}
    after = {PUBLISH: "68 69", SUBSCRIBE: "0001 61 00", SUBACK: "00", UNSUBSCRIBE: "0001 61", UNSUBACK: "00"}
    body = unhex(before[owner]) + properties + unhex(after.get(owner, ""))
    return frame(owner, body, 2 if owner == PUBLISH else None)
