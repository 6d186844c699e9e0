"""What leaves a node: slots of messages that become records, one slot per partition [K21].

The partition of a topic is fixed for the life of the process: the number of partitions that Kafka told first counts to
the end. When the topic grows meanwhile, this node goes on with the partitions that it uses, and its next process
spreads over all of them. A topic that changed its partition under way could overtake itself: its newer messages lie in
a partition that others read at their own pace, perhaps on another Kafka broker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from gateways.kafka import bus_records
from gateways.kafka.bus_records import RUN_OVERHEAD, BusRecordError, Flag, Item, Kind, encode_message
from gateways.kafka.bus_settings import BusSettings, TopicSize
from gateways.kafka.bus_window import BusWindow
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.dlq import Stage
from gateways.kafka.partitions import partition_for
from gateways.kafka.records import Reason, Record
from mqtt_trio.gateway import Answer, FrameRun, GatewayHost, Hold, Message

log = logging.getLogger("gateways.kafka.bus")

RECORD_SIZE: Final = 128 * 1024
"""Bytes at which a slot leaves without waiting for the linger."""
PART_SLACK: Final = 2048
"""Bytes of a record that its header, its key and Kafka's own framing may take beside the body."""
LEAST_PART: Final = 1024
CONTROL_PARTITION: Final = 0
"""Where nodes tell each other about themselves: one partition for all of them, whatever the topic grows to, so that all
see it in one order."""


class Slot:
    """The messages of one partition that wait for the next record: the TapRoute of all topics that live there."""

    __slots__ = ("_sender", "_window", "items", "messages", "number", "size")

    def __init__(self, sender: BusSender, number: int) -> None:
        self._sender = sender
        self._window = sender.window
        self.number = number
        self.items: list[Item] = []
        self.messages = 0
        self.size = 0

    def take_run(self, run: FrameRun) -> Answer:
        """Take a run of frames from the fast lane (hot)."""
        window = self._window
        size = len(run.frames) + RUN_OVERHEAD
        answer: Answer = None
        if window.messages >= window.max_messages or window.size >= window.max_size:
            answer = window.beyond(run.qos, run.count, size)
            if not isinstance(answer, Hold):
                return answer
        else:
            window.messages += run.count
            window.size += size
        self.items.append(run)
        self.messages += run.count
        self.size += size
        if self.size >= RECORD_SIZE:
            self._sender.ship(self)
        elif not self._sender.armed:
            self._sender.arm()
        return answer

    def take(self, message: Message) -> Answer:
        """Take one message from the full path."""
        sender, window = self._sender, self._window
        item = sender.encoded(message)
        if item is None:
            return None
        if message.retain:
            sender.retain(message)
        size = len(item) + RUN_OVERHEAD
        answer: Answer = None
        if window.full:
            answer = window.beyond(message.qos, 1, size)
            if not isinstance(answer, Hold):
                return answer
        else:
            window.add(1, size)
        self.items.append(item)
        self.messages += 1
        self.size += size
        if self.size >= RECORD_SIZE:
            sender.ship(self)
        elif not sender.armed:
            sender.arm()
        return answer

    def empty(self) -> list[tuple[list[Item], int, int]]:
        """Give away what waits, as (items, messages, bytes) of about RECORD_SIZE each."""
        items, messages, size = self.items, self.messages, self.size
        self.items, self.messages, self.size = [], 0, 0
        if size < 2 * RECORD_SIZE:
            return [(items, messages, size)] if items else []
        chunks: list[tuple[list[Item], int, int]] = []
        chunk: list[Item] = []
        messages = size = 0
        for item in items:
            chunk.append(item)
            run = item if isinstance(item, FrameRun) else None
            messages += run.count if run else 1
            size += RUN_OVERHEAD + len(run.frames if run else item)  # type: ignore[arg-type]  # bytes if no run
            if size >= RECORD_SIZE:
                chunks.append((chunk, messages, size))
                chunk, messages, size = [], 0, 0
        if chunk:
            chunks.append((chunk, messages, size))
        return chunks


class BusSender:
    """Packs what this node's clients publish and hands it to the producer. Trio thread only.

    Attributes:
      armed: the linger runs already, or nothing may be shipped yet.
      retain: called with each message that is to be retained.
      after_ship: called behind each linger.
    """

    def __init__(
        self,
        settings: BusSettings,
        host: GatewayHost,
        offer: Callable[[Record], None],
        window: BusWindow,
        dead_letters: DeadLetters,
    ) -> None:
        self.settings = settings
        self.window = window
        self.partitions = settings.partitions
        self.armed = True
        self.ending = False
        self.retain: Callable[[Message], None]
        self.after_ship: Callable[[], None]
        self.sent_messages = self.sent_records = self.failed_messages = 0
        self._host = host
        self._offer = offer
        self._dead_letters = dead_letters
        self._slots: list[Slot] = []
        self._part_size = RECORD_SIZE
        self._sequences: dict[int, int] = {}
        self._open = False
        self._wake = trio.Event()

    # --- what comes

    def slot(self, topic_name: str, known: TopicSize | None) -> Slot:
        """Where messages of a topic wait. `known`: what Kafka says about the bus topic; the first answer counts."""
        if not self._slots:
            count = known.partitions if known is not None else self.partitions
            self._slots = [Slot(self, number) for number in range(count)]
        return self._slots[partition_for(topic_name.encode(), len(self._slots))]

    def encoded(self, message: Message) -> bytes | None:
        """Pack a message; None, counted and written as a dead letter, when no record can hold it."""
        try:
            return encode_message(message)
        except BusRecordError as exc:
            self.failed_messages += 1
            self._dead_letters.of_message(Stage.BUS, message, self.settings.topic, Reason.UNENCODABLE, str(exc))
            return None

    def arm(self) -> None:
        """Something waits: ship it a linger from now."""
        if not self.armed:
            self.armed = True
            self._wake.set()

    # --- what leaves

    def begin(self, known: TopicSize | None) -> None:
        """Kafka has told how large its topic is: what waited may go."""
        if known is not None:
            self.partitions = known.partitions
            self._part_size = max(known.max_message_bytes - PART_SLACK - len(self._host.node_id), LEAST_PART)
        self._open = True
        self.ship_all()

    @property
    def is_open(self) -> bool:
        """Records may leave."""
        return self._open and not self.ending

    async def run(self) -> None:
        """Ship what waits, each time a linger after it came; until cancelled."""
        while True:
            await self._wake.wait()
            await trio.sleep(self.settings.linger)
            self._wake = trio.Event()
            self.ship_all()

    def ship_all(self) -> None:
        """Send what waits anywhere."""
        self.armed = not self._open
        for slot in self._slots:
            if slot.items:
                self.ship(slot)
        if self._open:
            self.after_ship()

    def ship(self, slot: Slot) -> None:
        """Send what waits in `slot`, unless nothing may be sent: it keeps it then."""
        if not self.is_open:
            return
        partition = slot.number % self.partitions
        for items, messages, size in slot.empty():
            sequence = self._next_sequence(partition)
            head = self._head(Kind.BATCH, sequence)
            value = bus_records.encode_items(items, head)
            if len(value) <= self._part_size + len(head):
                self._send(partition, value, messages, size)
            else:
                self._ship_parts(partition, sequence, value[len(head) :], messages, size)

    def _ship_parts(self, partition: int, sequence: int, body: bytes, messages: int, size: int) -> None:
        parts = bus_records.cut_body(body, self._part_size)
        for number, part in enumerate(parts):
            flags = Flag.NONE
            if number:
                sequence = self._next_sequence(partition)
                flags |= Flag.CONTINUED
            is_last = number == len(parts) - 1
            if not is_last:
                flags |= Flag.MORE
            value = self._head(Kind.BATCH, sequence, flags) + part
            self._send(partition, value, messages if is_last else 0, size if is_last else 0)

    def _next_sequence(self, partition: int) -> int:
        sequence = self._sequences[partition] = self._sequences.get(partition, 0) + 1
        return sequence

    def _head(self, kind: Kind, sequence: int, flags: Flag = Flag.NONE) -> bytes:
        return bus_records.encode_header(kind, self._host.instance_id, self._host.node_id, sequence, flags)

    def _send(self, partition: int, value: bytes, messages: int, size: int) -> None:
        done = partial(self._done, messages, size)
        self._offer(Record(self.settings.topic, partition, None, value, done=done, messages=messages))

    def _done(self, messages: int, size: int, failure: Exception | None) -> None:
        if failure is None:
            self.sent_records += 1
            self.sent_messages += messages
        else:
            self.failed_messages += messages
            log.error("%d messages did not reach the other nodes: %s", messages, failure)
        self.window.settle(messages, size)

    def tell(self, kind: Kind, body: bytes, done: Callable[[Exception | None], None]) -> int:
        """Write a record to the other nodes that holds no messages; return its sequence."""
        sequence = self._next_sequence(CONTROL_PARTITION)
        value = self._head(kind, sequence) + body
        self._offer(Record(self.settings.topic, CONTROL_PARTITION, None, value, done=done, messages=0))
        return sequence
