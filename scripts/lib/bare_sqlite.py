"""What SQLite alone can do: the rows that kept messages are, written and removed with plain sqlite3 in one thread.

    bare_sqlite.py FILE MESSAGES_A_COMMIT SECONDS QOS

Prints messages per second. Each commit inserts the rows of its messages and removes those of the commit before; at
QoS 2 a commit in between notes their PUBREC. Only the time from BEGIN to the end of COMMIT counts: the rows are made
before. The tables are the store's, which makes the file; everything else is sqlite3 as its documentation shows it.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mqtt_trio.broker.store import Batch
from mqtt_trio.server.sqlite_store import SqliteStore
from mqtt_trio.server.store_rows import FLAGS_WEIGHT, delivery_checksum

LEAST_COMMITS: Final = 3
OWNERS: Final = 10
FRAME: Final = b"x" * 76
"""As long as the PUBLISH of scripts/load/mqttload.c."""
RELEASED: Final = 8
PRAGMAS: Final = {
    "locking_mode": "EXCLUSIVE",
    "cache_size": "-32768",
    "secure_delete": "OFF",
    "recursive_triggers": "OFF",
    "wal_autocheckpoint": "1000",
    "journal_size_limit": "8388608",
    "journal_mode": "WAL",
    "synchronous": "FULL",
}
"""The store's; a test compares them."""
INSERT: Final = "INSERT INTO deliveries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
RELEASE: Final = "UPDATE deliveries SET flags = ?, checksum = ? WHERE number = ?"
REMOVE: Final = "DELETE FROM deliveries WHERE number BETWEEN ? AND ?"
"""The numbers of a commit follow each other: the quickest way to say so."""

Rows = list[tuple[Any, ...]]


def make(path: Path) -> None:
    """Make a store's file with sessions that messages may belong to."""
    store = SqliteStore(path)
    store.load()
    store.commit(Batch(sessions={n: (n, f"c{n}", None, 3600, None, None, None) for n in range(1, OWNERS + 1)}))
    store.close()


def connect(path: Path) -> sqlite3.Connection:
    """Open it as the store does."""
    db = sqlite3.connect(path, isolation_level=None)
    for name, value in PRAGMAS.items():
        db.execute(f"PRAGMA {name} = {value}").fetchall()
    return db


def rows_of(numbers: range, qos: int) -> Rows:
    """Make the rows of messages on their way."""
    rows: Rows = []
    for n in numbers:
        row = (n, n % OWNERS + 1, n // OWNERS % 65_535 + 1, qos, None, 4, 1.7e9 + n / 1e6, 0, FRAME)
        rows.append((*row, delivery_checksum(row)))
    return rows


def commit(db: sqlite3.Connection, new: Rows, released: Sequence[tuple[int, int, int]], gone: range) -> float:
    """Commit one batch; return the seconds that it took."""
    begin = time.perf_counter()
    db.execute("BEGIN IMMEDIATE")
    db.executemany(INSERT, new)
    if released:
        db.executemany(RELEASE, released)
    if gone:
        db.execute(REMOVE, (gone[0], gone[-1]))
    db.execute("COMMIT")
    return time.perf_counter() - begin


def run(path: Path, size: int, seconds: float, qos: int) -> float:
    """Commit batches of `size` messages for so long, a few at least; return messages per second."""
    make(path)
    db = connect(path)
    spent, number = 0.0, 0
    before: Rows = []
    gone = range(0)
    while spent < seconds or number < LEAST_COMMITS * size:
        new = rows_of(range(number + 1, number + size + 1), qos)
        number += size
        released = []
        if qos == 2:
            released = [(row[3] + RELEASED, row[9] + RELEASED * FLAGS_WEIGHT, row[0]) for row in before]
        last = range(before[0][0], before[-1][0] + 1) if before else range(0)
        spent += commit(db, new, released, gone if qos == 2 else last)
        before, gone = new, last
    db.close()
    return number / spent


if __name__ == "__main__":
    print(run(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
