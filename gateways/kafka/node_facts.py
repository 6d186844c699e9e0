"""What a node says of itself: the body of the bus records of `nodes`."""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

import attrs

from gateways.kafka.bus_records import LATEST, BusRecordError, read_name

FACTS: Final = struct.Struct(">Qdiq16sH")


@attrs.frozen
class NodeFacts:
    """What a node says of itself."""

    host: str
    pid: int
    started_at: float
    """UTC seconds since the epoch."""
    hello_partition: int = -1
    """Where its HELLO lies in the log; -1: not known yet."""
    hello_offset: int = -1
    target: bytes = bytes(16)
    """ALIVE: the instance that is told to end."""


def facts_of_process(started_at: float) -> NodeFacts:
    """What this process says of itself; `started_at`: UTC seconds since the epoch."""
    return NodeFacts(socket.gethostname(), os.getpid(), started_at)


def encode_facts(facts: NodeFacts) -> bytes:
    """The body of a record about a node."""
    host = facts.host.encode()
    return (
        FACTS.pack(facts.pid, facts.started_at, facts.hello_partition, facts.hello_offset, facts.target, len(host))
        + host
    )


def decode_facts(value: bytes, start: int) -> NodeFacts:
    """Read the body of a record about a node, from `start` to its end.

    Raises:
      BusRecordError: it is none.
    """
    if len(value) - start < FACTS.size:
        raise BusRecordError("a cut record about a node")
    pid, started_at, partition, offset, target, length = FACTS.unpack_from(value, start)
    if len(value) - start != FACTS.size + length or not 0 <= started_at <= LATEST:
        raise BusRecordError("a record about a node with a wrong length or time")
    try:
        host = read_name(value[start + FACTS.size :])
    except UnicodeDecodeError:
        raise BusRecordError("a host name that is no UTF-8") from None
    return NodeFacts(host, pid, started_at, partition, offset, target)
