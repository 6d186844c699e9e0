"""Reading parts of topics from one end to the other, for commands. Blocking."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Protocol, TypeAlias

from gateways.kafka.records import ConsumedRecord
from mqtt_trio.errors import GatewayError

Partition: TypeAlias = tuple[str, int]
POLL: Final = 0.5
PATIENCE: Final = 30.0
"""Seconds without any record after which a read has failed."""


class ConsumerLike(Protocol):
    """What is needed of `workers.Consumer`."""

    def assign(self, offsets: Mapping[Partition, int]) -> None: ...
    def poll(self, timeout: float) -> list[ConsumedRecord]: ...
    def position(self, partition: Partition) -> int: ...


def read_range(
    consumer: ConsumerLike, first: Mapping[Partition, int], end: Mapping[Partition, int], done: Callable[[int], None]
) -> Iterator[ConsumedRecord]:
    """Yield the records of each partition from offset `first` up to, not including, `end`; in order per partition.

    `done` is told how many offsets were passed.

    Raises:
      GatewayError: nothing came for PATIENCE seconds.
    """
    left = {p: offset for p, offset in first.items() if offset < end[p]}
    if not left:
        return
    consumer.assign(left)
    changed_at = time.monotonic()
    while left:
        for record in consumer.poll(POLL):
            if record.offset < end[record.topic, record.partition]:
                yield record
        for p, before in list(left.items()):
            position = min(consumer.position(p), end[p])  # behind markers of transactions, too
            if position > before:
                changed_at = time.monotonic()
                done(position - before)
                left[p] = position
            if position >= end[p]:
                del left[p]
        be_patient(changed_at, left)


def be_patient(since: float, partitions: Iterable[Partition]) -> None:
    """Nothing has come from `partitions` since then (monotonic seconds).

    Raises:
      GatewayError: that is PATIENCE seconds ago.
    """
    if time.monotonic() - since > PATIENCE:
        names = ", ".join(f"{topic}-{number}" for topic, number in partitions)
        raise GatewayError(f"nothing comes from {names} any more: is its Kafka broker down?", retriable=True)


def total(first: Mapping[Partition, int], end: Mapping[Partition, int]) -> int:
    """Return how many offsets `read_range` passes."""
    return sum(max(0, end[p] - offset) for p, offset in first.items())
