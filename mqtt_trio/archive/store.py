"""What an archive group needs of a store. Implementations: `sqlite`, `memory`, and `gateways.kafka.archive`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import trio

from mqtt_trio.broker.message import Message

Outcome: TypeAlias = Mapping[int, Exception]
"""Index in the batch -> why that message is not stored. Empty: all of it is stored."""


class ArchiveStore(Protocol):
    """Where one archive group keeps its messages. All methods are called on the Trio thread."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Own the store's thread until cancelled; `started()` once `submit` may be called.

        Raises:
          StoreError: the store cannot be opened.
        """

    def submit(self, batch: Sequence[Message], done: Callable[[Outcome], None]) -> None:
        """Store `batch` behind all batches before it. Never blocks; the group bounds what is submitted and not done.

        `done` is called on the Trio thread, in the order of submission, when the outcome of the whole batch is known.
        A store that is away for a time keeps the batch and goes on trying; it does not fail it.
        """

    async def stop(self) -> None:
        """Store what was submitted, then close. Bounded by the caller's cancel scope; cancelled, it closes at once."""

    def trouble(self) -> str | None:
        """Return why nothing can be stored at the moment: the store is away. None: it is not, as far as is known."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` on the Trio thread when `trouble` begins and when it ends. Before `run`, at most once."""

    def describe(self) -> str:
        """One phrase for the start-up summary, such as `SQLite data/archive-Default.sqlite3`."""
