"""Watches the threads that make blocking calls: one that gives no sign of life is reported and replaced.

A thread cannot be ended from outside. One that hangs in a call is left behind: it is told to end should it ever return,
what it had goes to its successor, and nobody waits for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, Protocol, TypeVar

import trio

log = logging.getLogger("gateways.kafka")

LOOK_INTERVAL: Final = 5.0
SILENCE: Final = 30.0
"""Seconds without a sign of life after which a thread counts as hanging."""
PAUSE: Final = 1.0
"""Seconds by which a look may be late on a busy machine."""
MOST_LEFT: Final = 3
"""Threads of one kind that are left behind at the same time. Outcome: further ones are reported, not replaced."""
REPORT_INTERVAL: Final = 60.0
"""Seconds between two lines about a thread that is not replaced."""
DEPOSE_WAIT: Final = 0.05
"""Seconds that a thread which turns out not to hang gets to take its hands off everything."""
WAITING: Final = math.inf
"""The `beat` of a thread that waits for work."""


class Worker(Protocol):
    """What a thread does."""

    beat: float
    """`time.monotonic()` of its last sign of life; WAITING: it has nothing to do."""
    doing: str
    """What it does since then, as in "hangs while ..."."""

    def run(self) -> None:
        """Work until told to end. In the thread."""

    def break_off(self) -> None:
        """Try to bring the call to an end in which the thread hangs; may block for ever."""


AnyWorker = TypeVar("AnyWorker", bound=Worker)


class Watchdog(Generic[AnyWorker]):
    """Owns the thread of one worker at a time. Trio thread only.

    Attributes:
      hangs: how often a thread was found hanging.
      left_behind: threads that hang now and have a successor.
    """

    def __init__(self, name: str, replace: Callable[[AnyWorker], Awaitable[AnyWorker]]) -> None:
        """`replace` takes everything from a worker that hangs and returns its successor."""
        self.hangs = 0
        self.left_behind = 0
        self._name = name
        self._replace = replace
        self._current: AnyWorker | None = None
        self._reported_at = -math.inf
        self._hung: AnyWorker | None = None

    async def run(self, worker: AnyWorker) -> None:
        """Run `worker`, then its successors, until one of them returns. Cancelled, the threads are left to themselves.

        Raises:
          whatever the worker raises.
        """
        async with trio.open_nursery() as nursery:
            self._current = worker
            nursery.start_soon(self._own, worker, nursery.cancel_scope)
            while True:
                before = time.monotonic()
                await trio.sleep(LOOK_INTERVAL)
                now = time.monotonic()
                silence = now - worker.beat
                if silence < SILENCE or now - before > 2 * LOOK_INTERVAL + PAUSE:
                    continue  # in the latter case this thread stood still as well: all of the process did
                may_replace = self.left_behind < MOST_LEFT
                self._report(worker, silence, may_replace=may_replace)
                if may_replace:
                    self._current = None  # it may return at this very moment
                    self.left_behind += 1
                    hanging, worker = worker, await self._replace(worker)
                    self._current = worker
                    nursery.start_soon(self._break_off, hanging)
                    nursery.start_soon(self._own, worker, nursery.cancel_scope)

    async def _own(self, worker: AnyWorker, scope: trio.CancelScope) -> None:
        await trio.to_thread.run_sync(worker.run, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        if worker is self._current:
            scope.cancel()
        else:
            self.left_behind -= 1
            log.warning("Kafka %s: a thread that was left behind has ended after all", self._name)

    async def _break_off(self, worker: AnyWorker) -> None:
        try:
            await trio.to_thread.run_sync(worker.break_off, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        except Exception as exc:  # it is given up anyway
            log.debug("Kafka %s: breaking off what hangs failed: %s", self._name, exc)

    def _report(self, worker: AnyWorker, silence: float, *, may_replace: bool) -> None:
        if worker is not self._hung:
            self.hangs += 1
            self._hung = worker
            self._reported_at = -math.inf
        if time.monotonic() - self._reported_at < REPORT_INTERVAL:
            return
        self._reported_at = time.monotonic()
        what = "it is replaced" if may_replace else "too many hang already, it is not replaced; restart the broker"
        log.error("Kafka %s hangs while %s, for %.0f s: %s", self._name, worker.doing, silence, what)

    def counters(self) -> dict[str, int]:
        """Return what happened since the start; `threads_left` is a gauge."""
        return {"threads_hung": self.hangs, "threads_left": self.left_behind}
