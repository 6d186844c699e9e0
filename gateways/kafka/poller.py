"""The thread that reads topics as a whole: all partitions by manual assignment, a group at most to store offsets in.

Positions live here, so a consumer that fails or stalls is replaced by one that goes on at the same offsets.
What this thread has in common with that of other readers is in `reader_thread`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Literal, Protocol, TypeAlias

import attrs

from gateways.kafka.cluster import Cluster
from gateways.kafka.lag import Partition as Partition
from gateways.kafka.reader_figures import LOOK_INTERVAL
from gateways.kafka.reader_thread import POLL_TIMEOUT, ReaderConsumer, ReaderThread, UnknownTopicError, chunks
from gateways.kafka.records import ConsumedRecord

log = logging.getLogger("gateways.kafka")

From: TypeAlias = Literal["end", "beginning"] | Mapping[int, int]
"""Where to begin: or at a checkpoint, an offset for each partition. Partitions that it does not name came to be since:
they are read from their beginning. Of an empty one, from the end."""
Assignment: TypeAlias = tuple[str, From]
Item: TypeAlias = list[ConsumedRecord] | Callable[[], None]

BEGINNING: Final = -1
STALL_TIMEOUT: Final = 30.0
"""Seconds without a record although Kafka has some, after which the consumer is replaced."""
COMMIT_NOTE: Final = "mqtt-trio "
"""What is stored with an offset: this and the offset. Tools that move an offset leave the note as it is, or away."""


@attrs.frozen
class Began:
    """Where reading a partition began that is not read from its beginning."""

    start: int
    end: int
    """Of the partition at the start: what lies before it was written while nobody read."""
    missing: int = 0
    """Records that Kafka deleted before they were read."""
    moved: bool = False
    """Somebody has moved the group's offset: it counts."""
    another: bool = False
    """The checkpoint is of an earlier topic of that name."""


class ConsumerLike(ReaderConsumer, Protocol):
    """What the poller needs of `workers.Consumer`."""

    def identity(self, topic: str) -> str | None: ...
    def first_offsets(self, partitions: Sequence[Partition]) -> Mapping[Partition, int]: ...
    def end_offsets(self, partitions: Sequence[Partition]) -> Mapping[Partition, int]: ...
    def assign(self, offsets: Mapping[Partition, int]) -> None: ...
    def poll(self, timeout: float) -> list[ConsumedRecord]: ...
    def committed(self, partitions: Sequence[Partition]) -> Mapping[Partition, tuple[int, str]]: ...
    def commit(self, offsets: Mapping[Partition, tuple[int, str]]) -> None: ...


class StalledError(Exception):
    """The consumer does not read what there is."""


class Poller(ReaderThread[ConsumerLike]):
    """Everything here runs in the poller's thread but `abort`, `break_off`, `successor` and `waiting`.

    Attributes:
      began: partitions that are read from a checkpoint or their end; complete when the positions are known.
      identities: topics as they were when their positions were taken: one that is made again has another identity. Set
        that of a checkpoint before the thread runs.
      on_another: handed over in front of the first record of a topic that was made again, with topic and identity.
      to_commit: offsets to store in the group; set it from any thread, it is empty again once that is done.
    """

    def __init__(
        self,
        name: str,
        open_consumer: Callable[[], ConsumerLike],
        cluster: Cluster,
        assignments: Sequence[Assignment],
        hand_over: Callable[[Poller, Item], bool],
    ) -> None:
        """`hand_over` waits a moment for room and returns whether there was some."""
        super().__init__(name, cluster)
        self.began: dict[Partition, Began] = {}
        self.to_commit: Mapping[Partition, int] = {}
        self.on_positions_known: Callable[[], None] | None = None
        self.on_caught_up: Callable[[], None] | None = None
        self._open_consumer = open_consumer
        self._assignments = dict(assignments)
        self._hand_over = hand_over
        self._held: tuple[Sequence[ConsumedRecord], int] = ((), 0)
        """Records that are being handed over, and how many of them have been."""
        self._next: dict[Partition, int] = {}
        self._targets_changed = False
        self._gone: set[str] = set()
        self.identities: dict[str, str | None] = {}
        self.on_another: Callable[[str, str | None], None] | None = None
        self._seen: set[str] = set()
        """Topics that were there."""
        self._replaced: set[str] = set()
        """Topics that are not those of their checkpoint."""
        self._targets: dict[Partition, int] | None = None
        """Where the partitions that are read from the beginning ended at the start; those not reached yet."""
        self._progress_at = 0.0
        self._next_look = 0.0

    def successor(self) -> Poller:
        """Return a poller that goes on where this one is, which hangs and was told to end."""
        other = Poller(self.name, self._open_consumer, self._cluster, tuple(self._assignments.items()), self._hand_over)
        other._take_over(self)
        other.on_positions_known, other.on_caught_up = self.on_positions_known, self.on_caught_up
        other._next, other.identities, other._seen = dict(self._next), dict(self.identities), set(self._seen)
        other.on_another = self.on_another
        other._targets = None if self._targets is None else dict(self._targets)
        return other

    def _open(self) -> ConsumerLike:
        return self._open_consumer()

    def _close(self, consumer: ConsumerLike | None) -> None:
        self._alive("closing its consumer")
        self._held = ((), 0)
        if consumer is not None:
            consumer.close()

    def _read(self, consumer: ConsumerLike) -> None:
        self._assign(consumer)
        self._note_back()
        if self._targets is None:
            self._know_positions(consumer)
        elif self._targets_changed:
            self._targets_changed = False
            self._set_targets(consumer)
            self._look_for_targets(consumer)
        self._progress_at = time.monotonic()
        while True:
            self._alive("waiting for records")
            records = consumer.poll(POLL_TIMEOUT)
            self._end_if_told()
            if records:
                self._is_well()
                self._pass_on(records)
                self._progress_at = time.monotonic()
            if self._targets:
                self._look_for_targets(consumer)
            if time.monotonic() >= self._next_look:
                self._look_after(consumer)

    # Positions

    def _assign(self, consumer: ConsumerLike) -> None:
        """Assign all partitions, each at its next offset."""
        new: dict[Partition, From] = {}
        old: dict[Partition, int] = {}
        for topic, start in self._assignments.items():
            self._alive("looking for partitions")
            partitions = consumer.partitions(topic)
            if not partitions:
                self._miss(topic)
                raise UnknownTopicError(f"there is no topic {topic}")
            another = self._is_another(consumer, topic)
            if another:
                log.warning("Kafka topic %s was deleted and made again: it is read from its beginning", topic)
                start = self._assignments[topic] = self._begin_another(consumer, topic, start, partitions)
            self.identities[topic] = consumer.identity(topic) or self.identities.get(topic)
            self._seen.add(topic)
            grown = any(known == topic for known, _ in self._next)  # its other partitions were read before
            for number in partitions:
                if (topic, number) in self._next:
                    continue
                if grown or isinstance(start, str) or not start:
                    new[topic, number] = "beginning" if grown else start or "end"
                else:
                    old[topic, number] = start.get(number, BEGINNING)
        self._alive("asking for positions")
        if at_end := [p for p, start in new.items() if start == "end"]:
            ends = consumer.end_offsets(at_end)
            self._next.update(ends)
            self.began.update({partition: Began(end, end) for partition, end in ends.items()})
        if at_beginning := [p for p, start in new.items() if start == "beginning"]:
            self._next.update(consumer.first_offsets(at_beginning))
        if old:
            self._resume(consumer, old)
        consumer.assign(self._next)

    def _miss(self, topic: str) -> None:
        """Have `topic` made; again, if it was there."""
        if topic in self._seen and topic not in self._gone:
            self._gone.add(topic)
            self._cluster.forget(topic)
        else:
            self._cluster.want(topic)

    def _is_another(self, consumer: ConsumerLike, topic: str) -> bool:
        return self._is_other_topic(self.identities.get(topic), consumer.identity(topic))

    def _begin_another(self, consumer: ConsumerLike, topic: str, start: From, partitions: Sequence[int]) -> From:
        """Return where to begin in a topic that was made again."""
        if topic not in self._seen and not isinstance(start, str):  # since the checkpoint
            self._replaced.add(topic)
            return dict.fromkeys(partitions, BEGINNING)
        self._forget(topic)
        if self.on_another is not None:
            self._give(partial(self.on_another, topic, consumer.identity(topic)))
        return "beginning"

    def _forget(self, topic: str) -> None:
        """Forget where `topic` was read: kafka-python would go on at the end of the new one, as behind a log that was
        cut."""
        for partition in [p for p in self._next if p[0] == topic]:
            del self._next[partition]
            if self._targets and self._targets.pop(partition, None) is not None:
                self._targets_changed = True

    def _resume(self, consumer: ConsumerLike, wanted: Mapping[Partition, int]) -> None:
        """Find out where reading goes on: at the checkpoint, as far as Kafka still has that, or where somebody has
        moved the group's offset to."""
        partitions = list(wanted)
        firsts, ends = consumer.first_offsets(partitions), consumer.end_offsets(partitions)
        try:
            stored = consumer.committed(partitions)
        except Exception as exc:  # no right to read the group: then nobody has moved it
            log.debug("Kafka consumer %s: the offsets of its group cannot be read: %s", self.name, exc)
            stored = {}
        for partition, offset in wanted.items():
            committed, note = stored.get(partition, (0, ""))
            another = partition[0] in self._replaced
            moved = not another and partition in stored and note != f"{COMMIT_NOTE}{committed}"
            at = committed if moved else offset
            first, end = firsts[partition], ends[partition]
            if at > end:
                log.warning("%s-%d ends at %d, in front of the checkpoint %d: is it a new topic?", *partition, end, at)
            missing = max(0, first - at) if at != BEGINNING else 0
            start = self._next[partition] = min(max(at, first), end)
            self.began[partition] = Began(start, end, missing, moved, another)

    def _know_positions(self, consumer: ConsumerLike) -> None:
        """Once: tell that nothing will be missed from now on, and how far there is to read."""
        self._alive("asking for positions")
        self._set_targets(consumer)

        history = [p for p in self._next if self._assignments[p[0]] == "beginning"]
        ends = dict(consumer.end_offsets(history)) if history else {}
        ends.update({partition: began.end for partition, began in self.began.items()})
        self._targets = {p: end for p, end in ends.items() if end > self._next[p]}
        if self.on_positions_known is not None:
            self._give(self.on_positions_known)
        if not self._targets and self.on_caught_up is not None:
            self._give(self.on_caught_up)

    def _set_targets(self, consumer: ConsumerLike) -> None:
        history = [p for p in self._next if self._assignments[p[0]] == "beginning"]
        ends = consumer.end_offsets(history) if history else {}
        self._targets = {p: end for p, end in ends.items() if end > self._next[p]}

    def _look_for_targets(self, consumer: ConsumerLike) -> None:
        assert self._targets is not None
        for partition in [p for p, end in self._targets.items() if self._reached(consumer, p, end)]:
            del self._targets[partition]
        if not self._targets and self.on_caught_up is not None:
            self._give(self.on_caught_up)

    def _reached(self, consumer: ConsumerLike, partition: Partition, end: int) -> bool:
        self._alive("asking for its position")
        # A compacted log may end in markers that are no records: then only the consumer knows that it passed them.
        return self._next[partition] >= end or consumer.position(partition) >= end

    # Records

    def _pass_on(self, records: list[ConsumedRecord]) -> None:
        """Hand records over in lists of bounded size; an offset counts as read once its list is handed over."""
        for start, chunk in chunks(records):
            self._held = (records, start)
            self._give_records(chunk)
        self._held = ((), 0)

    def _give_records(self, records: list[ConsumedRecord]) -> None:
        self._give(records)
        for partition, last in self._note_handed(records).items():
            self._next[partition] = last.offset + 1

    def _give(self, item: Item) -> None:
        while not self._hand_over(self, item):
            self._alive("handing over")
            self._end_if_told()
            self._look_ahead()
        self._progress_at = time.monotonic()

    # Supervision

    def _look_after(self, consumer: ConsumerLike) -> None:
        """See whether the connection stands, whether records come, whether topics have grown."""
        now = time.monotonic()
        self._next_look = now + LOOK_INTERVAL
        ends = {partition: consumer.highwater(partition) for partition in self._next}
        positions = {p: self._position(consumer, p, ends[p] or 0) for p in self._next}
        self.figures.look(consumer, positions, ends)
        self._look_for_kafka(consumer)
        unread = sum(max(0, (end or 0) - positions[p]) for p, end in ends.items() if positions[p] <= self._next[p])
        if unread and now - self._progress_at > STALL_TIMEOUT:
            raise StalledError(f"no record for {STALL_TIMEOUT:.0f} s although there are {unread}")
        self._look_for_growth(consumer)
        if self.to_commit:
            offsets, self.to_commit = self.to_commit, {}
            self._commit(consumer, offsets)

    def _position(self, consumer: ConsumerLike, partition: Partition, end: int) -> int:
        """Return where reading goes on: behind the last record, or behind the markers and gaps that follow it."""
        position = self._next[partition]
        if end <= position:
            return position
        self._alive("asking for its position")
        return max(position, consumer.position(partition))

    def _look_ahead(self) -> None:
        """See how much comes while nobody takes what is held."""
        if self._consumer is not None and time.monotonic() >= self._next_look:
            self._alive("asking for the ends of partitions")
            self._next_look = time.monotonic() + self.figures.look_ahead(self._consumer, self._next)

    def waiting(self) -> Sequence[ConsumedRecord]:
        """Return records that are read and not handed over. Any thread."""
        records, start = self._held
        return records[start:]

    def _commit(self, consumer: ConsumerLike, offsets: Mapping[Partition, int]) -> None:
        """Store offsets in the group. It is for people and tools, so a failure stops nothing."""
        try:
            consumer.commit({partition: (offset, f"{COMMIT_NOTE}{offset}") for partition, offset in offsets.items()})
        except Exception as exc:
            log.debug("Kafka consumer %s: offsets are not stored: %s", self.name, exc)

    def _look_for_growth(self, consumer: ConsumerLike) -> None:
        """Read new partitions, and topics that were made again, as soon as the client knows of them.

        It asks Kafka every `metadata_max_age_ms`.
        """
        for topic in self._assignments:
            partitions = consumer.partitions(topic)
            if not partitions:
                self._miss(topic)
                continue
            self._gone.discard(topic)
            if self._is_another(consumer, topic):
                # In this consumer's hands are answers about the old topic, which would move it on in the new one.
                raise UnknownTopicError(f"topic {topic} is another one now")
            if any((topic, number) not in self._next for number in partitions):
                log.info("Kafka topic %s has grown to %d partitions", topic, len(partitions))
                self._assign(consumer)
                return
