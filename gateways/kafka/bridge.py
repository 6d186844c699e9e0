"""The Trio half of the bridge: a bounded window towards the feeder thread, lists of records from the poller thread.

Costs decide the shape: a hop per record takes 50 µs and more, a deque with one wake per burst 0.4 µs.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import trio

from gateways.kafka.cluster import Cluster
from gateways.kafka.exposed import ClientReport
from gateways.kafka.feeder import Feeder
from gateways.kafka.generation import Faults, ProducerLike
from gateways.kafka.lag import Behind
from gateways.kafka.options import KafkaOptions
from gateways.kafka.poller import Assignment, Began, ConsumerLike, Partition, Poller
from gateways.kafka.records import ConsumedRecord as ConsumedRecord
from gateways.kafka.records import Record as Record
from gateways.kafka.records import RecordRefusedError
from gateways.kafka.watchdog import Watchdog
from mqtt_trio.errors import GatewayError

log = logging.getLogger("gateways.kafka")

COLLECT_LINGER: Final = 0.002
"""Seconds from the first outcome of a watched record to the look at all that came by then."""
DRAIN_LIMIT: Final = 2000
"""Outcomes that one drain handles before other tasks get their turn."""
DEPOSE_WAIT: Final = 0.05
"""Seconds that a thread which turns out not to hang gets to take its hands off everything."""
CLOSE_GRACE: Final = 1.0
"""Seconds that a cancelled `stop` still waits for its thread."""
SLOTS: Final = 8
"""Lists of records that wait for the Trio thread; then the poller waits."""


def nothing(*_arguments: object) -> None:
    """Do nothing: the hook that is not set."""


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

    def __init__(
        self,
        options: KafkaOptions,
        cluster: Cluster,
        *,
        name: str,
        compression: str | None,
        window_records: int,
        window_bytes: int,
        linger_ms: int = 5,
        lazy: bool = False,
        open_producer: Callable[[], ProducerLike] | None = None,
        faults: Faults | None = None,
    ) -> None:
        """`name` stands in logs and client ids; `linger_ms` is the producer's (0 where records are packed already);
        `lazy`: connect when there is something to send; `open_producer` and `faults` are for tests."""
        self.name = name
        self.cluster = cluster
        cluster.clients[name] = self
        self.after_drain: Callable[[], None] = nothing
        self.on_refused: Callable[[Record, RecordRefusedError], None] = nothing
        self.collectors: list[Callable[[], None]] = []
        self.full = False
        self.outstanding_records = self.outstanding_bytes = 0
        self._window_records, self._window_bytes = window_records, window_bytes
        self._sent = self._sent_messages = self._failed = 0
        self._room_waiters: deque[Callable[[], None]] = deque()
        self._outcomes: deque[tuple[Record, Exception | None]] = deque()
        self._drain_is_due = self._collection_is_due = False
        self._collects = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._ended = trio.Event()
        self._closed = False
        if open_producer is None or faults is None:
            from gateways.kafka import workers

            open_it = partial(workers.Producer, options, name, compression, linger_ms)
            open_producer = partial(cluster.when_let_in, open_it)
            faults = workers
        timeout = options.effective_delivery_timeout
        self._make_feeder = partial(
            Feeder, name, open_producer, faults, cluster, self._settle, delivery_timeout=timeout, lazy=lazy
        )
        self._feeder = self._make_feeder(on_end=self._feeder_ended)
        self._inbox = self._feeder.inbox
        self._watchdog = Watchdog(f"producer {name}", self._replace_feeder)

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
        self._token = trio.lowlevel.current_trio_token()
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
        successor = self._make_feeder(on_end=self._feeder_ended)
        successor.succeed(feeder)
        self._feeder, self._inbox = successor, successor.inbox
        return successor

    async def stop(self) -> None:
        """Send what was offered, close. Bounded by the caller's cancel scope: cancelled, the producer is closed by
        force and every record without an outcome gets `done(GatewayError)`. Idempotent."""
        if self._token is None:
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
        if self._token is not None:
            try:
                self._token.run_sync_soon(callback, idempotent=True)
            except trio.RunFinishedError:
                pass  # the process is ending; nobody waits for outcomes any more

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


class ConsumerBridge:
    """One kafka-python consumer in a thread of its own, by manual assignment of all partitions of some topics.

    It is no member of a group; positions live in the bridge, also across rebuilds.

    Attributes:
      positions_known: set when the first position of every partition is known: nothing published from now on is missed.
      caught_up: set when all topics that are read from the beginning were handed over up to the end that they had at
        the start (after the `on_records` calls with those records).
      room: awaited before each list of records; while it waits, the poller stops reading after SLOTS more of them.
      on_another: called with topic and identity in front of the first record of a topic that was made again.
    """

    def __init__(
        self,
        options: KafkaOptions,
        cluster: Cluster,
        assignments: Sequence[Assignment],
        on_records: Callable[[list[ConsumedRecord]], None],
        *,
        name: str = "bus",
        group: str | None = None,
        on_positions_known: Callable[[], None] = nothing,
        on_caught_up: Callable[[], None] = nothing,
        open_consumer: Callable[[], ConsumerLike] | None = None,
    ) -> None:
        """`on_records` is called on the Trio thread with bounded lists (about 128 KiB), per partition in order;
        `assignments` are pairs of a topic and where to begin; `group` is where `commit` stores offsets; `open_consumer`
        is for tests."""
        self.name = name
        cluster.clients[name] = self
        self.positions_known = trio.Event()
        self.caught_up = trio.Event()
        self.room: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.on_another: Callable[[str, str | None], None] = nothing
        self._on_records = on_records
        self._items: deque[Any] = deque()
        self._slots = threading.BoundedSemaphore(SLOTS)
        self._arrived = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        if open_consumer is None:
            from gateways.kafka import workers

            open_consumer = partial(cluster.when_let_in, partial(workers.Consumer, options, name, group))
        self._poller = Poller(name, open_consumer, cluster, assignments, self._hand_over)
        self._poller.on_positions_known = partial(self._reached, self.positions_known, on_positions_known)
        self._poller.on_caught_up = partial(self._reached, self.caught_up, on_caught_up)
        self._poller.on_another = self._another
        self._watchdog = Watchdog(f"consumer {name}", self._replace_poller)

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
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watchdog.run, self._poller)
                task_status.started()
                await self._deliver()
        finally:
            self._poller.abort()

    async def _replace_poller(self, poller: Poller) -> Poller:
        """Let another thread read on where a hanging one is; a list that it was handing over may come twice."""
        poller.abort()
        await trio.sleep(DEPOSE_WAIT)
        self._poller = poller.successor()
        return self._poller

    async def _deliver(self) -> None:
        while True:
            while self._items:
                if not callable(self._items[0]):
                    await self.room()
                item = self._items.popleft()
                self._slots.release()
                if callable(item):
                    item()
                else:
                    self._on_records(item)
                await trio.lowlevel.checkpoint()
            self._arrived = trio.Event()
            if not self._items:  # what came before the new event was made woke nobody
                await self._arrived.wait()

    def _hand_over(self, poller: Poller, item: Any) -> bool:
        """Queue `item` for the Trio thread; wait a moment for room (poller's thread)."""
        if poller is not self._poller or not self._slots.acquire(timeout=0.2):
            return False
        self._items.append(item)
        if self._token is not None:
            try:
                self._token.run_sync_soon(self._wake, idempotent=True)
            except trio.RunFinishedError:
                poller.abort()
        return True

    def _wake(self) -> None:
        self._arrived.set()

    @property
    def began(self) -> Mapping[Partition, Began]:
        """Where reading began, of partitions that are read from a checkpoint or their end; once positions are known."""
        return self._poller.began

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Have offsets stored in the group, within a second or so; what fails is not told."""
        self._poller.to_commit = dict(offsets)

    def lag(self) -> dict[Partition, Behind]:
        """Return how far `on_records` is behind Kafka in each partition, as of the last second."""
        while True:
            try:
                queued = tuple(self._items)
                break
            except RuntimeError:  # the poller's thread appended meanwhile
                continue
        lists = [item for item in queued if not callable(item)]
        return self._poller.figures.lag.behind(itertools.chain(*lists, self._poller.waiting()))

    def report(self) -> ClientReport:
        """Say how the consumer fares."""
        figures = self._poller.figures
        return ClientReport(
            kind="consumer",
            figures=figures.client,
            lag=self.lag(),
            skew=figures.lag.skew,
            failed_fetches=figures.failures.total,
            failed_fetch_rate=figures.failures.rate(time.monotonic()),
        )

    def counters(self) -> dict[str, int]:
        """Return what happened since the start."""
        return {
            "records_received": self._poller.received,
            "rebuilds": self._poller.rebuilds,
            **self._watchdog.counters(),
        }
