"""The bytes of a spool's files: records, the header of a segment, the cursor. Pure.

A segment is a header and records behind each other. Every header has a checksum of its own, so a record whose length
cannot be believed is never taken for one that was not written to its end; each record begins with a mark that it can be
found by behind a damaged place. CRC-32 is zlib's: it finds the same flips and torn writes as CRC-32C, takes 0.2 µs for
a small record, and needs no package beside Python.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final
from zlib import crc32

import attrs

FORMAT_VERSION: Final = 1
MAGIC: Final = b"MTSPOOL"
MARK: Final = b"\xf7SPL"

SEGMENT: Final = struct.Struct("<7sBQQI")
"""MAGIC, version, position of the first message, position where the segment before it ended, checksum of all that."""
RECORD: Final = struct.Struct("<4sIIQII")
"""MARK, checksum of what follows in the header, bytes of the data, position, messages, checksum of the data."""
_FACTS: Final = struct.Struct("<IQII")
"""What the first checksum of RECORD is of."""
CURSOR: Final = struct.Struct("<QQI")
"""Number of the write, position in front of which all is acknowledged, checksum of both."""
CURSOR_SLOT: Final = 32
"""Bytes between the two slots of a cursor file, which are written by turns."""


@attrs.define
class SpoolRecord:
    """What was appended at once: `data` stands for `messages` messages, the first of which has number `position`."""

    position: int
    messages: int
    data: bytes

    @property
    def end(self) -> int:
        """Position behind it."""
        return self.position + self.messages

    @property
    def size(self) -> int:
        """Bytes that it takes on disk."""
        return RECORD.size + len(self.data)


class TornRecordError(Exception):
    """The bytes end before the record does."""


class DamagedError(Exception):
    """The bytes are not what was written; the text says how that shows."""


class LaterVersionError(DamagedError):
    """A later version of this program wrote the file."""


def pack_records(records: Iterable[SpoolRecord]) -> bytes:
    """Return the bytes of `records`."""
    parts: list[bytes] = []
    for record in records:
        data = record.data
        facts = _FACTS.pack(len(data), record.position, record.messages, crc32(data))
        parts += (MARK, crc32(facts).to_bytes(4, "little"), facts, data)
    return b"".join(parts)


def read_record(data: bytes, at: int) -> tuple[SpoolRecord, int]:
    """Return the record that begins at `at`, and where the next one does.

    Raises:
      TornRecordError: the record would end behind the data.
      DamagedError: there is no record.
    """
    begin = at + RECORD.size
    if begin > len(data):
        if data[at : at + 4] == MARK[: len(data) - at]:
            raise TornRecordError
        raise DamagedError("no record begins here")
    mark, checksum, length, position, messages, data_checksum = RECORD.unpack_from(data, at)
    if mark != MARK:
        raise DamagedError("no record begins here")
    if checksum != crc32(data[at + 8 : begin]):
        raise DamagedError("the header of a record does not match its checksum")
    end = begin + length
    if end > len(data):
        raise TornRecordError
    body = data[begin:end]
    if data_checksum != crc32(body):
        raise DamagedError("a record does not match its checksum")
    return SpoolRecord(position, messages, body), end


def find_record(data: bytes, at: int) -> int:
    """Return where the next readable record begins, not before `at`; the end of `data` where there is none."""
    while (at := data.find(MARK, at)) >= 0:
        try:
            read_record(data, at)
        except (TornRecordError, DamagedError):
            at += 1
        else:
            return at
    return len(data)


def pack_segment_header(first: int, previous_end: int) -> bytes:
    """Return the header of a segment whose first message has number `first`."""
    facts = SEGMENT.pack(MAGIC, FORMAT_VERSION, first, previous_end, 0)[:-4]
    return facts + crc32(facts).to_bytes(4, "little")


def read_segment_header(data: bytes, first: int) -> int:
    """Return where the segment in front of this one ended; `first`: position of its first message, by its name.

    Raises:
      TornRecordError: the data end before the header does.
      LaterVersionError: it is sound and of a version that this one does not know.
      DamagedError: there is no header.
    """
    if len(data) < SEGMENT.size:
        raise TornRecordError
    magic, version, found, previous_end, checksum = SEGMENT.unpack_from(data)
    if checksum != crc32(data[: SEGMENT.size - 4]) or magic != MAGIC:
        raise DamagedError("the header of the file does not match its checksum")
    if version != FORMAT_VERSION:
        raise LaterVersionError(f"it has format {version}, this version knows {FORMAT_VERSION}")
    if found != first:
        raise DamagedError(f"it says that it begins with message {found}")
    return int(previous_end)


def pack_cursor(number: int, position: int) -> bytes:
    """Return one slot of a cursor file."""
    facts = CURSOR.pack(number, position, 0)[:-4]
    return facts + crc32(facts).to_bytes(4, "little")


def read_cursor(data: bytes) -> tuple[int, int] | None:
    """Return number and position of the later sound slot of a cursor file, None where neither is sound."""
    slots: list[tuple[int, int]] = []
    for at in (0, CURSOR_SLOT):
        slot = data[at : at + CURSOR.size]
        if len(slot) == CURSOR.size and crc32(slot[:-4]) == int.from_bytes(slot[-4:], "little"):
            number, position, _ = CURSOR.unpack(slot)
            slots.append((number, position))
    return max(slots, default=None)
