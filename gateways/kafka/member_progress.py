"""What a member of a consumer group has: its partitions, the records that are being processed, what to store [K14].

Three threads come here. The program's says what it processed, kafka-python's which partitions come and go, and the
member's own hands records over and stores offsets. An offset is only stored for whoever had the partition when its
record was read: each assignment of a partition is an epoch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from gateways.kafka.lag import Partition
from gateways.kafka.reading import Archived
from gateways.kafka.records import ConsumedRecord
from mqtt_trio.errors import GatewayError


@attrs.frozen(eq=False)
class Taken:
    """A record that was read."""

    record: ConsumedRecord
    epoch: int
    """For which assignment of its partition."""
    archived: Archived | GatewayError
    """What it says, or why that is nothing."""

    @property
    def partition(self) -> Partition:
        """Where it lies."""
        return self.record.topic, self.record.partition


class Progress:
    """See the module. Everything may be called from any thread.

    Attributes:
      lock: held by every change; notified when something was processed or given up.
      outstanding: records that were handed over and neither processed nor given up.
      reports: how often something was processed.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.outstanding = 0
        self.reports = 0
        self._epochs: dict[Partition, int] = {}
        self._last_epoch = 0
        self._processed: dict[Partition, tuple[int, int]] = {}
        """Partition -> epoch and offset to store."""
        self._handed: list[Taken] = []
        """What was handed over since nothing was outstanding; replaced, never changed."""
        self._done: dict[Partition, int] = {}
        """Behind the last record that was processed."""

    # --- partitions

    @property
    def partitions(self) -> list[Partition]:
        """Those of this member."""
        return list(self._epochs)

    def epoch(self, record: ConsumedRecord) -> int | None:
        """Return the epoch of a record's partition; None: it is another member's."""
        return self._epochs.get((record.topic, record.partition))

    def assigned(self, partitions: Iterable[Partition]) -> None:
        """These are this member's now."""
        with self.lock:
            for partition in partitions:
                self._last_epoch += 1
                self._epochs[partition] = self._last_epoch

    def lost(self, partitions: Iterable[Partition]) -> None:
        """Other members may have these already."""
        with self.lock:
            for partition in partitions:
                self._epochs.pop(partition, None)
                self._processed.pop(partition, None)
                self._done.pop(partition, None)

    # --- records

    def hand_over(self, taken: Sequence[Taken]) -> None:
        """These are going to be processed."""
        with self.lock:
            self._handed = [*self._handed, *taken] if self.outstanding else list(taken)
            self.outstanding += len(taken)

    def report(self, records: Iterable[Taken]) -> int:
        """These were processed, in their order; return `reports`."""
        with self.lock:
            for taken in records:
                behind = taken.record.offset + 1
                self._processed[taken.partition] = (taken.epoch, behind)
                self._done[taken.partition] = behind
                self.outstanding -= 1
            if not self.outstanding:
                self._handed = []
            self.reports += 1
            self.lock.notify_all()
            return self.reports

    def give_up(self, count: int) -> None:
        """So many records will not be processed here: their partitions went away."""
        with self.lock:
            self.outstanding -= count
            self.lock.notify_all()

    def waiting(self) -> Iterator[ConsumedRecord]:
        """Yield the records that were handed over and are not processed yet."""
        with self.lock:
            handed = self._handed if self.outstanding else []
            done = dict(self._done)
        return (taken.record for taken in handed if taken.record.offset >= done.get(taken.partition, 0))

    # --- offsets

    def take(self, partitions: Iterable[Partition] | None = None) -> tuple[dict[Partition, int], int]:
        """Return the offsets to store, of some partitions or all, and up to which report they go."""
        with self.lock:
            wanted = self._processed.keys() if partitions is None else self._processed.keys() & set(partitions)
            found = {partition: self._processed.pop(partition) for partition in list(wanted)}
            return {p: at for p, (epoch, at) in found.items() if self._epochs.get(p) == epoch}, self.reports

    def put_back(self, offsets: Mapping[Partition, int]) -> None:
        """These were not stored; what was processed since then goes further."""
        with self.lock:
            for partition, at in offsets.items():
                if partition in self._epochs:
                    self._processed.setdefault(partition, (self._epochs[partition], at))
