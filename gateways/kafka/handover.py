"""The Trio half of a reader: it owns the thread (`reader_thread`), and has a bounded queue from there.

A hop per record takes 50 µs and more, a deque of lists with one wake per burst 0.4 µs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, Protocol, Self, TypeAlias, TypeVar

import trio

from gateways.kafka.reader_figures import ReaderFigures
from gateways.kafka.watchdog import DEPOSE_WAIT, Watchdog

HAND_OVER_WAIT: Final = 0.2
"""Seconds that a reader waits for a slot before it does something else."""


class Reader(Protocol):
    """What is needed of a reader; a `watchdog.Worker`."""

    beat: float
    doing: str
    figures: ReaderFigures
    rebuilds: int

    def run(self) -> None: ...
    def break_off(self) -> None: ...
    def abort(self) -> None: ...
    def successor(self) -> Self:
        """Return a reader in the place of this one, which hangs and was told to end."""


AnyReader = TypeVar("AnyReader", bound=Reader)
Item = TypeVar("Item")
Give: TypeAlias = Callable[[AnyReader, Item | Callable[[], None]], bool]
"""`Handover.hand_over`: waits a moment for room; returns whether there was some."""


class TrioThread:
    """The way from other threads to the Trio thread."""

    def __init__(self) -> None:
        self._token: trio.lowlevel.TrioToken | None = None

    @property
    def is_known(self) -> bool:
        """`enter` was called."""
        return self._token is not None

    def enter(self) -> None:
        """This is the thread."""
        self._token = trio.lowlevel.current_trio_token()

    def soon(self, callback: Callable[[], object]) -> bool:
        """Have `callback` called on the Trio thread; once, however often it is asked for until then. Any thread.

        Return False when Trio has ended: nobody waits for anything any more. Before `enter` nothing is called.
        """
        if self._token is not None:
            try:
                self._token.run_sync_soon(callback, idempotent=True)
            except trio.RunFinishedError:
                return False
        return True


class Handover(Generic[AnyReader, Item]):
    """One reader, whose lists of records are handed out one by one, and callbacks in between them.

    Attributes:
      reader: the one that reads now. What another one hands over, which was left behind, is not taken.
      room: awaited before each list of records; while it waits, the reader stops after `slots` more of them.
      ended: `run` is over.
    """

    def __init__(
        self,
        name: str,
        make_reader: Callable[[Give[AnyReader, Item]], AnyReader],
        take: Callable[[Item], None],
        slots: int,
        wait: float = HAND_OVER_WAIT,
    ) -> None:
        """`name` stands in logs; `make_reader` is given `hand_over`; `take` gets each list on the Trio thread.
        `slots`: items that wait for it, beyond them the reader waits; `wait`: seconds, before it is told that there is
        no room."""
        self.room: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.ended = trio.Event()
        self.trio_thread = TrioThread()
        self._take = take
        self._items: deque[Any] = deque()
        self._slots = threading.BoundedSemaphore(slots)
        self._wait = wait
        self._arrived = trio.Event()
        self.reader = make_reader(self.hand_over)
        self._watchdog = Watchdog(f"consumer {name}", self._replace)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the reader's thread until cancelled, or until the reader was told to end; `started()` at once. Cancelled,
        the thread is told to end and left to do so.

        Raises:
          whatever `take` and `room` raise.
        """
        self.trio_thread.enter()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deliver)
                task_status.started()
                await self._watchdog.run(self.reader)
                nursery.cancel_scope.cancel()
        finally:
            self.ended.set()
            self.reader.abort()

    async def _replace(self, reader: AnyReader) -> AnyReader:
        """Let another thread read on where a hanging one is; a list that it was handing over may come twice."""
        reader.abort()
        await trio.sleep(DEPOSE_WAIT)
        self.reader = reader.successor()
        return self.reader

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
                    self._take(item)
                await trio.lowlevel.checkpoint()
            self._arrived = trio.Event()
            if not self._items:  # what came before the new event was made woke nobody
                await self._arrived.wait()

    def hand_over(self, reader: AnyReader, item: Item | Callable[[], None]) -> bool:
        """Queue `item` for the Trio thread; wait a moment for room, and return whether there was some (the reader's
        thread)."""
        if reader is not self.reader or not self._slots.acquire(timeout=self._wait):
            return False
        self._items.append(item)
        self.soon(self._wake)
        return True

    def soon(self, callback: Callable[[], object]) -> None:
        """Have `callback` called on the Trio thread; any thread. Where Trio has ended, the reader ends as well."""
        if not self.trio_thread.soon(callback):
            self.reader.abort()

    def _wake(self) -> None:
        self._arrived.set()

    def waiting(self) -> list[Item]:
        """Return the lists of records that were handed over and not taken yet."""
        while True:
            try:
                queued = tuple(self._items)
                break
            except RuntimeError:  # the reader's thread appended meanwhile
                continue
        return [item for item in queued if not callable(item)]

    def counters(self) -> dict[str, int]:
        """Return what happened since the start."""
        return {"rebuilds": self.reader.rebuilds, **self._watchdog.counters()}
