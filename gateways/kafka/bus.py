"""The bus: nodes joined by one Kafka topic [K4, K21]. What the clients of one node publish reaches those of all others.

The tap puts runs and messages into one slot per partition; a linger later, or when a slot is full, each slot leaves as
one record. Every node reads all partitions from the end of the log, skips what it wrote itself, drops what a retried
produce doubled and hands the rest to its local client. mqtt.retained is read beside it from the beginning.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, Protocol

import attrs
import trio

from gateways.kafka import bus_records
from gateways.kafka.bus_inbox import BusInbox
from gateways.kafka.bus_records import (
    RUN_OVERHEAD,
    BusRecordError,
    Flag,
    Item,
    Kind,
    NodeFacts,
    encode_message,
)
from gateways.kafka.bus_window import BusWindow
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.dlq import Stage
from gateways.kafka.nodes import Nodes
from gateways.kafka.partitions import partition_for
from gateways.kafka.records import ConsumedRecord, Reason, Record
from gateways.kafka.retained import Retained
from mqtt_trio.errors import StartError
from mqtt_trio.gateway import Answer, FrameRun, GatewayHost, Hold, Message, TapRoute, wait_for_room

log = logging.getLogger("gateways.kafka.bus")

RECORD_SIZE: Final = 128 * 1024
"""Bytes at which a slot leaves without waiting for the linger."""
PART_SLACK: Final = 2048
"""Bytes of a record that its header, its key and Kafka's own framing may take beside the body."""
LEAST_PART: Final = 1024
START_TIMEOUT: Final = 10.0
"""Seconds without any progress after which a node starts without Kafka."""
FACTS_TIMEOUT: Final = 5.0
"""Seconds to wait for what Kafka says about the topics, once they can be read; then the configured numbers count."""
CONFLICT_GRACE: Final = 3.0
"""Seconds that a node which has to give way takes to ship what it holds."""


@attrs.frozen(kw_only=True)
class BusSettings:
    """What the bus needs to know of the configuration."""

    topic: str = "monster"
    retained_topic: str = "mqtt.retained"
    linger: float = 0.003
    """Seconds that messages wait to share a record."""
    partitions: int = 12
    """Of the bus topic, while Kafka has not said otherwise."""
    retained_partitions: int = 12
    """Of the retained topic, while Kafka has not said otherwise."""
    window_messages: int = 200_000
    """Messages that may wait for Kafka. Outcome: see `BusWindow`."""
    window_bytes: int = 32 * 1024 * 1024
    """Bytes of them, with an estimate of what a message costs beside its content. Outcome: see `BusWindow`."""


class Producer(Protocol):
    """What the bus uses of `ProducerBridge`."""

    after_drain: Callable[[], None]

    def offer(self, record: Record) -> None: ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    async def stop(self) -> None: ...

    def counters(self) -> dict[str, int]: ...


class Consumer(Protocol):
    """What the bus uses of `ConsumerBridge`."""

    positions_known: trio.Event
    caught_up: trio.Event
    room: Callable[[], Awaitable[None]]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    def counters(self) -> dict[str, int]: ...


class MakeConsumer(Protocol):
    """Makes the one consumer of the bus: `topic` from its end, `retained_topic` from its beginning."""

    def __call__(self, on_records: Callable[[list[ConsumedRecord]], None]) -> Consumer: ...


class TopicSize(Protocol):
    """What the bus uses of `cluster.TopicFacts`."""

    @property
    def partitions(self) -> int: ...

    @property
    def max_message_bytes(self) -> int: ...


class Slot:
    """The messages of one partition that wait for the next record: the TapRoute of all topics that live there."""

    __slots__ = ("_bus", "_window", "items", "messages", "number", "size")

    def __init__(self, bus: Bus, number: int) -> None:
        self._bus = bus
        self._window = bus.window
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
            self._bus.ship(self)
        elif not self._bus.armed:
            self._bus.arm()
        return answer

    def take(self, message: Message) -> Answer:
        """Take one message from the full path."""
        bus, window = self._bus, self._window
        try:
            item = encode_message(message)
        except BusRecordError as exc:
            bus.unencodable += 1
            bus.dead_letters.of_message(Stage.BUS, message, bus.settings.topic, Reason.UNENCODABLE, str(exc))
            return None
        if message.retain:
            bus.retain(message)
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
            bus.ship(self)
        elif not bus.armed:
            bus.arm()
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


class Bus:
    """One node's end of the bus; a Tap. Trio thread only.

    Attributes:
      armed: the linger runs already, or nothing may be shipped yet.
    """

    def __init__(
        self,
        settings: BusSettings,
        host: GatewayHost,
        producer: Producer,
        make_consumer: MakeConsumer,
        facts: Callable[[str], TopicSize | None],
        dead_letters: DeadLetters | None = None,
    ) -> None:
        """`producer` and the consumer are run by the bus and by nobody else; `facts` is `Cluster.facts`; what can be
        neither written nor read goes to `dead_letters`, None: it is counted."""
        self.settings = settings
        self.host = host
        self.window = BusWindow(
            settings.window_messages,
            settings.window_bytes,
            stop=partial(host.stop_publishers, self),
            resume=partial(host.resume_publishers, self),
        )
        self.armed = True
        self.unencodable = 0
        self._facts = facts
        self._producer = producer
        self._consumer = make_consumer(self.on_records)
        self._slots: list[Slot] = []
        self._partitions = settings.partitions
        self._part_size = RECORD_SIZE
        self._sequences: dict[int, int] = {}
        self._open = False
        self._started = False
        self._ending = False
        self._wake = trio.Event()
        self._sent_messages = self._sent_records = self._failed_messages = 0
        producer.after_drain = host.flush
        local = host.local_client("bus")
        self._consumer.room = partial(wait_for_room, local)  # Kafka keeps it for longer than this node has memory for
        about_us = NodeFacts(socket.gethostname(), os.getpid(), time.time())
        self.nodes = Nodes(host.node_id, host.instance_id, about_us, self._send_facts)
        self.dead_letters = dead_letters or DeadLetters()
        self.inbox = BusInbox(host.instance_id, local, self.nodes, self.dead_letters)
        self.retained = Retained(
            settings.retained_topic,
            host.node_id,
            host.instance_id,
            producer.offer,
            local=local,
            settled=partial(self.window.settle, 0),
            dead_letters=self.dead_letters,
        )
        self.retained.partitions = settings.retained_partitions

    # --- tap

    def route(self, topic_name: str) -> TapRoute | None:
        """Where messages of `topic_name` wait: $SYS is each node's own."""
        if topic_name.startswith("$SYS/") or topic_name == "$SYS":
            return None
        if not self._slots:
            self._make_slots()
        return self._slots[partition_for(topic_name.encode(), len(self._slots))]

    def _make_slots(self) -> None:
        known = self._facts(self.settings.topic)
        count = known.partitions if known is not None else self.settings.partitions
        self._slots = [Slot(self, number) for number in range(count)]

    def retain(self, message: Message) -> None:
        """Write a message with RETAIN 1 to mqtt.retained as well."""
        window, retained = self.window, self.retained
        if message.qos == 0 and window.full and message.topic_name.encode() not in retained.pending:
            retained.dropped += 1
            return
        window.add(0, retained.take(message))
        if not self.armed:
            self.arm()

    # --- out

    def arm(self) -> None:
        """Something waits: ship it a linger from now."""
        self.armed = True
        self._wake.set()

    async def _linger(self) -> None:
        while True:
            await self._wake.wait()
            await trio.sleep(self.settings.linger)
            self._wake = trio.Event()
            self._ship_all()

    def _ship_all(self) -> None:
        self.armed = not self._open
        for slot in self._slots:
            if slot.items:
                self.ship(slot)
        if self._open:
            self.retained.ship()

    def ship(self, slot: Slot) -> None:
        """Send what waits in `slot`, unless nothing may be sent: it keeps it then."""
        if not self._open or self._ending:
            return
        partition = slot.number % self._partitions
        for items, messages, size in slot.empty():
            sequence = self._next_sequence(partition)
            head = self._head(Kind.BATCH, sequence)
            value = bus_records.encode_items(items, head)
            if len(value) <= self._part_size + len(head):
                self._offer(partition, value, messages, size)
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
            self._offer(partition, value, messages if is_last else 0, size if is_last else 0)

    def _next_sequence(self, partition: int) -> int:
        sequence = self._sequences[partition] = self._sequences.get(partition, 0) + 1
        return sequence

    def _head(self, kind: Kind, sequence: int, flags: Flag = Flag.NONE) -> bytes:
        return bus_records.encode_header(kind, self.host.instance_id, self.host.node_id, sequence, flags)

    def _offer(self, partition: int, value: bytes, messages: int, size: int) -> None:
        done = partial(self._done, messages, size)
        self._producer.offer(Record(self.settings.topic, partition, None, value, done=done, messages=messages))

    def _done(self, messages: int, size: int, failure: Exception | None) -> None:
        if failure is None:
            self._sent_records += 1
            self._sent_messages += messages
        else:
            self._failed_messages += messages
            log.error("%d messages did not reach the other nodes: %s", messages, failure)
        self.window.settle(messages, size)

    def _send_facts(self, kind: Kind, facts: NodeFacts, settled: Callable[[], None]) -> None:
        partition = partition_for(self.host.node_id.encode(), self._partitions)
        value = self._head(kind, self._next_sequence(partition)) + bus_records.encode_facts(facts)

        def done(failure: Exception | None) -> None:
            if failure is not None and not self._ending:
                log.warning("the other nodes do not hear of this one: %s", failure)
            settled()

        self._producer.offer(Record(self.settings.topic, partition, None, value, done=done, messages=0))

    # --- in

    def on_records(self, records: list[ConsumedRecord]) -> None:
        """Take records of both topics, each partition in its order."""
        topic, receive, retained = self.settings.topic, self.inbox.receive, self.retained
        for record in records:
            try:
                if record.topic == topic:
                    receive(record)
                else:
                    retained.receive(record)
            except Exception as exc:  # whatever is in it: a record never stops those behind it
                self.inbox.undelivered += 1
                log.exception("%s-%d@%d could not be delivered", record.topic, record.partition, record.offset)
                self.dead_letters.unreadable(
                    record, Reason.UNDELIVERED, f"{type(exc).__name__}: {exc}", type(exc).__name__
                )

    # --- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started()` when every position is known, this node's id is its own and the retained
        messages are read, or when Kafka has not answered for START_TIMEOUT: then the bus joins in when it does.

        Raises:
          StartError: another live node has this `Node.Id` and was first. Also later, when Kafka was away at the start.
        """
        self.host.add_tap(self)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._producer.run)
            await nursery.start(self._consumer.run)
            nursery.start_soon(self._linger)
            nursery.start_soon(self._join)
            nursery.start_soon(self._start, task_status)
            await self.nodes.conflict.wait()
            if self._started:
                with trio.move_on_after(CONFLICT_GRACE):
                    await self.stop()
            nursery.cancel_scope.cancel()
        raise StartError(self.nodes.conflict_text)

    async def _join(self) -> None:
        await self._consumer.positions_known.wait()
        topics = self.settings.topic, self.settings.retained_topic
        with trio.move_on_after(FACTS_TIMEOUT):  # the consumer may be quicker than who asks for the topics' properties
            while any(self._facts(topic) is None for topic in topics):  # noqa: ASYNC110  once, at the start
                await trio.sleep(0.02)
        self._begin_shipping()
        await self.nodes.run()

    def _begin_shipping(self) -> None:
        """Kafka has told how large its topics are: what waited may go."""
        known = self._facts(self.settings.topic)
        if known is not None:
            self._partitions = known.partitions
            self._part_size = max(known.max_message_bytes - PART_SLACK - len(self.host.node_id), LEAST_PART)
        kept = self._facts(self.settings.retained_topic)
        if kept is not None:
            self.retained.partitions = kept.partitions
            self.retained.maximum_size = max(kept.max_message_bytes - PART_SLACK, LEAST_PART)
        self._open = True
        self._ship_all()

    async def _start(self, task_status: trio.TaskStatus[None]) -> None:
        events = (self._consumer.positions_known, self.nodes.joined, self._consumer.caught_up)
        for event in events:
            if not await self._progress(event):
                # No second warning: that Kafka is away has been said, and whoever says it names the server.
                log.info("Kafka does not answer: this node starts without the bus and joins it when Kafka is back")
                break
        self._started = True
        task_status.started()

    async def _progress(self, event: trio.Event) -> bool:
        """Wait for `event` as long as records come in; False when nothing happened for START_TIMEOUT."""
        while True:
            before = self.inbox.received + self.retained.received
            with trio.move_on_after(START_TIMEOUT):
                await event.wait()
                return True
            if before == self.inbox.received + self.retained.received:
                return False

    @property
    def ready(self) -> bool:
        """This node misses nothing that others publish, and has all retained messages."""
        consumer = self._consumer
        return consumer.positions_known.is_set() and self.nodes.joined.is_set() and consumer.caught_up.is_set()

    async def stop(self) -> None:
        """Ship what waits, say goodbye, close the producer. Bounded by the caller's cancel scope. Idempotent."""
        if self._open and not self._ending:
            for slot in self._slots:
                self.ship(slot)
            self.retained.ship(everything=True)
            self.nodes.goodbye()
        self._ending = True
        try:
            await self._producer.stop()
        finally:
            self.window.release_all()
            self.host.flush()

    def describe(self) -> Sequence[str]:
        """Lines for the start-up summary."""
        settings, others = self.settings, len(self.nodes.known)
        state = f"{others} other node{'' if others == 1 else 's'}" if self.ready else "waiting for Kafka"
        linger = settings.linger * 1000
        return [
            f"bus: topic {settings.topic}, {self._partitions} partitions, linger {linger:g} ms, {state}",
            f"retained messages of the cluster: topic {settings.retained_topic}",
        ]

    def counters(self) -> dict[str, int]:
        """Counters by name; what waits or is on its way is a gauge."""
        window, inbox, retained = self.window, self.inbox, self.retained
        return {
            "bus_messages_sent": self._sent_messages,
            "bus_records_sent": self._sent_records,
            "bus_messages_waiting": window.messages,
            "bus_bytes_waiting": window.size,
            "bus_messages_dropped": window.dropped,
            "bus_messages_held": window.held,
            "bus_messages_refused": window.refused,
            "bus_messages_failed": self._failed_messages + self.unencodable,
            "bus_publishers_stopped": window.stops,
            "bus_nodes": len(self.nodes.known),
            **inbox.counters(),
            **retained.counters(),
        }
