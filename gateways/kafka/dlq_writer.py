"""Writing the records of dead letters, and the notes about them. Blocking.

Whatever Kafka refuses of one record fails everything else that its producer holds, and the producer with it. So records
go out in one stream until something fails; what is without an outcome then goes one by one, each failure at the cost of
a new producer. Notes have a producer of their own.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import attrs

from gateways.kafka.cluster import one_line
from gateways.kafka.dlq import ID_HEADER, REDRIVEN_HEADER, DeadLetter, LostRecord
from gateways.kafka.partitions import partition_for
from gateways.kafka.records import Record
from mqtt_trio.errors import GatewayError

OUTSTANDING: Final = 1000
"""Records that Kafka has not confirmed."""
STRIKES: Final = 5
"""Failures of a target, one after the other, after which nothing more is tried there."""
Callback: TypeAlias = Callable[[Record, Any], None]


class ProducerLike(Protocol):
    """What is needed of `workers.Producer`."""

    def send(self, record: Record, partition: int, done: Callback, failed: Callback) -> None: ...


OpenProducer: TypeAlias = Callable[[], AbstractContextManager[ProducerLike]]
"""All outcomes are known when the body is left."""


@attrs.frozen
class Pending:
    """A letter whose record is to be written."""

    letter: DeadLetter
    record: LostRecord

    @property
    def timestamp_ms(self) -> int:
        """The record's, or what it would have been; whoever wrote the letter, none that Kafka reads as a command."""
        given = self.record.timestamp_ms
        return max(0, self.letter.dead_at_ms if given is None or given < 0 else given)


def redriven_record(one: Pending) -> Record:
    """Return the record of a letter as it should have been, with the letter's id."""
    record = one.record
    headers = [(name, value) for name, value in record.headers if name != ID_HEADER]
    headers.append((ID_HEADER, one.letter.id.encode()))
    partition = record.partition if record.key is None else None
    return Record(record.topic, partition, record.key, record.value, headers, one.timestamp_ms)


def note_record(topic: str, identity: str, where: str) -> Record:
    """Return the note that the record of a letter is at `where`."""
    headers = [(REDRIVEN_HEADER, where.encode())]
    return Record(topic, None, identity.encode(), None, headers, time.time_ns() // 1_000_000)


def choose_partition(record: Record, count: int) -> int:
    """Return the partition, of `count`, that a record goes to."""
    if record.key is not None:
        return partition_for(record.key, count)
    return record.partition if record.partition is not None and record.partition < count else 0


class Stream:
    """One producer and the outcomes that come from its thread."""

    def __init__(self, producer: ProducerLike, patience: float) -> None:
        """`patience`: seconds to wait for the next outcome."""
        self.outstanding = 0
        self._producer = producer
        self._patience = patience
        self._outcomes: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def send(self, record: Record, partition: int, identity: str) -> None:
        """Hand a record over."""
        self.outstanding += 1
        try:
            self._producer.send(record, partition, partial(self._done, identity), partial(self._failed, identity))
        except Exception as exc:  # an outcome like any other
            self._outcomes.put((identity, exc))

    def _done(self, identity: str, _record: Record, metadata: Any) -> None:
        self._outcomes.put((identity, f"{metadata.topic}-{metadata.partition}@{metadata.offset}"))

    def _failed(self, identity: str, _record: Record, error: Any) -> None:
        self._outcomes.put((identity, error))

    def take(self, *, wait: bool = True) -> tuple[str, str | BaseException] | None:
        """Return the next outcome: where the record is, or an error. None: not `wait`, and there is none.

        Raises:
          GatewayError: Kafka is silent.
        """
        try:
            found = self._outcomes.get(wait, self._patience)
        except queue.Empty:
            if not wait:
                return None
            raise GatewayError(
                f"Kafka has not confirmed {self.outstanding} records for {self._patience:g} s. Redrive again later: "
                "what is there by then is not written a second time",
                retriable=True,
            ) from None
        self.outstanding -= 1
        return found


class Notes:
    """Writes notes until that fails; then the next redrive has to search. Opens its producer for the first one."""

    def __init__(self, open_producer: OpenProducer, topic: str, partitions: int, patience: float) -> None:
        self.error = ""
        """Why there are no more notes."""
        self._open = open_producer
        self._topic = topic
        self._partitions = partitions
        self._patience = patience
        self._stack = ExitStack()
        self._stream: Stream | None = None

    def write(self, identity: str, where: str) -> None:
        """Note that the record of the letter `identity` is at `where`."""
        if self.error:
            return
        if self._stream is None:
            self._stream = Stream(self._stack.enter_context(self._open()), self._patience)
        record = note_record(self._topic, identity, where)
        self._stream.send(record, choose_partition(record, self._partitions), identity)
        self._settle(self._stream, OUTSTANDING)

    def close(self) -> None:
        """Wait for all outcomes, close the producer."""
        with self._stack:
            if self._stream is not None:
                self._settle(self._stream, 0)

    def _settle(self, stream: Stream, most: int) -> None:
        while stream.outstanding > most and not self.error:
            try:
                outcome = stream.take()
            except GatewayError as exc:
                self.error = str(exc)
                return
            if outcome is not None and isinstance(outcome[1], BaseException):
                self.error = one_line(outcome[1])


class Writer:
    """Writes records; a note follows each that Kafka has.

    Attributes:
      written: how many Kafka has.
      errors: how often each error came.
    """

    def __init__(
        self,
        open_producer: OpenProducer,
        sizes: Mapping[str, int],
        notes: Notes,
        patience: float,
        progress: Callable[[int], None],
    ) -> None:
        """`sizes`: partitions of each topic; `patience`: seconds without any outcome after which it gives up."""
        self.written = 0
        self.errors: Counter[str] = Counter()
        self._open = open_producer
        self._sizes = sizes
        self._notes = notes
        self._patience = patience
        self._progress = progress

    def write(self, todo: Sequence[Pending], search: Callable[[Sequence[Pending]], Mapping[str, str]]) -> None:
        """Write all of `todo`, in order; `search` returns where those without an outcome are after all.

        Raises:
          GatewayError: Kafka is silent.
        """
        left = self._stream(todo)
        if left:
            there = search(left)
            for one in left:
                if (where := there.get(one.letter.id)) is not None:
                    self._count(one.letter.id, where)
            self._singly([one for one in left if one.letter.id not in there])

    def _stream(self, todo: Sequence[Pending]) -> list[Pending]:
        """Write until something fails; return what is without a good outcome."""
        left = {one.letter.id: one for one in todo}
        is_good = True

        def take(*, wait: bool = True) -> bool:
            nonlocal is_good
            if (found := stream.take(wait=wait)) is None:
                return False
            identity, outcome = found
            if isinstance(outcome, BaseException):
                is_good = False
            else:
                del left[identity]
                self._count(identity, outcome)
            return True

        with self._open() as producer:
            stream = Stream(producer, self._patience)
            for one in todo:
                while is_good and stream.outstanding >= OUTSTANDING:
                    take()
                if not is_good:
                    break
                self._send(stream, one)
            while is_good and stream.outstanding:
                take()
        while take(wait=False):  # what the end of the producer brought
            pass
        return list(left.values())

    def _singly(self, todo: Sequence[Pending]) -> None:
        strikes: Counter[str] = Counter()
        with ExitStack() as stack:
            stream: Stream | None = None
            for one in todo:
                topic = one.record.topic
                if strikes[topic] >= STRIKES:
                    self._fail(f"not tried, because {STRIKES} others failed on {topic} before")
                    continue
                if stream is None:
                    stream = Stream(stack.enter_context(self._open()), self._patience)
                self._send(stream, one)
                found = stream.take()
                if found is not None and not isinstance(outcome := found[1], BaseException):
                    strikes[topic] = 0
                    self._count(one.letter.id, outcome)
                    continue
                strikes[topic] += 1
                self._fail(one_line(found[1]) if found is not None else "")
                stack.close()
                stream = None

    def _send(self, stream: Stream, one: Pending) -> None:
        record = redriven_record(one)
        stream.send(record, choose_partition(record, self._sizes.get(record.topic, 1)), one.letter.id)

    def _count(self, identity: str, where: str) -> None:
        self.written += 1
        self._progress(1)
        self._notes.write(identity, where)

    def _fail(self, error: str) -> None:
        self.errors[error] += 1
        self._progress(1)
