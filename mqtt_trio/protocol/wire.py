"""Data representation of all versions: integers, strings, binary data, and where one packet ends [MQTT5-1.5]."""

from __future__ import annotations

from typing import Final, TypeAlias

from mqtt_trio.errors import LocalProtocolError, MalformedPacketError

MAXIMUM_VARIABLE_BYTE_INTEGER: Final = 268_435_455
MAXIMUM_REMAINING_LENGTH: Final = MAXIMUM_VARIABLE_BYTE_INTEGER
MAXIMUM_POSSIBLE_PACKET_SIZE: Final = 1 + 4 + MAXIMUM_REMAINING_LENGTH
"""Bytes of the largest packet that can be written; what "no limit" means."""
MAXIMUM_STRING_SIZE: Final = 65_535
"""Bytes of the longest UTF-8 Encoded String or Binary Data [MQTT5-1.5.4, 1.5.6]."""

PACKET_IDS: Final = tuple(packet_id.to_bytes(2, "big") for packet_id in range(65_536))
"""The two bytes of every Packet Identifier: looking one up is half as dear as making it."""

Header: TypeAlias = tuple[int, int]
"""Where the body of a packet starts and where it ends (behind its last byte), as offsets into the buffer."""


def read_header(buffer: bytes, start: int) -> Header | None:
    """Return the bounds of the body of the packet at `start`, or None while its fixed header is incomplete.

    The body itself may still be on its way: compare the end with the length of the buffer.

    Raises:
      MalformedPacketError: the Remaining Length has more than four bytes.
    """
    size = len(buffer)
    at = start + 1
    if at >= size:
        return None
    length = buffer[at]
    at += 1
    if length < 128:
        return at, at + length
    length &= 127
    for shift in (7, 14, 21):
        if at >= size:
            return None
        byte = buffer[at]
        at += 1
        length |= (byte & 127) << shift
        if byte < 128:
            return at, at + length
    raise MalformedPacketError("Remaining Length has more than four bytes")


def decode_string(raw: bytes) -> str:
    """Decode the bytes of a UTF-8 Encoded String.

    Raises:
      MalformedPacketError: ill-formed UTF-8, which includes surrogates [MQTT5-1.5.4-1], or U+0000 [MQTT5-1.5.4-2].
    """
    try:
        text = raw.decode()  # strict: refuses overlong forms and D800..DFFF, keeps U+FEFF [MQTT5-1.5.4-3]
    except UnicodeDecodeError as exc:
        raise MalformedPacketError(f"ill-formed UTF-8: {exc.reason}") from None
    if "\0" in text:
        raise MalformedPacketError("a string contains U+0000")
    return text


class Reader:
    """Reads values one behind the other, never beyond `end`. Every method raises MalformedPacketError at a short or
    ill-formed value."""

    __slots__ = ("at", "data", "end")

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data = data
        self.at = at
        self.end = end

    def _take(self, size: int) -> int:
        at = self.at
        if at + size > self.end:
            raise MalformedPacketError("the packet ends inside a value")
        self.at = at + size
        return at

    def byte(self) -> int:
        return self.data[self._take(1)]

    def two_byte_integer(self) -> int:
        at = self._take(2)
        return self.data[at] << 8 | self.data[at + 1]

    def four_byte_integer(self) -> int:
        at = self._take(4)
        return int.from_bytes(self.data[at : at + 4], "big")

    def variable_byte_integer(self) -> int:
        """Read 1 to 4 bytes; more of them, or more than the value needs, are malformed [MQTT5-1.5.5-1]."""
        value = 0
        for shift in (0, 7, 14, 21):
            byte = self.data[self._take(1)]
            value |= (byte & 127) << shift
            if byte < 128:
                if byte == 0 and shift:
                    raise MalformedPacketError("a Variable Byte Integer has more bytes than it needs")
                return value
        raise MalformedPacketError("a Variable Byte Integer has more than four bytes")

    def binary(self) -> bytes:
        size = self.two_byte_integer()
        at = self._take(size)
        return self.data[at : at + size]

    def string(self) -> str:
        return decode_string(self.binary())

    def string_pair(self) -> tuple[str, str]:
        return self.string(), self.string()

    def rest(self) -> bytes:
        at, self.at = self.at, self.end
        return self.data[at : self.end]

    def finish(self) -> None:
        """Raise unless everything has been read."""
        if self.at != self.end:
            raise MalformedPacketError(f"{self.end - self.at} bytes too many at the end of the packet")


def write_byte(value: int) -> bytes:
    return _write_integer(value, 1)


def write_two_byte_integer(value: int) -> bytes:
    return _write_integer(value, 2)


def write_four_byte_integer(value: int) -> bytes:
    return _write_integer(value, 4)


def _write_integer(value: int, size: int) -> bytes:
    try:
        return value.to_bytes(size, "big")
    except OverflowError:
        raise LocalProtocolError(f"{value} does not fit in {size} bytes") from None


def write_variable_byte_integer(value: int) -> bytes:
    """Encode in the fewest bytes [MQTT5-1.5.5-1]. Raises LocalProtocolError beyond 268,435,455."""
    if 0 <= value < 128:
        return bytes((value,))
    if not 0 <= value <= MAXIMUM_VARIABLE_BYTE_INTEGER:
        raise LocalProtocolError(f"{value} is no Variable Byte Integer")
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def write_binary(value: bytes) -> bytes:
    if len(value) > MAXIMUM_STRING_SIZE:
        raise LocalProtocolError(f"{len(value)} bytes where 65,535 is the most")
    return PACKET_IDS[len(value)] + value


def write_string(value: str) -> bytes:
    """Raises LocalProtocolError: longer than 65,535 bytes, surrogates or U+0000 inside."""
    try:
        raw = value.encode()
    except UnicodeEncodeError:
        raise LocalProtocolError("a string contains a surrogate") from None
    if b"\0" in raw:
        raise LocalProtocolError("a string contains U+0000")
    return write_binary(raw)


def write_string_pair(value: tuple[str, str]) -> bytes:
    return write_string(value[0]) + write_string(value[1])
