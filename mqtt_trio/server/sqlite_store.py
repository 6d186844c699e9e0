"""The session store on disk: one SQLite file with a write-ahead log. Blocking; one thread uses it."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import Final, Literal, TypeAlias

from mqtt_trio.broker.store import Batch, StoredState
from mqtt_trio.errors import StoreError
from mqtt_trio.server.store_file import (
    CORRUPT,
    UnusableFileError,
    close_keeping_log,
    code_of,
    connect,
    lock_file,
    log_aside,
    store_error,
)
from mqtt_trio.server.store_reader import Contents, read_contents
from mqtt_trio.server.store_repair import finish_replacement, replace
from mqtt_trio.server.store_writer import Writer

Synchronous: TypeAlias = Literal["FULL", "NORMAL", "OFF"]

FILE_NAME: Final = "sessions.sqlite3"
"""Name of the file in `[Persistence] Path`."""

_REOPEN: Final = CORRUPT | {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
"""Primary result codes after which the open file is not trusted to recover by itself."""

TEND_COMMITS: Final = 16
"""Commits between two looks at the unused pages of the file."""
UNUSED_PAGES: Final = 4096
"""Unused pages (16 MiB) that a file may always have; beyond them, a quarter of it. The others are given back."""
GIVE_BACK_PAGES: Final = 256
"""Pages given back in one step: about a millisecond."""
GIVE_BACK_TIME: Final = 1.0
"""Seconds that giving back may take at load and at close, at most."""

logger = logging.getLogger(__name__)


class SqliteStore:
    """A Store in the file at `path`; its directory is made when it is missing. `PATH-wal` is its log while it is open,
    `PATH.lock` says which process has it.

    A kill of the process costs nothing that was committed. A power loss, or a crash of the operating system, costs by
    `synchronous`:

    - FULL: nothing, as far as the disk tells the truth about what it has written. Each commit waits for the disk.
    - NORMAL: the last commits, whole ones, back to the last fold of the log (4 MiB of changes). The file stays sound.
    - OFF: the same, and the file may be damaged; then what can be read of it is kept at the next start.
    """

    def __init__(self, path: Path, *, synchronous: Synchronous = "FULL") -> None:
        self.path = path
        self._synchronous = synchronous
        self._lock: int | None = None
        self._db: sqlite3.Connection | None = None
        self._writer: Writer | None = None
        self._commits = 0
        self._files: tuple[tuple[int, int] | None, ...] = ()
        """Which files are open: the database and its log."""

    def load(self) -> StoredState:
        """Open the file and return what it holds. One that is damaged, another program's or of a later version is set
        aside as `NAME.corrupt-TIME`; what can be read of it goes into a new one, and one ERROR says all of that.

        Raises:
          StoreError: another process uses it, it cannot be read or written, there is no space to replace it.
        """
        self.close()
        self._lock = lock_file(self.path)
        try:
            finish_replacement(self.path)
            try:
                contents = self._open_and_read()
            except UnusableFileError as exc:
                replace(self.path, exc, synchronous=self._synchronous)
                contents = self._open_and_read()
            self._begin(contents)
        except UnusableFileError as exc:
            self._release()
            raise StoreError(f"session store {self.path}: what replaced the damaged file is unusable: {exc}") from exc
        except (sqlite3.Error, OSError) as exc:
            self._release()
            raise store_error(self.path, exc, "cannot be opened") from exc
        except BaseException:
            self._release()
            raise
        return contents.state

    def commit(self, batch: Batch) -> None:
        """Make `batch` durable as far as `synchronous` promises, all of it or nothing.

        After a StoreError the same or a larger batch may come again. It may be that a failed one is there after all
        (the disk reported an error after it had written): coming again, it changes nothing.

        Raises:
          StoreError: it could not be written.
        """
        if batch.empty:
            return
        assert self._writer is not None, "load comes first"
        try:
            db = self._trusted()
            db.execute("BEGIN IMMEDIATE")
            self._writer.write(db, batch)
            db.execute("COMMIT")
        except (sqlite3.Error, UnusableFileError) as exc:
            self._recover(exc)
            if isinstance(exc, UnusableFileError):
                raise StoreError(f"session store {self.path} cannot be written: {exc}; restart the broker") from exc
            raise store_error(self.path, exc, "cannot be written") from exc
        except BaseException:
            self._recover(None)
            raise
        self._writer.committed(batch)
        self._commits += 1
        if self._commits % TEND_COMMITS == 0:
            self._give_back(0.0)

    def close(self) -> None:
        """Give unused pages back, fold the log into the file and let other processes have it."""
        if self._db is not None:
            self._give_back(GIVE_BACK_TIME)
        self._release()

    def describe(self) -> str:
        """One phrase for the start-up summary."""
        return f"SQLite {self.path}, Synchronous = {self._synchronous}"

    # --- opening ---

    def _open_and_read(self) -> Contents:
        if log_aside(self.path).exists():
            raise UnusableFileError("an earlier start found it damaged and could not replace it", ours=True)
        self._db = db = connect(self.path, synchronous=self._synchronous)
        try:
            # Damage may hide rows without any row being wrong: the structure is checked apart from them.
            (result,) = db.execute("PRAGMA quick_check(1)").fetchone()
            contents = read_contents(db)
        except sqlite3.Error as exc:
            if code_of(exc) not in CORRUPT:
                raise
            result, contents = str(exc), Contents()
        problems = [] if result == "ok" else [" ".join(result.split())]
        if not contents.whole:
            problems += contents.losses()
        if problems:
            self._db = None
            close_keeping_log(self.path, db)
            raise UnusableFileError("; ".join(problems), ours=True)
        return contents

    def _begin(self, contents: Contents) -> None:
        state = contents.state
        self._files = self._files_there()
        in_flight = {row[0]: row[1] for row in state.deliveries if row[2]}
        self._writer = Writer(in_flight, (state.last_owner, state.last_number))
        if contents.orphans:
            logger.warning("session store %s: %s; they are removed", self.path, "; ".join(contents.losses()))
            self.commit(contents.removal_of_orphans())
        self._give_back(GIVE_BACK_TIME)

    def _trusted(self) -> sqlite3.Connection:
        """Return the connection, made anew where the last one was not trusted any more."""
        if self._db is None:
            self._db = self._reopen()
            self._files = self._files_there()
        elif self._files_there() != self._files:
            raise StoreError(
                f"session store {self.path} cannot be written: the file or its log was removed or replaced while in"
                " use; put it back, or restart the broker, which begins with what is there"
            )
        return self._db

    def _reopen(self) -> sqlite3.Connection:
        if not self.path.exists():
            # A new file would hold this batch and nothing of what came before.
            raise UnusableFileError("the file is gone", ours=True)
        return connect(self.path, synchronous=self._synchronous)

    def _files_there(self) -> tuple[tuple[int, int] | None, ...]:
        """Which files have our names. One that was removed would take commits as before, and end with the process."""
        return tuple(_identity(path) for path in (self.path, f"{self.path}-wal"))

    def _recover(self, exc: BaseException | None) -> None:
        """After a failed commit: back to the last one, with a connection that is trusted."""
        db = self._db
        if db is None:
            return
        try:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if not isinstance(exc, sqlite3.Error) or code_of(exc) not in _REOPEN:
                return
        except sqlite3.Error as failure:
            logger.debug("session store %s: %s", self.path, failure)
        self._close_db()

    def _close_db(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            try:
                db.close()
            except sqlite3.Error as exc:
                logger.warning("session store %s: closing it failed: %s", self.path, exc)

    def _release(self) -> None:
        self._close_db()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- space ---

    def _give_back(self, limit: float) -> None:
        """Cut unused pages off the file, one step or as many as `limit` seconds allow."""
        db, until = self._db, time.monotonic() + limit
        if db is None:
            return
        try:
            (unused,) = db.execute("PRAGMA freelist_count").fetchone()
            if unused <= UNUSED_PAGES:
                return
            (pages,) = db.execute("PRAGMA page_count").fetchone()
            surplus = unused - max(UNUSED_PAGES, (pages - unused) // 3)
            while surplus > 0:
                # `execute` would stop after the first page: each is a row, and a row without columns ends it.
                db.executescript(f"PRAGMA incremental_vacuum({min(surplus, GIVE_BACK_PAGES)})")
                surplus -= GIVE_BACK_PAGES
                if time.monotonic() >= until:
                    return
        except sqlite3.Error as exc:
            logger.debug("session store %s: unused pages are kept: %s", self.path, exc)
            if db.in_transaction:
                db.execute("ROLLBACK")


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Device and inode of a file; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
