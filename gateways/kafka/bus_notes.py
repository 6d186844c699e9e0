"""Records of the bus that Kafka may not have: notes in the node's session store [K22].

A note holds the record and is written in the commit of everything else that its messages led to, so a kill at any
instant leaves both or neither. It goes in a commit behind Kafka's confirmation; where the record goes over the spool
before it has left, behind that of the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from gateways.kafka.bus_outgoing import NOTES, Outgoing
from mqtt_trio.gateway import GatewayHost, LocalClient

log = logging.getLogger("gateways.kafka.bus")


class BusNotes:
    """The notes of one node. Trio thread only.

    Attributes:
      keeps: there is a session store; without one nothing is noted, and what Kafka does not have ends with the process.
      lost: notes that could not be read.
    """

    def __init__(self, host: GatewayHost, local: LocalClient, kept: Callable[[Sequence[Outgoing]], None]) -> None:
        """`kept` is told which records the store knows now: they may leave, in this order."""
        self.keeps = host.marks is not None
        self.lost = 0
        self._local = local
        self._kept = kept
        self._uncommitted = 0
        self._last = 0
        self._gone: dict[str, bytes | None] = {}
        self._found = self._read(host.marks or {})

    def _read(self, marks: Mapping[str, bytes]) -> list[Outgoing]:
        found: list[Outgoing] = []
        for name in sorted(name for name in marks if name.startswith(NOTES)):
            try:
                outgoing = Outgoing.of(marks[name])
                outgoing.number = int(name.removeprefix(NOTES))
            except ValueError as exc:
                self.lost += 1
                self._gone[name] = None
                log.error("a record of the bus in the session store is lost: %s", exc)  # noqa: TRY400
                continue
            self._last = outgoing.number
            found.append(outgoing)
        return found

    def take_found(self) -> list[Outgoing]:
        """Return what the last process had noted and Kafka may not have, in order; once."""
        found, self._found = self._found, []
        return found

    def changes(self, packed: Sequence[Outgoing]) -> dict[str, bytes | None]:
        """Note records in the commit that is being made; return what is new for the store (`GatewayHost.note`): these,
        and which are over."""
        changed, self._gone = self._gone, {}
        for outgoing in packed:
            self._last += 1
            outgoing.number = self._last
            changed[outgoing.name] = outgoing.packed()
        if packed:
            self._uncommitted += len(packed)
            self._local.when_kept(partial(self._committed, packed))
        return changed

    def _committed(self, packed: Sequence[Outgoing]) -> None:
        self._uncommitted -= len(packed)
        self._kept(packed)

    def forget(self, outgoing: Outgoing) -> None:
        """It needs its note no more, if it has one."""
        if outgoing.number:
            self._gone[outgoing.name] = None
            outgoing.number = 0

    @property
    def is_settled(self) -> bool:
        """The store has every record that was to be noted, and those have left."""
        return not self._uncommitted
