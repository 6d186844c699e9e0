"""Replacing a session store's file that cannot be used: it is set aside, and what can be read of it starts a new one.

The order of steps makes every one of them safe to be the last: first a new file is written beside the old one, then the
old one gets another name, then the new one takes its place. `finish_replacement` does what was left.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from mqtt_trio.archive.sqlite_file import create_private
from mqtt_trio.broker.store import Batch, StoredState
from mqtt_trio.errors import StoreError
from mqtt_trio.server.store_file import PAGE, UnusableFileError, connect, decode_text, log_aside, store_error
from mqtt_trio.server.store_reader import Contents, read_contents
from mqtt_trio.server.store_rows import SCHEMA
from mqtt_trio.server.store_writer import Writer

logger = logging.getLogger(__name__)


def finish_replacement(path: Path) -> None:
    """Go on where a replacement was interrupted.

    Raises:
      StoreError: the files cannot be renamed.
    """
    try:
        if path.exists() or not _new_name(path).exists():
            return
        _take_place(path, _aside_name(path))
    except OSError as exc:
        raise store_error(path, exc, "cannot be replaced") from exc
    logger.warning("session store %s: its replacement after damage, interrupted earlier, is finished", path)


def replace(path: Path, problem: UnusableFileError, *, synchronous: str) -> None:
    """Set the file aside as `NAME.corrupt-TIME`, its log with it, and put a new one in its place; log what is in it.

    Raises:
      StoreError: that cannot be done; the file is as it was.
    """
    try:
        contents = _salvage(path) if problem.ours else Contents()
        new = _new_name(path)
        _discard(new)
        with closing(connect(new, synchronous=synchronous)) as db:
            _fill(db, contents.state)
        target = _aside_name(path)
        os.rename(path, target)
        _take_place(path, target)
    except (OSError, sqlite3.Error) as exc:
        raise store_error(path, exc, f"is unusable ({problem}) and cannot be replaced") from exc
    except UnusableFileError as exc:
        raise StoreError(f"session store {path} is unusable ({problem}), and so is what replaces it: {exc}") from exc
    kept = ", ".join(f"{count} {name}" for name, count in contents.counts().items() if count) or "nothing"
    losses = "; ".join(contents.losses()) if problem.ours else "none of it can be read by this program"
    logger.error(
        "session store %s is unusable: %s. It is kept as %s. A new one holds what could be read: %s. Lost: %s",
        *(path, problem, target, kept, losses or "nothing that can be counted"),
    )


def batch_of(state: StoredState) -> Batch:
    """Return the batch that makes `state` of an empty store."""
    return Batch(
        sessions={row[0]: row for row in state.sessions},
        groups=dict(state.groups),
        subscriptions={row[:2]: row for row in state.subscriptions},
        deliveries={row[0]: row for row in state.deliveries},
        contents=dict(state.contents),
        received=dict.fromkeys(state.received, True),
        retained={row[0]: row for row in state.retained},
        marks=dict(state.marks),
    )


def _fill(db: sqlite3.Connection, state: StoredState) -> None:
    db.execute("BEGIN IMMEDIATE")
    # The numbers used up are written even where no row has them any more.
    Writer({}, (0, 0), used=(state.last_owner, state.last_number)).write(db, batch_of(state))
    db.execute("COMMIT")


def _new_name(path: Path) -> Path:
    return Path(f"{path}.new")


def _aside_name(path: Path) -> Path:
    base = f"{path}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = (Path(base if number == 1 else f"{base}-{number}") for number in range(1, 10_000))
    return next(name for name in names if not name.exists() and not Path(f"{name}-wal").exists())


def _take_place(path: Path, target: Path) -> None:
    """Give the log of the file that was renamed to `target` its new name, and the new file its place."""
    for log in (log_aside(path), Path(f"{path}-wal")):
        if log.exists():
            os.rename(log, f"{target}-wal")
    os.rename(_new_name(path), path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _discard(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


# --- reading a damaged file ---


def _salvage(path: Path) -> Contents:
    """Read what can be read, in a copy: SQLite may change what it opens."""
    copy = Path(f"{path}.salvage")
    try:
        _copy(path, copy)
        contents = _read(copy)
        if contents.unreadable:
            # The first page says where everything is, and where it is has not changed since the file was made.
            _copy(path, copy)
            _renew_first_page(copy)
            again = _read(copy)
            if sum(again.counts().values()) > sum(contents.counts().values()):
                return again
        return contents
    finally:
        _discard(copy)


def _copy(path: Path, copy: Path) -> None:
    _discard(copy)
    create_private(copy)
    shutil.copyfile(path, copy)
    for log in (Path(f"{path}-wal"), log_aside(path)):
        if log.exists():
            create_private(Path(f"{copy}-wal"))
            shutil.copyfile(log, f"{copy}-wal")


_OPEN: Final = ("PRAGMA locking_mode = EXCLUSIVE", "PRAGMA cell_size_check = ON")


def _read(copy: Path) -> Contents:
    with closing(sqlite3.connect(copy, isolation_level=None)) as db:
        db.text_factory = decode_text
        for statement in _OPEN:
            db.execute(statement).fetchall()
        return read_contents(db)


def _renew_first_page(copy: Path) -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.execute(f"PRAGMA page_size = {PAGE}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.executescript(SCHEMA)
        page = bytearray(db.serialize()[:PAGE])
    page[18:20] = b"\2\2"  # there may be a write-ahead log
    page[28:32] = (copy.stat().st_size // PAGE).to_bytes(4, "big")
    with open(copy, "r+b") as file:
        file.write(page)
