"""The Trio half of a group member: what `GroupPoller` reads comes here in lists of bounded size, in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import attrs
import trio

from gateways.kafka.bridge import CLOSE_GRACE
from gateways.kafka.client_settings import auto_commit_interval
from gateways.kafka.cluster import Cluster
from gateways.kafka.exposed import ClientReport
from gateways.kafka.group_poller import GroupPoller, Handed, MemberLike, Membership
from gateways.kafka.handover import Give, Handover
from gateways.kafka.lag import Partition
from gateways.kafka.options import KafkaOptions

SLOTS: Final = 4
"""Lists of records that wait for the Trio thread; then nothing more is fetched, and the membership goes on."""
HAND_OVER_WAIT: Final = 0.1
"""Seconds that the poller waits for a slot before it polls again."""


@attrs.define(eq=False, repr=False)
class GroupBridge:
    """One kafka-python consumer in a thread of its own, a member of a group.

    Attributes:
      joined: set when this member has got partitions for the first time.
      room: awaited before each list of records.
    """

    _options: KafkaOptions
    _cluster: Cluster
    _topic: str
    _group: str
    _on_records: Callable[[Handed], None]
    """Called on the Trio thread."""
    name: str = attrs.field(kw_only=True)
    _open_consumer: Callable[[Membership], MemberLike] | None = attrs.field(default=None, kw_only=True)
    """For tests."""

    joined: trio.Event = attrs.field(factory=trio.Event, init=False)
    room: Callable[[], Awaitable[None]] = attrs.field(default=trio.lowlevel.checkpoint, init=False)
    _handover: Handover[GroupPoller, Handed] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._cluster.clients[self.name] = self
        self._handover = Handover(self.name, self._make_poller, self._on_records, SLOTS, HAND_OVER_WAIT)
        self._handover.room = self._wait_for_room

    def _wait_for_room(self) -> Awaitable[None]:
        return self.room()

    def _make_poller(self, hand_over: Give[GroupPoller, Handed]) -> GroupPoller:
        open_consumer = self._open_consumer or self._open_real_one
        poller = GroupPoller(self.name, self._topic, open_consumer, self._cluster, hand_over)
        poller.on_joined = self._note_joined
        if self._open_consumer is None:
            poller.mend = self._remedy
        if (interval := auto_commit_interval(self._options)) is not None:
            poller.commit_automatically(interval)
        return poller

    def _remedy(self, exc: Exception) -> str:
        from gateways.kafka.stream_consumer import mend_of

        return mend_of(self._options, self._group, exc)

    def _open_real_one(self, membership: Membership) -> MemberLike:
        from gateways.kafka.stream_consumer import StreamConsumer

        make = partial(StreamConsumer, self._options, self.name, self._group, self._topic, membership)
        return self._cluster.when_let_in(make)

    @property
    def _poller(self) -> GroupPoller:
        return self._handover.reader

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the poller thread until cancelled or stopped; `started()` at once, also while Kafka is away.

        Raises:
          whatever `on_records` raises.
        """
        await self._handover.run(task_status=task_status)

    async def stop(self) -> None:
        """Store the offsets of what is done with, leave the group. Bounded by the caller's cancel scope, and by itself:
        a thread that does not come back is left behind."""
        self._poller.abort()
        if not self._handover.trio_thread.is_known or not self._poller.owned:
            return  # there is nothing to store; it may be about to connect, which takes seconds
        with trio.move_on_after(4 * CLOSE_GRACE):
            await self._handover.ended.wait()

    def _note_joined(self) -> None:
        self._handover.soon(self.joined.set)

    @property
    def poller(self) -> GroupPoller:
        """What reads, in its thread; for settings before `run`."""
        return self._poller

    @property
    def owned(self) -> frozenset[Partition]:
        """Partitions that are this node's share."""
        return self._poller.owned

    def report(self) -> ClientReport:
        """Say how the consumer fares."""
        return self._poller.figures.report(self._poller.figures.lag.behind())

    def counters(self) -> dict[str, int]:
        """Return what happened since the start."""
        return self._handover.counters()
