"""The task that owns the store: takes the journal's batches, has a thread commit them, and tells the broker.

Commits follow each other without a pause while there are changes; everything that came during one goes into the next.

However a commit ends, it failed unless it returned: what the store's thread dies of, be it a bug or want of memory, is
one more reason to offer the same changes again later, and so is a thread that cannot be started. A commit that does not
end holds back what waits for it, and the log says so. Nothing is acknowledged in any of these cases.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
SLOW_AFTER: Final = 10.0
"""Seconds that a commit may take before the log says that it has not ended."""


class DiedError(StoreError):
    """Something else than StoreError came out of the store, or it could not be asked at all."""


class RunSync(Protocol):
    """Runs a blocking call of the store; one at a time."""

    async def __call__(self, function: Callable[[], T]) -> T: ...


class InThread:
    """Runs the blocking calls of one store in threads. Cancelled, a call is left to itself: a disk that hangs must not
    hold the process. The next call still waits for its end, since a store takes one at a time."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)

    async def __call__(self, function: Callable[[], T]) -> T:
        """Run one call."""
        return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=self._limiter)


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

    def __init__(self, broker: Broker, store: Store, run_sync: RunSync | None = None) -> None:
        self.broker = broker
        self.store = store
        self._run_sync = run_sync or InThread()
        self._changed = trio.Event()
        self._ended = trio.Event()
        self._closing = False
        self._answer_by = math.inf
        """Until when the commit that is out is not slow; no time when none is out, or when it was told already."""
        self._began_at = 0.0
        self._slow = False
        """Whether it was told that the store does not answer."""
        self._alarm = trio.CancelScope()
        """Wakes `_watch` at `_answer_by`. A deadline costs a commit less than a task."""
        self.found = (0, 0, 0)
        """Sessions, queued and retained messages that the store held at the start."""

    async def load(self) -> None:
        """Give the broker what the store held; before its listeners open. Wills and sessions that are due wait for the
        `DeadlineTimer`, which starts once every tap is there.

        Raises:
          StoreError: the store cannot be opened.
        """
        with _without_collector():
            try:
                state = await self._ask(self.store.load)
            except DiedError as exc:
                logger.error("%s", exc, exc_info=exc.__cause__)  # noqa: TRY400
                raise
            self.broker.journal.changed = self._look
            Recovery(self.broker, state, trio.current_time()).restore()
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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            await self._commit_until_closing()
            nursery.cancel_scope.cancel()

    async def _commit_until_closing(self) -> None:
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

    async def _watch(self) -> None:
        """Tell of a commit that does not end: whoever waits for it is told nothing."""
        while True:
            self._alarm = trio.CancelScope(deadline=self._answer_by)
            with self._alarm:
                await trio.sleep_forever()
            if trio.current_time() >= self._answer_by:
                self._answer_by = math.inf
                self._slow = True
                logger.warning(
                    "session store (%s) has not answered for %g s; QoS 1 and 2 messages that need it wait for it",
                    self.store.describe(),
                    SLOW_AFTER,
                )

    async def _ask(self, function: Callable[[], T]) -> T:
        """Have the store do something, in its thread.

        Raises:
          StoreError: it failed, whatever it raised.
        """
        name = self.store.describe()

        def guarded() -> T:
            try:
                return function()
            except (StoreError, KeyboardInterrupt):
                raise
            except BaseException as exc:  # also SystemExit, which would end the node
                raise DiedError(f"session store ({name}) failed unexpectedly: {_phrase(exc)}") from exc

        try:
            return await self._run_sync(guarded)
        except StoreError:
            raise
        except Exception as exc:
            raise DiedError(f"session store ({name}) cannot be asked: {_phrase(exc)}") from exc

    async def _commit(self) -> bool:
        """Commit what there is; say whether the store took it."""
        broker = self.broker
        batch = broker.keeper.take()
        self._began_at = trio.current_time()
        self._answer_by = self._alarm.deadline = self._began_at + SLOW_AFTER
        try:
            await self._ask(partial(self.store.commit, batch))
        except StoreError as exc:
            self._answered()
            if broker.keeper.outage_since is None:
                refused = "QoS 1 and 2 messages that need the store are refused until it takes them again"
                logger.error("%s; %s", exc, refused, exc_info=_place(exc))  # noqa: TRY400 (most say all)
            elif isinstance(exc, DiedError):
                logger.debug("%s", exc, exc_info=exc.__cause__)
            broker.keeper.failed(batch, str(exc), trio.current_time())
            return False
        finally:
            broker.flush()
        self._answered()
        before = broker.keeper.outage_since
        broker.keeper.committed(trio.current_time())
        if before is not None and broker.keeper.outage_since is None:
            logger.warning("the store takes messages again")
        broker.flush()
        return True

    def _answered(self) -> None:
        self._answer_by = self._alarm.deadline = math.inf
        if self._slow:
            self._slow = False
            logger.warning("session store: it has answered after %.0f s", trio.current_time() - self._began_at)

    async def stop(self) -> None:
        """Commit what there is, then close. Bounded by the caller's cancel scope."""
        self._closing = True
        self._changed.set()
        await self._ended.wait()
        while self.broker.journal.dirty and await self._commit():
            pass  # what came up behind the end of `run`
        try:
            await self._ask(self.store.close)
        except StoreError as exc:
            logger.error("%s while it was closed; what was committed stays", exc, exc_info=_place(exc))  # noqa: TRY400


def _place(exc: StoreError) -> BaseException | None:
    """Of an error that nobody expected, the place may be what matters."""
    return exc.__cause__ if isinstance(exc, DiedError) else None


def _phrase(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
