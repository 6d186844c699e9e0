"""Reading the session store's file, whole or as far as it can be read."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from typing import Any, Final

import attrs

from mqtt_trio.broker.store import Batch, StoredState
from mqtt_trio.server.store_rows import (
    CONTENTS,
    DELIVERIES,
    GROUPS,
    MARKS,
    META,
    RECEIVED,
    RETAINED,
    SESSIONS,
    SUBSCRIPTIONS,
    TABLES,
    Table,
    Values,
)

DATA: Final = tuple(table for table in TABLES if table is not META)
"""Tables whose rows people would miss."""


@attrs.define
class Contents:
    """What was read of a file, and what could not be."""

    state: StoredState = attrs.Factory(StoredState)
    damaged: dict[str, int] = attrs.Factory(dict)
    """Table -> its rows that are not what was written."""
    unreadable: dict[str, str] = attrs.Factory(dict)
    """Table -> why some of its rows could not be read; nobody can say how many."""
    orphans: dict[str, list[Any]] = attrs.Factory(dict)
    """Table -> keys of good rows that belong to a session, group or content that is not there."""

    @property
    def whole(self) -> bool:
        """Whether everything was read."""
        return not self.damaged and not self.unreadable

    def counts(self) -> dict[str, int]:
        """Return the rows that were read, by table."""
        return {table.name: len(getattr(self.state, table.name)) for table in DATA}

    def losses(self) -> list[str]:
        """Return one phrase for each kind of loss."""
        lines = [f"{count} of {name} are damaged" for name, count in self.damaged.items()]
        lines += [f"some of {name} cannot be read ({reason})" for name, reason in self.unreadable.items()]
        lines += [f"{len(keys)} of {name} belong to nothing" for name, keys in self.orphans.items()]
        return lines

    def removal_of_orphans(self) -> Batch:
        """Return the changes that take `orphans` out of the file."""
        return Batch(
            subscriptions=dict.fromkeys(self.orphans.get(SUBSCRIPTIONS.name, ())),
            done=self.orphans.get(DELIVERIES.name, []),
            received=dict.fromkeys(self.orphans.get(RECEIVED.name, ()), False),
        )


def read_contents(db: sqlite3.Connection) -> Contents:
    """Read every row of every table and check it. Damage is part of the result, never an exception."""
    contents = Contents()
    version = _version(db)
    rows: dict[str, list[Any]] = {
        table.name: _read_table(db, table, contents) if table.since <= version else [] for table in TABLES
    }
    owners = {row[0] for table in (SESSIONS, GROUPS) for row in rows[table.name]}
    sessions = {row[0] for row in rows[SESSIONS.name]}
    frames: dict[int, bytes] = dict(rows[CONTENTS.name])
    last: dict[str, int] = dict(rows[META.name])
    deliveries = rows[DELIVERIES.name]
    # A delivery has its own frame or names a content, never both.
    lost = [r[0] for r in deliveries if r[1] not in owners or (r[7] not in frames if r[8] is None else r[7])]
    _leave_out(contents, DELIVERIES, rows, lost)
    _leave_out(contents, SUBSCRIPTIONS, rows, [row[:2] for row in rows[SUBSCRIPTIONS.name] if row[0] not in sessions])
    _leave_out(contents, RECEIVED, rows, [row for row in rows[RECEIVED.name] if row[0] not in sessions])
    numbers = (row[0] for table in (DELIVERIES, CONTENTS) for row in rows[table.name][-1:])  # in order: the largest
    contents.state = StoredState(
        sessions=rows[SESSIONS.name],
        groups=rows[GROUPS.name],
        subscriptions=rows[SUBSCRIPTIONS.name],
        deliveries=rows[DELIVERIES.name],
        contents=frames,
        received=rows[RECEIVED.name],
        retained=rows[RETAINED.name],
        marks=dict(rows[MARKS.name]),
        last_owner=max(last.get("last_owner", 0), *owners, 0),
        last_number=max(last.get("last_number", 0), *numbers, 0),
    )
    return contents


def _version(db: sqlite3.Connection) -> int:
    """Return the version that the file says it has; what cannot be one counts as the newest, which has all tables."""
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
    except (sqlite3.Error, UnicodeDecodeError):
        version = 0
    newest = max(table.since for table in TABLES)
    return int(version) if 1 <= version <= newest else newest


_KEYS: Final = {RECEIVED.name: 2, SUBSCRIPTIONS.name: 2}
"""Columns of a row's key, where it is not one."""


def _key(table: Table, row: Values) -> object:
    return row[: _KEYS[table.name]] if table.name in _KEYS else row[0]


def _leave_out(contents: Contents, table: Table, rows: dict[str, list[Any]], keys: Sequence[Any]) -> None:
    if keys:
        contents.orphans[table.name] = list(keys)
        gone: Collection[Any] = set(keys)
        rows[table.name] = [row for row in rows[table.name] if _key(table, row) not in gone]


def _read_table(db: sqlite3.Connection, table: Table, contents: Contents) -> list[Values]:
    rows: list[Values] = []
    damaged = 0
    read = table.read
    try:
        for values in db.execute(f"SELECT * FROM {table.name} ORDER BY {table.key}"):
            if (row := read(values)) is None:
                damaged += 1
            else:
                rows.append(row)
    except (sqlite3.Error, UnicodeDecodeError) as exc:  # the latter for the name of a column
        contents.unreadable[table.name] = str(exc)
        more, damaged_behind = _read_backwards(db, table, rows)
        rows += more
        damaged += damaged_behind
    if damaged:
        contents.damaged[table.name] = damaged
    return rows


def _read_backwards(db: sqlite3.Connection, table: Table, before: Sequence[Values]) -> tuple[list[Values], int]:
    """Return what comes behind the damage that ended reading, from the last row on up to it; and damaged rows there."""
    known = {_key(table, row) for row in before}
    rows: list[Values] = []
    damaged = 0
    try:
        for values in db.execute(f"SELECT * FROM {table.name} ORDER BY {table.key.replace(',', ' DESC,')} DESC"):
            if (row := table.read(values)) is None:
                damaged += 1
            elif (key := _key(table, row)) in known:
                break
            else:
                known.add(key)
                rows.append(row)
    except (sqlite3.Error, UnicodeDecodeError):
        pass
    return rows[::-1], damaged
