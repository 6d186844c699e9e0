"""A topic in memory and a group that shares it: what `GroupPoller` needs of a consumer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import attrs

from gateways.kafka.client_metrics import ClientFigures
from gateways.kafka.group_poller import Membership
from gateways.kafka.poller import Partition
from gateways.kafka.records import ConsumedRecord

TOPIC = "t"


@attrs.define
class MemoryGroup:
    """`shares`: the partitions of each member, which take effect at its next poll; `stored`: the group's offsets."""

    log: dict[Partition, list[bytes]]
    shares: dict[int, set[Partition]] = attrs.Factory(dict)
    stored: dict[Partition, int] = attrs.Factory(dict)
    commits: list[dict[Partition, int]] = attrs.Factory(list)
    refuse_commits: int = 0
    faults: list[Exception] = attrs.Factory(list)
    life: int = 0
    """How often the topic was deleted and made again."""
    opened: int = 0
    left: list[int] = attrs.Factory(list)
    held_back: int = 0
    """Polls that fetched nothing because the member was full."""

    def put(self, *values: bytes, partition: int = 0) -> None:
        self.log[TOPIC, partition] += values

    def open(self, membership: Membership) -> MemoryMember:
        self.opened += 1
        return MemoryMember(self, self.opened, membership)


class MemoryMember:
    def __init__(self, group: MemoryGroup, number: int, membership: Membership) -> None:
        self.group = group
        self.number = number
        self.at: dict[Partition, int] = {}
        self.connected = True
        self.closed = threading.Event()
        self.membership = membership
        self.failed: list[Callable[[], None]] = []

    def partitions(self, topic: str) -> list[int]:
        return sorted(number for name, number in self.group.log if name == topic)

    def identity(self, topic: str) -> object:
        return self.group.life

    def join(self) -> None:
        self.group.shares.setdefault(self.number, set(self.group.log))

    def owned(self) -> frozenset[Partition]:
        return frozenset(self.at)

    def poll(self, timeout: float, *, paused: bool) -> list[ConsumedRecord]:
        for tell in self.failed:
            tell()
        self.failed = []
        if self.group.faults:
            raise self.group.faults.pop()
        share = self.group.shares.get(self.number, set())
        if gone := self.at.keys() - share:
            self.membership.lost(sorted(gone))
            for partition in gone:
                del self.at[partition]
        for partition in share - self.at.keys():
            self.at[partition] = self.group.stored.get(partition, 0)
        found = []
        if paused:
            self.group.held_back += 1
        else:
            for partition, offset in self.at.items():
                values = self.group.log.get(partition, [])[offset:]
                found += [ConsumedRecord(*partition, offset + i, None, v, [], 0) for i, v in enumerate(values)]
                self.at[partition] = offset + len(values)
        if not found:
            self.closed.wait(min(timeout, 0.01))
        return found

    def position(self, partition: Partition) -> int:
        return self.at[partition]

    def latest_ends(self, partitions: Sequence[Partition]) -> Mapping[Partition, int]:
        return {partition: len(self.group.log[partition]) for partition in partitions}

    def figures(self) -> ClientFigures:
        return ClientFigures(answered_at=time.monotonic())

    def highwater(self, partition: Partition) -> int | None:
        return len(self.group.log[partition])

    def store(
        self, offsets: Mapping[Partition, int], failed: Callable[[Mapping[Partition, int], Exception], None]
    ) -> None:
        if self.group.refuse_commits:
            self.group.refuse_commits -= 1
            self.failed.append(lambda: failed(offsets, RuntimeError("a rebalance is going on")))
            return
        self.store_now(offsets, 0)

    def store_now(self, offsets: Mapping[Partition, int], timeout: float) -> None:
        self.group.stored.update(offsets)
        self.group.commits.append(dict(offsets))

    def close(self) -> None:
        self.closed.set()
        self.membership.lost(list(self.at))
        self.group.left.append(self.number)
        self.group.shares.pop(self.number, None)
