"""Wills and session expiry: one task that sleeps until the broker's next deadline. No polling."""

from __future__ import annotations

import logging

import trio

from mqtt_trio.broker.broker import Broker

logger = logging.getLogger(__name__)


class DeadlineTimer:
    """Runs the broker's deadlines."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self._changed = trio.Event()
        broker.connections.deadline_added = self.look_again

    def look_again(self) -> None:
        """The broker has a deadline that may be earlier than the one that is slept for."""
        self._changed.set()

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            self._changed = trio.Event()
            deadline = self.broker.next_deadline()
            with trio.move_on_at(float("inf") if deadline is None else deadline):
                await self._changed.wait()
            try:
                self.broker.run_deadlines(trio.current_time())
            except Exception:  # one client's Will must not end the node; what was due beside it comes next
                logger.exception("a Will or a session's end failed by an error of the broker")
                self.broker.metrics.client_failures += 1
            self.broker.flush()
