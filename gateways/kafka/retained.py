"""Retained messages of the cluster: the compacted topic mqtt.retained [K23].

Every node writes what its clients retain and reads everything from the beginning. The order of the log decides, so
all nodes end with the same message: a node whose own record for a topic is still on its way ignores what others wrote
for it, since its own record lies behind theirs. Records of one topic that wait here give way to the newest one.

A record may be on its way for long: while Kafka is away, or from one process to the next (`retained_marks`). So where
others wrote meanwhile, the times at which the messages were published decide: what is outdated is not written, and
where it was, the node writes the newer message of the others again, behind it. What a node had read when it took its
own message is older, whatever the clocks say; between equal times the order of the log stays.

All records of one MQTT topic must be in one partition, or compaction keeps several and nobody can tell which is the
last. So the number of partitions over which topics are spread is fixed for the life of the Kafka topic: the first node
writes it there, under a key that no MQTT topic can have, and all others go by it. Partitions that are added later are
read and stay empty.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

import attrs
import trio

from gateways.kafka.bus_answers import FAILED
from gateways.kafka.bus_records import (
    FORMAT_VERSION,
    NUMBER,
    RUN_OVERHEAD,
    BusRecordError,
    Kind,
    UnknownVersionError,
    check_topic,
    decode_header,
    decode_items,
    encode_header,
    encode_message,
)
from gateways.kafka.bus_window import BusWindow
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.dlq import Stage
from gateways.kafka.partitions import partition_for
from gateways.kafka.records import ConsumedRecord, Reason, Record, was_closed
from gateways.kafka.retained_marks import RetainedMarks
from mqtt_trio.gateway import GatewayHost, Hold, LocalClient, Message, ReasonCode, wait_until_kept

log = logging.getLogger("gateways.kafka.retained")

MAX_OUTSTANDING: Final = 2000
"""Records that Kafka has not confirmed. Outcome: newer ones wait, one per topic."""
SETTLE_LIMIT: Final = 2.0
"""Seconds that a node which ends waits for its store. Outcome: what the store does not know stays behind."""
MAP_KEY: Final = b"\0partitions"
"""Key of the record that says over how many partitions topics are spread; partition 0. U+0000 is in no Topic Name."""
MOST_PARTITIONS: Final = 100_000
LONGEST_TOPIC: Final = 65_535
"""Bytes [MQTT5-1.5.4]."""
VERSION_HEADER: Final = "mqtt.version"
NODE_HEADER: Final = "mqtt.node"
INSTANCE_HEADER: Final = "mqtt.instance"
SEQUENCE_HEADER: Final = "mqtt.sequence"
SEQUENCE: Final = struct.Struct(">Q")


@attrs.define
class OwnRecord:
    """The newest message of this node for one topic, until it is read back."""

    newest: Message
    seen: int = 0
    """Offsets below this one were read before it was taken."""
    sequence: int = 0
    """Of its record; 0: not shipped yet."""
    ignored: Message | None = None
    """What lies before it in the log: the last word, should it fail."""
    is_outdated: bool = False
    """`ignored` came meanwhile, and was published later."""


class Retained:
    """Writes and reads mqtt.retained for one node. Trio thread only."""

    def __init__(
        self,
        topic: str,
        host: GatewayHost,
        offer: Callable[[Record], None],
        *,
        local: LocalClient,
        window: BusWindow,
        dead_letters: DeadLetters | None = None,
    ) -> None:
        """What waits, or is on its way, counts in `window`."""
        self._dead_letters = dead_letters or DeadLetters()
        self.topic = topic
        self.partitions = 0
        """Over how many partitions of the topic MQTT topics are spread; 0: not known yet, nothing is shipped."""
        self.maximum_size = 1_000_000
        """Bytes of the largest value; set before the first `ship`."""
        self.local = local
        self.arm: Callable[[], None] = lambda: None
        """Has `ship` called soon."""
        self.pending: dict[bytes, Message] = {}
        """What may leave."""
        self.outstanding = 0
        self.sent = self.received = self.failed = 0
        self.unconfirmed = 0
        """Of the failed ones, those that Kafka had not confirmed when the producer was closed."""
        self.too_large = self.dropped = self.malformed = self.unknown_version = self.resumed = self.restored = 0
        self._host = host
        self._offer = offer
        self._window = window
        self._began = False
        self._holds: dict[bytes, list[Hold]] = {}
        """Without a store: of who waits until Kafka has the newest message of a topic."""
        self._sequences: dict[int, int] = {}
        self._read_back: dict[int, int] = {}
        self._offsets: dict[int, int] = {}
        """Behind the last record that was read, by partition."""
        self._marks = RetainedMarks(host, local, self._marked)
        self._owed = self._marks.read()
        self._own = {key: OwnRecord(owed.message, owed.seen) for key, owed in self._owed.items()}
        self.pending.update((key, owed.message) for key, owed in self._owed.items())
        window.add(0, sum(size_of(owed.message) for owed in self._owed.values()))

    # --- out

    def begin(self, count: int) -> None:
        """Everything is read; the topic has `count` partitions now. Messages leave once it is known how they are
        spread: as an earlier node said, or, once Kafka has that, over all partitions of today."""
        self._began = True
        self._compare()
        if self.partitions:
            self.ship()
            return
        value = encode_header(Kind.PARTITIONS, self._host.instance_id, self._host.node_id, 0) + NUMBER.pack(count)

        def done(failure: Exception | None) -> None:
            if failure is not None:
                log.warning("over how many partitions of %s topics are spread is not noted: %s", self.topic, failure)
                self._spread(count)

        self._offer(Record(self.topic, 0, MAP_KEY, value, done=done, messages=0))

    def _spread(self, count: int) -> None:
        self.partitions = count
        self.ship()

    def _compare(self) -> None:
        """Drop what was outdated before it could leave, and what Kafka has although nobody noted that."""
        owed, self._owed = self._owed, {}
        for key, own in list(self._own.items()):
            if own.ignored is None or not (own.is_outdated or is_same(own.ignored, own.newest)):
                self.resumed += key in owed and own.newest is owed[key].message
                continue
            del self._own[key]
            self._marks.forget(key)
            self._release(self._holds.pop(key, ()))
            for waiting in (self.pending, self._marks.fresh):
                if (message := waiting.pop(key, None)) is not None:
                    self._window.settle(0, size_of(message))
            if own.is_outdated:
                self.local.set_retained(own.ignored)

    def take(self, message: Message, *, waited_for: bool = False) -> Hold | None:
        """Take a message with RETAIN 1. It leaves once the session store, if there is one, knows of it.

        What is returned, where it is `waited_for`, is let go when a kill of this node does not take the message from
        the others any more: the store has its mark, or, without a store, Kafka has it. Whoever waits for the commit of
        the retained message, as clients do, waits for the mark with that.
        """
        marks = self._marks
        hold = Hold(kept=marks.keeps) if waited_for else None
        key = message.topic_name.encode()
        own = self._own.get(key)
        if own is None:
            seen = self._offsets.get(partition_for(key, self.partitions), 0) if self.partitions else 0
            self._own[key] = own = OwnRecord(message, seen)
        else:
            own.newest, own.sequence, own.is_outdated = message, 0, False
        if marks.keeps:
            before = marks.fresh.get(key)
            marks.add(key, message, own.seen, hold)
        else:
            before = self.pending.get(key)
            self.pending[key] = message
            if hold is not None:
                self._holds.setdefault(key, []).append(hold)
        self._window.add(0, size_of(message) - (size_of(before) if before is not None else 0))
        self.arm()
        return hold

    def waits(self, topic_name: str) -> bool:
        """Whether a message of the topic waits, and would give way to a newer one."""
        key = topic_name.encode()
        return key in self.pending or key in self._marks.fresh

    def _marked(self, messages: Mapping[bytes, Message]) -> None:
        """The store knows of messages: they may leave."""
        for key, message in messages.items():
            before = self.pending.pop(key, None) if key in self._own else message
            if before is not None:
                self._window.settle(0, size_of(before))
            if key in self._own:
                self.pending[key] = message
        self.ship()

    def ship(self, *, everything: bool = False) -> None:
        """Hand what waits to Kafka, as far as there is room, or `everything`."""
        if self._marks.fresh:
            self._host.commit()
        if not self._began or not self.partitions:
            return
        while self.pending and (everything or self.outstanding < MAX_OUTSTANDING):
            key = next(iter(self.pending))
            message = self.pending.pop(key)
            self._ship(key, message)

    async def settle(self) -> None:
        """Wait until the store knows of everything that was taken, for SETTLE_LIMIT at most."""
        with trio.move_on_after(SETTLE_LIMIT):
            while not self._marks.is_settled:
                self._host.commit()
                await wait_until_kept(self.local)

    @property
    def is_safe(self) -> bool:
        """The process may end: what Kafka has not confirmed is in the store."""
        return not (self.pending or self.outstanding) if not self._marks.keeps else self._marks.is_settled

    def _ship(self, key: bytes, message: Message) -> None:
        number = partition_for(key, self.partitions)
        sequence = self._sequences.get(number, 0) + 1
        value: bytes | None = None
        own = self._own[key]
        holds = self._holds.pop(key, ())  # this is the newest one: those of the ones that it replaced wait for it
        node_id, instance_id = self._host.node_id, self._host.instance_id
        if message.payload:  # an empty one removes the message [MQTT5-3.3.1-6]: a tombstone
            try:
                value = encode_header(Kind.BATCH, instance_id, node_id, sequence) + encode_message(message)
            except BusRecordError as exc:
                self.failed += 1
                self._dead_letters.of_message(Stage.RETAINED, message, self.topic, Reason.UNENCODABLE, str(exc))
                if own.newest is message:
                    del self._own[key]
                    self._marks.forget(key)
                self._window.settle(0, size_of(message))
                self._release(holds)
                return
            if len(value) + len(key) > self.maximum_size:
                self.too_large += 1
                text = f"retained message of {len(value)} bytes is too large for {self.topic}: only this node has it"
                self._dead_letters.of_message(Stage.RETAINED, message, self.topic, Reason.TOO_LARGE, text)
                value = None  # the others at least lose the outdated one
        self._sequences[number] = sequence
        if own.newest is message:
            own.sequence = sequence
        self.outstanding += 1
        headers = (
            (VERSION_HEADER, bytes((FORMAT_VERSION,))),
            (NODE_HEADER, node_id.encode()),
            (INSTANCE_HEADER, instance_id),
            (SEQUENCE_HEADER, SEQUENCE.pack(sequence)),
        )
        done = partial(self._done, key, sequence, size_of(message), holds)
        self._offer(Record(self.topic, number, key, value, headers, int(message.published_at * 1000), done, messages=0))

    @staticmethod
    def _release(holds: Iterable[Hold], refused: ReasonCode | None = None) -> None:
        for hold in holds:
            hold.release(refused)

    def _done(self, key: bytes, sequence: int, size: int, holds: Sequence[Hold], failure: Exception | None) -> None:
        self.outstanding -= 1
        self._window.settle(0, size)
        own = self._own.get(key)
        is_newest = own is not None and own.sequence == sequence
        if failure is None:
            self.sent += 1
            if is_newest:
                self._marks.forget(key)
            self._release(holds)
        elif self._marks.keeps and was_closed(failure):
            return  # the producer was closed, nobody knows: the next process goes by the mark
        else:
            self.failed += 1
            if was_closed(failure):  # told once, by the bus
                self.unconfirmed += 1
            else:
                log.warning("retained message of topic %r is on this node only: %s", key.decode(), failure)
                self._release(holds, FAILED)
            if own is not None and is_newest:
                del self._own[key]
                self._marks.forget(key)
                if own.ignored is not None:  # theirs is the last word then
                    self.local.set_retained(own.ignored)
        if self.pending:
            self.ship()

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "retained_records_sent": self.sent,
            "retained_records_received": self.received,
            "retained_records_failed": self.failed,
            "retained_messages_resumed": self.resumed,
            "retained_messages_restored": self.restored,
            "retained_messages_dropped": self.dropped,
            "retained_messages_too_large": self.too_large,
            "retained_records_malformed": self.malformed,
            "retained_records_unknown_version": self.unknown_version,
        }

    # --- in

    def receive(self, record: ConsumedRecord) -> None:
        """Apply one record of the topic, in the order of the log. Garbage is counted."""
        self.received += 1
        self._offsets[record.partition] = record.offset + 1
        if record.defect is not None:
            self.malformed += 1
            self._dead_letters.unreadable(record, Reason.MALFORMED, record.defect)
            return
        try:
            if record.key == MAP_KEY:
                self._spread(self._decode_map(record))  # the last one counts: it is what compaction keeps
                return
            message = self._decode(record)
        except BusRecordError as exc:
            is_version = isinstance(exc, UnknownVersionError)
            self.unknown_version += is_version
            self.malformed += not is_version
            log.debug("%s-%d@%d: %s", record.topic, record.partition, record.offset, exc)
            reason = Reason.UNKNOWN_VERSION if is_version else Reason.MALFORMED
            self._dead_letters.unreadable(record, reason, str(exc))
            return
        if not self._is_ours_behind(record, message):
            self.local.set_retained(message)

    def _is_ours_behind(self, record: ConsumedRecord, message: Message) -> bool:
        """Whether a record of this node for the topic lies behind `record`, or is to; keeps account of what was read
        back."""
        headers = dict(record.headers)
        number = record.partition
        sequence = headers.get(SEQUENCE_HEADER, b"")
        is_own = headers.get(INSTANCE_HEADER) == self._host.instance_id and len(sequence) == SEQUENCE.size
        if is_own and (count := SEQUENCE.unpack(sequence)[0]) > self._read_back.get(number, 0):
            self._read_back[number] = count
        key = message.topic_name.encode()
        own = self._own.get(key)
        if own is None:
            return False
        if not own.sequence or own.sequence > self._read_back.get(number, 0):
            own.ignored = message
            node = headers.get(NODE_HEADER, b"")
            own.is_outdated = record.offset >= own.seen and self._is_newer(message, node, own.newest)
            return True
        del self._own[key]
        self._marks.forget(key)  # whoever reads it knows that Kafka has it
        if is_own and own.is_outdated and own.ignored is not None:
            self.restored += 1
            self.local.set_retained(own.ignored)
            self.take(own.ignored)
            return True
        return False

    def _is_newer(self, theirs: Message, node: bytes, ours: Message) -> bool:
        """Whether what another node wrote was published after a message of this one."""
        return node != self._host.node_id.encode() and milliseconds(theirs) > milliseconds(ours)

    @staticmethod
    def _decode_map(record: ConsumedRecord) -> int:
        value = record.value or b""
        header = decode_header(value)
        if header.kind is not Kind.PARTITIONS or len(value) != header.body_start + NUMBER.size:
            raise BusRecordError("no number of partitions")
        count: int = NUMBER.unpack_from(value, header.body_start)[0]
        if not 0 < count <= MOST_PARTITIONS or record.partition:
            raise BusRecordError(f"{count} partitions, said in partition {record.partition}")
        return count

    def _decode(self, record: ConsumedRecord) -> Message:
        if not record.key or len(record.key) > LONGEST_TOPIC:
            raise BusRecordError("a retained message without a key, or with one that no topic can be")
        try:
            topic = record.key.decode()
        except UnicodeDecodeError:
            raise BusRecordError("a key that is no UTF-8") from None
        check_topic(topic)
        if record.value is None:
            return Message(topic, b"", retain=True, published_at=record.timestamp_ms / 1000)
        header = decode_header(record.value)
        items = decode_items(record.value, header.body_start)
        if len(items) != 1 or not isinstance(message := items[0], Message) or message.topic_name != topic:
            raise BusRecordError("no single message of the key's topic")
        if header.kind is not Kind.BATCH or header.flags or not message.retain:
            raise BusRecordError("no retained message")
        return message


def size_of(message: Message) -> int:
    """Bytes that a retained message counts for in the window of the bus."""
    return RUN_OVERHEAD + message.size


def milliseconds(message: Message) -> int:
    """When it was published, as precisely as a tombstone tells."""
    return int(message.published_at * 1000)


def is_same(one: Message, other: Message) -> bool:
    """Whether both are one message; of one that removes, Kafka keeps only the time."""
    if one.payload or other.payload:
        return one == other
    return milliseconds(one) == milliseconds(other)
