"""One producer of a feeder, and the records that were handed to it (docs/kafka-errors.md)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Set
from typing import Any, Protocol, TypeAlias

from gateways.kafka.client_metrics import ClientFigures
from gateways.kafka.records import Reason, Record, RecordRefusedError

Partition: TypeAlias = tuple[str, int]


class ProducerLike(Protocol):
    """What the feeder needs of `workers.Producer`."""

    def send(
        self, record: Record, partition: int, done: Callable[[Record, Any], None], failed: Callable[[Record, Any], None]
    ) -> None: ...
    def too_large(self, record: Record, limit: int) -> bool: ...
    def vanished(self) -> Set[Partition]: ...
    def figures(self) -> ClientFigures: ...
    @property
    def is_alive(self) -> bool: ...
    def break_off(self) -> None: ...
    def close(self, wait: float) -> bool: ...


class Faults(Protocol):
    """Tells the producer's exceptions apart."""

    def is_fault_of_record(self, error: BaseException) -> bool: ...
    def is_denial(self, error: BaseException) -> bool: ...
    def reason_for(self, error: BaseException) -> Reason: ...
    def is_retriable(self, error: BaseException) -> bool: ...


class Generation:
    """One producer and what was handed to it."""

    def __init__(
        self,
        producer: ProducerLike,
        faults: Faults,
        settle: Callable[[Record, Exception | None], None],
        wake: Callable[[], None],
    ) -> None:
        self.producer = producer
        self.in_flight: deque[Record] = deque()
        """In the order of sending; records with an outcome are removed from the left only."""
        self.broken: BaseException | None = None
        self.denied: str | None = None
        """The topic that this node may not write to, where that broke it."""
        self.outgrown: str | None = None
        """The topic that takes less than is known of it, where that broke it."""
        self.confirmed = 0
        self.over = False
        """Outcomes that come now count no more: its records belong to the next generation."""
        self.gone: dict[Partition, float] = {}
        """Partitions that Kafka no longer names, with the moment since when."""
        self.gone_topics: Set[str] = frozenset()
        """Topics that have been gone for so long that it is no mistake."""
        self.leaving_at: float | None = None
        """Nothing more is sent; broken off when only records of `gone` are left, or then."""
        self._faults = faults
        self._settle = settle
        self._wake = wake

    def confirm(self, record: Record, _metadata: Any) -> None:
        """Note that Kafka has the record (producer's thread)."""
        if self.over:
            return
        record.settled = True
        self.confirmed += 1
        self._settle(record, None)
        if record.suspect:
            self._wake()

    def fail(self, record: Record, exc: Exception) -> None:
        """Break the producer off at its first failure (producer's thread)."""
        if self.over:
            return
        if self.broken is None:
            if self._faults.is_denial(exc):
                self.denied = record.topic
            elif self._faults.is_fault_of_record(exc) and self._faults.reason_for(exc) is Reason.TOO_LARGE:
                self.outgrown = record.topic
            self.broken = exc
            self.producer.break_off()
            self._wake()
        if not self._faults.is_fault_of_record(exc):
            return
        if record.suspect:  # it was alone in its batch
            self.finish(record, RecordRefusedError(f"Kafka refuses the record: {exc}", self._faults.reason_for(exc)))
        else:
            record.suspect = True

    def finish(self, record: Record, error: Exception | None) -> None:
        """Give the record its outcome."""
        if self.over:
            return
        record.settle(error)
        self._settle(record, error)

    def trim(self) -> None:
        """Forget the oldest records that have their outcome."""
        in_flight = self.in_flight
        while in_flight and in_flight[0].settled:
            in_flight.popleft()

    def unsettled(self) -> list[Record]:
        """Return what has no outcome, in order."""
        return [record for record in self.in_flight if not record.settled]

    def look_for_gone(self, now: float, patience: float) -> list[str]:
        """Note which partitions Kafka no longer names; return topics with one that has been gone for `patience`
        seconds, each once."""
        vanished = self.producer.vanished()
        if not vanished and not self.gone:
            return []
        self.gone = {partition: self.gone.get(partition, now) for partition in vanished}
        found = {topic for (topic, _), since in self.gone.items() if now - since > patience}
        new = found - self.gone_topics
        self.gone_topics = found
        return sorted(new)

    def gone_for(self, now: float) -> float:
        """Return for how many seconds the partition has been gone that went first."""
        return now - min(self.gone.values()) if self.gone else 0.0

    def only_gone_left(self) -> bool:
        """Whether every record without an outcome belongs to a topic of `gone`."""
        topics = self.gone_topics
        return all(record.settled or record.topic in topics for record in self.in_flight)
