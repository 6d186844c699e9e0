"""A Store that fails when it is told to, and batches that end whoever reads them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from typing import Any

import attrs

from mqtt_trio.broker.store import Batch, Store, StoredState
from mqtt_trio.errors import StoreError


class Fault(Enum):
    """How one commit goes."""

    NONE = auto()
    BEFORE = auto()
    """It fails before anything was written."""
    AFTER = auto()
    """It is there and yet fails, as when the disk reports an error after it had written."""
    CRASH = auto()
    """The process dies before it: this and every later commit of this life fails, and nothing is written."""
    CRASH_AFTER = auto()
    """The process dies behind it: it is there, nobody is told, and every later commit of this life fails."""
    DIES = auto()
    """Something else than StoreError ends it, as a bug or want of memory does, before anything was written."""
    DIES_AFTER = auto()
    """The same once it is there."""
    HANGS = auto()
    """It waits until `FaultyStore.go_on` is set, then all goes well. Blocks its thread: not for a fake clock."""


class FaultyStore:
    """A life of `store` whose commits go by `faults`, one after the other; without more of them, all goes well.

    A test gives the same `store` to the next FaultyStore, as if it were the disk.
    """

    def __init__(self, store: Store, faults: Iterable[Fault] = (), *, dies_of: BaseException | None = None) -> None:
        """`dies_of` is what Fault.DIES raises; a RuntimeError unless given."""
        self.store = store
        self.faults = deque(faults)
        self.dies_of = dies_of or RuntimeError("planned: a bug")
        self.go_on = threading.Event()
        """Ends Fault.HANGS."""
        self.crashed = False
        self.commits = 0
        """Calls of `commit`, the failed ones too."""

    def load(self) -> StoredState:
        """Return what the store holds."""
        return self.store.load()

    def commit(self, batch: Batch) -> None:
        """Commit, or fail as planned."""
        self.commits += 1
        fault = Fault.NONE if not self.faults else self.faults.popleft()
        if self.crashed or fault is Fault.CRASH:
            self.crashed = True
            raise StoreError("planned: the process is dead")
        if fault is Fault.BEFORE:
            raise StoreError("planned: nothing was written")
        if fault is Fault.DIES:
            raise self.dies_of
        if fault is Fault.HANGS:
            self.go_on.wait()
        self.store.commit(batch)
        if fault is Fault.DIES_AFTER:
            raise self.dies_of
        if fault is Fault.CRASH_AFTER:
            self.crashed = True
        if fault in (Fault.AFTER, Fault.CRASH_AFTER):
            raise StoreError("planned: reported as failed after all was written")

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def describe(self) -> str:
        return f"{self.store.describe()}, with faults"


class Interruption(BaseException):
    """Ends a commit in the middle, as KeyboardInterrupt, SystemExit and MemoryError may."""


class _Rows(dict[Any, Any]):
    """Rows of a batch that end whoever reads them, once `left` have been read of the whole batch."""

    def __init__(self, rows: Any, left: list[int]) -> None:
        super().__init__(rows)
        self.left = left

    def __iter__(self) -> Iterator[Any]:
        return _read(super().__iter__(), self.left)

    def keys(self) -> Any:
        return _read(super().keys(), self.left)

    def values(self) -> Any:
        return _read(super().values(), self.left)

    def items(self) -> Any:
        return _read(super().items(), self.left)


class _Numbers(list[int]):
    """The same for numbers of rows."""

    def __init__(self, numbers: Iterable[int], left: list[int]) -> None:
        super().__init__(numbers)
        self.left = left

    def __iter__(self) -> Iterator[int]:
        return _read(super().__iter__(), self.left)


def _read(rows: Iterable[Any], left: list[int]) -> Iterator[Any]:
    for row in rows:
        left[0] -= 1
        if left[0] < 0:
            raise Interruption
        yield row


def dying(batch: Batch, rows: int) -> Batch:
    """Return a batch that is the same, and whose reader gets so many rows and then an exception."""
    left = [rows]
    parts: dict[str, Any] = {field.name: getattr(batch, field.name) for field in attrs.fields(Batch)}
    for name, part in parts.items():
        parts[name] = _Rows(part, left) if isinstance(part, dict) else _Numbers(part, left)
    return Batch(**parts)
