"""A topic and its consumer group in memory, for tests of `Member` and `ArchiveConsumer`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence

from gateways.kafka.client_metrics import ClientFigures
from gateways.kafka.member import Member
from gateways.kafka.poller import Partition
from gateways.kafka.records import ConsumedRecord

TOPIC = "mqtt.archive"


class RejoinError(Exception):
    """The group shares its partitions out anew."""


class DeniedError(Exception):
    """This user may not."""


class MemoryGroup:
    """Partitions of one topic, the offsets that a group stored, and its members.

    A member of whom partitions are wanted gives them up in its next poll, as with Kafka.
    """

    def __init__(self, partitions: int = 1) -> None:
        self.log: list[list[bytes]] = [[] for _ in range(partitions)]
        self.stored: dict[Partition, int] = {}
        self.history: list[dict[Partition, int]] = []
        """What each commit stored."""
        self.consumers: list[MemoryConsumer] = []
        self.exists = True
        self.away = 0
        """How many consumers fail to connect."""
        self.commit_errors: list[Exception] = []
        self.poll_errors: list[Exception] = []
        self.lose = False
        """The members' partitions are taken from them without a word."""
        self.hang = threading.Event()
        self.hang.set()
        self.changed = threading.Condition()

    def open(self, member: Member) -> MemoryConsumer:
        if self.away:
            self.away -= 1
            raise OSError("nobody answers")
        return MemoryConsumer(self, member)

    def write(self, value: bytes | str, partition: int = 0) -> None:
        raw = value if isinstance(value, bytes) else json.dumps({"topic": "t", "payload": value}).encode()
        with self.changed:
            self.log[partition].append(raw)
            self.changed.notify_all()

    def is_denial(self, error: BaseException) -> bool:
        return isinstance(error, DeniedError)

    def is_rejoin(self, error: BaseException) -> bool:
        return isinstance(error, RejoinError)

    def shares(self) -> dict[MemoryConsumer, set[Partition]]:
        """Who should have what."""
        members = self.consumers
        partitions = [(TOPIC, number) for number in range(len(self.log))]
        return {m: {p for p in partitions if p[1] % len(members) == at} for at, m in enumerate(members)}


class MemoryConsumer:
    def __init__(self, group: MemoryGroup, member: Member) -> None:
        self.group = group
        self.member = member
        self.next: dict[Partition, int] = {}

    def missing(self) -> list[str]:
        return [] if self.group.exists else [TOPIC]

    def begin_at_end(self) -> None:
        if not self.group.stored:
            self.group.stored = {(TOPIC, n): len(log) for n, log in enumerate(self.group.log)}

    def join(self) -> None:
        with self.group.changed:
            self.group.consumers.append(self)
            self.group.changed.notify_all()

    def poll(self, timeout: float, *, paused: bool) -> list[ConsumedRecord]:
        group = self.group
        group.hang.wait()
        with group.changed:
            if group.poll_errors:
                raise group.poll_errors.pop()
            self._rebalance()
            found = [] if paused else self._fetch()
            if not found:
                group.changed.wait(timeout)
                self._rebalance()
                found = [] if paused else self._fetch()
        return found

    def _rebalance(self) -> None:
        group = self.group
        if group.lose:
            group.lose = False
            self.member.lost(list(self.next))
            self.next.clear()
        mine = group.shares()[self]
        if surplus := set(self.next) - mine:
            group.stored.update(self.member.revoked(sorted(surplus)))
            for partition in surplus:
                del self.next[partition]
        others = {p for consumer in group.consumers if consumer is not self for p in consumer.next}
        if new := mine - set(self.next) - others:
            self.next.update({p: group.stored.get(p, 0) for p in new})
            self.member.assigned(sorted(new))

    def _fetch(self) -> list[ConsumedRecord]:
        found = []
        for (topic, number), at in self.next.items():
            values = enumerate(self.group.log[number][at:], start=at)
            found += [ConsumedRecord(topic, number, offset, None, value, (), 1500) for offset, value in values]
            self.next[topic, number] = len(self.group.log[number])
        return found

    def commit(self, offsets: Mapping[Partition, int], timeout: float) -> None:
        if self.group.commit_errors:
            raise self.group.commit_errors.pop()
        assert set(offsets) <= set(self.next), "offsets of another member's partitions"
        self.group.stored.update(offsets)
        self.group.history.append(dict(offsets))

    def standing(self) -> tuple[dict[Partition, int], dict[Partition, int | None]]:
        return dict(self.next), dict(self.latest_ends(list(self.next)))

    def latest_ends(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        return {p: len(self.group.log[p[1]]) for p in partitions}

    def figures(self) -> ClientFigures:
        return ClientFigures(answered_at=time.monotonic())

    @property
    def connected(self) -> bool:
        return True

    def close(self) -> None:
        with self.group.changed:
            if self in self.group.consumers:
                self.group.consumers.remove(self)
            self.group.changed.notify_all()
