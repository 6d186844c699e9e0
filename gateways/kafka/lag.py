"""How far readers are behind, in records and in seconds, and how evenly partitions are filled [K17]. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeAlias

import attrs

from gateways.kafka.records import ConsumedRecord

Partition: TypeAlias = tuple[str, int]

SKEW_WINDOW: Final = 60.0
"""Seconds over which what comes into each partition is compared."""
SKEW_RECORDS: Final = 10
"""Records per partition, on average, below which a window says nothing."""


@attrs.frozen
class Behind:
    """How far a reader is behind in one partition."""

    records: int
    """Records that Kafka has and that were not processed."""
    seconds: float
    """For how long the one that is processed next has waited; 0: none waits."""


@attrs.frozen
class _Seen:
    """One partition at a look of the thread that reads it."""

    position: int
    """Offset of the record that is handed over next."""
    end: int
    since: float
    """UTC seconds before which the record at `position` was not written."""
    clear_at: float
    """UTC seconds of the last look that found nothing to hand over; 0: none did."""
    clear_end: int
    """Where the partition ended then: what lies behind was written later."""


class Lag:
    """Kept by the thread that reads, which calls `handed` and `look`; anybody may ask.

    A record has waited since it was written (its timestamp), but not since before the reader had everything: a record
    that a producer kept for hours before it wrote it does not make a reader late. While the reader stands still, the
    time goes on.

    Attributes:
      skew: by topic, records that came into the busiest partition in multiples of what came into one on average, over
        the last SKEW_WINDOW; 1 is even, and stands for too little to tell.
    """

    def __init__(self, *, utc: Callable[[], float] = time.time) -> None:
        """`utc`: seconds since the epoch."""
        self.skew: Mapping[str, float] = {}
        self._utc = utc
        self._written: dict[Partition, float] = {}
        self._seen: Mapping[Partition, _Seen] = {}
        self._begin: Mapping[Partition, int] = {}
        self._began_at = utc()

    def handed(self, partition: Partition, timestamp_ms: int) -> None:
        """The last record that was handed over of a partition had this timestamp."""
        self._written[partition] = timestamp_ms / 1000

    def look(
        self, positions: Mapping[Partition, int], ends: Mapping[Partition, int | None], *, fresh: bool = True
    ) -> None:
        """Note where reading is, and where the partitions end; None: nobody knows yet.

        `fresh`: Kafka has answered just now, so where it has nothing there is nothing.
        """
        now = self._utc()
        self._seen = {p: self._see(p, position, ends.get(p), now, fresh) for p, position in positions.items()}
        if now - self._began_at >= SKEW_WINDOW or not self._begin:
            self._weigh(now)

    def _see(self, partition: Partition, position: int, end: int | None, now: float, fresh: bool) -> _Seen:
        before = self._seen.get(partition)
        clear_at, clear_end = (before.clear_at, before.clear_end) if before is not None else (0.0, 0)
        if end is None:
            end = before.end if before is not None else position
        elif end <= position and fresh:
            clear_at, clear_end = now, position
        since = max(clear_at, self._written.get(partition, 0.0))
        if since <= 0:  # nothing was read yet: it counts from the first look
            since = before.since if before is not None else now
        return _Seen(position, end, min(since, now), clear_at, clear_end)

    def _weigh(self, now: float) -> None:
        """Compare what came into the partitions of each topic since the last time."""
        came: dict[str, list[int]] = {}
        for (topic, number), seen in self._seen.items():
            begin = self._begin.get((topic, number))
            came.setdefault(topic, []).append(seen.end - begin if begin is not None else 0)
        self.skew = {
            topic: max(counts) * len(counts) / sum(counts) if sum(counts) >= SKEW_RECORDS * len(counts) else 1.0
            for topic, counts in came.items()
        }
        self._begin = {partition: seen.end for partition, seen in self._seen.items()}
        self._began_at = now

    def behind(self, waiting: Iterable[ConsumedRecord] = ()) -> dict[Partition, Behind]:
        """Return how far the reader is behind in each partition, records that it has in its hands included: `waiting`,
        in the order in which they will be processed."""
        first: dict[Partition, ConsumedRecord] = {}
        for record in waiting:
            first.setdefault((record.topic, record.partition), record)
        now = self._utc()
        found = {}
        for partition, seen in self._seen.items():
            if partition in first:
                count, since = _from(first[partition], seen)
            else:
                count, since = max(0, seen.end - seen.position), seen.since
            found[partition] = Behind(count, max(0.0, now - since) if count else 0.0)
        return found


def _from(record: ConsumedRecord, seen: _Seen) -> tuple[int, float]:
    """Return how many records there are from `record` on, and since when it waits."""
    since = record.timestamp_ms / 1000
    if record.offset >= seen.clear_end:
        since = max(since, seen.clear_at)
    return max(1, seen.end - record.offset), since if since > 0 else seen.since  # a record may have no timestamp
