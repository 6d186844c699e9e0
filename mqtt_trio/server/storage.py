"""The task that owns the store: takes the journal's batches, has a thread commit them, and tells the broker.

Commits follow each other without a pause while there are changes; everything that came during one goes into the next.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar

import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.broker.store import Store
from mqtt_trio.errors import StoreError

logger = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_FIRST: Final = 0.1
RETRY_LAST: Final = 5.0
"""Seconds between two attempts while the store takes nothing: doubled each time, from the first to the last."""


class RunSync(Protocol):
    """Runs a blocking call of the store; one at a time."""

    async def __call__(self, function: Callable[[], T]) -> T: ...


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking call in a thread. Cancelled, it is left to itself: a disk that hangs must not hold the process."""
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))


async def inline(function: Callable[[], T]) -> T:
    """Run a call of a store in memory at once: for tests on a fake clock, which does not see threads."""
    await trio.lowlevel.checkpoint()
    return function()


@contextmanager
def _without_collector() -> Iterator[None]:
    """Make a million objects that all stay without the garbage collector, which would look at them over and over and
    take almost half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Storage:
    """One broker's store, from load to close."""

    def __init__(self, broker: Broker, store: Store, run_sync: RunSync = in_thread) -> None:
        self.broker = broker
        self.store = store
        self._run_sync = run_sync
        self._changed = trio.Event()
        self._ended = trio.Event()
        self._closing = False
        self.found = (0, 0, 0)
        """Sessions, queued and retained messages that the store held at the start."""

    async def load(self) -> None:
        """Give the broker what the store held; before its listeners open.

        Raises:
          StoreError: the store cannot be opened.
        """
        with _without_collector():
            state = await self._run_sync(self.store.load)
            self.broker.journal.changed = self._look
            Recovery(self.broker, state, trio.current_time()).run()
        metrics = self.broker.metrics
        self.found = (metrics.sessions, metrics.messages_queued, len(state.retained))
        self.broker.flush()

    def describe(self) -> str:
        """One line for the start-up summary."""
        sessions, queued, retained = self.found
        held = f"{sessions} sessions, {queued} queued and {retained} retained messages"
        return f"{self.store.describe()}, with {held}"

    def _look(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Commit until `stop`, or until cancelled; then what was not committed is lost with the process."""
        journal = self.broker.journal
        delay = RETRY_FIRST
        while True:
            while not journal.dirty:
                if self._closing:
                    self._ended.set()
                    return
                self._changed = trio.Event()
                await self._changed.wait()
            if await self._commit():
                if self.broker.keeper.outage_since is None:
                    delay = RETRY_FIRST
            else:
                await trio.sleep(delay)
                delay = min(2 * delay, RETRY_LAST)

    async def _commit(self) -> bool:
        """Commit what there is; say whether the store took it."""
        broker = self.broker
        batch = broker.keeper.take()
        try:
            await self._run_sync(lambda: self.store.commit(batch))
        except StoreError as exc:
            if broker.keeper.outage_since is None:
                refused = "QoS 1 and 2 messages that need the store are refused until it takes them again"
                logger.error("%s; %s", exc, refused)  # noqa: TRY400 (the text says all)
            broker.keeper.failed(batch, str(exc), trio.current_time())
            return False
        finally:
            broker.flush()
        before = broker.keeper.outage_since
        broker.keeper.committed(trio.current_time())
        if before is not None and broker.keeper.outage_since is None:
            logger.warning("the store takes messages again")
        broker.flush()
        return True

    async def stop(self) -> None:
        """Commit what there is, then close. Bounded by the caller's cancel scope."""
        self._closing = True
        self._changed.set()
        await self._ended.wait()
        while self.broker.journal.dirty and await self._commit():
            pass  # what came up behind the end of `run`
        await self._run_sync(self.store.close)
