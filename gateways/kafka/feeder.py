"""The thread that feeds one producer, and replaces it when it can no longer be trusted (docs/kafka-errors.md).

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
from typing import Final

from gateways.kafka.client_metrics import NO_FIGURES
from gateways.kafka.cluster import Cluster, one_line
from gateways.kafka.generation import Faults, Generation, ProducerLike
from gateways.kafka.parking import Parking
from gateways.kafka.partitions import partition_for
from gateways.kafka.records import Reason, Record, RecordRefusedError
from gateways.kafka.watchdog import WAITING
from mqtt_trio.errors import GatewayError

log = logging.getLogger("gateways.kafka")

BURST: Final = 500
"""Records between two looks at the state of the producer."""
YIELD_EVERY: Final = 20
"""Records between two invitations to the Trio thread to take the interpreter."""
IDLE_WAIT: Final = 0.5
FINISH_WAIT: Final = 0.02
LOOK_INTERVAL: Final = 0.25
READ_INTERVAL: Final = 1.0
"""Seconds between two looks at the figures of the producer."""
AWAY_AFTER: Final = 3.0
"""Seconds without a confirmation after which Kafka is said to be away."""
FIRST_BACKOFF: Final = 0.1
LONGEST_BACKOFF: Final = 5.0
GONE_AFTER: Final = 1.0
"""Seconds without a trace of a partition after which whoever keeps topics shall look, and make the topic again."""
LEAVE_AFTER: Final = 6.0
"""Seconds after which the producer is given up for it: what waits for that topic pins it."""
LEAVE_WAIT: Final = 2.0
"""Seconds that records of other topics get then to be confirmed: fewer are sent twice."""
CLOSE_WAIT: Final = 5.0
ABORT_WAIT: Final = 1.0


class TopicGoneError(Exception):
    """A topic that the producer wrote to was deleted, and nobody made it again."""


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
        *,
        delivery_timeout: float = 60.0,
        lazy: bool = False,
        on_end: Callable[[Feeder], None] = lambda feeder: None,
    ) -> None:
        """`settle` takes the outcomes; it is called in this thread and in the producer's. `delivery_timeout`: seconds
        that a record may stay unconfirmed, or without a topic to go to; `lazy`: no producer is made before there is
        something to send; `on_end` is the last thing that the thread does."""
        self.name = name
        self.inbox: deque[Record] = deque()
        self.idle = False
        self.resent = 0
        self.rebuilds = 0
        self.beat = time.monotonic()
        self.doing = "starting"
        self.left_behind = 0
        """Threads of producers that did not end."""
        self.figures = NO_FIGURES
        """Of the present producer; they are replaced as a whole."""
        self._lazy = lazy
        self._on_end = on_end
        self._open_producer = open_producer
        self._faults = faults
        self._cluster = cluster
        self._settle = settle
        self._delivery_timeout = delivery_timeout
        self._again: deque[Record] = deque()
        self._parked = Parking(cluster, delivery_timeout)
        self._wake = threading.Event()
        self._halt = threading.Event()
        self._generation: Generation | None = None
        self._finishing = False
        self._deposed = False
        self._away = False
        self._backoff = FIRST_BACKOFF
        self._next_look = self._next_read = 0.0

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

    def depose(self) -> None:
        """The thread hangs: should it return, it touches nothing any more. Then, a moment later, see `remains`."""
        self._deposed = True
        self._halt.set()
        if (generation := self._generation) is not None:
            generation.over = True
            generation.broken = RuntimeError("its feeder hangs")
        self._wake.set()

    def remains(self) -> list[Record]:
        """Return everything without an outcome, in order, from a thread that was deposed."""
        in_flight = self._generation.unsettled() if self._generation is not None else []
        return [*in_flight, *self._parked.all(), *self._again, *self.inbox]

    def succeed(self, other: Feeder) -> None:
        """Take over from a feeder that was deposed."""
        self._finishing = other._finishing
        self.resent, self.rebuilds, self.left_behind = other.resent, other.rebuilds + 1, other.left_behind
        self._again.extend(other.remains())

    def break_off(self) -> None:
        """Let what the hanging thread was doing come to an end, if that is possible. Blocks: in a thread of its own."""
        if (generation := self._generation) is not None:
            generation.producer.break_off()

    # The thread

    def _alive(self, doing: str) -> None:
        self.doing = doing
        self.beat = time.monotonic()

    def run(self) -> None:
        """Serve until told to end."""
        self._cluster.listen(self.wake_up)
        try:
            while not self._halt.is_set():
                self._generation = generation = self._open()
                if generation is None or self._guarded_serve(generation):
                    break
                self._generation = None
                self._alive("waiting to connect")
                self._halt.wait(self._backoff)
                self._backoff = min(self._backoff * 2, LONGEST_BACKOFF)
        finally:
            self._cluster.unlisten(self.wake_up)
            if not self._deposed:
                self.fail_rest()
                self._on_end(self)

    def _open(self) -> Generation | None:
        """Make a producer, however long it takes; None when told to end before."""
        while not self._halt.is_set():
            if self._finishing and not self._has_work():
                return None
            if self._lazy and not self._has_work():
                self._wait_for_work()
                continue
            self._alive("connecting")
            try:
                return Generation(self._open_producer(), self._faults, self._settle, self.wake_up)
            except Exception as exc:
                self._report_away(exc)
            self._alive("waiting to connect")
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
            self._alive("sending")
            self._look_after(generation)
            if generation.broken is not None:
                self._report_broken(generation)
                return False
            if generation.leaving_at is None and self._send_some(generation):
                continue
            if self._finishing and not generation.in_flight and not self._has_work():
                return True
            self._wait(generation)

    def _wait(self, generation: Generation) -> None:
        # The order matters: an append before `idle` is seen by the test, one behind it sees `idle`.
        self._wake.clear()
        self.idle = True
        held = bool(self._again) or generation.leaving_at is not None
        held = held or bool(generation.in_flight and generation.in_flight[-1].suspect)
        if (held or not self.inbox) and generation.broken is None and not self._halt.is_set():
            self._wake.wait(FINISH_WAIT if self._finishing else IDLE_WAIT)
        self.idle = False

    def _wait_for_work(self) -> None:
        self._wake.clear()
        self.idle = True
        if not self.inbox and not self._finishing and not self._halt.is_set():
            self.beat = WAITING
            self._wake.wait()
        self._alive("starting")
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
        if facts is None or topic in self._parked or topic in generation.gone_topics:
            self._parked.add(record)
            return
        try:
            record.prepare()
        except Exception as exc:  # a message that cannot be mapped must not stop the others
            text = f"{type(exc).__name__}: {exc}"
            generation.finish(record, RecordRefusedError(text, Reason.UNENCODABLE))
            return
        limit = facts.max_message_bytes
        if record.size > limit:  # an upper bound
            record.size = record.measure()
        if record.size > limit and self._is_too_large(generation, record, limit):
            text = f"the record has {record.size} bytes, topic {topic} takes batches of {limit}"
            generation.finish(record, RecordRefusedError(text, Reason.TOO_LARGE))
            return
        if facts.is_compacted and record.key is None:
            text = f"topic {topic} is compacted, and the record has no key"
            generation.finish(record, RecordRefusedError(text, Reason.REFUSED))
            return
        if record.partition is None:
            record.partition = partition_for(record.key or b"", facts.partitions)
        record.sent_at = time.monotonic()
        generation.in_flight.append(record)  # before the call: whatever happens in it, the record is not lost
        try:
            generation.producer.send(record, record.partition % facts.partitions, generation.confirm, generation.fail)
        except Exception as exc:
            self._not_sent(generation, record, exc)

    def _is_too_large(self, generation: Generation, record: Record, limit: int) -> bool:
        self._alive("compressing a large record")
        return generation.producer.too_large(record, limit)

    def _not_sent(self, generation: Generation, record: Record, exc: Exception) -> None:
        """Decide about a record that the producer did not even take."""
        if generation.broken is not None:
            return
        if self._faults.is_retriable(exc):  # no metadata: the topic is gone, or Kafka is
            generation.in_flight.pop()
            self._cluster.forget(record.topic)
            self._parked.add(record)
        elif "Unrecognized partition" in str(exc):  # what we know about the topic is not what the producer knows
            self._cluster.forget(record.topic)
            generation.broken = exc
        elif self._faults.is_fault_of_record(exc) or isinstance(exc, ValueError | TypeError | OverflowError):
            generation.in_flight.pop()
            reason = self._faults.reason_for(exc)
            generation.finish(record, RecordRefusedError(f"Kafka cannot take the record: {exc}", reason))
        else:
            generation.broken = exc

    # Supervision

    def _look_after(self, generation: Generation) -> None:
        """Trim what is in flight; now and then see whether confirmations come, and whether topics came or went."""
        generation.trim()
        if self._parked:
            for queue in self._parked.known(generation.gone_topics):
                self._again.extendleft(reversed(queue))
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_INTERVAL
        if now >= self._next_read:
            self._next_read = now + READ_INTERVAL
            self.figures = generation.producer.figures()
        for record, error in self._parked.hopeless(now):
            generation.finish(record, error)
        self._look_for_gone(generation, now)
        waiting = now - generation.in_flight[0].sent_at if generation.in_flight else 0.0
        if not generation.producer.is_alive and generation.broken is None:
            generation.broken = RuntimeError("its thread ended")
        elif waiting > self._delivery_timeout and generation.broken is None:
            generation.broken = TimeoutError(f"no confirmation for {waiting:.0f} s")
        elif waiting > AWAY_AFTER and not self._away and not generation.gone:
            self._report_away(TimeoutError(f"no confirmation for {waiting:.0f} s"))
        elif self._away and waiting < AWAY_AFTER and (generation.confirmed or not self._is_waiting(generation)):
            self._away = False
            self._cluster.back(self.name)

    def _is_waiting(self, generation: Generation) -> bool:
        """Whether there is anything that Kafka could confirm: what is parked waits for its topic, perhaps for days."""
        return bool(generation.in_flight or self.inbox or self._again)

    def _look_for_gone(self, generation: Generation, now: float) -> None:
        """See to topics that were deleted: a record for one pins kafka-python's thread and waits in vain, unless the
        topic is made again in time."""
        for topic in generation.look_for_gone(now, GONE_AFTER):
            log.warning("Kafka topic %s is gone: what is for it waits until it is there again", topic)
            self._cluster.forget(topic)
        if generation.leaving_at is None:
            if generation.gone_for(now) > LEAVE_AFTER:
                generation.leaving_at = now + LEAVE_WAIT
        elif not generation.gone:
            generation.leaving_at = None
        if generation.leaving_at is not None and (generation.only_gone_left() or now > generation.leaving_at):
            topics = ", ".join(sorted(generation.gone_topics))
            generation.broken = generation.broken or TopicGoneError(f"there is no topic {topics} any more")

    def _take_back(self, generation: Generation) -> None:
        """Close the producer; what has no outcome goes before everything else, in order."""
        self._alive("closing its producer")
        self.figures, self._next_read = NO_FIGURES, 0.0
        if not generation.producer.close(ABORT_WAIT if self._halt.is_set() else CLOSE_WAIT):
            self.left_behind += 1
            log.error("the thread of Kafka producer %s does not end and is left behind", self.name)
        if self._deposed:  # its successor has them
            return
        generation.over = True
        unsettled = generation.unsettled()
        # Per topic, parked records are younger than those in flight and older than those still to be sent again.
        self._again.extendleft(reversed([*unsettled, *self._parked.all()]))
        self._parked.clear()
        self.resent += len(unsettled)
        if generation.confirmed:
            self._backoff = FIRST_BACKOFF

    def _report_broken(self, generation: Generation) -> None:
        self.rebuilds += 1
        exc = generation.broken
        assert exc is not None
        if generation.denied is not None:  # whoever keeps topics finds out what is missing
            log.warning("Kafka producer %s is replaced: it may not write to topic %s", self.name, generation.denied)
            self._cluster.forget(generation.denied)
        elif isinstance(exc, TopicGoneError):
            log.warning("Kafka producer %s is replaced: %s", self.name, exc)
        elif self._faults.is_fault_of_record(exc):
            log.warning("Kafka producer %s is replaced, Kafka refused a record: %s", self.name, one_line(exc))
            if generation.outgrown is not None:  # somebody lowered its limit: the next large record is kept out
                self._cluster.forget(generation.outgrown)
        elif generation.confirmed and not isinstance(exc, TimeoutError):
            log.warning("Kafka producer %s is replaced: %s", self.name, one_line(exc))
        else:
            self._report_away(exc)

    def _report_away(self, exc: BaseException) -> None:
        if not self._away:
            self._away = True
            self._cluster.away(self.name, self._cluster.probe() or one_line(exc))

    def fail_rest(self) -> None:
        """Give everything that is left its outcome; nothing is left after an end in peace."""
        self._again.extendleft(reversed(self._parked.all()))
        self._parked.clear()
        for queue in (self._again, self.inbox):
            while queue:
                record = queue.popleft()
                error = GatewayError("closed before Kafka confirmed the record", retriable=True)
                record.settle(error)
                self._settle(record, error)
