"""A Store that fails when it is told to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import Enum, auto

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


class FaultyStore:
    """A life of `store` whose commits go by `faults`, one after the other; without more of them, all goes well.

    A test gives the same `store` to the next FaultyStore, as if it were the disk.
    """

    def __init__(self, store: Store, faults: Iterable[Fault] = ()) -> None:
        self.store = store
        self.faults = deque(faults)
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
        self.store.commit(batch)
        if fault is Fault.CRASH_AFTER:
            self.crashed = True
        if fault is not Fault.NONE:
            raise StoreError("planned: reported as failed after all was written")

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def describe(self) -> str:
        return f"{self.store.describe()}, with faults"
