"""The thread of a reader: one consumer after the other, Kafka being away, and records in lists of bounded size.

What is read, and from where on, say `poller` (topics as a whole) and `group_poller` (a node's share of a topic);
`watchdog` looks after the thread, `handover` brings the records to the Trio thread.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Final, Generic, Protocol, TypeVar

from gateways.kafka.cluster import Cluster, one_line
from gateways.kafka.lag import Partition
from gateways.kafka.reader_figures import Measured, ReaderFigures
from gateways.kafka.records import ConsumedRecord

log = logging.getLogger("gateways.kafka")

CHUNK_BYTES: Final = 128 * 1024
CHUNK_RECORDS: Final = 256
"""What the Trio thread handles before other tasks get their turn."""
POLL_TIMEOUT: Final = 0.2
FIRST_BACKOFF: Final = 0.1
LONGEST_BACKOFF: Final = 5.0


class ReaderConsumer(Measured, Protocol):
    """What every reader needs of its consumer."""

    def partitions(self, topic: str) -> list[int]: ...
    def position(self, partition: Partition) -> int: ...
    def highwater(self, partition: Partition) -> int | None: ...
    @property
    def connected(self) -> bool: ...
    def close(self) -> None: ...


AnyConsumer = TypeVar("AnyConsumer", bound=ReaderConsumer)


class Ended(Exception):
    """The reader was told to end."""


class UnknownTopicError(Exception):
    """A topic does not exist, or not yet."""


class ReaderThread(ABC, Generic[AnyConsumer]):
    """A `watchdog.Worker`. Everything here runs in the thread but `abort` and `break_off`.

    Attributes:
      figures: how far what was handed over is behind Kafka, and how fetches fare.
      received: records that were handed over.
      rebuilds: consumers that were replaced.
    """

    def __init__(self, name: str, cluster: Cluster) -> None:
        """`name` stands in logs, and in what the cluster says."""
        self.beat = time.monotonic()
        self.doing = "starting"
        self.name = name
        self.figures = ReaderFigures(name)
        self.received = 0
        self.rebuilds = 0
        self._cluster = cluster
        self._consumer: AnyConsumer | None = None
        self._halt = threading.Event()
        self._backoff = FIRST_BACKOFF
        self._away = False

    def abort(self) -> None:
        """End soon, in order. Any thread."""
        self._halt.set()

    def break_off(self) -> None:
        """Let the call end in which the thread hangs, if that is possible. Blocks: in a thread of its own."""
        if (consumer := self._consumer) is not None:
            consumer.close()  # kafka-python's endless loop over a batch that it cannot read ends with that

    def run(self) -> None:
        """Serve until told to end."""
        while not self._halt.is_set():
            consumer: AnyConsumer | None = None
            self._alive("connecting")
            try:
                self._consumer = consumer = self._open()
                self._read(consumer)
            except Ended:
                return
            except UnknownTopicError as exc:
                log.debug("Kafka consumer %s waits: %s", self.name, exc)
            except Exception as exc:
                if consumer is not None:
                    self.figures.failed(consumer)
                self._report(exc, opened=consumer is not None)
            finally:
                self._consumer = None
                self.figures.closed()
                self._close(consumer)
            self._alive("waiting to connect")
            self._halt.wait(self._backoff)
            self._backoff = min(self._backoff * 2, LONGEST_BACKOFF)

    # What a reader does in its own way

    @abstractmethod
    def _open(self) -> AnyConsumer:
        """Return a new consumer."""

    @abstractmethod
    def _read(self, consumer: AnyConsumer) -> None:
        """Read until something is raised: Ended; UnknownTopicError: another consumer tries again; or what went wrong.
        Call `_is_well` when records come."""

    @abstractmethod
    def _close(self, consumer: AnyConsumer | None) -> None:
        """Put away what belongs to a consumer, and close it; None: there is none, it could not be opened."""

    def _is_news(self, text: str) -> bool:
        """Tell whether it is to be logged that the consumer is replaced because of `text`."""
        return True

    def _remedy(self, exc: Exception) -> str:
        """Return what ends the line about such an error: what somebody can do; empty when nobody can tell."""
        return ""

    # What all of them need

    def _alive(self, doing: str) -> None:
        self.doing = doing
        self.beat = time.monotonic()

    def _is_well(self) -> None:
        self._backoff = FIRST_BACKOFF

    def _end_if_told(self) -> None:
        if self._halt.is_set():
            raise Ended

    def _take_over(self, other: ReaderThread[AnyConsumer]) -> None:
        """Go on counting where `other` stopped, which hangs and was told to end."""
        self.figures, self.received, self.rebuilds = other.figures, other.received, other.rebuilds + 1

    def _report(self, exc: Exception, *, opened: bool) -> None:
        text = one_line(exc)
        self.rebuilds += opened
        reason = self._cluster.probe()
        if reason is None and opened and not self._away and self._is_news(text):
            log.warning("Kafka consumer %s is replaced: %s%s", self.name, text, self._remedy(exc))
        if not opened or reason is not None:
            self._note_away(reason or text)

    def _note_away(self, reason: str) -> None:
        self._away = True
        self._cluster.away(self.name, reason)

    def _note_back(self) -> None:
        self._away = False
        self._cluster.back(self.name)

    def _look_for_kafka(self, consumer: AnyConsumer) -> None:
        if consumer.connected:
            if self._away:
                self._note_back()
        # No connection stands: that is normal for a moment (an idle one was closed), so ask the servers.
        elif not self._away and (reason := self._cluster.probe()) is not None:
            self._note_away(reason)

    def _note_handed(self, records: Sequence[ConsumedRecord]) -> dict[Partition, ConsumedRecord]:
        """Count records that were handed over; return the last one of each partition."""
        self.received += len(records)
        last = {(record.topic, record.partition): record for record in records}
        for partition, record in last.items():
            self.figures.lag.handed(partition, record.timestamp_ms)
        return last

    @staticmethod
    def _is_other_topic(known: object, now: object) -> bool:
        """Tell whether a topic was made again, from what told it from others of its name and what does now; None:
        nobody knows."""
        return known is not None and now is not None and known != now


def chunks(records: list[ConsumedRecord]) -> Iterator[tuple[int, list[ConsumedRecord]]]:
    """Cut records into lists of bounded size (a single record may be larger); yield them, each behind the index of its
    first record."""
    start = size = 0
    for number, record in enumerate(records):
        size += len(record.value or b"")
        if size >= CHUNK_BYTES or number - start + 1 >= CHUNK_RECORDS:
            yield start, records[start : number + 1]
            start, size = number + 1, 0
    if start < len(records):
        yield start, records[start:]
