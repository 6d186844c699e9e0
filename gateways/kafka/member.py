"""The thread of one member of a consumer group: it reads, and stores what was processed [K14].

A chunk of records is handed over, and the next one is asked for when all of it was processed; until then the consumer
is polled with its partitions paused, so that it remains a member however long the records take. Offsets are stored by
this thread between two polls, and by kafka-python's own right before a partition goes to another member.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

from gateways.kafka.client_metrics import ClientFigures
from gateways.kafka.cluster import Cluster, one_line
from gateways.kafka.lag import Behind, Partition
from gateways.kafka.member_progress import Progress, Taken
from gateways.kafka.reader_figures import ReaderFigures
from gateways.kafka.reader_thread import FIRST_BACKOFF, LONGEST_BACKOFF, POLL_TIMEOUT
from gateways.kafka.reading import Archived, JsonReader, UnreadableError
from gateways.kafka.records import ConsumedRecord
from mqtt_trio.errors import GatewayError

log = logging.getLogger("gateways.kafka")

COMMIT_TIMEOUT: Final = 5.0
"""Seconds that one attempt to store offsets takes at most."""
ATTEND_INTERVAL: Final = 1.0
"""Seconds between two polls that only keep the membership, while records are being processed."""
ATTEND_TIMEOUT: Final = 0.05
LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks at whether Kafka is still there."""


class MemberConsumerLike(Protocol):
    """What the member needs of `member_consumer.MemberConsumer`."""

    def missing(self) -> list[str]: ...
    def begin_at_end(self) -> None: ...
    def join(self) -> None: ...
    def poll(self, timeout: float, *, paused: bool) -> list[ConsumedRecord]: ...
    def commit(self, offsets: Mapping[Partition, int], timeout: float) -> None: ...
    def standing(self) -> tuple[Mapping[Partition, int], Mapping[Partition, int | None]]: ...
    def latest_ends(self, partitions: Sequence[Partition]) -> Mapping[Partition, int]: ...
    def figures(self) -> ClientFigures: ...
    @property
    def connected(self) -> bool: ...
    def close(self) -> None: ...


class Refusals(Protocol):
    """Tells exceptions apart; `member_consumer` itself."""

    def is_denial(self, error: BaseException) -> bool: ...
    def is_rejoin(self, error: BaseException) -> bool: ...


class Member:
    """See the module. `run` is the thread's; `assigned`, `revoked` and `lost` are called by kafka-python's thread; the
    others by any.

    Attributes:
      error: why the thread ended although nobody asked it to; None: it did not.
      commits: how often offsets were stored.
      figures: how its client fares.
    """

    def __init__(
        self,
        name: str,
        open_consumer: Callable[[Member], MemberConsumerLike],
        refusals: Refusals,
        cluster: Cluster,
        *,
        from_end: bool = False,
        commit_interval: float = 0.0,
    ) -> None:
        """`from_end`: a group without offsets begins at the ends of its topics; `commit_interval`: seconds between two
        commits at most, 0: each report is stored at once."""
        self.name = name
        self.error: GatewayError | None = None
        self.commits = 0
        self.figures = ReaderFigures(name)
        self.on_records: Callable[[list[Taken]], None] = lambda records: None
        self.read: Callable[[ConsumedRecord], Archived] = JsonReader().read
        """May block, for a schema registry; the thread calls it."""
        self.on_stored: Callable[[], None] = lambda: None
        """Called by the thread when `stored_up_to` rose."""
        self.stored_up_to = 0
        """All reports up to this number are stored, or cannot be any more because their partitions went away."""
        self._open_consumer = open_consumer
        self._refusals = refusals
        self._cluster = cluster
        self._from_end = from_end
        self._commit_interval = commit_interval
        self._commit_at = 0.0
        self._progress = Progress()
        self._lock = self._progress.lock
        self._halt = False
        self._halt_by = 0.0
        self._attend_at = self._look_at = 0.0
        self._backoff = FIRST_BACKOFF
        self._said_missing = False

    # --- any thread

    def owns(self, taken: Taken) -> bool:
        """Tell whether the partition of a record has been this member's ever since the record was read."""
        return self._progress.epoch(taken.record) == taken.epoch

    def report(self, records: Iterable[Taken]) -> int:
        """These were processed, in their order; return the number that `stored_up_to` reaches once that is stored."""
        return self._progress.report(records)

    def give_up(self, count: int) -> None:
        """So many records will not be processed here: their partitions went away."""
        self._progress.give_up(count)

    def lag(self) -> dict[Partition, Behind]:
        """Return how far this member is behind in each of its partitions, as of the last second."""
        return self.figures.lag.behind(self._progress.waiting())

    def finish(self, limit: float) -> None:
        """Store what was reported within `limit` seconds, leave the group, end."""
        with self._lock:
            self._halt_by = min(self._halt_by, time.monotonic() + limit) if self._halt else time.monotonic() + limit
            self._halt = True
            self._lock.notify_all()

    # --- kafka-python's thread

    def assigned(self, partitions: Sequence[Partition]) -> None:
        """These are this member's now."""
        self._progress.assigned(partitions)
        log.debug("Kafka consumer %s: it has %s now", self.name, sorted(partitions))

    def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, int]:
        """These go to other members; return the offsets to store of them first."""
        offsets, _ = self._progress.take(partitions)
        self.lost(partitions)
        return offsets

    def lost(self, partitions: Sequence[Partition]) -> None:
        """Other members may have these already."""
        self._progress.lost(partitions)
        log.debug("Kafka consumer %s: %s went to other members", self.name, sorted(partitions))

    # --- the thread

    def run(self) -> None:
        """Serve until told to end, or until Kafka refuses what the member is for."""
        while not self._halt:
            consumer: MemberConsumerLike | None = None
            try:
                consumer = self._open_consumer(self)
                if self._begin(consumer):
                    self._serve(consumer)
                    return
            except Exception as exc:
                if self._refusals.is_denial(exc):
                    text = f"Kafka consumer {self.name} is refused: {one_line(exc)}"
                    self.error = GatewayError(text, retriable=False)
                    return
                if consumer is not None:
                    self.figures.failed(consumer)
                self._report(exc, opened=consumer is not None)
            finally:
                self.figures.closed()
                if consumer is not None:
                    self._store_last(consumer)
                    consumer.close()
                    self.lost(self._progress.partitions)
            with self._lock:
                self._lock.wait_for(lambda: self._halt, self._backoff)
            self._backoff = min(self._backoff * 2, LONGEST_BACKOFF)

    def _begin(self, consumer: MemberConsumerLike) -> bool:
        """Join the group; False: a topic is not there yet."""
        if missing := consumer.missing():
            if not self._said_missing:
                self._said_missing = True
                names = ", ".join(missing)
                log.warning("Kafka consumer %s waits for topics that do not exist, or not for it: %s", self.name, names)
            return False
        self._cluster.back(self.name)
        if self._from_end:
            consumer.begin_at_end()
        consumer.join()
        return True

    def _report(self, exc: Exception, *, opened: bool) -> None:
        text = one_line(exc)
        reason = self._cluster.probe()
        if opened and reason is None:
            log.warning("Kafka consumer %s is replaced: %s", self.name, text)
        else:
            self._cluster.away(self.name, reason or text)

    def _serve(self, consumer: MemberConsumerLike) -> None:
        while not self._halt:
            self._store(consumer)
            if self._progress.outstanding:
                self._attend(consumer)
            elif records := consumer.poll(POLL_TIMEOUT, paused=False):
                self._backoff = FIRST_BACKOFF
                self._cluster.back(self.name)
                self._hand_over(records)
            self._look_after(consumer)

    def _attend(self, consumer: MemberConsumerLike) -> None:
        """Wait for reports while records are being processed, and remain a member."""
        with self._lock:
            wait = max(0.0, self._attend_at - time.monotonic())
            self._lock.wait_for(lambda: self._halt or self._is_due() or not self._progress.outstanding, wait)
            if self._halt or self._is_due() or not self._progress.outstanding:
                return
        self._attend_at = time.monotonic() + ATTEND_INTERVAL
        self._hand_over(consumer.poll(ATTEND_TIMEOUT, paused=True))  # of partitions that it has just been given

    def _hand_over(self, records: Sequence[ConsumedRecord]) -> None:
        taken = []
        for record in records:
            if (epoch := self._progress.epoch(record)) is not None:
                taken.append(Taken(record, epoch, self._read(record)))  # noqa: PERF401  too long for one line
        self._progress.hand_over(taken)
        if taken:
            for partition, last in {one.partition: one.record for one in taken}.items():
                self.figures.lag.handed(partition, last.timestamp_ms)
            self.on_records(taken)

    def _read(self, record: ConsumedRecord) -> Archived | GatewayError:
        try:
            return self.read(record) if record.defect is None else UnreadableError(record.defect)
        except GatewayError as exc:
            if exc.retriable:  # the registry: another consumer reads these records again
                raise
            return exc

    def _is_due(self) -> bool:
        return self.stored_up_to < self._progress.reports and time.monotonic() >= self._commit_at

    def _store(self, consumer: MemberConsumerLike) -> None:
        """Store what was processed, when it is time."""
        if not self._is_due():
            return
        offsets, reports = self._progress.take()
        if offsets:
            try:
                consumer.commit(offsets, COMMIT_TIMEOUT)
            except Exception as exc:
                if self._refusals.is_denial(exc):
                    raise
                self._progress.put_back(offsets)
                if not self._refusals.is_rejoin(exc):
                    self._look_for_kafka(consumer, exc)
                # What the group decides meanwhile says whether it is still this member's to store.
                self._hand_over(consumer.poll(ATTEND_TIMEOUT, paused=self._progress.outstanding > 0))
                return
            self.commits += 1
            self._cluster.back(self.name)
        self._commit_at = time.monotonic() + self._commit_interval
        self.stored_up_to = reports
        self.on_stored()

    def _store_last(self, consumer: MemberConsumerLike) -> None:
        """Store what was processed before the group is left. Where the group deals out its partitions anew just then,
        that is waited for: what this member keeps of them is still its to store."""
        until = time.monotonic() + COMMIT_TIMEOUT
        until = min(until, self._halt_by) if self._halt else until
        offsets, reports = self._progress.take()
        while offsets and (limit := until - time.monotonic()) > 0 and consumer.connected:
            try:
                consumer.commit(offsets, limit)
            except Exception as exc:
                self._progress.put_back(offsets)
                if not self._refusals.is_rejoin(exc) or not self._goes_on(consumer):
                    log.debug("Kafka consumer %s: offsets are not stored at the end: %s", self.name, exc)
                    return
                offsets, reports = self._progress.take()
            else:
                self.commits += 1
                break
        self.stored_up_to = reports
        self.on_stored()

    def _goes_on(self, consumer: MemberConsumerLike) -> bool:
        """Go on with a join; False: that fails. What is read is for whoever comes next."""
        try:
            consumer.poll(ATTEND_TIMEOUT, paused=True)
        except Exception as exc:
            log.debug("Kafka consumer %s: the group cannot be joined again at the end: %s", self.name, exc)
            return False
        return True

    def _look_after(self, consumer: MemberConsumerLike) -> None:
        if time.monotonic() < self._look_at:
            return
        pause, (positions, ends) = LOOK_INTERVAL, consumer.standing()
        if self._progress.outstanding:  # partitions are paused: no fetch tells how much comes meanwhile
            pause = self.figures.look_ahead(consumer, positions)
        else:
            self.figures.look(consumer, positions, ends)
        self._look_at = time.monotonic() + pause
        if consumer.connected:
            self._cluster.back(self.name)
        else:
            self._look_for_kafka(consumer, None)

    def _look_for_kafka(self, consumer: MemberConsumerLike, exc: Exception | None) -> None:
        """Something failed, or no connection stands, which is normal for a moment: ask the servers."""
        if (reason := self._cluster.probe()) is not None:
            self._cluster.away(self.name, reason)
        elif exc is not None:
            log.debug("Kafka consumer %s: %s", self.name, exc)
