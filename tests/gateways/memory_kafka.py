"""A Kafka in memory for tests of the bridge: producers that break, hang and refuse."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from gateways.kafka.bridge import ProducerBridge, Record
from gateways.kafka.client_metrics import NO_FIGURES, ClientFigures
from gateways.kafka.cluster import Cluster, TopicFacts
from gateways.kafka.mapping import MessageRecord
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import Reason
from tests.gateway_support import LIMIT
from tests.record_check.watch import check


class PoisonError(Exception):
    """A fault of one record."""


class DeniedError(Exception):
    """This node may not write to the topic."""


class AwayError(Exception):
    """Kafka is not there."""


class FakeFaults:
    """Tells the fake producer's exceptions apart."""

    def is_fault_of_record(self, error: BaseException) -> bool:
        return isinstance(error, PoisonError)

    def is_denial(self, error: BaseException) -> bool:
        return isinstance(error, DeniedError)

    def reason_for(self, error: BaseException) -> Reason:
        return Reason.REFUSED

    def is_retriable(self, error: BaseException) -> bool:
        return isinstance(error, AwayError)


Sent = tuple[Record, Callable[[Record, Any], None], Callable[[Record, Any], None]]


class FakeKafka:
    """A log in memory, and the producers that write to it.

    A producer takes records into a batch per partition; `deliver`, in the feeder's thread through `send`, completes
    a batch when it has `batch` records. Refused: a batch with a poisoned record, and everything while `broken`.
    """

    def __init__(self, batch: int = 1) -> None:
        self.batch = batch
        self.log: list[Record] = []
        self.opened = 0
        self.away = 0
        """How many producers fail to connect."""
        self.fail_at: set[int] = set()
        """Counts of sent records at which the producer breaks."""
        self.hang = False
        self.dead = False
        """The thread of the producer ended."""
        self.deleted: set[str] = set()
        self.denied: set[str] = set()
        self.sent = 0
        self.hold_up: threading.Event | None = None
        """Sending the record `hang` does not return before this is set."""
        self.figures = NO_FIGURES
        self.on_open: Callable[[], None] = lambda: None

    def open(self) -> FakeProducer:
        if self.away:
            self.away -= 1
            raise AwayError("nobody answers")
        self.opened += 1
        self.on_open()
        return FakeProducer(self)

    def values(self, partition: int) -> list[bytes | None]:
        return [record.value for record in self.log if record.partition == partition]


class FakeProducer:
    def __init__(self, kafka: FakeKafka) -> None:
        self.kafka = kafka
        self.batch: list[Sent] = []
        self.written: list[Record] = []
        self.broken = False
        self.lock = threading.RLock()
        self.timer: threading.Timer | None = None

    def send(
        self, record: Record, partition: int, done: Callable[[Record, Any], None], failed: Callable[[Record, Any], None]
    ) -> None:
        with self.lock:
            if self.broken:
                raise RuntimeError("closed")
            if record.value == b"hang" and self.kafka.hold_up is not None:
                hold_up, self.kafka.hold_up = self.kafka.hold_up, None
                hold_up.wait()
                raise RuntimeError("closed")
            if isinstance(record, MessageRecord):  # others are what a test likes
                check("archive", record, partition)
            if record.value == b"unfit":
                raise ValueError("no such header")
            self.kafka.sent += 1
            self.written.append(record)
            self.batch.append((record, done, failed))
            if self.kafka.sent in self.kafka.fail_at:
                self._fail(AwayError("broken pipe"))
            elif len(self.batch) >= self.kafka.batch:
                self._deliver()
            elif self.timer is None:
                self.timer = threading.Timer(0.02, self._deliver)
                self.timer.start()

    def _deliver(self) -> None:
        with self.lock:
            self.timer = None
            if self.broken or self.kafka.hang:
                return
            if any(record.topic in self.kafka.denied for record, _, _ in self.batch):
                self._fail(DeniedError("no right to write"))
                return
            kept = [sent for sent in self.batch if sent[0].topic in self.kafka.deleted]
            self.batch = [sent for sent in self.batch if sent[0].topic not in self.kafka.deleted]
            if any((record.value or b"").startswith(b"poison") for record, _, _ in self.batch):
                self._fail(PoisonError("the batch holds a record that is none"))
                return
            batch, self.batch = self.batch, kept
            for record, done, _ in batch:
                self.kafka.log.append(record)
                done(record, None)
            if kept:
                self.timer = threading.Timer(0.02, self._deliver)
                self.timer.start()

    def _fail(self, exc: Exception) -> None:
        batch, self.batch = self.batch, []
        for record, _, failed in batch:
            failed(record, exc)

    def too_large(self, record: Record, limit: int) -> bool:
        return True

    def vanished(self) -> set[tuple[str, int]]:
        return {(record.topic, record.partition or 0) for record in self.written if record.topic in self.kafka.deleted}

    def figures(self) -> ClientFigures:
        return self.kafka.figures

    @property
    def is_alive(self) -> bool:
        return not self.kafka.dead

    def break_off(self) -> None:
        self.broken = True

    def close(self, wait: float) -> bool:
        with self.lock:
            self.broken = True
            if self.timer is not None:
                self.timer.cancel()
            self._fail(RuntimeError("closed"))
        return True


@attrs.define
class Setup:
    kafka: FakeKafka
    cluster: Cluster
    bridge: ProducerBridge
    outcomes: dict[bytes, Exception | None] = attrs.field(factory=dict)
    order: list[bytes] = attrs.field(factory=list)
    changed: trio.Event = attrs.field(factory=trio.Event)

    def offer(self, value: bytes, partition: int = 0, topic: str = "t", *, patient: bool = False) -> Record:
        def done(error: Exception | None) -> None:
            assert value not in self.outcomes, "an outcome came twice"
            self.outcomes[value] = error
            self.order.append(value)
            self.changed.set()

        record = Record(topic, partition, None, value, done=done)
        record.patient = patient
        self.bridge.offer(record)
        return record

    async def until(self, count: int) -> None:
        """Wait for `count` outcomes."""
        with trio.fail_after(LIMIT):
            while len(self.outcomes) < count:
                self.changed = trio.Event()
                await self.changed.wait()


@asynccontextmanager
async def producing(
    kafka: FakeKafka, *, window: int = 1000, timeout_ms: int = 60_000, lazy: bool = False
) -> AsyncIterator[Setup]:
    cluster = Cluster(["k"])
    cluster.know("t", TopicFacts(partitions=4, max_message_bytes=1000))
    options = KafkaOptions(producer={"delivery.timeout.ms": timeout_ms})
    bridge = ProducerBridge(
        options, cluster, name="test", compression=None, window_records=window, window_bytes=10**6,
        lazy=lazy, open_producer=kafka.open, faults=FakeFaults(),
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        await nursery.start(bridge.run)
        yield Setup(kafka, cluster, bridge)
        with trio.move_on_after(0.2):
            await bridge.stop()
        nursery.cancel_scope.cancel()
