"""The Trio half of a group member: what `GroupPoller` reads comes here in lists of bounded size, in order."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio

from gateways.kafka.bridge import CLOSE_GRACE, DEPOSE_WAIT
from gateways.kafka.cluster import Cluster
from gateways.kafka.exposed import ClientReport
from gateways.kafka.group_poller import GroupPoller, Handed, MemberLike, Membership
from gateways.kafka.options import KafkaOptions
from gateways.kafka.poller import Partition
from gateways.kafka.watchdog import Watchdog

log = logging.getLogger("gateways.kafka")

SLOTS: Final = 4
"""Lists of records that wait for the Trio thread; then nothing more is fetched, and the membership goes on."""
HAND_OVER_WAIT: Final = 0.1
"""Seconds that the poller waits for a slot before it polls again."""


class GroupBridge:
    """One kafka-python consumer in a thread of its own, a member of a group.

    Attributes:
      joined: set when this member has got partitions for the first time.
      room: awaited before each list of records.
    """

    def __init__(
        self,
        options: KafkaOptions,
        cluster: Cluster,
        topic: str,
        group: str,
        on_records: Callable[[Handed], None],
        *,
        name: str,
        open_consumer: Callable[[Membership], MemberLike] | None = None,
    ) -> None:
        """`on_records` is called on the Trio thread; `open_consumer` is for tests."""
        self.name = name
        cluster.clients[name] = self
        self.joined = trio.Event()
        self.room: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self._on_records = on_records
        self._items: deque[Handed] = deque()
        self._slots = threading.BoundedSemaphore(SLOTS)
        self._arrived = trio.Event()
        self._ended = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        if open_consumer is None:
            from gateways.kafka.stream_consumer import StreamConsumer

            def open_it(membership: Membership) -> MemberLike:
                return cluster.when_let_in(partial(StreamConsumer, options, name, group, topic, membership))

            open_consumer = open_it
        self._poller = GroupPoller(name, topic, open_consumer, cluster, self._hand_over)
        self._poller.on_joined = self._note_joined
        self._watchdog = Watchdog(f"consumer {name}", self._replace_poller)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the poller thread until cancelled or stopped; `started()` at once, also while Kafka is away.

        Raises:
          whatever `on_records` raises.
        """
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deliver)
                task_status.started()
                await self._watchdog.run(self._poller)
                nursery.cancel_scope.cancel()
        finally:
            self._ended.set()
            self._poller.abort()

    async def stop(self) -> None:
        """Store the offsets of what is done with, leave the group. Bounded by the caller's cancel scope, and by itself:
        a thread that does not come back is left behind."""
        self._poller.abort()
        if self._token is None or not self._poller.owned:
            return  # there is nothing to store; it may be about to connect, which takes seconds
        with trio.move_on_after(4 * CLOSE_GRACE):
            await self._ended.wait()

    async def _replace_poller(self, poller: GroupPoller) -> GroupPoller:
        poller.abort()
        await trio.sleep(DEPOSE_WAIT)
        self._poller = poller.successor()
        return self._poller

    async def _deliver(self) -> None:
        while True:
            while self._items:
                await self.room()
                item = self._items.popleft()
                self._slots.release()
                self._on_records(item)
                await trio.lowlevel.checkpoint()
            self._arrived = trio.Event()
            if not self._items:  # what came before the new event was made woke nobody
                await self._arrived.wait()

    def _hand_over(self, poller: GroupPoller, item: Handed) -> bool:
        """Queue `item` for the Trio thread; wait a moment for room (poller's thread)."""
        if poller is not self._poller or not self._slots.acquire(timeout=HAND_OVER_WAIT):
            return False
        self._items.append(item)
        self._soon(self._wake)
        return True

    def _wake(self) -> None:
        self._arrived.set()

    def _note_joined(self) -> None:
        self._soon(self.joined.set)

    def _soon(self, callback: Callable[[], Any]) -> None:
        if self._token is not None:
            try:
                self._token.run_sync_soon(callback, idempotent=True)
            except trio.RunFinishedError:
                self._poller.abort()

    @property
    def owned(self) -> frozenset[Partition]:
        """Partitions that are this node's share."""
        return self._poller.owned

    def report(self) -> ClientReport:
        """Say how the consumer fares."""
        figures = self._poller.figures
        return ClientReport(
            kind="consumer",
            figures=figures.client,
            lag=figures.lag.behind(),
            skew=figures.lag.skew,
            failed_fetches=figures.failures.total,
            failed_fetch_rate=figures.failures.rate(time.monotonic()),
        )

    def counters(self) -> dict[str, int]:
        """Return what happened since the start."""
        return {"rebuilds": self._poller.rebuilds, **self._watchdog.counters()}
