"""Rebuilding the history of an archive group in SQLite from an archive elsewhere [K19]. Blocking."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import attrs

from mqtt_trio.archive.sqlite_file import ArchiveFile, ForeignFileError, MessageTooLargeError, noted_progress
from mqtt_trio.archive.store import Entry, NotEmptyError, Progress
from mqtt_trio.broker.message import Message
from mqtt_trio.errors import StoreError
from mqtt_trio.protocol.topics import topic_matches

LOOKS: Final = 20
LOOK_PAUSE: Final = 0.05
"""Seconds between two looks whether somebody has the file open."""


def encode_progress(progress: Progress) -> str:
    """Return `progress` as text for a store."""
    return json.dumps(attrs.asdict(progress))


def decode_progress(text: str) -> Progress:
    """Return the progress that `encode_progress` wrote.

    Raises:
      ValueError: it did not write that.
    """
    try:
        table: dict[str, Any] = json.loads(text)
        parts = {name: {int(p): int(at) for p, at in table[name].items()} for name in ("ends", "next")}
        return Progress(source=str(table["source"]), identity=str(table["identity"]), **parts)
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"no progress of a rebuild: {exc}") from None


def unfinished_history(path: Path) -> Progress | None:
    """Return how far an unfinished rebuild of a group's file has come. None: there is none, or no such file, or it
    cannot be read, which whoever opens it says better.

    Raises:
      StoreError: what the rebuild noted is no progress.
    """
    if not path.is_file():
        return None
    # Without a log nothing but the file is looked at, and nothing is made beside it.
    how = "mode=ro" if os.path.lexists(f"{path}-wal") else "mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?{how}", timeout=1.0, uri=True)) as db:
            text = noted_progress(db)
    except (sqlite3.Error, UnicodeDecodeError):
        return None
    return None if text is None else _read_progress(text, path)


def _read_progress(text: str, path: Path) -> Progress:
    try:
        return decode_progress(text)
    except ValueError as exc:
        raise StoreError(f"archive store {path}: {exc}; remove the file and begin anew") from None


def advanced(progress: Progress, entries: Iterable[Entry]) -> Progress:
    """Return `progress` behind `entries`."""
    return attrs.evolve(progress, next={**progress.next, **{e.partition: e.offset + 1 for e in entries}})


def fresh(progress: Progress, entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that `progress` is not behind yet."""
    return [entry for entry in entries if entry.offset >= progress.next.get(entry.partition, 0)]


@attrs.define(kw_only=True)
class HistoryTarget:
    """The file of one group. It takes what its filters match and its retention still keeps, as the group does."""

    group: str
    path: Path
    filters: Sequence[str] = ("#",)
    retention: float | None = None
    max_size: int | None = None
    clock: Callable[[], float] = time.time
    _file: ArchiveFile | None = attrs.field(default=None, init=False)
    _progress: Progress | None = attrs.field(default=None, init=False)
    _expired: int = attrs.field(default=0, init=False)
    _too_large: int = attrs.field(default=0, init=False)

    @property
    def name(self) -> str:
        """What people call it."""
        return f"history of group {self.group}"

    def open(self) -> Progress | None:
        """See `RebuildTarget.open`."""
        if self.path.exists():
            self._refuse_shared_file()
        with self._errors("cannot be opened"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self._file = ArchiveFile(self.path, max_size=self.max_size, synchronous="NORMAL")
            text, is_empty = file.rebuild_progress(), file.is_empty()
        if text is None and not is_empty:
            raise NotEmptyError(
                f"archive store {self.path} is not empty: only an empty one is rebuilt; move it away, or choose "
                "another place with --set Persistence.Path=DIR"
            )
        if text is not None:
            self._progress = _read_progress(text, self.path)
        return self._progress

    def _refuse_shared_file(self) -> None:
        """Look whether a broker has the file open. Whoever merely reads a few rows is waited for."""
        with self._errors("cannot be opened"):
            for _ in range(LOOKS):
                if self._is_alone():
                    return
                time.sleep(LOOK_PAUSE)
            raise StoreError(f"archive store {self.path} is in use: end the broker, or whoever has it open")

    def _is_alone(self) -> bool:
        """SQLite leaves the mode with a log only where nobody else has the file open, and does not wait for that."""
        with closing(sqlite3.connect(self.path, timeout=1.0, isolation_level=None)) as db:
            try:
                (mode,) = db.execute("PRAGMA journal_mode = DELETE").fetchone()
            except sqlite3.OperationalError as exc:
                if "locked" not in str(exc):
                    raise
                return False
            return bool(mode == "delete")

    def begin(self, progress: Progress) -> None:
        """See `RebuildTarget.begin`."""
        with self._errors("cannot be written"):
            self._opened().begin_rebuild(encode_progress(progress))
        self._progress = progress

    def store(self, entries: Sequence[Entry]) -> None:
        """See `RebuildTarget.store`."""
        assert self._progress is not None, "begin comes first"
        entries = fresh(self._progress, entries)
        oldest = None if self.retention is None else self.clock() - self.retention
        wanted = [at for at, entry in enumerate(entries) if self._wants(entry.message, oldest)]
        messages = [message for at in wanted if (message := entries[at].message) is not None]
        file, done, at = self._opened(), 0, 0
        with self._errors("cannot be written"):
            while at < len(messages):
                try:
                    end, cost = file.fitting(messages, at, len(messages))
                except MessageTooLargeError:
                    self._too_large += 1
                    del messages[at], wanted[at]
                    continue
                behind = wanted[end] if end < len(wanted) else len(entries)
                progress = advanced(self._progress, entries[done:behind])
                file.insert(messages[at:end], cost, progress=encode_progress(progress))
                self._progress, done, at = progress, behind, end
            if done < len(entries):
                self._progress = advanced(self._progress, entries[done:])
                file.note_progress(encode_progress(self._progress))

    def _wants(self, message: Message | None, oldest: float | None) -> bool:
        if message is None or not any(topic_matches(each, message.topic_name) for each in self.filters):
            return False
        if oldest is not None and message.published_at < oldest:
            self._expired += 1
            return False
        return True

    def finish(self) -> list[str]:
        """See `RebuildTarget.finish`."""
        with self._errors("cannot be written"):
            self._opened().finish_rebuild()
            lines = [f"{self._opened().count()} messages are in it"]
        if self._expired:
            lines.append(f"{self._expired} are older than Retention")
        if self._too_large:
            lines.append(f"{self._too_large} are too large for MaxSize")
        return lines

    def close(self) -> None:
        """See `RebuildTarget.close`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> ArchiveFile:
        assert self._file is not None, "open comes first"
        return self._file

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ForeignFileError, OSError) as exc:
            raise StoreError(f"archive store {self.path} {what}: {exc}") from exc
