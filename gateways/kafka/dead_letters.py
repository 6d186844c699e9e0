"""Where dead letters are written: a producer of their own, so that neither they nor poison hold anybody up [K7, K12].

Nothing here blocks or raises. What cannot be written to mqtt.dlq either is counted and logged; no letter is written
about a letter.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Final, Protocol

import attrs
import trio

from gateways.kafka.bus_records import BusRecordError, Kind, decode_header, decode_items
from gateways.kafka.dlq import (
    BusSource,
    DeadLetter,
    KafkaSource,
    LostRecord,
    MqttSource,
    Source,
    Stage,
    clean_text,
    encode_letter,
    id_of_bus_record,
    id_of_consumed,
    id_of_message,
    letter_headers,
)
from gateways.kafka.records import ConsumedRecord, Reason, Record, RecordRefusedError
from mqtt_trio.gateway import Message

log = logging.getLogger("gateways.kafka.dlq")

LARGEST: Final = 1_000_000
"""Bytes of a letter while Kafka has not said what mqtt.dlq takes: a little less than its default."""
SLACK: Final = 512
"""Bytes that Kafka's framing of a batch may take beside the record."""
MAX_KNOWN: Final = 10_000
"""Letters whose ids are remembered. Outcome: the oldest is forgotten; a second one of its like then has its id."""
MAX_ONCE: Final = 4096
"""Things that are told once. Outcome: the one that came last the longest ago is forgotten, and told again."""
BURST: Final = 1000
REFILL: Final = 10.0
"""Letters about records that were read: so many at once, and so many a second. Outcome: the others are counted only."""
LOG_INTERVAL: Final = 10.0
"""Seconds between two lines about letters."""


def nothing() -> None:
    """Do nothing: nobody waits for a letter."""


class Producer(Protocol):
    """What is used of `ProducerBridge`."""

    full: bool

    def offer(self, record: Record) -> None: ...
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...
    async def stop(self) -> None: ...


class TopicLimit(Protocol):
    """What is used of `cluster.TopicFacts`."""

    @property
    def max_message_bytes(self) -> int: ...


@attrs.frozen
class Why:
    """What a letter is for."""

    reason: Reason
    error: str
    target: str | None = None


class DeadLetters:
    """Writes dead letters of one node. Trio thread only.

    Attributes:
      broker_id: `Node.Id`; set before the first letter.
      letters: what became a letter, by reason, written or not.
      written, lost: letters by what became of them; lost: the window was full, Kafka refused the letter, the broker
        ended before Kafka had it, or there is no topic for letters here.
      bare: letters that hold the facts alone.
      left_out: what was counted only, because too many of its like came.
    """

    def __init__(
        self,
        producer: Producer | None = None,
        topic: str = "mqtt.dlq",
        facts: Callable[[str], TopicLimit | None] = lambda topic: None,
        *,
        contents: bool = True,
    ) -> None:
        """`producer` is run and stopped by the caller, None: letters are counted and logged only; `facts` is
        `Cluster.facts`; `contents`: payloads may be written to `topic`."""
        self.broker_id = ""
        self.letters: Counter[Reason] = Counter()
        self.written = self.lost = self.bare = self.left_out = 0
        self._producer = producer
        self._topic = topic
        self._facts = facts
        self._contents = contents
        self._known: dict[str, int] = {}
        self._once: dict[Hashable, None] = {}
        self._tokens = float(BURST)
        self._tokens_at = float("-inf")
        self._unlogged = self._unlogged_lost = 0
        self._log_at = float("-inf")

    # --- what ends here

    def refused(self, stage: Stage, record: Record, error: RecordRefusedError) -> None:
        """`record` can never be stored (`ProducerBridge.on_refused`)."""
        lost = LostRecord(
            topic=record.topic,
            partition=None if record.key is not None else record.partition,
            key=record.key,
            value=record.value,
            headers=record.headers,
            timestamp_ms=record.timestamp_ms,
        )
        why = Why(error.reason, str(error), record.topic)
        message = record.message if stage is not Stage.RETAINED else retained_message(record)
        if message is not None:
            self._of_message(stage, message, why, lost)
        elif (source := bus_source(record)) is not None:  # without the messages: newer ones have come since
            self._write(self._letter(stage, source, why, id_of_bus_record(source), record.value or b""))

    def refused_on_bus(self, record: Record, error: RecordRefusedError) -> None:
        """The same for the producer of the bus, which writes retained messages too: these have a key."""
        self.refused(Stage.BUS if record.key is None else Stage.RETAINED, record, error)

    def of_message(self, stage: Stage, message: Message, target: str, reason: Reason, error: str) -> None:
        """`message` cannot become a record of the topic `target`."""
        self._of_message(stage, message, Why(reason, error, target), None)

    def unreadable(self, record: ConsumedRecord, reason: Reason, error: str, once: Hashable = None) -> None:
        """`record` was read and cannot be understood. `once`: of all records with an equal one the first gets a letter,
        the others are only counted."""
        if not self._may_write(once):
            self.left_out += 1
            return
        source = KafkaSource(
            topic=record.topic, partition=record.partition, offset=record.offset, timestamp_ms=record.timestamp_ms
        )
        identity = id_of_consumed(source, record.value)
        if identity in self._known:  # read again, by a consumer that went back
            self.left_out += 1
            return
        letter = self._letter(Stage.CONSUME, source, Why(reason, error), identity, record.value or b"")
        self._write(attrs.evolve(letter, record=lost_record(record)))
        self._know(identity, 1)

    @property
    def has_room(self) -> bool:
        """Another letter would find room: who may wait with one, waits."""
        return self._producer is None or not self._producer.full

    def undeliverable(
        self, record: ConsumedRecord, reason: Reason, error: str, done: Callable[[], None], *, redrivable: bool = True
    ) -> None:
        """`record` of mqtt.messages cannot be published; `done` is called once its letter is written, or will never be.

        However many of its like came, each has its letter: its reader looks at `has_room` first, and goes on behind
        `done`. `redrivable`: once it is mended it can be written again.
        """
        source = KafkaSource(
            topic=record.topic, partition=record.partition, offset=record.offset, timestamp_ms=record.timestamp_ms
        )
        identity = id_of_consumed(source, record.value)
        if identity in self._known:  # read again, by a consumer that went back
            self.left_out += 1
            done()
            return
        letter = self._letter(Stage.CONSUME, source, Why(reason, error), identity, record.value or b"")
        lost = lost_record(record)
        self._know(identity, 1)
        self._write(attrs.evolve(letter, record=lost, redrivable=redrivable), done)

    def _may_write(self, once: Hashable) -> bool:
        if once is not None:
            is_known = self._once.pop(once, self) is None
            if not is_known and len(self._once) >= MAX_ONCE:
                del self._once[next(iter(self._once))]
            self._once[once] = None
            if is_known:
                return False
        now = time.monotonic()
        self._tokens = min(self._tokens + (now - self._tokens_at) * REFILL, BURST)
        self._tokens_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    # --- letters

    def _of_message(self, stage: Stage, message: Message, why: Why, record: LostRecord | None) -> None:
        target, payload = why.target or "", message.payload
        first = id_of_message(message, self.broker_id, target)
        occurrence = self._known.get(first, 0)  # two messages may be alike in all that is in the id
        source = MqttSource(
            topic=message.topic_name,
            client_id=message.client_id,
            published_at=message.published_at,
            qos=message.qos,
            retain=message.retain,
        )
        identity = first if not occurrence else id_of_message(message, self.broker_id, target, occurrence)
        letter = self._letter(stage, source, why, identity, payload)
        redrivable = record is not None and stage in (Stage.ARCHIVE, Stage.MESSAGES)
        contents = payload if record is None else None
        self._write(attrs.evolve(letter, record=record, payload=contents, redrivable=redrivable))
        self._know(first, occurrence + 1)

    def _letter(self, stage: Stage, source: Source, why: Why, identity: str, content: bytes) -> DeadLetter:
        return DeadLetter(
            id=identity,
            dead_at_ms=time.time_ns() // 1_000_000,
            broker_id=self.broker_id,
            stage=stage,
            reason=why.reason,
            error=why.error,
            source=source,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            target=why.target,
        )

    def _know(self, identity: str, count: int) -> None:
        if self._known.pop(identity, None) is None and len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[identity] = count

    def _write(self, letter: DeadLetter, done: Callable[[], None] = nothing) -> None:
        """Write a letter; `done` is called when its outcome is known, perhaps at once."""
        self.letters[letter.reason] += 1
        self._unlogged += 1
        self._log(letter)
        if self._producer is None:  # nobody expects it to be written
            self.lost += 1
            done()
            return
        if self._producer.full:
            self._lose("those before it wait for Kafka, and their window is full")
            done()
            return
        if not self._contents or letter.reason is Reason.TOO_LARGE:  # [K7]: facts and SHA-256, no payload
            letter = letter.without_contents()
        record = self._record(letter, done)
        if record is None:
            letter = letter.without_contents()
            record = self._record(letter, done)
        if record is None:
            self._lose(f"the facts alone are too large for {self._topic}")
            done()
            return
        self.bare += letter.record is None and letter.payload is None
        self._producer.offer(record)

    def _record(self, letter: DeadLetter, done: Callable[[], None]) -> Record | None:
        """Return the record of `letter` if it fits into the topic."""
        facts = self._facts(self._topic)
        limit = (facts.max_message_bytes if facts is not None else LARGEST) - SLACK
        if (letter.record.size if letter.record is not None else len(letter.payload or b"")) > limit:
            return None  # before anything is copied
        record = Record(
            self._topic,
            None,
            letter.id.encode(),
            encode_letter(letter),
            letter_headers(letter),
            letter.dead_at_ms,
            partial(self._done, done),
            messages=0,
        )
        return record if record.measure() <= limit else None

    def _done(self, done: Callable[[], None], error: Exception | None) -> None:
        if error is None:
            self.written += 1
        else:
            self._lose(str(error))
        done()

    # --- what is told

    def _lose(self, reason: str) -> None:
        self.lost += 1
        self._unlogged_lost += 1
        if self._unlogged_lost == 1:
            log.error("a dead letter is not written: %s", reason)

    def _log(self, letter: DeadLetter) -> None:
        now = time.monotonic()
        if now < self._log_at:
            return
        self._log_at = now + LOG_INTERVAL
        source = letter.source
        place = (
            f"{source.topic}-{source.partition}@{source.offset}"
            if isinstance(source, KafkaSource)
            else f"topic {source.topic!r}"
        )
        log.warning(
            "%d dead letter%s, the latest: %s, %s (%s): %s%s",
            self._unlogged,
            "" if self._unlogged == 1 else "s",
            letter.reason,
            letter.stage,
            place,
            clean_text(letter.error),
            f"; {self._unlogged_lost} not written" if self._unlogged_lost else "",
        )
        self._unlogged = self._unlogged_lost = 0

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "dlq_letters": self.letters.total(),
            "dlq_letters_written": self.written,
            "dlq_letters_lost": self.lost,
            "dlq_letters_bare": self.bare,
            "dlq_left_out": self.left_out,
            **{f"dlq_{reason}": self.letters[reason] for reason in Reason},
        }


def lost_record(record: ConsumedRecord) -> LostRecord:
    """Return a record that was read as letters have it."""
    return LostRecord(
        topic=record.topic,
        partition=record.partition,
        key=record.key,
        value=record.value,
        headers=record.headers,
        timestamp_ms=record.timestamp_ms,
    )


def retained_message(record: Record) -> Message:
    """Return the message of a record of mqtt.retained that this node wrote."""
    if record.value is not None:
        try:
            item = decode_items(record.value, decode_header(record.value).body_start)[0]
        except (BusRecordError, IndexError):
            item = None
        if isinstance(item, Message):
            return item
    published_at = (record.timestamp_ms or 0) / 1000
    return Message((record.key or b"").decode(errors="replace"), b"", retain=True, published_at=published_at)


def bus_source(record: Record) -> BusSource | None:
    """Return where a record of the bus was to go; None: it holds no messages, so nothing is lost with it."""
    try:
        header = decode_header(record.value or b"")
    except BusRecordError:
        return None
    if header.kind is not Kind.BATCH:
        return None
    return BusSource(
        topic=record.topic,
        partition=record.partition or 0,
        instance_id=header.instance_id,
        sequence=header.sequence,
        messages=record.messages,
    )
