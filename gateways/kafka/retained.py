"""Retained messages of the cluster: the compacted topic mqtt.retained [K23].

Every node writes what its clients retain and reads everything from the beginning. The order of the log decides, so
all nodes end with the same message: a node whose own record for a topic is still on its way ignores what others wrote
for it, since its own record lies behind theirs. Records of one topic that wait here give way to the newest one.

All records of one MQTT topic must be in one partition, or compaction keeps several and nobody can tell which is the
last. So the number of partitions over which topics are spread is fixed for the life of the Kafka topic: the first node
writes it there, under a key that no MQTT topic can have, and all others go by it. Partitions that are added later are
read and stay empty.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from functools import partial
from typing import Final

import attrs

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
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.dlq import Stage
from gateways.kafka.partitions import partition_for
from gateways.kafka.records import ConsumedRecord, Reason, Record
from mqtt_trio.gateway import LocalClient, Message

log = logging.getLogger("gateways.kafka.retained")

MAX_OUTSTANDING: Final = 2000
"""Records that Kafka has not confirmed. Outcome: newer ones wait, one per topic."""
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
    """The newest record of this node for one topic, until it is read back."""

    sequence: int = 0
    """0: not shipped yet."""
    ignored: Message | None = None
    """What lies before it in the log: the last word, should it fail."""


class Retained:
    """Writes and reads mqtt.retained for one node. Trio thread only."""

    def __init__(
        self,
        topic: str,
        node_id: str,
        instance_id: bytes,
        offer: Callable[[Record], None],
        *,
        local: LocalClient,
        settled: Callable[[int], None],
        dead_letters: DeadLetters | None = None,
    ) -> None:
        """`settled` is told the bytes that need no room any more."""
        self._dead_letters = dead_letters or DeadLetters()
        self.topic = topic
        self.partitions = 0
        """Over how many partitions of the topic MQTT topics are spread; 0: not known yet, nothing is shipped."""
        self.maximum_size = 1_000_000
        """Bytes of the largest value; set before the first `ship`."""
        self.local = local
        self.pending: dict[bytes, Message] = {}
        self.outstanding = 0
        self.sent = 0
        self.received = 0
        self.too_large = 0
        self.dropped = 0
        self.malformed = 0
        self.unknown_version = 0
        self.failed = 0
        self._instance_id = instance_id
        self._offer = offer
        self._settled = settled
        self._node_id = node_id
        self._own: dict[bytes, OwnRecord] = {}
        self._sequences: dict[int, int] = {}
        self._read_back: dict[int, int] = {}

    # --- out

    def begin(self, count: int) -> None:
        """Everything is read; the topic has `count` partitions now. Messages leave once it is known how they are
        spread: as an earlier node said, or, once Kafka has that, over all partitions of today."""
        if self.partitions:
            self.ship()
            return
        value = encode_header(Kind.PARTITIONS, self._instance_id, self._node_id, 0) + NUMBER.pack(count)

        def done(failure: Exception | None) -> None:
            if failure is not None:
                log.warning("over how many partitions of %s topics are spread is not noted: %s", self.topic, failure)
                self._spread(count)

        self._offer(Record(self.topic, 0, MAP_KEY, value, done=done, messages=0))

    def _spread(self, count: int) -> None:
        self.partitions = count
        self.ship()

    def take(self, message: Message) -> int:
        """Take a message with RETAIN 1; return how many more bytes wait because of it."""
        key = message.topic_name.encode()
        before = self.pending.get(key)
        self.pending[key] = message
        if before is None:
            self._own.setdefault(key, OwnRecord()).sequence = 0
            return RUN_OVERHEAD + message.size
        return message.size - before.size

    def ship(self, *, everything: bool = False) -> None:
        """Hand what waits to Kafka, as far as there is room, or `everything`."""
        while self.pending and self.partitions and (everything or self.outstanding < MAX_OUTSTANDING):
            key = next(iter(self.pending))
            message = self.pending.pop(key)
            self._ship(key, message, RUN_OVERHEAD + message.size)

    def _ship(self, key: bytes, message: Message, size: int) -> None:
        number = partition_for(key, self.partitions)
        sequence = self._sequences.get(number, 0) + 1
        value: bytes | None = None
        if message.payload:  # an empty one removes the message [MQTT5-3.3.1-6]: a tombstone
            try:
                value = encode_header(Kind.BATCH, self._instance_id, self._node_id, sequence) + encode_message(message)
            except BusRecordError as exc:
                self.failed += 1
                self._dead_letters.of_message(Stage.RETAINED, message, self.topic, Reason.UNENCODABLE, str(exc))
                self._own.pop(key, None)
                self._settled(size)
                return
            if len(value) + len(key) > self.maximum_size:
                self.too_large += 1
                text = f"retained message of {len(value)} bytes is too large for {self.topic}: only this node has it"
                self._dead_letters.of_message(Stage.RETAINED, message, self.topic, Reason.TOO_LARGE, text)
                value = None  # the others at least lose the outdated one
        self._sequences[number] = sequence
        self._own[key].sequence = sequence
        self.outstanding += 1
        headers = (
            (VERSION_HEADER, bytes((FORMAT_VERSION,))),
            (NODE_HEADER, self._node_id.encode()),
            (INSTANCE_HEADER, self._instance_id),
            (SEQUENCE_HEADER, SEQUENCE.pack(sequence)),
        )
        done = partial(self._done, key, sequence, size)
        self._offer(Record(self.topic, number, key, value, headers, int(message.published_at * 1000), done, messages=0))

    def _done(self, key: bytes, sequence: int, size: int, failure: Exception | None) -> None:
        self.outstanding -= 1
        self._settled(size)
        if failure is None:
            self.sent += 1
        else:
            self.failed += 1
            log.warning("retained message of topic %r is on this node only: %s", key.decode(), failure)
            own = self._own.get(key)
            if own is not None and own.sequence == sequence:
                del self._own[key]
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
            "retained_messages_dropped": self.dropped,
            "retained_messages_too_large": self.too_large,
            "retained_records_malformed": self.malformed,
            "retained_records_unknown_version": self.unknown_version,
        }

    # --- in

    def receive(self, record: ConsumedRecord) -> None:
        """Apply one record of the topic, in the order of the log. Garbage is counted."""
        self.received += 1
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
        """Whether a record of this node for the topic lies behind `record`; keeps account of what was read back."""
        headers = dict(record.headers)
        number = record.partition
        sequence = headers.get(SEQUENCE_HEADER, b"")
        is_own = headers.get(INSTANCE_HEADER) == self._instance_id and len(sequence) == SEQUENCE.size
        if is_own and (count := SEQUENCE.unpack(sequence)[0]) > self._read_back.get(number, 0):
            self._read_back[number] = count
        key = message.topic_name.encode()
        own = self._own.get(key)
        if own is None:
            return False
        if not own.sequence or own.sequence > self._read_back.get(number, 0):
            own.ignored = message
            return True
        del self._own[key]
        return False

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
