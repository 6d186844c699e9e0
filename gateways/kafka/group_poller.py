"""The thread that reads a topic as a member of a group: each record on one node, offsets stored once all is done, or,
with automatic commits, once a record was taken for delivery [K16].

Rebalances have one rule each way. What was handed over of a partition that is lost is dropped, unless it was delivered
already; whoever gets the partition reads it from the stored offset. And what this process has delivered it does not
deliver again, when the partition comes back. So only what a node had delivered and not stored can come twice.

What this thread has in common with that of other readers is in `reader_thread`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import attrs

from gateways.kafka.cluster import Cluster
from gateways.kafka.lag import Partition
from gateways.kafka.reader_figures import LOOK_INTERVAL
from gateways.kafka.reader_thread import POLL_TIMEOUT, ReaderConsumer, ReaderThread, UnknownTopicError, chunks
from gateways.kafka.records import ConsumedRecord

log = logging.getLogger("gateways.kafka")

STORE_INTERVAL: Final = 0.1
"""Seconds between two commits: what is delivered within them comes twice when the node is killed."""
FULL_POLL: Final = 0.05
"""Seconds of a poll that only keeps the membership."""
LAST_COMMIT: Final = 2.0
"""Seconds that the last commit may take."""


class MemberLike(ReaderConsumer, Protocol):
    """What the poller needs of `stream_consumer.StreamConsumer`."""

    def identity(self, topic: str) -> object: ...
    def join(self) -> None: ...
    def owned(self) -> frozenset[Partition]: ...
    def poll(self, timeout: float, *, paused: bool) -> list[ConsumedRecord]: ...
    def store(
        self, offsets: Mapping[Partition, int], failed: Callable[[Mapping[Partition, int], Exception], None]
    ) -> None: ...
    def store_now(self, offsets: Mapping[Partition, int], timeout: float) -> None: ...


class Progress:
    """How far this process is with the partitions of one topic, whoever else read them meanwhile. A topic that is made
    again has a new one."""

    def __init__(self, *, automatic: bool = False) -> None:
        """`automatic`: offsets are stored whether or not what was delivered is kept."""
        self.delivered: dict[Partition, int] = {}
        """The offset behind the last record that was taken for delivery; the Trio thread's."""
        self.done: dict[Partition, int] = {}
        """The offset up to which everything is done with; written by the Trio thread."""
        self.settled = self.delivered if automatic else self.done
        """The offset that may be stored in the group."""
        self._automatic = automatic

    def fresh(self) -> Progress:
        """Return that of another topic of this name."""
        return Progress(automatic=self._automatic)


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
        settled = self.progress.settled
        return {partition: settled[partition] for partition in partitions if partition in settled}

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


class GroupPoller(ReaderThread[MemberLike]):
    """Everything here runs in the poller's thread but `abort`, `break_off` and `successor`. When it is told to end, it
    stores what is done with and leaves the group.

    Attributes:
      owned: this node's share, as of the last poll.
      on_joined: called once, when it has got one.
      mend: says, of an error, what somebody can do about it; empty when nobody can tell.
      thin: returns what of some records, those of a partition side by side, has to be handed over; the last one of each
        partition always is.
    """

    def __init__(
        self,
        name: str,
        topic: str,
        open_consumer: Callable[[Membership], MemberLike],
        cluster: Cluster,
        hand_over: Callable[[GroupPoller, Handed], bool],
    ) -> None:
        """`hand_over` waits a moment for room and returns whether there was some."""
        super().__init__(name, cluster)
        self.owned: frozenset[Partition] = frozenset()
        self.progress = Progress()
        self.on_joined: Callable[[], None] | None = None
        self.mend: Callable[[Exception], str] = lambda _: ""
        self.thin: Callable[[list[ConsumedRecord]], list[ConsumedRecord]] = list
        self._topic = topic
        self._open_consumer = open_consumer
        self._hand_over = hand_over
        self._store_interval = STORE_INTERVAL
        self._membership = Membership()
        self._identity: object = None
        self._known = False
        self._backlog: deque[Handed] = deque()
        self._stored: dict[Partition, int] = {}
        self._next_store = self._next_look = 0.0
        self._told = ""
        """Why it was replaced last, while that goes on."""

    def successor(self) -> GroupPoller:
        """Return a poller in the place of this one, which hangs and was told to end."""
        self._membership.over = True
        other = GroupPoller(self.name, self._topic, self._open_consumer, self._cluster, self._hand_over)
        other._take_over(self)
        other.progress, other._identity, other.on_joined = self.progress, self._identity, self.on_joined
        other.mend, other.thin, other._store_interval = self.mend, self.thin, self._store_interval
        return other

    def commit_automatically(self, interval: float) -> None:
        """Store, every so many seconds, what was taken for delivery; before `run`."""
        self.progress = Progress(automatic=True)
        self._store_interval = max(interval, STORE_INTERVAL)

    def _open(self) -> MemberLike:
        self._membership = Membership(self.progress)
        return self._open_consumer(self._membership)

    def _close(self, consumer: MemberLike | None) -> None:
        """Store what is done with, leave the group."""
        self._alive("leaving its group")
        membership = self._membership
        self._backlog.clear()
        if consumer is not None:
            offsets = self._to_store()
            if offsets and consumer.connected:
                consumer.store_now(offsets, LAST_COMMIT)
            consumer.close()
        membership.over = True
        self.owned = frozenset()
        self._stored = {}

    def _is_news(self, text: str) -> bool:
        told, self._told = self._told, text
        return text != told  # a right that it lacks is missing the next time as well

    def _remedy(self, exc: Exception) -> str:
        return self.mend(exc)

    def _read(self, consumer: MemberLike) -> None:
        self._find_topic(consumer)
        consumer.join()
        self._note_back()
        while True:
            self._alive("waiting for records")
            full = bool(self._backlog)
            records = consumer.poll(FULL_POLL if full else POLL_TIMEOUT, paused=full)
            self._end_if_told()
            self._note_owned(consumer)
            if records:
                self._is_well()
                self._told = ""
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
        if self._is_other_topic(self._identity, identity):
            log.warning("Kafka topic %s was deleted and made again: it is read from its beginning", self._topic)
            self.progress = self._membership.progress = self.progress.fresh()
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
            self._stored[partition] = self.progress.settled.get(partition, 0)
        self.owned = owned
        if self.on_joined is not None and owned:
            hook, self.on_joined = self.on_joined, None
            hook()

    # Records

    def _sort_in(self, records: list[ConsumedRecord]) -> None:
        """Queue records in lists of bounded size. Those of a partition that was lost while they were fetched are left
        out: the tenure is looked at behind the fetch."""
        tenure = self._membership.tenure
        mine = self.thin([record for record in records if (record.topic, record.partition) in self.owned])
        for _, chunk in chunks(mine):
            self._backlog.append(Handed(chunk, self._membership, tenure, self.progress))

    # Offsets

    def _to_store(self) -> dict[Partition, int]:
        settled = self.progress.settled
        found = {p: settled.get(p, 0) for p in self.owned}
        return {p: offset for p, offset in found.items() if offset > self._stored.get(p, 0)}

    def _store(self, consumer: MemberLike) -> None:
        now = time.monotonic()
        if now < self._next_store:
            return
        self._next_store = now + self._store_interval
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
        self._look_for_kafka(consumer)
        if not consumer.partitions(self._topic):
            self._miss()
            raise UnknownTopicError(f"there is no topic {self._topic} any more")
        identity = consumer.identity(self._topic)
        if self._is_other_topic(self._identity, identity):
            raise UnknownTopicError(f"topic {self._topic} is another one now")
        self._identity = identity or self._identity
