"""What an archive group needs of a store. Implementations: `sqlite`, `memory`, and `gateways.kafka.archive`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import attrs
import trio

from mqtt_trio.broker.message import Message
from mqtt_trio.errors import StoreError

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


class NotEmptyError(StoreError):
    """A store that should be rebuilt holds something that no unfinished rebuild has stored."""


@attrs.frozen
class Entry:
    """One record of an archive in its partition, on its way into stores that are rebuilt."""

    message: Message | None
    """None: the record holds none, but it was read."""
    partition: int
    offset: int


@attrs.frozen(kw_only=True)
class Progress:
    """How far a rebuild has come."""

    source: str
    """Where the records come from, such as `Kafka topic mqtt.archive`."""
    identity: str
    """Tells the source from another one of the same name; empty: nobody knows."""
    ends: Mapping[int, int]
    """Partition -> the offset that it ends in front of, as it was when the rebuild began."""
    next: Mapping[int, int]
    """Partition -> the offset to go on at."""

    @property
    def is_complete(self) -> bool:
        """Nothing is left to be read."""
        return all(self.next[partition] >= end for partition, end in self.ends.items())


class RebuildTarget(Protocol):
    """A store that is filled from an archive [K19]. Blocking; `open` first, `close` last. What is stored and how far
    that goes are committed together: one that was killed goes on where it was."""

    @property
    def name(self) -> str:
        """What people call it, such as `history of group Default`."""

    def open(self) -> Progress | None:
        """Open the store; return how far an unfinished rebuild has come, None: it is empty.

        Raises:
          NotEmptyError: it is neither.
          StoreError: a broker uses it, it cannot be read or written; the text says what helps.
        """

    def begin(self, progress: Progress) -> None:
        """Note that a rebuild has begun.

        Raises:
          StoreError: it cannot be written.
        """

    def store(self, entries: Sequence[Entry]) -> None:
        """Store what it wants of `entries`, which follow those before in their partitions. Those that it has already
        are passed.

        Raises:
          StoreError: it cannot be written; what was committed stays.
        """

    def finish(self) -> list[str]:
        """Make of it a store like any other; return lines about what was stored and what was not.

        Raises:
          StoreError: it cannot be written.
        """

    def close(self) -> None:
        """Close the store; what is not finished goes on at the next `open`."""
