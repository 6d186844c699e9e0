"""Store files as tests need them: filled, looked at, damaged."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from mqtt_trio.broker.store import Batch, StoredState
from mqtt_trio.server.sqlite_store import SqliteStore
from mqtt_trio.testing.stores import delivery

SESSIONS = 300


def realistic(first: int = 1, count: int = SESSIONS) -> Batch:
    """Return sessions with a subscription, a queue and open QoS 2 identifiers, groups, retained messages."""
    batch = Batch()
    for owner in range(first, first + count):
        will = b"a will of client %d" % owner if owner % 5 == 0 else None
        batch.sessions[owner] = (owner, f"client-{owner}", f"user-{owner % 7}", 3600, 1.8e9, will, None)
        batch.subscriptions[owner, f"site/{owner}/#"] = (owner, f"site/{owner}/#", 1, None)
        batch.received[owner, owner % 65_535 + 1] = True
        number = owner * 100
        batch.contents[number] = b"frame that many share %d" % owner
        for each in range(number, number + 10):
            batch.deliveries[each] = delivery(each, owner, each % 3, frame=b"%d " % each + b"x" * 100)
        batch.deliveries[number + 10] = delivery(number + 10, owner, content=number, frame=None)
        batch.retained[f"site/{owner}/temperature"] = (f"site/{owner}/temperature", b"y" * 90, f"client-{owner}", 1.7e9)
    for number in range(12):
        batch.marks[f"marks/{first}/{number}"] = b"position %d" % number
    batch.groups[first + count] = "$share/group/site/+/temperature"
    return batch


def fill(path: Path, *batches: Batch) -> None:
    """Make a file that holds `batches`, closed."""
    store = SqliteStore(path, synchronous="OFF")
    store.load()
    for batch in batches:
        store.commit(batch)
    store.close()


def as_after_a_kill(path: Path, *batches: Batch) -> tuple[bytes, bytes]:
    """Return file and log as a kill leaves them behind the last of `batches`."""
    store = SqliteStore(path, synchronous="OFF")
    store.load()
    for batch in batches:
        store.commit(batch)
    contents = file_and_log(path)
    store.close()
    return contents


def file_and_log(path: Path) -> tuple[bytes, bytes]:
    """Return both as they are while the store is open."""
    # Reading the file closes a descriptor of it and with it SQLite's own lock; nobody else is there.
    return path.read_bytes(), Path(f"{path}-wal").read_bytes()


def put(path: Path, file: bytes | bytearray, log: bytes | bytearray = b"") -> None:
    """Write both and take away what else is beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.iterdir():
        other.unlink()
    path.write_bytes(file)
    if log:
        Path(f"{path}-wal").write_bytes(log)


def load(path: Path) -> StoredState:
    """Return what a new life finds."""
    store = SqliteStore(path, synchronous="OFF")
    try:
        return store.load()
    finally:
        store.close()


def set_aside(path: Path) -> list[Path]:
    """Return the files that were set aside, without their logs."""
    return sorted(p for p in path.parent.glob(f"{path.name}.corrupt-*") if not p.name.endswith("-wal"))


def query(path: Path, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement with a connection of its own."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(statement).fetchall()


def total(state: StoredState) -> int:
    """Return how many rows there are."""
    parts = (state.sessions, state.groups, state.subscriptions, state.deliveries, state.contents, state.received)
    return sum(map(len, (*parts, state.retained, state.marks)))
