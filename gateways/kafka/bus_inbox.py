"""What comes from the bus: own records are skipped, doubled ones dropped, the rest is delivered [K4, K21]."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from gateways.kafka.bus_choices import Chosen
from gateways.kafka.bus_clients import BusClients
from gateways.kafka.bus_positions import MAX_WRITERS, Begun, Position, Positions, Writer
from gateways.kafka.bus_records import (
    ABOUT_NODES,
    INSTANCE,
    PARTS,
    BusRecordError,
    Decoded,
    Flag,
    Header,
    Kind,
    UnknownVersionError,
    decode_header,
    decode_items,
)
from gateways.kafka.bus_shares import BusShares
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.node_facts import decode_facts
from gateways.kafka.nodes import Nodes
from gateways.kafka.records import ConsumedRecord, Reason
from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.gateway import FrameRun, GatewayHost, LocalClient, Message, read_run

log = logging.getLogger("gateways.kafka.bus")

MAX_PARTS_SIZE: Final = 320 * 1024 * 1024
"""Bytes of begun bodies, all writers together: more than the largest packet. Outcome: the body that has waited for its
next part for longest is lost, counted."""

MAX_VERSIONS_TOLD: Final = 8
"""Format versions of others that are told; more of them are garbage, and counted only."""


class BusInbox:
    """Receives the records of the bus topic. Trio thread only."""

    def __init__(
        self,
        host: GatewayHost,
        local: LocalClient,
        nodes: Nodes,
        positions: Positions,
        dead_letters: DeadLetters,
        *,
        utc: Callable[[], float],
    ) -> None:
        """`utc`: seconds since the epoch."""
        self.received = 0
        self.own = 0
        self.messages = 0
        self.backlog = 0
        """Messages at QoS 1 and 2 that were published while this node was away."""
        self.doubled = 0
        self.missing = 0
        self.malformed = 0
        self.unknown_version = 0
        self.lost_bodies = 0
        self.undelivered = 0
        """Records that failed on their way to the subscribers; counted by the bus."""
        self.clients: BusClients
        """Set before the first record."""
        self.shares: BusShares
        """The same."""
        self._instance_id = host.instance_id
        self._local = local
        self._nodes = nodes
        self._positions = positions
        self._dead_letters = dead_letters
        self._utc = utc
        self._lives = frozenset(positions.lives)
        self._begun_size = 0
        self._versions_seen: set[int] = set()

    def receive(self, record: ConsumedRecord) -> None:
        """Take one record; one that cannot be read is counted."""
        self.received += 1
        value = record.value or b""
        position = self._positions.of(record.partition)
        if record.offset < position.next:  # the topic was deleted and made again, or cut off
            for writer in list(position.begun):
                self._forget_begun(position, writer)
            position.applied = position.backlog_end = 0
        if record.defect is not None:
            self.malformed += 1
            self._dead_letters.unreadable(record, Reason.MALFORMED, record.defect)
            position.passed(record.offset)
            return
        try:
            instance_id = value[INSTANCE]
            if instance_id == self._instance_id:
                self.own += 1
                self._read_back(decode_header(value), value, record)
            elif instance_id in self._lives:
                self.own += 1  # this node wrote it before it was killed: its own sessions had it then
            else:
                self._of_others(decode_header(value), value, record, position)
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
        finally:
            position.passed(record.offset)

    def _of_others(self, header: Header, value: bytes, record: ConsumedRecord, position: Position) -> None:
        if record.offset < position.applied:  # it is read again for the sake of a body that began there
            if header.kind is Kind.BATCH and header.flags & PARTS:
                self._gather(header, value, record, position)
        elif not self._is_new(header, position):
            pass
        elif record.offset < position.backlog_end:
            self._handle_backlog(header, value, record, position)
        else:
            self._handle(header, value, record, position)

    def _is_new(self, header: Header, position: Position) -> bool:
        """Whether the record was not there before: a producer that was rebuilt sends again what was not confirmed."""
        writers, writer = position.writers, header.writer
        last = writers.pop(writer, None)  # put back at the end: the first one is the one silent for longest
        if last is None and len(writers) >= MAX_WRITERS:
            oldest = next(iter(writers))
            del writers[oldest]
            self._forget_begun(position, oldest)
        if last is not None and header.sequence <= last:
            writers[writer] = last
            self.doubled += 1
            return False
        if last is not None:
            self.missing += header.sequence - last - 1
        writers[writer] = header.sequence
        return True

    def _read_back(self, header: Header, value: bytes, record: ConsumedRecord) -> None:
        """A record of this very instance: what it says about others than messages has its place in the log now."""
        if header.kind is Kind.CLIENTS:
            self.clients.read_back(header.sequence, value[header.body_start :])
        elif header.kind is Kind.GROUPS:
            self.shares.read_back(header.sequence, value[header.body_start :], record.offset)
        elif header.kind is not Kind.BATCH:
            self._nodes.read_back(header.kind, record.partition, record.offset)

    def _handle(self, header: Header, value: bytes, record: ConsumedRecord, position: Position) -> None:
        if header.kind in ABOUT_NODES:
            self._nodes.heard(header, decode_facts(value, header.body_start), record.partition, record.offset)
            self.shares.node_spoke(header)
        elif header.kind is Kind.GROUPS:
            self.shares.heard(header, value[header.body_start :], record.offset)
            self._nodes.is_alive(header)
        elif header.kind is Kind.CLIENTS:
            self.clients.heard(header, value[header.body_start :])
        elif (items := self._items(header, value, record, position)) is not None:
            self.shares.begin(header)
            try:
                self._deliver(header, items)
            finally:
                self.shares.end()

    def _handle_backlog(self, header: Header, value: bytes, record: ConsumedRecord, position: Position) -> None:
        """What was written while this node was away: about nodes it is outdated, clients have moved for good, and
        messages are for sessions that were here."""
        if header.kind in ABOUT_NODES or header.kind is Kind.GROUPS:
            return
        if header.kind is Kind.CLIENTS:
            self.clients.heard(header, value[header.body_start :], after=self._positions.noted_at)
        elif (items := self._items(header, value, record, position)) is not None:
            self.shares.begin(header, missed=True)
            try:
                self._deliver_missed(header, items)
            finally:
                self.shares.end()

    def _deliver_missed(self, header: Header, items: list[Decoded | Chosen]) -> None:
        messages: list[Message] = []
        for item in items:
            if not item.qos:
                continue
            if isinstance(item, Chosen):
                self._local.publish_missed(messages)
                messages = []
                self.backlog += len(item.items)
                self.shares.deliver(header, [item], missed=True)
                self.shares.begin(header, missed=True)
                continue
            self.backlog += 1
            messages.append(item if isinstance(item, Message) else read_run(item)[0])
        self._local.publish_missed(messages)

    def _items(
        self, header: Header, value: bytes, record: ConsumedRecord, position: Position
    ) -> list[Decoded | Chosen] | None:
        """The messages of a batch; None until all parts of it are there."""
        if header.kind is not Kind.BATCH:
            raise BusRecordError(f"a record of kind {header.kind.name}, which is not for this topic")
        if not header.flags & PARTS:
            return decode_items(value, header.body_start)
        body = self._gather(header, value, record, position)
        return None if body is None else decode_items(body)

    def _gather(self, header: Header, value: bytes, record: ConsumedRecord, position: Position) -> bytes | None:
        """Put the parts of a large body together; None until the last one is there."""
        writer = header.writer
        begun = self._forget_begun(position, writer)
        if header.flags & Flag.CONTINUED:
            if begun is None or begun.next_sequence != header.sequence:
                raise BusRecordError("a part whose beginning this node did not see")
        else:
            begun = Begun(record.offset)
        begun.parts.append(value[header.body_start :])
        begun.size += len(begun.parts[-1])
        begun.next_sequence = header.sequence + 1
        if not header.flags & Flag.MORE:
            return b"".join(begun.parts)
        if begun.size > MAX_PARTS_SIZE or not begun.parts[-1]:
            raise BusRecordError("a body that is too large, or a part with nothing in it")
        while self._begun_size + begun.size > MAX_PARTS_SIZE:
            self._forget_begun(*self._positions.longest_begun())
            self.lost_bodies += 1
        begun.at = self._utc()
        position.begun[writer] = begun
        self._begun_size += begun.size
        return None

    def _forget_begun(self, position: Position, writer: Writer) -> Begun | None:
        begun = position.begun.pop(writer, None)
        if begun is not None:
            self._begun_size -= begun.size
        return begun

    def _deliver(self, header: Header, items: list[Decoded | Chosen]) -> None:
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
            if start < end and isinstance(items[start], Chosen):
                start = self._deliver_chosen(header, items, start)

    def _deliver_chosen(self, header: Header, items: list[Decoded | Chosen], start: int) -> int:
        chosen: list[Chosen] = []
        while start < len(items) and isinstance(item := items[start], Chosen):
            chosen.append(item)
            self.messages += sum(each.count if isinstance(each, FrameRun) else 1 for each in item.items)
            start += 1
        self.shares.deliver(header, chosen)
        self.shares.begin(header)  # nobody was chosen for what comes behind
        return start

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "bus_records_received": self.received,
            "bus_records_own": self.own,
            "bus_messages_received": self.messages,
            "bus_messages_of_backlog": self.backlog,
            "bus_records_doubled": self.doubled,
            "bus_records_missing": self.missing,
            "bus_records_malformed": self.malformed,
            "bus_records_unknown_version": self.unknown_version,
            "bus_bodies_lost": self.lost_bodies,
            "bus_records_undelivered": self.undelivered,
        }
