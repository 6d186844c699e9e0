"""Records that wait for their topic: they hold up no others, and do not wait for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Set
from typing import Final

from gateways.kafka.cluster import Cluster
from gateways.kafka.records import Record, RecordRefusedError

SETTLED_AFTER: Final = 1.0
"""Seconds that a topic must have been in trouble at least, before anything is given up: it may be being made."""


class Parking:
    """Per topic in their order. One feeder's thread only, but `all` (see there)."""

    def __init__(self, cluster: Cluster, patience: float) -> None:
        """`patience`: seconds that records wait for a topic which nobody can make or which is not for this node."""
        self.patience = patience
        self._cluster = cluster
        self._queues: dict[str, deque[Record]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __contains__(self, topic: str) -> bool:
        return topic in self._queues

    def add(self, record: Record) -> None:
        """Keep `record` until its topic is known."""
        queue = self._queues.get(record.topic)
        if queue is None:
            queue = self._queues[record.topic] = deque()
            self._cluster.want(record.topic)
        queue.append(record)

    def known(self, gone: Set[str]) -> Iterator[deque[Record]]:
        """Take out the records of topics that are known now, and not `gone` in the producer's eyes."""
        for topic in [name for name in self._queues if name not in gone and self._cluster.facts(name) is not None]:
            yield self._queues.pop(topic)

    def hopeless(self, now: float) -> Iterator[tuple[Record, RecordRefusedError]]:
        """Take out the records of topics that whoever keeps topics could not bring about for `patience` seconds, with
        what is wrong; `patient` ones stay. While Kafka is away nobody can tell, and nothing is given up."""
        if self._cluster.is_away:
            return
        for topic in list(self._queues):
            trouble = self._cluster.trouble(topic)
            if trouble is None or now - trouble.since <= max(self.patience, SETTLED_AFTER):
                continue
            queue = self._queues.pop(topic)
            if patient := deque(record for record in queue if record.patient):
                self._queues[topic] = patient
            if len(patient) == len(queue):
                continue
            error = RecordRefusedError(trouble.text, trouble.reason)
            for record in queue:
                if not record.patient:
                    yield record, error

    def all(self) -> list[Record]:
        """Return everything, per topic in order, and keep it."""
        return [record for queue in self._queues.values() for record in queue]

    def clear(self) -> None:
        """Forget everything."""
        self._queues.clear()
