"""The archive store that keeps messages in memory: for tests, and for a short history without a disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import trio

from mqtt_trio.archive.store import Outcome
from mqtt_trio.broker.message import Message
from mqtt_trio.errors import StoreError

DEFAULT_MAX_SIZE: Final = 64 * 1024 * 1024
"""Bytes."""


class MemoryStore:
    """Keeps the newest messages, `max_size` bytes of them (`Message.size`) and for `retention` seconds.

    `clock` gives UTC seconds since the epoch.
    """

    def __init__(
        self,
        *,
        retention: float | None = None,
        max_size: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.size = 0
        """Bytes kept."""
        self._retention = retention
        self._max_size = DEFAULT_MAX_SIZE if max_size is None else max_size
        self._clock = clock
        self._messages: deque[Message] = deque()
        self._filled = trio.Event()
        self._stopped = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Let messages go when their time is over, until stopped."""
        async with trio.open_nursery() as nursery:
            if self._retention is not None:
                nursery.start_soon(self._expire, self._retention)
            task_status.started()
            await self._stopped.wait()
            nursery.cancel_scope.cancel()

    async def _expire(self, retention: float) -> None:
        while True:
            if not self._messages:
                self._filled = trio.Event()
                await self._filled.wait()
            # At least a millisecond, or a clock that is coarser than Trio's would make this spin.
            await trio.sleep(max(self._messages[0].published_at + retention - self._clock(), 0.001))
            self._drop_expired()

    def submit(self, batch: Sequence[Message], done: Callable[[Outcome], None]) -> None:
        """Keep `batch`; the outcome is known at once, so `done` is called before this returns."""
        outcome: dict[int, Exception] = {}
        for index, message in enumerate(batch):
            if message.size > self._max_size:
                outcome[index] = StoreError(f"a message of {message.size} bytes, the whole store has {self._max_size}")
                continue
            self._messages.append(message)
            self.size += message.size
        while self.size > self._max_size:
            self._drop_oldest()
        self._drop_expired()
        self._filled.set()
        done(outcome)

    def _drop_expired(self) -> None:
        if self._retention is None:
            return
        before = self._clock() - self._retention
        while self._messages and self._messages[0].published_at <= before:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self.size -= self._messages.popleft().size

    def messages(self) -> list[Message]:
        """Return what is kept, the oldest first."""
        self._drop_expired()
        return list(self._messages)

    async def stop(self) -> None:
        """End `run`; what is kept can still be read."""
        self._stopped.set()
        await trio.lowlevel.checkpoint()

    def trouble(self) -> str | None:
        """Return None: memory is always there."""
        return None

    def watch(self, changed: Callable[[], None]) -> None:
        """Do nothing: memory is never away."""

    def describe(self) -> str:
        """One phrase for the start-up summary."""
        return f"memory, {self._max_size // 1024 // 1024} MiB"
