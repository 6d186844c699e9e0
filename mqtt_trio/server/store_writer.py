"""Writing a batch into the session store's file.

sqlite3 lets go of the GIL for each step of a statement and waits for it afterwards, up to a switch interval when the
Trio thread is busy. So a batch becomes few statements: each writes or removes up to CHUNK rows, cut into powers of two
so that there are few texts and SQLite parses each once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, Final

from mqtt_trio.broker.store import Batch, Number, Owner
from mqtt_trio.server.store_rows import (
    CONTENTS,
    DELIVERIES,
    GROUPS,
    IDS_PER_SESSION,
    MARKS,
    META,
    MOVE,
    RECEIVED,
    RETAINED,
    SESSIONS,
    SUBSCRIPTIONS,
    Table,
    Values,
    delivery_checksum,
    received_entry,
)

CHUNK: Final = 1024
"""Rows of one statement."""
LARGE: Final = 16 * 1024
"""Bytes of a frame that gets a statement of its own: a cached statement keeps the values of its last use."""
RUN: Final = 16
"""Consecutive numbers that are removed as a range; shorter runs go by lists."""
NUMBERS_AHEAD: Final = 65_536
"""`last_number` is written this much ahead, so that not every commit writes it: so many numbers are left out at each
start."""


class Writer:
    """Writes batches; knows of each delivery on its way (with a Packet Identifier) whose it is.

    These are in no index, which would cost more than everything else. The dict costs 0.1 µs and, while a delivery is
    on its way, about 100 bytes; the queues of absent sessions, which may be long, are in an index instead.
    """

    def __init__(
        self, in_flight: dict[Number, Owner], last: tuple[Owner, Number], used: tuple[Owner, Number] = (0, 0)
    ) -> None:
        """`last` are the owner and the number that the file names as the last ones; `used` are used up, whatever it
        names."""
        self._in_flight = in_flight
        self._last = last
        self._used = used
        self._next_last = last

    def write(self, db: sqlite3.Connection, batch: Batch) -> None:
        """Execute everything that `batch` asks for; `committed` follows once the transaction is."""
        if batch.moves:
            _execute(db, MOVE, 4, [(number, *move) for number, move in batch.moves.items()])
        removed = [n for owners in (batch.sessions, batch.groups) for n, row in owners.items() if row is None]
        if removed:
            self._remove_owners(db, batch, removed)
        _put(db, SESSIONS, [row for row in batch.sessions.values() if row is not None])
        _put(db, GROUPS, [(number, name) for number, name in batch.groups.items() if name is not None])
        _put(db, SUBSCRIPTIONS, [row for row in batch.subscriptions.values() if row is not None])
        _remove_pairs(db, [key for key, row in batch.subscriptions.items() if row is None])
        _put(db, CONTENTS, batch.contents.items())
        if batch.deliveries:
            _put_deliveries(db, batch)
        _remove_numbers(db, DELIVERIES, batch.done)
        _remove_numbers(db, CONTENTS, batch.contents_done)
        _put(db, RECEIVED, [entry for entry, present in batch.received.items() if present])
        gone = [received_entry(entry) for entry, present in batch.received.items() if not present]
        _remove_numbers(db, RECEIVED, gone)
        _put(db, RETAINED, [row for row in batch.retained.values() if row is not None])
        _remove_listed(db, RETAINED, [topic for topic, row in batch.retained.items() if row is None])
        _put(db, MARKS, [(name, value) for name, value in batch.marks.items() if value is not None])
        _remove_listed(db, MARKS, [name for name, value in batch.marks.items() if value is None])
        self._put_last(db, batch)

    def committed(self, batch: Batch) -> None:
        """Note what `batch` changed. Not earlier: a batch that failed comes again."""
        self._last = self._next_last
        in_flight = self._in_flight
        for number, (owner, packet_id, _) in batch.moves.items():
            if packet_id:
                in_flight[number] = owner
            else:
                in_flight.pop(number, None)
        removed = {n for owners in (batch.sessions, batch.groups) for n, row in owners.items() if row is None}
        if removed:
            for number in [number for number, owner in in_flight.items() if owner in removed]:
                del in_flight[number]
        for row in batch.deliveries.values():
            if row[2]:
                in_flight[row[0]] = row[1]
        for number in batch.done:
            in_flight.pop(number, None)

    def _remove_owners(self, db: sqlite3.Connection, batch: Batch, removed: Sequence[Owner]) -> None:
        owners = set(removed)
        # `committed` has not seen this batch's moves yet: what they say counts.
        moved = {number: move[0] for number, move in batch.moves.items() if move[1]}
        in_flight = [n for n, owner in self._in_flight.items() if owner in owners and n not in batch.moves]
        in_flight += [n for n, owner in moved.items() if owner in owners]
        _remove_numbers(db, DELIVERIES, in_flight)
        waiting = "DELETE FROM deliveries INDEXED BY deliveries_waiting WHERE packet_id = 0 AND owner IN (VALUES {})"
        received = (
            "WITH gone (session) AS (VALUES {}) DELETE FROM received WHERE entry IN (SELECT entry FROM gone CROSS JOIN"
            f" received WHERE entry BETWEEN session * {IDS_PER_SESSION} AND session * {IDS_PER_SESSION} + 65535"
            " UNION ALL SELECT entry FROM gone CROSS JOIN"
            f" received WHERE entry BETWEEN -session * {IDS_PER_SESSION} - 65535 AND -session * {IDS_PER_SESSION})"
        )
        rows = [(owner,) for owner in removed]
        for statement in (waiting, received, "DELETE FROM subscriptions WHERE session IN (VALUES {})"):
            _execute(db, statement, 1, rows)
        _remove_listed(db, SESSIONS, removed)
        _remove_listed(db, GROUPS, removed)

    def _put_last(self, db: sqlite3.Connection, batch: Batch) -> None:
        last_owner = max(self._used[0], self._last[0], *batch.sessions, *batch.groups)
        last_number = max(self._used[1], self._last[1], *batch.deliveries, *batch.contents)
        changed = []
        if last_owner > self._last[0]:
            changed.append(("last_owner", last_owner))
        if last_number > self._last[1]:
            last_number += NUMBERS_AHEAD
            changed.append(("last_number", last_number))
        _put(db, META, changed)
        self._next_last = (last_owner, last_number)


def _pieces(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Cut into pieces of CHUNK rows and, at the end, smaller powers of two. A piece that is a power of two but for an
    eighth is filled up with its last row: to write or to remove the same twice changes nothing, and is one statement
    instead of several."""
    at, size = 0, CHUNK
    while (rest := len(rows) - at) > 0:
        while size - rest > rest // 8:
            size //= 2
        piece = rows[at : at + size]
        yield piece if rest >= size else [*piece, *[piece[-1]] * (size - rest)]
        at += size


@cache
def _text(statement: str, columns: int, rows: int) -> str:
    """Return `statement` with placeholders for so many rows."""
    row = f"({','.join('?' * columns)})"
    return statement.format(",".join([row] * rows))


def _execute(db: sqlite3.Connection, statement: str, columns: int, rows: Sequence[Values]) -> None:
    for piece in _pieces(rows):
        db.execute(_text(statement, columns, len(piece)), tuple(chain.from_iterable(piece)))


def _put(db: sqlite3.Connection, table: Table, rows: Iterable[Any]) -> None:
    values = [table.values(row) for row in rows]
    if not values:
        return
    columns = len(values[0])
    large = [row for row in values if len(row[1] or b"") > LARGE] if table in _WITH_FRAMES else []
    for row in large:
        db.execute(_text(table.insert, columns, 1), row)
    _execute(db, table.insert, columns, [row for row in values if len(row[1]) <= LARGE] if large else values)


_WITH_FRAMES: Final = (CONTENTS, RETAINED, MARKS)


def _put_deliveries(db: sqlite3.Connection, batch: Batch) -> None:
    rows = list(batch.deliveries.values())
    if any(row[8] is not None and len(row[8]) > LARGE for row in rows):
        for row in rows:
            db.execute(_text(DELIVERIES.insert, 10, 1), (*row, delivery_checksum(row)))
        return
    for piece in _pieces(rows):
        values: list[object] = []
        for row in piece:
            values += row
            values.append(delivery_checksum(row))
        db.execute(_text(DELIVERIES.insert, 10, len(piece)), values)


def _remove_numbers(db: sqlite3.Connection, table: Table, numbers: Sequence[int]) -> None:
    """Remove rows by an integer key: long runs as ranges, the others by lists."""
    if not numbers:
        return
    ordered = sorted(set(numbers))
    runs: list[tuple[int, int]] = [(ordered[0], ordered[-1])]  # the common case
    others: list[int] = []
    if ordered[-1] - ordered[0] != len(ordered) - 1 or len(ordered) < RUN:
        runs, others = _runs(ordered)
    for run in runs:
        db.execute(f"DELETE FROM {table.name} WHERE {table.key} BETWEEN ? AND ?", run)
    _remove_listed(db, table, others)


def _runs(ordered: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the ranges (first, last) of at least RUN consecutive numbers, and the numbers beside them."""
    runs: list[tuple[int, int]] = []
    others: list[int] = []
    first = 0
    for at in range(1, len(ordered) + 1):
        if at < len(ordered) and ordered[at] == ordered[at - 1] + 1:
            continue
        if at - first >= RUN:
            runs.append((ordered[first], ordered[at - 1]))
        else:
            others += ordered[first:at]
        first = at
    return runs, others


def _remove_listed(db: sqlite3.Connection, table: Table, keys: Sequence[object]) -> None:
    for piece in _pieces(keys):
        statement = f"DELETE FROM {table.name} WHERE {table.key} IN (VALUES {{}})"
        db.execute(_text(statement, 1, len(piece)), tuple(piece))


def _remove_pairs(db: sqlite3.Connection, keys: Sequence[tuple[Owner, str]]) -> None:
    _execute(db, "DELETE FROM subscriptions WHERE (session, topic_filter) IN (VALUES {})", 2, keys)
