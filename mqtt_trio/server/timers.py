"""Tasks of the clock: deferred work, Wills and session expiry when they are due, `$SYS` topics every few seconds."""

from __future__ import annotations

import logging

import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.sys_topics import SysTopics

logger = logging.getLogger(__name__)


class DeadlineTimer:
    """Runs the broker's deadlines: sleeps until the next one, never polls."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self._changed = trio.Event()
        broker.connections.deadline_added = self.look_again

    def look_again(self) -> None:
        """The broker has a deadline that may be earlier than the one that is slept for."""
        self._changed.set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once what was due already is done."""
        self._run_due()
        task_status.started()
        while True:
            self._changed = trio.Event()
            deadline = self.broker.next_deadline()
            with trio.move_on_at(float("inf") if deadline is None else deadline):
                await self._changed.wait()
            self._run_due()

    def _run_due(self) -> None:
        try:
            self.broker.run_deadlines(trio.current_time())
        except Exception:  # one client's Will must not end the node; what was due beside it comes next
            logger.exception("a Will or a session's end failed by an error of the broker")
            self.broker.metrics.client_failures += 1
        self.broker.flush()


class SysTopicsTimer:
    """Publishes the `$SYS` topics."""

    def __init__(self, sys_topics: SysTopics, interval: float) -> None:
        """`interval` is seconds, more than 0."""
        self.sys_topics = sys_topics
        self.interval = interval

    async def run(self) -> None:
        """Publish at once, then every `interval`, until cancelled."""
        broker = self.sys_topics.broker
        next_at = trio.current_time()
        while True:
            try:
                self.sys_topics.publish(trio.current_time())
            except Exception:  # a figure is no reason to end the node
                logger.exception("publishing $SYS failed by an error of the broker")
                broker.metrics.client_failures += 1
            broker.flush()
            next_at = max(next_at + self.interval, trio.current_time())
            await trio.sleep_until(next_at)
