"""The Trio half of the bridge: a bounded window towards the feeder thread, lists of records from the poller thread (by
way of `handover`).

Costs decide the shape: a hop per record takes 50 µs and more, a deque with one wake per burst 0.4 µs.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

import attrs
import trio

from gateways.kafka.cluster import Cluster
from gateways.kafka.exposed import ClientReport
from gateways.kafka.feeder import Feeder
from gateways.kafka.generation import Faults, ProducerLike
from gateways.kafka.handover import Give, Handover, TrioThread
from gateways.kafka.lag import Behind
from gateways.kafka.options import KafkaOptions
from gateways.kafka.poller import Assignment, Began, ConsumerLike, Partition, Poller
from gateways.kafka.records import ConsumedRecord as ConsumedRecord
from gateways.kafka.records import Record as Record
from gateways.kafka.records import RecordRefusedError
from gateways.kafka.watchdog import DEPOSE_WAIT, Watchdog
from mqtt_trio.errors import GatewayError

log = logging.getLogger("gateways.kafka")

COLLECT_LINGER: Final = 0.002
"""Seconds from the first outcome of a watched record to the look at all that came by then."""
DRAIN_LIMIT: Final = 2000
"""Outcomes that one drain handles before other tasks get their turn."""
CLOSE_GRACE: Final = 1.0
"""Seconds that a cancelled `stop` still waits for its thread."""
SLOTS: Final = 8
"""Lists of records that wait for the Trio thread; then the poller waits."""


def nothing(*_arguments: object) -> None:
    """Do nothing: the hook that is not set."""


@attrs.define(eq=False, repr=False, slots=False)
class ProducerBridge:
    """One kafka-python producer in threads of its own, fed from the Trio thread.

    Everything but `run` and `stop` is synchronous and runs on the Trio thread. Kafka being away fails no record: the
    bridge keeps what it has and goes on trying. Only a record that Kafka can never take fails, alone.

    Attributes:
      after_drain: called on the Trio thread after each burst of `done` calls; set it to `host.flush`.
      on_refused: called on the Trio thread with each record that can never be stored, before its `done`.
      collectors: called on the Trio thread in each drain; they look after records that are `watched`, and give back
        with `give_back` what these took of the window.
      full: the window is reached, in records or in bytes.
      outstanding_records, outstanding_bytes: offered and without an outcome.
    """

    _options: KafkaOptions
    cluster: Cluster
    name: str = attrs.field(kw_only=True)
    """Stands in logs and client ids."""
    _compression: str | None = attrs.field(kw_only=True)
    _window_records: int = attrs.field(kw_only=True)
    _window_bytes: int = attrs.field(kw_only=True)
    _linger_ms: int = attrs.field(default=5, kw_only=True)
    """The producer's; 0 where records are packed already."""
    _lazy: bool = attrs.field(default=False, kw_only=True)
    """Connect when there is something to send."""
    _open_producer: Callable[[], ProducerLike] | None = attrs.field(default=None, kw_only=True)
    _faults: Faults | None = attrs.field(default=None, kw_only=True)
    """These two are for tests."""

    def __attrs_post_init__(self) -> None:
        self.cluster.clients[self.name] = self
        self.after_drain: Callable[[], None] = nothing
        self.on_refused: Callable[[Record, RecordRefusedError], None] = nothing
        self.collectors: list[Callable[[], None]] = []
        self.full = False
        self.outstanding_records = self.outstanding_bytes = 0
        self._sent = self._sent_messages = self._failed = 0
        self._room_waiters: deque[Callable[[], None]] = deque()
        self._outcomes: deque[tuple[Record, Exception | None]] = deque()
        self._drain_is_due = self._collection_is_due = False
        self._collects = trio.Event()
        self._trio_thread = TrioThread()
        self._ended = trio.Event()
        self._closed = False
        self._feeder = self._make_feeder()
        self._inbox = self._feeder.inbox
        self._watchdog = Watchdog(f"producer {self.name}", self._replace_feeder)

    def _make_feeder(self) -> Feeder:
        open_producer, faults = self._open_producer, self._faults
        if open_producer is None or faults is None:
            from gateways.kafka import workers

            open_it = partial(workers.Producer, self._options, self.name, self._compression, self._linger_ms)
            open_producer, faults = partial(self.cluster.when_let_in, open_it), workers
        return Feeder(
            self.name,
            open_producer,
            faults,
            self.cluster,
            self._settle,
            delivery_timeout=self._options.effective_delivery_timeout,
            lazy=self._lazy,
            on_end=self._feeder_ended,
        )

    def offer(self, record: Record) -> None:
        """Take `record`, behind all records before it. Never blocks, never refuses: the caller looks at `full`."""
        record.size = size = record.measure()
        self._take_room(1, size)
        self._inbox.append(record)
        self._wake()

    def offer_all(self, records: Sequence[Record], size: int) -> None:
        """Take records that are `watched`, as `offer` does; they take `size` bytes of the window."""
        self._take_room(len(records), size)
        self._inbox.extend(records)
        self._wake()

    def give_back(self, *, sent: int, failed: int, size: int) -> None:
        """Records of `offer_all` have their outcome: so many of each kind, of so many bytes together."""
        self.outstanding_records -= sent + failed
        self.outstanding_bytes -= size
        self._sent += sent
        self._sent_messages += sent
        self._failed += failed

    def make_room(self, records: int, size: int) -> None:
        """So much of what was offered takes no room in the window for now; negative: it does again."""
        self._take_room(-records, -size)
        self._look_for_room()

    def _take_room(self, records: int, size: int) -> None:
        self.outstanding_records += records
        self.outstanding_bytes += size
        if self.outstanding_records >= self._window_records or self.outstanding_bytes >= self._window_bytes:
            self.full = True

    def _wake(self) -> None:
        if self._feeder.idle:
            self._feeder.wake_up()
        if self._closed:
            self._feeder.fail_rest()

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, on the Trio thread, at the end of the drain that makes `full` False, before
        `after_drain`; at once when it is False now."""
        if self.full:
            self._room_waiters.append(callback)
        else:
            callback()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the feeder thread until cancelled or stopped; `started()` at once, also while Kafka is away.

        Cancelled, the thread is told to close at once and left to do so.
        """
        self._trio_thread.enter()
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._collect_bursts)
                await self._watchdog.run(self._feeder)
                nursery.cancel_scope.cancel()
        finally:
            self._feeder.abort()

    def _collect_soon(self) -> None:
        self._collects.set()

    async def _collect_bursts(self) -> None:
        """Look after watched records: once for all outcomes of COLLECT_LINGER. kafka-python tells them one by one, and
        a wake of this thread for each of them would cost more than all the rest."""
        while True:
            await self._collects.wait()
            await trio.sleep(COLLECT_LINGER)
            self._collects = trio.Event()
            self._collection_is_due = False  # before the look: what comes behind it asks for another one
            self._collect()

    def _collect(self) -> None:
        for collect in self.collectors:
            collect()
        self._look_for_room()
        self.after_drain()

    def _feeder_ended(self, feeder: Feeder) -> None:
        """Note the end of a thread (that thread)."""
        if feeder is self._feeder:
            self._closed = True
            self._soon(self._ended.set)

    async def _replace_feeder(self, feeder: Feeder) -> Feeder:
        """Let another thread have what a hanging one has; what that one was sending may be there twice then."""
        feeder.depose()
        await trio.sleep(DEPOSE_WAIT)
        successor = self._make_feeder()
        successor.succeed(feeder)
        self._feeder, self._inbox = successor, successor.inbox
        return successor

    async def stop(self) -> None:
        """Send what was offered, close. Bounded by the caller's cancel scope: cancelled, the producer is closed by
        force and every record without an outcome gets `done(GatewayError)`. Idempotent."""
        if not self._trio_thread.is_known:
            self._feeder.abort()
            self._feeder.fail_rest()
            self._drain()
            return
        self._feeder.finish()
        try:
            await self._ended.wait()
        finally:
            self._feeder.abort()
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_GRACE):
                await self._ended.wait()
            if not self._ended.is_set():
                log.warning("Kafka producer %s does not end; its thread is left behind", self.name)
                self._closed = True
                self._feeder.depose()
                for record in self._feeder.remains():
                    error = GatewayError("closed before Kafka confirmed the record", retriable=True)
                    record.settle(error)
                    self._settle(record, error)
            self._collect()
            while self._outcomes:
                self._drain()

    def counters(self) -> dict[str, int]:
        """Return what happened since the start."""
        return {
            "records_sent": self._sent,
            "messages_sent": self._sent_messages,
            "records_failed": self._failed,
            "records_resent": self._feeder.resent,
            "rebuilds": self._feeder.rebuilds,
            "threads_left": self._feeder.left_behind + self._watchdog.left_behind,
            "threads_hung": self._watchdog.hangs,
        }

    def report(self) -> ClientReport:
        """Say how the producer fares."""
        return ClientReport(kind="producer", figures=self._feeder.figures)

    def _settle(self, record: Record, error: Exception | None) -> None:
        """Note an outcome, wake the Trio thread once per burst. Any thread."""
        if record.watched:
            if not self._collection_is_due:
                self._collection_is_due = True
                self._soon(self._collect_soon)
            return
        self._outcomes.append((record, error))
        if not self._drain_is_due:
            self._drain_is_due = True
            self._soon(self._drain)

    def _soon(self, callback: Callable[[], object]) -> None:
        self._trio_thread.soon(callback)  # where the process is ending, nobody waits for outcomes any more

    def _drain(self) -> None:
        """Hand out the outcomes that came (Trio thread)."""
        self._drain_is_due = False  # before the first look: what comes behind it asks for a drain of its own
        outcomes = self._outcomes
        for _ in range(min(len(outcomes), DRAIN_LIMIT)):
            record, error = outcomes.popleft()
            if record.finished:  # a producer that was given up on spoke up late
                continue
            record.finished = True
            self._count(record, error)
            done, record.done = record.done, None
            if isinstance(error, RecordRefusedError):
                self.tell_refused(record, error)
            if done is not None:
                try:
                    done(error)
                except Exception:
                    log.exception("Kafka producer %s: error while an outcome was handed out", self.name)
        if outcomes and not self._drain_is_due:
            self._drain_is_due = True
            self._soon(self._drain)
        self._look_for_room()
        self.after_drain()

    def tell_refused(self, record: Record, error: RecordRefusedError) -> None:
        """Have a dead letter written about `record`."""
        try:
            self.on_refused(record, error)
        except Exception:
            log.exception("Kafka producer %s: error while a refused record was reported", self.name)

    def _count(self, record: Record, error: Exception | None) -> None:
        self.outstanding_records -= 1
        self.outstanding_bytes -= record.size
        if error is None:
            self._sent += 1
            self._sent_messages += record.messages
        else:
            self._failed += 1

    def _look_for_room(self) -> None:
        if not self.full:
            return
        records, size = self.outstanding_records, self.outstanding_bytes
        self.full = records >= self._window_records or size >= self._window_bytes
        while self._room_waiters and not self.full:  # one that fills the window queues behind those still waiting
            self._room_waiters.popleft()()


@attrs.define(eq=False, repr=False)
class ConsumerBridge:
    """One kafka-python consumer in a thread of its own, by manual assignment of all partitions of some topics.

    It is no member of a group; positions live in its reader (`poller`), also across rebuilds.

    Attributes:
      positions_known: set when the first position of every partition is known: nothing published from now on is missed.
      caught_up: set when all topics that are read from the beginning were handed over up to the end that they had at
        the start (after the `on_records` calls with those records).
      room: awaited before each list of records; while it waits, the poller stops reading after SLOTS more of them.
      on_another: called with topic and identity in front of the first record of a topic that was made again.
    """

    _options: KafkaOptions
    _cluster: Cluster
    _assignments: Sequence[Assignment]
    """Pairs of a topic and where to begin."""
    _on_records: Callable[[list[ConsumedRecord]], None]
    """Called on the Trio thread with bounded lists (about 128 KiB), per partition in order."""
    name: str = attrs.field(default="bus", kw_only=True)
    _group: str | None = attrs.field(default=None, kw_only=True)
    """Where `commit` stores offsets."""
    _on_positions_known: Callable[[], None] = attrs.field(default=nothing, kw_only=True)
    _on_caught_up: Callable[[], None] = attrs.field(default=nothing, kw_only=True)
    _open_consumer: Callable[[], ConsumerLike] | None = attrs.field(default=None, kw_only=True)
    """For tests."""

    positions_known: trio.Event = attrs.field(factory=trio.Event, init=False)
    caught_up: trio.Event = attrs.field(factory=trio.Event, init=False)
    room: Callable[[], Awaitable[None]] = attrs.field(default=trio.lowlevel.checkpoint, init=False)
    on_another: Callable[[str, str | None], None] = attrs.field(default=nothing, init=False)
    _handover: Handover[Poller, list[ConsumedRecord]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._cluster.clients[self.name] = self
        self._handover = Handover(self.name, self._make_poller, self._on_records, SLOTS)
        self._handover.room = self._wait_for_room

    def _wait_for_room(self) -> Awaitable[None]:
        return self.room()

    def _make_poller(self, hand_over: Give[Poller, list[ConsumedRecord]]) -> Poller:
        open_consumer = self._open_consumer
        if open_consumer is None:
            from gateways.kafka import workers

            open_it = partial(workers.Consumer, self._options, self.name, self._group)
            open_consumer = partial(self._cluster.when_let_in, open_it)
        poller = Poller(self.name, open_consumer, self._cluster, self._assignments, hand_over)
        poller.on_positions_known = partial(self._reached, self.positions_known, self._on_positions_known)
        poller.on_caught_up = partial(self._reached, self.caught_up, self._on_caught_up)
        poller.on_another = self._another
        return poller

    @property
    def _poller(self) -> Poller:
        return self._handover.reader

    def expect(self, topic: str, identity: str) -> None:
        """The checkpoint of `topic` is of the one with this identity: another one is read from its beginning. Before
        `run`."""
        self._poller.identities[topic] = identity

    def identity(self, topic: str) -> str | None:
        """Return what tells `topic` from an earlier one of its name, as of its positions; None: Kafka does not say."""
        return self._poller.identities.get(topic)

    def _another(self, topic: str, identity: str | None) -> None:
        self.on_another(topic, identity)

    @staticmethod
    def _reached(event: trio.Event, hook: Callable[[], None]) -> None:
        event.set()
        hook()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the poller thread until cancelled; `started()` at once, also while Kafka is away.

        Raises:
          whatever `on_records` raises.
        """
        await self._handover.run(task_status=task_status)

    @property
    def began(self) -> Mapping[Partition, Began]:
        """Where reading began, of partitions that are read from a checkpoint or their end; once positions are known."""
        return self._poller.began

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Have offsets stored in the group, within a second or so; what fails is not told."""
        self._poller.to_commit = dict(offsets)

    def lag(self) -> dict[Partition, Behind]:
        """Return how far `on_records` is behind Kafka in each partition, as of the last second."""
        lists = self._handover.waiting()
        return self._poller.figures.lag.behind(itertools.chain(*lists, self._poller.waiting()))

    def report(self) -> ClientReport:
        """Say how the consumer fares."""
        return self._poller.figures.report(self.lag())

    def counters(self) -> dict[str, int]:
        """Return what happened since the start."""
        return {"records_received": self._poller.received, **self._handover.counters()}
