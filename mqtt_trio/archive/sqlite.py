"""The embedded archive store: one SQLite file for each group, written by one thread with group commit."""

from __future__ import annotations

import bisect
import itertools
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import attrs
import trio

from mqtt_trio.archive.options import file_name
from mqtt_trio.archive.sqlite_file import ArchiveFile, ForeignFileError, MessageTooLargeError
from mqtt_trio.archive.store import Outcome
from mqtt_trio.broker.message import Message
from mqtt_trio.errors import StoreError

FIRST_RETRY: Final = 0.1
LAST_RETRY: Final = 5.0
"""Seconds between attempts while the file cannot be written: doubled from the first to the last."""
LONGEST_INTERVAL: Final = 60.0
"""Seconds that a message may stay beyond the retention, at most."""

_CORRUPT: Final = frozenset((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))
_REOPEN: Final = frozenset((sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN))
"""Primary result codes after which the open file is not trusted to recover by itself."""
_AWAY: Final = {
    sqlite3.SQLITE_FULL: "the disk is full, free some space",
    sqlite3.SQLITE_BUSY: "another process keeps it locked, end that one",
    sqlite3.SQLITE_LOCKED: "another process keeps it locked, end that one",
    sqlite3.SQLITE_IOERR: "the disk or file system fails, check it",
    sqlite3.SQLITE_NOMEM: "memory is short",
    sqlite3.SQLITE_PROTOCOL: "another process keeps it locked, end that one",
    sqlite3.SQLITE_READONLY: "let the user that runs the broker write there, or choose another place with --data",
    sqlite3.SQLITE_CANTOPEN: "let the user that runs the broker write there, or choose another place with --data",
    sqlite3.SQLITE_PERM: "let the user that runs the broker write there, or choose another place with --data",
}
"""Primary result codes that may pass, each with what helps."""

logger = logging.getLogger(__name__)


@attrs.define
class _Batch:
    messages: Sequence[Message]
    done: Callable[[Outcome], None]
    outcome: dict[int, Exception] = attrs.Factory(dict)


_Jobs: TypeAlias = "queue.SimpleQueue[_Batch | None]"


def archive_path(directory: Path, name: str) -> Path:
    """Return the file of group `name`."""
    return directory / f"archive-{file_name(name)}.sqlite3"


def _code(exc: Exception) -> int | None:
    """Return the primary result code of an error of SQLite."""
    code = getattr(exc, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None


def _set_aside(path: Path, reason: object) -> None:
    """Rename a file that cannot be used, its log with it [S3].

    Raises:
      StoreError: that is not possible either.
    """
    target = next(t for n in itertools.count(1) if not os.path.lexists(t := f"{path}.corrupt-{n}"))
    try:
        for suffix in ("", "-wal", "-shm"):
            if os.path.lexists(f"{path}{suffix}"):
                os.rename(f"{path}{suffix}", f"{target}{suffix}")
    except OSError as exc:
        raise StoreError(f"archive store {path} is unusable ({reason}) and cannot be set aside: {exc}") from exc
    logger.error("archive store %s is unusable: %s. It is kept as %s; a new one is begun", path, reason, target)


def open_archive_file(path: Path, *, max_size: int | None, synchronous: str) -> ArchiveFile:
    """Open or make the file; one that is corrupt or of a later version is set aside first.

    Raises:
      StoreError: the file cannot be used; the text says what would help.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        mend = _AWAY[sqlite3.SQLITE_PERM]
        raise StoreError(f"archive store {path}: cannot make its directory: {exc.strerror}; {mend}") from exc
    for attempt in (1, 2):
        try:
            return ArchiveFile(path, max_size=max_size, synchronous=synchronous)
        except ForeignFileError as exc:
            _set_aside(path, exc)
        except sqlite3.Error as exc:
            if _code(exc) not in _CORRUPT or attempt == 2:
                mend = _AWAY.get(_code(exc) or 0, "check the file")
                raise StoreError(f"archive store {path} cannot be opened: {exc}; {mend}") from exc
            _set_aside(path, exc)
    raise StoreError(f"archive store {path}: the new file is unusable as well")


def nothing() -> None:
    """Do nothing: nobody watches the store."""


class SqliteArchive:
    """Stores messages in the file at `path`. All batches that wait become one transaction, within bounds.

    Retention and size are enforced by the same thread. While the file cannot be written (disk full, locked) batches
    wait and are tried again. `clock` gives UTC seconds since the epoch and is called in the thread.
    """

    def __init__(
        self,
        path: Path,
        *,
        retention: float | None = None,
        max_size: int | None = None,
        synchronous: str = "NORMAL",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.retention = retention
        self.max_size = max_size
        self._jobs: _Jobs = queue.SimpleQueue()
        self._closing = threading.Event()
        self._closed = trio.Event()
        self._worker = _Worker(self, synchronous, clock)
        self._finished: deque[_Batch] = deque()
        self._token: trio.lowlevel.TrioToken | None = None
        self._changed: Callable[[], None] = nothing
        self._trouble: str | None = None

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Own the thread until stopped or cancelled; cancelled, the thread ends after the transaction it is in.

        Raises:
          StoreError: the file cannot be opened.
        """
        self._token = trio.lowlevel.current_trio_token()
        limiter = trio.CapacityLimiter(1)
        try:
            await trio.to_thread.run_sync(self._worker.open, limiter=limiter)
            task_status.started()
            await trio.to_thread.run_sync(self._worker.serve, abandon_on_cancel=True, limiter=limiter)
        finally:
            self._close_now()
            self._worker.close_unserved()
            self._deliver()
            self._closed.set()

    def submit(self, batch: Sequence[Message], done: Callable[[Outcome], None]) -> None:
        """Queue `batch` for the thread."""
        self._jobs.put(_Batch(batch, done))

    async def stop(self) -> None:
        """Store what was submitted, close the file. Cancelled, what is not committed is given up."""
        self._jobs.put(None)
        try:
            await self._closed.wait()
        finally:
            self._close_now()

    def _close_now(self) -> None:
        self._closing.set()
        self._jobs.put(None)  # wakes the thread

    def trouble(self) -> str | None:
        """Return why the file cannot be written, while that is so."""
        return self._trouble

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` when that begins and ends."""
        self._changed = changed

    def describe(self) -> str:
        """One phrase for the start-up summary."""
        bounds = "" if self.max_size is None else f", at most {self.max_size / 1024 / 1024:g} MiB"
        if self.retention is not None:
            bounds += f", kept for {self.retention / 3600:g} h"
        return f"SQLite {self.path}{bounds}"

    def post(self, batch: _Batch) -> None:
        """Hand a finished batch to the Trio thread; called in the worker's."""
        self._finished.append(batch)
        self._soon(self._deliver)  # one wake for a burst

    def report(self, trouble: str | None) -> None:
        """Say that the file cannot be written, or can again; called in the worker's thread."""
        self._trouble = trouble
        self._soon(self._tell)

    def _tell(self) -> None:
        self._changed()

    def _soon(self, callback: Callable[[], None]) -> None:
        assert self._token is not None
        try:
            self._token.run_sync_soon(callback, idempotent=True)
        except trio.RunFinishedError:
            pass  # given up long ago

    def _deliver(self) -> None:
        while self._finished:
            batch = self._finished.popleft()
            batch.done(batch.outcome)


class _Worker:
    """The blocking half: everything here but the constructor runs in the store's thread."""

    def __init__(self, store: SqliteArchive, synchronous: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._jobs, self._closing = store._jobs, store._closing
        self._synchronous = synchronous
        self._clock = clock
        self._file: ArchiveFile | None = None
        self._serving = False
        self._retry = 0.0  # seconds before the next attempt; 0: the last one succeeded
        self._tend_at: float | None = 0.0  # None: nothing to do but what inserts do by themselves

    @property
    def failing(self) -> bool:
        """The last attempt failed and is repeated. Any thread."""
        return self._retry > 0

    def open(self) -> ArchiveFile:
        store = self._store
        self._file = open_archive_file(store.path, max_size=store.max_size, synchronous=self._synchronous)
        return self._file

    def serve(self) -> None:
        """Commit what comes until None comes or the store closes."""
        self._serving = True
        try:
            while not self._closing.is_set():
                self._tend()
                batches, last = self._next_batches()
                self._commit(batches)
                if last:
                    return
        finally:
            if self._file is not None:
                self._file.close()

    def close_unserved(self) -> None:
        """Close what `open` opened when `serve` was never called or has not looked at `_closing` yet."""
        if not self._serving and self._file is not None:
            self._file.close()

    def _next_batches(self) -> tuple[list[_Batch], bool]:
        """Wait for batches, take all there are; True with the last of them. None at all: time to tend the file."""
        wait = None if self._tend_at is None else min(max(self._tend_at - self._clock(), 0.0), LONGEST_INTERVAL)
        batches: list[_Batch] = []
        try:
            job = self._jobs.get(timeout=wait)
            while job is not None:
                batches.append(job)
                job = self._jobs.get_nowait()
        except queue.Empty:
            return batches, False
        return batches, True

    def _commit(self, batches: Sequence[_Batch]) -> None:
        messages = [message for batch in batches for message in batch.messages]
        ends = list(itertools.accumulate(len(batch.messages) for batch in batches))
        at = singly = posted = 0
        while True:
            while posted < len(batches) and ends[posted] <= at:
                self._store.post(batches[posted])
                posted += 1
            if at >= len(messages) or self._closing.is_set():
                return
            end = at + 1
            try:
                file = self._file or self.open()
                end, cost = file.fitting(messages, at, end if at < singly else len(messages))
                file.insert(messages[at:end], cost)
            except Exception as exc:
                if self._passes(exc):
                    continue
                if end > at + 1:
                    singly = end  # one of them cannot be stored: find out which
                    continue
                owner = bisect.bisect_right(ends, at)
                start = ends[owner] - len(batches[owner].messages)
                batches[owner].outcome[at - start] = StoreError(str(exc))
            self._recovered()
            at = end

    def _passes(self, exc: Exception) -> bool:
        """Whether the same attempt may succeed later, after a while that this waits; a corrupt file is replaced."""
        if isinstance(exc, MessageTooLargeError):
            return False
        code = _code(exc)
        if code in _CORRUPT:
            self._replace(exc)
        elif code not in _AWAY and not (isinstance(exc, StoreError) and self._file is None):
            return False
        if not self._retry:
            if self._file is None or code in _AWAY:
                help_text = f"; {_AWAY[code]}" if code in _AWAY else ""
                logger.warning(
                    "archive store %s cannot be written: %s%s. It is tried again", self._store.path, exc, help_text
                )
            self._retry = FIRST_RETRY
            self._store.report(f"archive store {self._store.path} cannot be written: {exc}")
        if self._file is not None and code in _REOPEN:
            self._file.close()
            self._file = None
        self._closing.wait(self._retry)
        self._retry = min(self._retry * 2, LAST_RETRY)
        return True

    def _recovered(self) -> None:
        if self._retry:
            self._retry = 0.0
            self._store.report(None)
            logger.info("archive store %s is written again", self._store.path)

    def _replace(self, exc: Exception) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        try:
            _set_aside(self._store.path, exc)
            self.open()
        except StoreError as failure:
            logger.error("%s", failure)  # noqa: TRY400 (the text says it all, and it is tried again)

    def _tend(self) -> None:
        """Work a little on retention and size when it is time."""
        now, retention = self._clock(), self._store.retention
        if self._file is None or self._tend_at is None or now < self._tend_at:
            return
        try:
            more = self._file.tend(None if retention is None else round((now - retention) * 1000))
        except sqlite3.Error as exc:
            logger.debug("archive store %s: %s", self._store.path, exc)
            more = False
            if _code(exc) in _CORRUPT:
                self._replace(exc)
        interval = None if retention is None else min(max(retention / 10, 1.0), LONGEST_INTERVAL)
        self._tend_at = now if more else None if interval is None else now + interval
