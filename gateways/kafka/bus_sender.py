"""What leaves a node: slots of messages become records, one slot per partition [K21].

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
from gateways.kafka.bus_outbox import BusOutbox
from gateways.kafka.bus_outgoing import Outgoing
from gateways.kafka.bus_records import RUN_OVERHEAD, BusRecordError, Flag, Item, Kind, encode_message
from gateways.kafka.bus_settings import BusSettings, TopicSize
from gateways.kafka.bus_slots import HANDED, RECORD_SIZE, SURE, Chunk, Slot, cut
from gateways.kafka.bus_window import BusWindow
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.dlq import Stage
from gateways.kafka.partitions import partition_for
from gateways.kafka.records import Reason, Record, was_closed
from mqtt_trio.gateway import GatewayHost, Hold, Message

log = logging.getLogger("gateways.kafka.bus")

PART_SLACK: Final = 2048
"""Bytes of a record that its header, its key and Kafka's own framing may take beside the body."""
LEAST_PART: Final = 1024
CONTROL_PARTITION: Final = 0
"""Where nodes tell each other about themselves: one partition for all of them, whatever the topic grows to, so that all
see it in one order."""
CONTROL_STREAM: Final = 0x7FFF


class BusSender:
    """Packs what this node's clients publish and hands it to the producer. Trio thread only.

    Attributes:
      armed: the linger runs already.
      retain: called with each message that is to be retained, and whether whoever brings it waits for that.
      after_ship: called behind each linger.
    """

    def __init__(
        self,
        settings: BusSettings,
        host: GatewayHost,
        offer: Callable[[Record], None],
        window: BusWindow,
        outbox: BusOutbox,
        *,
        dead_letters: DeadLetters,
    ) -> None:
        self.settings = settings
        self.window = window
        self.outbox = outbox
        outbox.pack_all = self._pack_sure
        outbox.pack_handed = self._pack_handed
        outbox.slot_holds = lambda: [hold for slot in self._slots for hold in slot.sure.holds]
        self.partitions = settings.partitions
        self.armed = False
        self.ending = False
        self.retain: Callable[[Message, bool], Hold | None]
        self.after_ship: Callable[[], None]
        self.sent_messages = self.sent_records = self.failed_messages = 0
        self.unconfirmed = 0
        """Of the failed ones, those that Kafka had not confirmed when the producer was closed."""
        self._host = host
        self._offer = offer
        self._dead_letters = dead_letters
        self._slots: list[Slot] = []
        self._part_size = RECORD_SIZE
        self._sequences: dict[int, int] = {}
        """By stream."""
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
        self.outbox.open(self.partitions)
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
        self.armed = False
        for slot in self._slots:
            if slot.items:
                self.ship(slot)
        if self.has_sure:
            if self.outbox.notes:
                self._host.commit()  # which asks for them: they leave behind it
            else:
                self.ship_sure()
        if self.is_open:
            self.after_ship()

    def ship(self, slot: Slot) -> None:
        """Send what waits in `slot` at QoS 0, unless nothing may be sent: it keeps it then."""
        if not self.is_open:
            return
        partition = slot.number % self.partitions
        for chunk in slot.empty():
            values = self._values(chunk, slot.number)
            for value in values[:-1]:
                self._send(partition, value, 0, 0)
            self._send(partition, values[-1], chunk.messages, chunk.size)

    @property
    def has_sure(self) -> bool:
        """Messages at QoS 1 or 2 wait in some slot."""
        return any(slot.sure.items for slot in self._slots)

    def ship_sure(self) -> None:
        """Hand what waits at QoS 1 and 2 to the outbox. While nothing is known of the topic, and nothing goes to the
        spool, it stays: then its parts are not too large."""
        if (self._open or self.outbox.spooling) and not self.ending:
            for outgoing in self._pack_sure():
                self.outbox.dispatch(outgoing)

    def _pack_sure(self) -> list[Outgoing]:
        packed: list[Outgoing] = []
        for slot in self._slots:
            for chunk in slot.sure.empty():
                values = self._values(chunk, slot.number | SURE)
                packed += [Outgoing(slot.number, value, 0, 0) for value in values[:-1]]
                packed.append(Outgoing(slot.number, values[-1], chunk.messages, chunk.size, chunk.holds))
        return packed

    def _pack_handed(self, handed: dict[int, list[Item]]) -> list[Outgoing]:
        packed: list[Outgoing] = []
        for number, items in handed.items():
            size = sum(RUN_OVERHEAD + len(item) for item in items if isinstance(item, bytes))
            for chunk in cut(items, [], len(items), size):
                values = self._values(chunk, number | SURE | HANDED)
                packed += [Outgoing(number, value, 0, 0) for value in values[:-1]]
                packed.append(Outgoing(number, values[-1], chunk.messages, chunk.size))
        return packed

    def _values(self, chunk: Chunk, stream: int) -> list[bytes]:
        """Make records of a chunk: one, or as many as its size asks for."""
        head = self._head(Kind.BATCH, stream)
        value = bus_records.encode_items(chunk.items, head)
        if len(value) <= self._part_size + len(head):
            return [value]
        parts = bus_records.cut_body(value[len(head) :], self._part_size)
        last = len(parts) - 1
        values = [self._with_flags(head, Flag.MORE) + parts[0]]
        for number, part in enumerate(parts[1:], 1):
            flags = Flag.CONTINUED | (Flag.MORE if number < last else Flag.NONE)
            values.append(self._head(Kind.BATCH, stream, flags) + part)
        return values

    def _head(self, kind: Kind, stream: int, flags: Flag = Flag.NONE) -> bytes:
        sequence = self._sequences[stream] = self._sequences.get(stream, 0) + 1
        host = self._host
        return bus_records.encode_header(kind, host.instance_id, host.node_id, sequence, flags, stream)

    @staticmethod
    def _with_flags(head: bytes, flags: Flag) -> bytes:
        return head[: bus_records.FLAGS_AT] + bytes((flags,)) + head[bus_records.FLAGS_AT + 1 :]

    def _send(self, partition: int, value: bytes, messages: int, size: int) -> None:
        done = partial(self._done, messages, size)
        self._offer(Record(self.settings.topic, partition, None, value, done=done, messages=messages))

    def _done(self, messages: int, size: int, failure: Exception | None) -> None:
        if failure is None:
            self.sent_records += 1
            self.sent_messages += messages
        else:
            self.failed_messages += messages
            if was_closed(failure):  # told once, by the bus
                self.unconfirmed += messages
            else:
                log.error("%d messages did not reach the other nodes: %s", messages, failure)
        self.window.settle(messages, size)

    def tell(self, kind: Kind, body: bytes, done: Callable[[Exception | None], None]) -> int:
        """Write a record to the other nodes that holds no messages; return its sequence."""
        value = self._head(kind, CONTROL_STREAM) + body
        self._offer(Record(self.settings.topic, CONTROL_PARTITION, None, value, done=done, messages=0))
        return self._sequences[CONTROL_STREAM]
