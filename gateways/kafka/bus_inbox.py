"""What comes from the bus: own records are skipped, doubled ones dropped, the rest is delivered [K4, K21]."""

from __future__ import annotations

import logging
from typing import Final

import attrs

from gateways.kafka.bus_clients import BusClients
from gateways.kafka.bus_records import (
    ABOUT_NODES,
    INSTANCE,
    BusRecordError,
    Decoded,
    Flag,
    Header,
    Kind,
    UnknownVersionError,
    decode_facts,
    decode_header,
    decode_items,
)
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.nodes import Nodes
from gateways.kafka.records import ConsumedRecord, Reason
from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.gateway import FrameRun, LocalClient, Message

log = logging.getLogger("gateways.kafka.bus")

MAX_WRITERS: Final = 65_536
"""(instance, partition) pairs whose last sequence is remembered. Outcome: the one that was silent for longest is
forgotten, and a record of it that comes twice then counts twice."""
MAX_PARTS_SIZE: Final = 320 * 1024 * 1024
"""Bytes of begun bodies, all writers together: more than the largest packet. Outcome: the body that has waited for its
next part for longest is lost, counted."""

MAX_VERSIONS_TOLD: Final = 8
"""Format versions of others that are told; more of them are garbage, and counted only."""

Writer = tuple[bytes, int]


@attrs.define
class Begun:
    """Parts of a body that are there already."""

    parts: list[bytes] = attrs.Factory(list)
    size: int = 0
    next_sequence: int = 0


class BusInbox:
    """Receives the records of the bus topic. Trio thread only."""

    def __init__(
        self, instance_id: bytes, local: LocalClient, nodes: Nodes, dead_letters: DeadLetters | None = None
    ) -> None:
        self.received = 0
        self.own = 0
        self.messages = 0
        self.doubled = 0
        self.missing = 0
        self.malformed = 0
        self.unknown_version = 0
        self.lost_bodies = 0
        self.undelivered = 0
        """Records that failed on their way to the subscribers; counted by the bus."""
        self.clients: BusClients
        """Set before the first record."""
        self._instance_id = instance_id
        self._local = local
        self._nodes = nodes
        self._dead_letters = dead_letters or DeadLetters()
        self._last: dict[Writer, int] = {}
        self._begun: dict[Writer, Begun] = {}
        self._begun_size = 0
        self._versions_seen: set[int] = set()

    def receive(self, record: ConsumedRecord) -> None:
        """Take one record; one that cannot be read is counted."""
        self.received += 1
        value = record.value or b""
        if record.defect is not None:
            self.malformed += 1
            self._dead_letters.unreadable(record, Reason.MALFORMED, record.defect)
            return
        try:
            if value[INSTANCE] == self._instance_id:
                self.own += 1
                self._read_back(decode_header(value), value, record)
                return
            header = decode_header(value)
            if self._is_new(header, record.partition):
                self._handle(header, value, record)
        except UnknownVersionError as exc:
            self.unknown_version += 1
            if exc.version not in self._versions_seen and len(self._versions_seen) < MAX_VERSIONS_TOLD:
                self._versions_seen.add(exc.version)
                log.warning("%s: such records are left out until this node is upgraded", exc)
            self._dead_letters.unreadable(record, Reason.UNKNOWN_VERSION, str(exc), (value[INSTANCE], exc.version))
        except (BusRecordError, RemoteProtocolError) as exc:  # the latter: packets of a run that no broker writes
            self.malformed += 1
            log.debug("%s-%d@%d: %s", record.topic, record.partition, record.offset, exc)
            self._dead_letters.unreadable(record, Reason.MALFORMED, str(exc), (value[INSTANCE], "malformed"))

    def _is_new(self, header: Header, partition: int) -> bool:
        """Whether the record was not there before: a producer that was rebuilt sends again what was not confirmed."""
        writer = header.instance_id, partition
        last = self._last.pop(writer, None)  # put back at the end: the first one is the one silent for longest
        if last is None and len(self._last) >= MAX_WRITERS:
            oldest = next(iter(self._last))
            del self._last[oldest]
            self._forget_begun(oldest)
        if last is not None and header.sequence <= last:
            self._last[writer] = last
            self.doubled += 1
            return False
        if last is not None:
            self.missing += header.sequence - last - 1
        self._last[writer] = header.sequence
        return True

    def _read_back(self, header: Header, value: bytes, record: ConsumedRecord) -> None:
        """A record of this very instance: what it says about others than messages has its place in the log now."""
        if header.kind is Kind.CLIENTS:
            self.clients.read_back(header.sequence, value[header.body_start :])
        elif header.kind is not Kind.BATCH:
            self._nodes.read_back(header.kind, record.partition, record.offset)

    def _handle(self, header: Header, value: bytes, record: ConsumedRecord) -> None:
        if header.kind in ABOUT_NODES:
            self._nodes.heard(header, decode_facts(value, header.body_start), record.partition, record.offset)
        elif header.kind is Kind.CLIENTS:
            self.clients.heard(header, value[header.body_start :])
        elif header.kind is not Kind.BATCH:
            raise BusRecordError(f"a record of kind {header.kind.name}, which is not for this topic")
        elif header.flags:
            body = self._gather(header, value, (header.instance_id, record.partition))
            if body is not None:
                self._deliver(decode_items(body))
        else:
            self._deliver(decode_items(value, header.body_start))

    def _gather(self, header: Header, value: bytes, writer: Writer) -> bytes | None:
        """Put the parts of a large body together; None until the last one is there."""
        begun = self._forget_begun(writer)
        if header.flags & Flag.CONTINUED:
            if begun is None or begun.next_sequence != header.sequence:
                raise BusRecordError("a part whose beginning this node did not see")
        else:
            begun = Begun()
        begun.parts.append(value[header.body_start :])
        begun.size += len(begun.parts[-1])
        begun.next_sequence = header.sequence + 1
        if not header.flags & Flag.MORE:
            return b"".join(begun.parts)
        if begun.size > MAX_PARTS_SIZE or not begun.parts[-1]:
            raise BusRecordError("a body that is too large, or a part with nothing in it")
        while self._begun_size + begun.size > MAX_PARTS_SIZE:
            self._forget_begun(next(iter(self._begun)))
            self.lost_bodies += 1
        self._begun[writer] = begun
        self._begun_size += begun.size
        return None

    def _forget_begun(self, writer: Writer) -> Begun | None:
        begun = self._begun.pop(writer, None)
        if begun is not None:
            self._begun_size -= begun.size
        return begun

    def _deliver(self, items: list[Decoded]) -> None:
        """Hand runs and messages on in their order, as few calls as that allows: each call flushes."""
        start, end = 0, len(items)
        while start < end:
            runs: list[FrameRun] = []
            messages: list[Message] = []
            while start < end and isinstance(item := items[start], FrameRun):
                runs.append(item)
                self.messages += item.count
                start += 1
            if runs:
                self._local.publish_runs(runs)
            while start < end and isinstance(item := items[start], Message):
                messages.append(item)
                start += 1
            if messages:
                self.messages += len(messages)
                self._local.publish(messages)

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "bus_records_received": self.received,
            "bus_records_own": self.own,
            "bus_messages_received": self.messages,
            "bus_records_doubled": self.doubled,
            "bus_records_missing": self.missing,
            "bus_records_malformed": self.malformed,
            "bus_records_unknown_version": self.unknown_version,
            "bus_bodies_lost": self.lost_bodies,
            "bus_records_undelivered": self.undelivered,
        }
