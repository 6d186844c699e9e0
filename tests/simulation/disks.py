"""What a simulated broker's store is on, and what a kill leaves of the batch that was being written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Protocol

from mqtt_trio.broker.store import Batch, MemoryStore, StoredState
from mqtt_trio.server.sqlite_store import FILE_NAME, SqliteStore


class Disk(Protocol):
    """Outlives brokers."""

    def load(self) -> StoredState:
        """Begin a life: return what is there."""

    def commit(self, batch: Batch) -> None:
        """Keep a batch."""

    def crash(self, batch: Batch | None, rng: random.Random) -> None:
        """The process is killed; `batch` was being written: all of it is there, or nothing."""

    def close(self) -> None:
        """The process ends in peace."""


class MemoryDisk:
    """A MemoryStore that is handed on."""

    def __init__(self) -> None:
        self.store = MemoryStore()

    def load(self) -> StoredState:
        return self.store.load()

    def commit(self, batch: Batch) -> None:
        self.store.commit(batch)

    def crash(self, batch: Batch | None, rng: random.Random) -> None:
        if batch is not None and rng.random() < 0.5:
            self.store.commit(batch)

    def close(self) -> None:
        pass


class FileDisk:
    """The real file and its log, as they are at the instant of the kill: the next life gets a copy, whose log ends
    somewhere in the last commit, or in garbage."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lives = 0
        self.torn = 0
        """Logs that ended in the middle of a commit."""
        self.store = self._store()

    def _store(self) -> SqliteStore:
        return SqliteStore(self.path, synchronous="OFF")

    @property
    def path(self) -> Path:
        return self.directory / str(self.lives) / FILE_NAME

    @property
    def log(self) -> Path:
        return Path(f"{self.path}-wal")

    def load(self) -> StoredState:
        return self.store.load()

    def commit(self, batch: Batch) -> None:
        self.store.commit(batch)

    def crash(self, batch: Batch | None, rng: random.Random) -> None:
        before = after = self._log_size()
        if batch is not None:
            self.store.commit(batch)
            after = self._log_size()
        old_path, old_log = self.path, self.log
        self.lives += 1
        self.path.parent.mkdir(parents=True)
        shutil.copyfile(old_path, self.path)
        if old_log.exists():
            shutil.copyfile(old_log, self.log)
        self.store.close()
        if after > before:
            self._tear(before, after, rng)
        self.store = self._store()

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _tear(self, before: int, after: int, rng: random.Random) -> None:
        """Damage the log behind `before`, or leave it whole."""
        data = bytearray(self.log.read_bytes())
        at = rng.randrange(before, after)
        kind = rng.choice(("whole", "absent", "cut", "garbage"))
        if kind == "absent":
            del data[before:]
        elif kind == "cut":
            del data[at:]
        elif kind == "garbage":
            data[at:] = rng.randbytes(after - at)
        self.torn += kind in ("cut", "garbage")
        self.log.write_bytes(data)

    def close(self) -> None:
        self.store.close()
