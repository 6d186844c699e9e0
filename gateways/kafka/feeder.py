"""The thread that feeds one producer, and replaces it when it can no longer be trusted (docs/kafka.md).

Order is what this module is careful about. Records leave in the order of their offers; per partition kafka-python keeps
it. The first failure breaks the producer off in the very thread that reports it, before anything behind the failed
batch can leave, and all records without an outcome are sent again by a new producer, oldest first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from gateways.kafka.cluster import Cluster
from gateways.kafka.partitions import partition_for
from gateways.kafka.records import Reason, Record, RecordRefusedError
from mqtt_trio.errors import GatewayError

log = logging.getLogger("gateways.kafka")

BURST: Final = 500
"""Records between two looks at the state of the producer."""
YIELD_EVERY: Final = 20
"""Records between two invitations to the Trio thread to take the interpreter."""
IDLE_WAIT: Final = 0.5
FINISH_WAIT: Final = 0.02
LOOK_INTERVAL: Final = 0.25
AWAY_AFTER: Final = 3.0
"""Seconds without a confirmation after which Kafka is said to be away."""
FIRST_BACKOFF: Final = 0.1
LONGEST_BACKOFF: Final = 5.0
CLOSE_WAIT: Final = 5.0
ABORT_WAIT: Final = 1.0


class ProducerLike(Protocol):
    """What the feeder needs of `workers.Producer`."""

    def send(
        self, record: Record, partition: int, done: Callable[[Record, Any], None], failed: Callable[[Record, Any], None]
    ) -> None: ...
    def too_large(self, record: Record, limit: int) -> bool: ...
    def break_off(self) -> None: ...
    def close(self, wait: float) -> None: ...


class Faults(Protocol):
    """Tells the producer's exceptions apart."""

    def is_fault_of_record(self, error: BaseException) -> bool: ...
    def reason_for(self, error: BaseException) -> Reason: ...
    def is_retriable(self, error: BaseException) -> bool: ...


class Generation:
    """One producer and what was handed to it."""

    def __init__(
        self,
        producer: ProducerLike,
        faults: Faults,
        settle: Callable[[Record, Exception | None], None],
        wake: Callable[[], None],
    ) -> None:
        self.producer = producer
        self.in_flight: deque[Record] = deque()
        """In the order of sending; records with an outcome are removed from the left only."""
        self.broken: BaseException | None = None
        self.confirmed = 0
        self.over = False
        """Outcomes that come now count no more: its records belong to the next generation."""
        self._faults = faults
        self._settle = settle
        self._wake = wake

    def confirm(self, record: Record, _metadata: Any) -> None:
        """Note that Kafka has the record (producer's thread)."""
        if self.over:
            return
        record.settled = True
        self.confirmed += 1
        self._settle(record, None)
        if record.suspect:
            self._wake()

    def fail(self, record: Record, exc: Exception) -> None:
        """Break the producer off at its first failure (producer's thread)."""
        if self.over:
            return
        if self.broken is None:
            self.broken = exc
            self.producer.break_off()
            self._wake()
        if not self._faults.is_fault_of_record(exc):
            return
        if record.suspect:  # it was alone in its batch
            self.finish(record, RecordRefusedError(f"Kafka refuses the record: {exc}", self._faults.reason_for(exc)))
        else:
            record.suspect = True

    def finish(self, record: Record, error: Exception | None) -> None:
        """Give the record its outcome."""
        record.settled = True
        self._settle(record, error)

    def trim(self) -> None:
        """Forget the oldest records that have their outcome."""
        in_flight = self.in_flight
        while in_flight and in_flight[0].settled:
            in_flight.popleft()


class Feeder:
    """Everything here runs in the feeder's thread but `wake_up`, `finish`, `abort` and what says otherwise.

    Attributes:
      inbox: where the Trio thread appends records.
      idle: the thread waits, or is about to: whoever appends must `wake_up`.
    """

    def __init__(
        self,
        name: str,
        open_producer: Callable[[], ProducerLike],
        faults: Faults,
        cluster: Cluster,
        settle: Callable[[Record, Exception | None], None],
    ) -> None:
        """`settle` takes the outcomes; it is called in this thread and in the producer's."""
        self.name = name
        self.inbox: deque[Record] = deque()
        self.idle = False
        self.resent = 0
        self.rebuilds = 0
        self.delivery_timeout = 60.0
        self.lazy = False
        """No producer is made before there is something to send."""
        self._open_producer = open_producer
        self._faults = faults
        self._cluster = cluster
        self._settle = settle
        self._again: deque[Record] = deque()
        self._parked: dict[str, deque[Record]] = {}
        self._wake = threading.Event()
        self._halt = threading.Event()
        self._finishing = False
        self._away = False
        self._backoff = FIRST_BACKOFF
        self._next_look = 0.0

    # Any thread

    def wake_up(self) -> None:
        """Make the thread look at the inbox and at its orders."""
        self._wake.set()

    def finish(self) -> None:
        """End when everything that was offered has its outcome."""
        self._finishing = True
        self._wake.set()

    def abort(self) -> None:
        """End now; what has no outcome yet fails."""
        self._halt.set()
        self._wake.set()

    # The thread

    def run(self) -> None:
        """Serve until told to end."""
        self._cluster.listen(self.wake_up)
        try:
            while not self._halt.is_set():
                generation = self._open()
                if generation is None or self._guarded_serve(generation):
                    break
                self._halt.wait(self._backoff)
                self._backoff = min(self._backoff * 2, LONGEST_BACKOFF)
        finally:
            self._cluster.unlisten(self.wake_up)
            self.fail_rest()

    def _open(self) -> Generation | None:
        """Make a producer, however long it takes; None when told to end before."""
        while not self._halt.is_set():
            if self._finishing and not self._has_work():
                return None
            if self.lazy and not self._has_work():
                self._wait_for_work()
                continue
            try:
                return Generation(self._open_producer(), self._faults, self._settle, self.wake_up)
            except Exception as exc:
                self._report_away(exc)
            self._halt.wait(self._backoff)
            self._backoff = min(self._backoff * 2, LONGEST_BACKOFF)
        return None

    def _guarded_serve(self, generation: Generation) -> bool:
        """Return whether the feeder is done; False: go on with another producer."""
        try:
            return self._serve(generation)
        except Exception as exc:
            log.exception("Kafka producer %s: unexpected error, it is replaced", self.name)
            generation.broken = exc
            return False
        finally:
            self._take_back(generation)

    def _serve(self, generation: Generation) -> bool:
        while True:
            if self._halt.is_set():
                return True
            self._look_after(generation)
            if generation.broken is not None:
                self._report_broken(generation)
                return False
            if self._send_some(generation):
                continue
            if self._finishing and not generation.in_flight and not self._has_work():
                return True
            self._wait(generation)

    def _wait(self, generation: Generation) -> None:
        # The order matters: an append before `idle` is seen by the test, one behind it sees `idle`.
        self._wake.clear()
        self.idle = True
        held = bool(self._again) or bool(generation.in_flight and generation.in_flight[-1].suspect)
        if (held or not self.inbox) and generation.broken is None and not self._halt.is_set():
            self._wake.wait(FINISH_WAIT if self._finishing else IDLE_WAIT)
        self.idle = False

    def _wait_for_work(self) -> None:
        self._wake.clear()
        self.idle = True
        if not self.inbox and not self._finishing and not self._halt.is_set():
            self._wake.wait()
        self.idle = False

    def _has_work(self) -> bool:
        return bool(self.inbox or self._again or self._parked)

    # Sending

    def _send_some(self, generation: Generation) -> bool:
        """Send up to a burst; return whether there was anything to send."""
        again, inbox, in_flight = self._again, self.inbox, generation.in_flight
        for number in range(BURST):
            source = again if again else inbox
            if not source or generation.broken is not None:
                return number > 0
            if in_flight and (source[0].suspect or in_flight[-1].suspect):
                return False  # a suspect shares its batch with nobody
            self._send(generation, source.popleft())
            if number % YIELD_EVERY == YIELD_EVERY - 1:
                time.sleep(0)
        return True

    def _send(self, generation: Generation, record: Record) -> None:
        topic = record.topic
        facts = self._cluster.facts(topic)
        if facts is None or topic in self._parked:
            self._park(record)
            return
        limit = facts.max_message_bytes
        if record.size > limit and generation.producer.too_large(record, limit):
            text = f"the record has {record.size} bytes, topic {topic} takes batches of {limit}"
            generation.finish(record, RecordRefusedError(text, Reason.TOO_LARGE))
            return
        if record.partition is None:
            record.partition = partition_for(record.key or b"", facts.partitions)
        record.sent_at = time.monotonic()
        generation.in_flight.append(record)  # before the call: whatever happens in it, the record is not lost
        try:
            generation.producer.send(record, record.partition % facts.partitions, generation.confirm, generation.fail)
        except Exception as exc:
            self._not_sent(generation, record, exc)

    def _not_sent(self, generation: Generation, record: Record, exc: Exception) -> None:
        """Decide about a record that the producer did not even take."""
        if generation.broken is not None:
            return
        if self._faults.is_retriable(exc):  # no metadata: the topic is gone, or Kafka is
            generation.in_flight.pop()
            self._cluster.forget(record.topic)
            self._park(record)
        elif "Unrecognized partition" in str(exc):  # what we know about the topic is not what the producer knows
            self._cluster.forget(record.topic)
            generation.broken = exc
        elif self._faults.is_fault_of_record(exc) or isinstance(exc, ValueError | TypeError | OverflowError):
            generation.in_flight.pop()
            reason = self._faults.reason_for(exc)
            generation.finish(record, RecordRefusedError(f"Kafka cannot take the record: {exc}", reason))
        else:
            generation.broken = exc

    def _park(self, record: Record) -> None:
        """Keep `record` until its topic is known."""
        parked = self._parked.get(record.topic)
        if parked is None:
            parked = self._parked[record.topic] = deque()
            self._cluster.want(record.topic)
        parked.append(record)

    # Supervision

    def _look_after(self, generation: Generation) -> None:
        """Trim what is in flight; now and then see whether confirmations come, and whether topics turned up."""
        generation.trim()
        if self._parked:
            self._unpark()
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_INTERVAL
        waiting = now - generation.in_flight[0].sent_at if generation.in_flight else 0.0
        if waiting > self.delivery_timeout:
            generation.broken = TimeoutError(f"no confirmation for {waiting:.0f} s")
        elif waiting > AWAY_AFTER and not self._away:
            self._report_away(TimeoutError(f"no confirmation for {waiting:.0f} s"))
        elif self._away and (generation.confirmed or not self._has_work()) and waiting < AWAY_AFTER:
            self._away = False
            self._cluster.back(self.name)

    def _unpark(self) -> None:
        for topic in [name for name in self._parked if self._cluster.facts(name) is not None]:
            self._again.extendleft(reversed(self._parked.pop(topic)))

    def _take_back(self, generation: Generation) -> None:
        """Close the producer; what has no outcome goes before everything else, in order."""
        generation.producer.close(ABORT_WAIT if self._halt.is_set() else CLOSE_WAIT)
        generation.over = True
        unsettled = [record for record in generation.in_flight if not record.settled]
        # Per topic, parked records are younger than those in flight and older than those still to be sent again.
        parked = [record for queue in self._parked.values() for record in queue]
        self._parked.clear()
        self._again.extendleft(reversed([*unsettled, *parked]))
        self.resent += len(unsettled)
        if generation.confirmed:
            self._backoff = FIRST_BACKOFF

    def _report_broken(self, generation: Generation) -> None:
        self.rebuilds += 1
        exc = generation.broken
        assert exc is not None
        if self._faults.is_fault_of_record(exc):
            log.warning("Kafka producer %s is replaced, Kafka refused a record: %s", self.name, describe(exc))
        elif generation.confirmed and not isinstance(exc, TimeoutError):
            log.warning("Kafka producer %s is replaced: %s", self.name, describe(exc))
        else:
            self._report_away(exc)

    def _report_away(self, exc: BaseException) -> None:
        if not self._away:
            self._away = True
            self._cluster.away(self.name, self._cluster.probe() or describe(exc))

    def fail_rest(self) -> None:
        """Give everything that is left its outcome; nothing is left after an end in peace."""
        for queue in (self._again, *self._parked.values(), self.inbox):
            while queue:
                record = queue.popleft()
                record.settled = True
                self._settle(record, GatewayError("closed before Kafka confirmed the record", retriable=True))
        self._parked.clear()


def describe(exc: BaseException) -> str:
    """Return an exception as one line."""
    return " ".join(f"{type(exc).__name__}: {exc}".split())
