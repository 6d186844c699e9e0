"""A record with messages at QoS 1 and 2 on its way, in memory and as it is kept on disk."""

from __future__ import annotations

import struct
from typing import Final

import attrs

from mqtt_trio.gateway import Hold

NOTES: Final = "kafka.bus.out/"
"""Marks of records that Kafka has not confirmed, by number."""
VERSION: Final = 1
HEAD: Final = struct.Struct(">BIIQ")
"""In front of a record that is kept: version, partition, messages, bytes that it counts for in the window."""


@attrs.define(eq=False)
class Outgoing:
    """One record."""

    partition: int
    value: bytes
    messages: int
    size: int
    """Bytes that it counts for in the window."""
    holds: list[Hold] = attrs.Factory(list)
    """What its publishers wait for."""
    number: int = 0
    """Of its note in the session store; 0: it has none."""
    spool_end: int | None = None
    """Position behind it in the spool; None: it is not there."""
    counted: bool = True
    """It takes room in the window."""
    aside: bool = False
    """It is on its way and in the spool, and has given its room back."""
    over: bool = False
    """Kafka has it, or never will."""
    answer_by: float = 0.0
    """When `holds` have waited for AckTimeout."""

    def packed(self) -> bytes:
        """Write it down."""
        return HEAD.pack(VERSION, self.partition, self.messages, self.size) + self.value

    @classmethod
    def of(cls, data: bytes) -> Outgoing:
        """Read what `packed` wrote.

        Raises:
          ValueError: it did not.
        """
        if len(data) <= HEAD.size or data[0] != VERSION:
            raise ValueError(f"a record of {len(data)} bytes, of version {data[0] if data else 'none'}")
        _, partition, messages, size = HEAD.unpack_from(data)
        return cls(partition, data[HEAD.size :], messages, size)

    @property
    def name(self) -> str:
        """The name of its note; in the order of the names records leave."""
        return f"{NOTES}{self.number:020d}"
