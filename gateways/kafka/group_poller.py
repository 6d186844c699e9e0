"""The thread that reads a topic as a member of a group: each record on one node, offsets stored once all is done.

Rebalances have one rule each way. What was handed over of a partition that is lost is dropped, unless it was delivered
already; whoever gets the partition reads it from the stored offset. And what this process has delivered it does not
deliver again, when the partition comes back. So only what a node had delivered and not stored can come twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import attrs

from gateways.kafka.client_metrics import ClientFigures
from gateways.kafka.cluster import Cluster
from gateways.kafka.poller import (
    CHUNK_BYTES,
    CHUNK_RECORDS,
    FIRST_BACKOFF,
    LONGEST_BACKOFF,
    POLL_TIMEOUT,
    Ended,
    Partition,
    UnknownTopicError,
)
from gateways.kafka.reader_figures import LOOK_INTERVAL, ReaderFigures
from gateways.kafka.records import ConsumedRecord

log = logging.getLogger("gateways.kafka")

STORE_INTERVAL: Final = 0.1
"""Seconds between two commits: what is delivered within them comes twice when the node is killed."""
FULL_POLL: Final = 0.05
"""Seconds of a poll that only keeps the membership."""
LAST_COMMIT: Final = 2.0
"""Seconds that the last commit may take."""


class MemberLike(Protocol):
    """What the poller needs of `stream_consumer.StreamConsumer`."""

    def partitions(self, topic: str) -> list[int]: ...
    def identity(self, topic: str) -> object: ...
    def join(self) -> None: ...
    def owned(self) -> frozenset[Partition]: ...
    def poll(self, timeout: float, *, paused: bool) -> list[ConsumedRecord]: ...
    def position(self, partition: Partition) -> int: ...
    def highwater(self, partition: Partition) -> int | None: ...
    def latest_ends(self, partitions: Sequence[Partition]) -> Mapping[Partition, int]: ...
    def figures(self) -> ClientFigures: ...
    def store(
        self, offsets: Mapping[Partition, int], failed: Callable[[Mapping[Partition, int], Exception], None]
    ) -> None: ...
    def store_now(self, offsets: Mapping[Partition, int], timeout: float) -> None: ...
    @property
    def connected(self) -> bool: ...
    def close(self) -> None: ...


class Progress:
    """How far this process is with the partitions of one topic, whoever else read them meanwhile. A topic that is made
    again has a new one."""

    def __init__(self) -> None:
        self.delivered: dict[Partition, int] = {}
        """The offset behind the last record that was taken for delivery; the Trio thread's."""
        self.done: dict[Partition, int] = {}
        """The offset up to which everything is done with, for the group; written by the Trio thread."""


class Membership:
    """What one consumer holds; the listener of its group. Any thread."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress or Progress()
        self.tenure = 0
        """Counts losses."""
        self.over = False
        self._lost_at: dict[Partition, int] = {}

    def assigned(self, partitions: Sequence[Partition]) -> None:
        """These are ours; the poller sees it by itself."""

    def revoked(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """These go to others; return how far they need not read."""
        self.lost(partitions)
        done = self.progress.done
        return {partition: done[partition] for partition in partitions if partition in done}

    def lost(self, partitions: Sequence[Partition]) -> None:
        """These are others' from now on."""
        tenure = self.tenure + 1
        for partition in partitions:
            self._lost_at[partition] = tenure
        self.tenure = tenure

    def has_lost(self, partition: Partition, tenure: int) -> bool:
        """Tell whether `partition` was lost since `tenure`."""
        return self.over or self._lost_at.get(partition, 0) > tenure


@attrs.frozen
class Handed:
    """Records on their way to the Trio thread."""

    records: list[ConsumedRecord]
    membership: Membership
    tenure: int
    progress: Progress


class GroupPoller:
    """Everything here runs in the poller's thread but `abort`. A `bridge.Poller` towards the bridge.

    Attributes:
      figures: how far this node is behind in its share, and how its client fares.
      owned: this node's share, as of the last poll.
      on_joined: called once, when it has got one.
    """

    def __init__(
        self,
        name: str,
        topic: str,
        open_consumer: Callable[[Membership], MemberLike],
        cluster: Cluster,
        hand_over: Callable[[Any, Any], bool],
    ) -> None:
        """`hand_over` waits a moment for room and returns whether there was some."""
        self.beat = time.monotonic()
        self.doing = "starting"
        self.name = name
        self.figures = ReaderFigures(name)
        self.owned: frozenset[Partition] = frozenset()
        self.received = 0
        self.rebuilds = 0
        self.progress = Progress()
        self.on_joined: Callable[[], None] | None = None
        self._topic = topic
        self._open_consumer = open_consumer
        self._cluster = cluster
        self._hand_over = hand_over
        self._consumer: MemberLike | None = None
        self._membership = Membership()
        self._identity: object = None
        self._known = False
        self._backlog: deque[Handed] = deque()
        self._stored: dict[Partition, int] = {}
        self._next_store = self._next_look = 0.0
        self._halt = threading.Event()
        self._backoff = FIRST_BACKOFF
        self._away = False
        self._told = ""
        """Why it was replaced last, while that goes on."""

    def abort(self) -> None:
        """Store what is done with, leave the group, end soon. Any thread."""
        self._halt.set()

    def successor(self) -> GroupPoller:
        """Return a poller in the place of this one, which hangs and was told to end."""
        self._membership.over = True
        other = GroupPoller(self.name, self._topic, self._open_consumer, self._cluster, self._hand_over)
        other.received, other.rebuilds = self.received, self.rebuilds + 1
        other.progress, other._identity, other.on_joined = self.progress, self._identity, self.on_joined
        other.figures = self.figures
        return other

    def break_off(self) -> None:
        """Let the call end in which the thread hangs, if that is possible. Blocks: in a thread of its own."""
        if self._consumer is not None:
            self._consumer.close()

    def _alive(self, doing: str) -> None:
        self.doing = doing
        self.beat = time.monotonic()

    def run(self) -> None:
        """Serve until told to end."""
        while not self._halt.is_set():
            consumer: MemberLike | None = None
            self._membership = Membership(self.progress)
            self._alive("connecting")
            try:
                self._consumer = consumer = self._open_consumer(self._membership)
                self._read(consumer)
            except Ended:
                return
            except UnknownTopicError as exc:
                log.debug("Kafka consumer %s waits: %s", self.name, exc)
            except Exception as exc:
                self._report(exc, opened=consumer is not None)
            finally:
                self._end(consumer)
            self._alive("waiting to connect")
            self._halt.wait(self._backoff)
            self._backoff = min(self._backoff * 2, LONGEST_BACKOFF)

    def _end(self, consumer: MemberLike | None) -> None:
        """Store what is done with, leave the group."""
        self._alive("leaving its group")
        membership = self._membership
        self._consumer = None
        self._backlog.clear()
        if consumer is not None:
            offsets = self._to_store()
            if offsets and consumer.connected:
                consumer.store_now(offsets, LAST_COMMIT)
            consumer.close()
        membership.over = True
        self.owned = frozenset()
        self._stored = {}
        self.figures.closed()

    def _report(self, exc: Exception, *, opened: bool) -> None:
        text = " ".join(f"{type(exc).__name__}: {exc}".split())
        if self._consumer is not None:
            self.figures.failed(self._consumer)
        self.rebuilds += opened
        reason = self._cluster.probe()
        if reason is None and opened and not self._away and text != self._told:
            self._told = text  # a right that it lacks is missing the next time as well
            log.warning("Kafka consumer %s is replaced: %s", self.name, text)
        if not opened or reason is not None:
            self._away = True
            self._cluster.away(self.name, reason or text)

    def _read(self, consumer: MemberLike) -> None:
        self._find_topic(consumer)
        consumer.join()
        self._away = False
        self._cluster.back(self.name)
        while True:
            self._alive("waiting for records")
            full = bool(self._backlog)
            records = consumer.poll(FULL_POLL if full else POLL_TIMEOUT, paused=full)
            if self._halt.is_set():
                raise Ended
            self._note_owned(consumer)
            if records:
                self._backoff, self._told = FIRST_BACKOFF, ""
                self._sort_in(records)
            self._alive("handing over")
            while self._backlog and self._hand_over(self, self._backlog[0]):
                self._note_handed(self._backlog.popleft().records)
            self._store(consumer)
            if time.monotonic() >= self._next_look:
                self._look_after(consumer)

    def _find_topic(self, consumer: MemberLike) -> None:
        self._alive("looking for partitions")
        if not consumer.partitions(self._topic):
            self._miss()
            raise UnknownTopicError(f"there is no topic {self._topic}")
        identity = consumer.identity(self._topic)
        if self._identity is not None and identity is not None and identity != self._identity:
            log.warning("Kafka topic %s was deleted and made again: it is read from its beginning", self._topic)
            self.progress = self._membership.progress = Progress()
        self._identity, self._known = identity, True

    def _miss(self) -> None:
        """Have the topic made; again, if it was there."""
        if self._known:
            self._known = False
            self._cluster.forget(self._topic)
        else:
            self._cluster.want(self._topic)

    def _note_owned(self, consumer: MemberLike) -> None:
        owned = consumer.owned()
        if owned == self.owned:
            return
        for partition in self.owned - owned:
            # It may come back when others are further: what was done with before is not stored again.
            self._stored.pop(partition, None)
        for partition in owned - self.owned:
            self._stored[partition] = self.progress.done.get(partition, 0)
        self.owned = owned
        if self.on_joined is not None and owned:
            hook, self.on_joined = self.on_joined, None
            hook()

    # Records

    def _sort_in(self, records: list[ConsumedRecord]) -> None:
        """Queue records in lists of bounded size. Those of a partition that was lost while they were fetched are left
        out: the tenure is looked at behind the fetch."""
        tenure, start, size = self._membership.tenure, 0, 0
        mine = [record for record in records if (record.topic, record.partition) in self.owned]
        for number, record in enumerate(mine):
            size += len(record.value or b"")
            if size >= CHUNK_BYTES or number - start + 1 >= CHUNK_RECORDS:
                self._backlog.append(Handed(mine[start : number + 1], self._membership, tenure, self.progress))
                start, size = number + 1, 0
        if start < len(mine):
            self._backlog.append(Handed(mine[start:], self._membership, tenure, self.progress))

    def _note_handed(self, records: list[ConsumedRecord]) -> None:
        self.received += len(records)
        for partition, timestamp_ms in {(r.topic, r.partition): r.timestamp_ms for r in records}.items():
            self.figures.lag.handed(partition, timestamp_ms)

    # Offsets

    def _to_store(self) -> dict[Partition, int]:
        done = self.progress.done
        found = {p: done.get(p, 0) for p in self.owned}
        return {p: offset for p, offset in found.items() if offset > self._stored.get(p, 0)}

    def _store(self, consumer: MemberLike) -> None:
        now = time.monotonic()
        if now < self._next_store:
            return
        self._next_store = now + STORE_INTERVAL
        if offsets := self._to_store():
            self._stored.update(offsets)
            consumer.store(offsets, self._not_stored)

    def _not_stored(self, offsets: Mapping[Partition, int], exc: Exception) -> None:
        """Kafka did not take offsets: they are tried again, if they are still ours."""
        log.debug("Kafka consumer %s: offsets are not stored: %s", self.name, exc)
        for partition in offsets:
            if partition in self.owned:
                self._stored[partition] = min(self._stored.get(partition, 0), offsets[partition] - 1)

    # Supervision

    def _measure(self, consumer: MemberLike) -> None:
        """See how far this node is behind: what was handed over and is not done with counts."""
        done, positions = self.progress.done, {}
        for partition in self.owned:
            self._alive("asking for its position")
            positions[partition] = done[partition] if partition in done else consumer.position(partition)
        if self._backlog:
            self._alive("asking for the ends of partitions")
            self.figures.look_ahead(consumer, positions)
        else:
            self.figures.look(consumer, positions, {p: consumer.highwater(p) for p in positions})

    def _look_after(self, consumer: MemberLike) -> None:
        self._next_look = time.monotonic() + LOOK_INTERVAL
        self._measure(consumer)
        if not consumer.connected:
            if not self._away and (reason := self._cluster.probe()) is not None:
                self._away = True
                self._cluster.away(self.name, reason)
        elif self._away:
            self._away = False
            self._cluster.back(self.name)
        if not consumer.partitions(self._topic):
            self._miss()
            raise UnknownTopicError(f"there is no topic {self._topic} any more")
        identity = consumer.identity(self._topic)
        if self._identity is not None and identity is not None and identity != self._identity:
            raise UnknownTopicError(f"topic {self._topic} is another one now")
        self._identity = identity or self._identity
