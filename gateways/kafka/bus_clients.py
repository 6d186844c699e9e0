"""Take-over across nodes: a client that connects to one node is disconnected from every other one [K23].

Each node writes which clients have connected to it, as many in a record as came within a linger. All these records lie
in one partition, so all nodes read them in one order, and of two nodes that one client connects to at the same time
the later one in the log has it: each node decides for itself and both come to the same end. A node that has not read
its own announcement back yet knows that it lies behind what it reads.

Announcements of an outage are written when Kafka is back, in any order; so of two that are further apart than CLOCKS
the later one by the clock counts. The session does not move: a persistent one waits on its node for the client to come
back, unless the client has started clean elsewhere.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Callable
from typing import Final

from gateways.kafka.bus_records import LATEST, BusRecordError, Header, Kind
from mqtt_trio.gateway import GatewayHost, Newcomer

log = logging.getLogger("gateways.kafka.bus")

CLOCKS: Final = 10.0
"""Seconds by which the clocks of two nodes may differ."""
MAX_PENDING: Final = 200_000
"""Clients that wait to be announced. Outcome: the one that came first is not announced, counted."""
RECORD_SIZE: Final = 64 * 1024
"""Bytes of one record, about."""
ENTRY: Final = struct.Struct(">BdHH")
CLEAN: Final = 1
HAS_USER: Final = 2

Tell = Callable[[Kind, bytes, Callable[[Exception | None], None]], int]
"""Writes a record to the other nodes, returns its sequence."""


class BusClients:
    """Announces the clients of this node and hears of those of others. Trio thread only."""

    def __init__(self, host: GatewayHost, tell: Tell, arm: Callable[[], None]) -> None:
        """`arm` has `ship` called soon."""
        self.announced = 0
        self.taken = 0
        """Clients and sessions of this node that ended because their client is elsewhere now."""
        self.forgotten = 0
        self._host = host
        self._tell = tell
        self._arm = arm
        self._pending: dict[str, Newcomer] = {}
        self._own: dict[str, int] = {}
        """Sequence of the last announcement of a client that was not read back."""
        self._read_back = 0
        host.watch_clients(self._connected)

    # --- this node's

    def _connected(self, newcomer: Newcomer) -> None:
        self._pending.pop(newcomer.client_id, None)
        if len(self._pending) >= MAX_PENDING:
            del self._pending[next(iter(self._pending))]
            self.forgotten += 1
        self._pending[newcomer.client_id] = newcomer
        self._arm()

    def ship(self) -> None:
        """Announce what waits."""
        while self._pending:
            entries: list[bytes] = []
            names: list[str] = []
            size = 0
            while self._pending and size < RECORD_SIZE:
                client_id = next(iter(self._pending))
                entry = encode_newcomer(self._pending.pop(client_id))
                entries.append(entry)
                names.append(client_id)
                size += len(entry)
            self.announced += len(names)
            sequence = self._tell(Kind.CLIENTS, b"".join(entries), self._done(names))
            self._own.update(dict.fromkeys(names, sequence))

    def _done(self, names: list[str]) -> Callable[[Exception | None], None]:
        def done(failure: Exception | None) -> None:
            if failure is not None:  # it will not be read back
                for name in names:
                    self._own.pop(name, None)

        return done

    def read_back(self, sequence: int, body: bytes) -> None:
        """An announcement of this very instance came back; a doubled one says nothing new."""
        if sequence <= self._read_back:
            return
        self._read_back = sequence
        for newcomer in decode_newcomers(body):
            if self._own.get(newcomer.client_id, sequence + 1) <= sequence:
                del self._own[newcomer.client_id]

    # --- those of others

    def heard(self, header: Header, body: bytes, *, after: float = 0.0) -> None:
        """Clients have connected to another node. `after`: UTC seconds, older news are known.

        Raises:
          BusRecordError: it cannot be read; nothing happened.
        """
        for newcomer in decode_newcomers(body):
            if newcomer.connected_at < after:
                continue
            connected_at = self._host.connected_at(newcomer.client_id)
            ours_is_behind = newcomer.client_id in self._own or newcomer.client_id in self._pending
            if connected_at is None:
                if ours_is_behind:
                    continue  # it was here later, and is gone
            elif abs(newcomer.connected_at - connected_at) > CLOCKS:
                if newcomer.connected_at < connected_at:
                    continue
            elif ours_is_behind:
                continue
            self.taken += self._host.taken_elsewhere(newcomer, header.node_id)

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "bus_clients_announced": self.announced,
            "bus_clients_taken_over": self.taken,
            "bus_clients_forgotten": self.forgotten,
        }


def encode_newcomer(newcomer: Newcomer) -> bytes:
    """One entry of a `Kind.CLIENTS` body."""
    client_id, user = newcomer.client_id.encode(), (newcomer.user_name or "").encode()
    flags = CLEAN * newcomer.clean_start | HAS_USER * (newcomer.user_name is not None)
    return ENTRY.pack(flags, newcomer.connected_at, len(client_id), len(user)) + client_id + user


def decode_newcomers(body: bytes) -> list[Newcomer]:
    """Read a `Kind.CLIENTS` body.

    Raises:
      BusRecordError: it is none.
    """
    found: list[Newcomer] = []
    at, end = 0, len(body)
    try:
        while at < end:
            flags, connected_at, id_size, user_size = ENTRY.unpack_from(body, at)
            start = at + ENTRY.size
            middle, at = start + id_size, start + id_size + user_size
            if at > end or flags & ~(CLEAN | HAS_USER) or not id_size:
                raise BusRecordError("a client that runs past the end of its record, or with unknown flags")
            if not math.isfinite(connected_at) or not 0 <= connected_at <= LATEST:
                raise BusRecordError("a client without a time")
            user = body[middle:at].decode() if flags & HAS_USER else None
            found.append(Newcomer(body[start:middle].decode(), user, bool(flags & CLEAN), connected_at))
    except struct.error:
        raise BusRecordError("a client that runs past the end of its record") from None
    except UnicodeDecodeError as exc:
        raise BusRecordError(f"a client with a name that is no UTF-8: {exc.reason}") from None
    return found
