"""Reading a topic from one end to the other in the order of its records' times. Blocking."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

from gateways.kafka.records import ConsumedRecord
from gateways.kafka.topic_reader import POLL, Partition, be_patient
from gateways.kafka.topic_reader import ConsumerLike as PlainConsumer

ENOUGH: Final = 1000
ENOUGH_BYTES: Final = 1024 * 1024
"""Records of a partition, and bytes of them, that wait: from where on no more of it are fetched."""


class ConsumerLike(PlainConsumer, Protocol):
    """What is needed of `workers.Consumer`."""

    def pause(self, partitions: Sequence[Partition]) -> None: ...
    def resume(self, partitions: Sequence[Partition]) -> None: ...


class MergingReader:
    """Yields the records of all partitions, each from its offset up to its end: in their order within a partition, and
    across partitions the one with the earliest time next.

    Of each partition about ENOUGH records or ENOUGH_BYTES are in memory, and what one more poll brings.
    """

    def __init__(self, consumer: ConsumerLike, first: Mapping[Partition, int], end: Mapping[Partition, int]) -> None:
        self._consumer = consumer
        self._first = {p: at for p, at in first.items() if at < end[p]}
        self._end = end
        self._unread = set(self._first)
        """Partitions of which more may come."""
        self._waiting: dict[Partition, deque[ConsumedRecord]] = {p: deque() for p in self._first}
        self._bytes = dict.fromkeys(self._first, 0)
        """Of the values that wait."""
        self._paused: set[Partition] = set()

    def __iter__(self) -> Iterator[ConsumedRecord]:
        """Raises GatewayError: nothing came for `topic_reader.PATIENCE` seconds."""
        if not self._first:
            return
        self._consumer.assign(self._first)
        heads: list[tuple[int, Partition]] = []
        lacking = set(self._first)
        while lacking or heads:
            for partition in self._fill(lacking):
                heapq.heappush(heads, (self._waiting[partition][0].timestamp_ms, partition))
            lacking = set()
            if not heads:
                return
            _, partition = heads[0]
            waiting = self._waiting[partition]
            record = waiting.popleft()
            self._bytes[partition] -= len(record.value or b"")
            yield record
            if waiting:
                heapq.heapreplace(heads, (waiting[0].timestamp_ms, partition))
            else:
                heapq.heappop(heads)
                lacking = {partition}

    def _fill(self, lacking: set[Partition]) -> set[Partition]:
        """Read until each partition of `lacking` has a record or is at its end; return those that have one."""
        changed_at = time.monotonic()
        while empty := {p for p in lacking & self._unread if not self._waiting[p]}:
            self._hold_back()
            if self._poll():
                changed_at = time.monotonic()
            for partition in empty:
                # Markers of transactions and deleted records are no records: only the consumer knows that it passed.
                if not self._waiting[partition] and self._consumer.position(partition) >= self._end[partition]:
                    self._unread.discard(partition)
            be_patient(changed_at, sorted(empty))
        return {p for p in lacking if self._waiting[p]}

    def _hold_back(self) -> None:
        full = {p for p in self._unread if len(self._waiting[p]) >= ENOUGH or self._bytes[p] >= ENOUGH_BYTES}
        full |= set(self._first) - self._unread
        if more := full - self._paused:
            self._consumer.pause(sorted(more))
        if less := self._paused - full:
            self._consumer.resume(sorted(less))
        self._paused = full

    def _poll(self) -> int:
        found = self._consumer.poll(POLL)
        for record in found:
            partition = (record.topic, record.partition)
            end = self._end[partition]
            if record.offset < end:
                self._waiting[partition].append(record)
                self._bytes[partition] += len(record.value or b"")
            if record.offset >= end - 1:
                self._unread.discard(partition)
        return len(found)
