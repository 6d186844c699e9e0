"""One SQLite file of archived messages: schema, inserts, bounds. Blocking; runs in the thread of `SqliteArchive`.

The bound `max_size` holds for the file and its write-ahead log together. Three quarters belong to the pages of the
database, the rest to the log: a transaction is cut so that it fits what is left of the log, and the log is folded
into the file before it grows further. Room is made before rows are inserted, so pages are used again instead of
added. (`-shm`, the log's index, is 32 KiB more. Another process that keeps a read transaction open keeps the log
from being folded in; the log then grows until that reader is done.)
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mqtt_trio.broker.message import Message

SCHEMA_VERSION: Final = 1
"""`PRAGMA user_version` of the files that we write."""
PAGE: Final = 4096
"""Bytes of a page of a file that we make."""
LOG_LIMIT: Final = 8 * 1024 * 1024
"""Bytes of the write-ahead log from where on it is folded into the file."""
LOG_RESERVE: Final = 64 * 1024 * 1024
"""Bytes of `max_size` set aside for the log, at most: a single message may need them."""
DELETE_ROWS: Final = 1000
"""Rows deleted in one transaction, at most."""
TRANSACTION_ROWS: Final = 20_000
ROW_OVERHEAD: Final = 200
"""Bytes of a row, its keys and its index entries beside the text and payload that it holds."""

SCHEMA: Final = """
CREATE TABLE messages (
  id INTEGER PRIMARY KEY,
  timestamp_ms INTEGER NOT NULL,
  topic TEXT NOT NULL,
  payload BLOB NOT NULL,
  qos INTEGER NOT NULL,
  retained INTEGER NOT NULL,
  client_id TEXT NOT NULL,
  content_type TEXT,
  response_topic TEXT,
  correlation_data BLOB,
  user_properties TEXT,
  payload_format_indicator INTEGER,
  message_expiry_interval INTEGER
);
CREATE INDEX messages_by_topic ON messages (topic, timestamp_ms);
CREATE INDEX messages_by_time ON messages (timestamp_ms);
"""
COLUMNS: Final = (
    "timestamp_ms",
    "topic",
    "payload",
    "qos",
    "retained",
    "client_id",
    "content_type",
    "response_topic",
    "correlation_data",
    "user_properties",
    "payload_format_indicator",
    "message_expiry_interval",
)
_INSERT: Final = f"INSERT INTO messages ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"

Row = tuple[object, ...]


class ForeignFileError(Exception):
    """The file is a database, but none that this version can use."""


class MessageTooLargeError(Exception):
    """A message that the bound leaves no room for."""


def row_of(message: Message) -> Row:
    """Return the values of COLUMNS; User Properties become a JSON list of [name, value]."""
    p = message.properties
    return (
        round(message.published_at * 1000),
        message.topic_name,
        message.payload,
        message.qos,
        1 if message.retain else 0,
        message.client_id,
        p.content_type,
        p.response_topic,
        p.correlation_data,
        json.dumps(p.user_properties, ensure_ascii=False) if p.user_properties else None,
        p.payload_format_indicator,
        p.message_expiry_interval,
    )


def cost_of(message: Message) -> int:
    """Bytes that a message takes in the file, never too few."""
    p = message.properties
    # The topic stands in the row and in an index; characters take up to four bytes.
    size = ROW_OVERHEAD + len(message.payload) + 8 * len(message.topic_name) + 4 * len(message.client_id)
    for text in (p.content_type, p.response_topic):
        if text:
            size += 4 * len(text)
    if p.correlation_data:
        size += len(p.correlation_data)
    for name, value in p.user_properties:
        size += 8 + 4 * (len(name) + len(value))
    return size if size < PAGE // 4 else size + PAGE  # a row that spills over has pages of its own


def noted_progress(db: sqlite3.Connection) -> str | None:
    """Return what an unfinished rebuild noted in a file; None: there is none."""
    found = db.execute("SELECT name FROM sqlite_schema WHERE name = 'rebuild'").fetchone()
    if found is None:
        return None
    (progress,) = db.execute("SELECT progress FROM rebuild").fetchone()
    return str(progress)


def create_private(path: Path) -> None:
    """Make an empty file that only its owner may read, 0600, where there is none: the messages in it are nobody else's.
    SQLite takes it for a new database and gives its log the same mode. One that is there keeps its mode."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError:
        pass  # it is there; or it cannot be made, which SQLite reports


class ArchiveFile:
    """An open file.

    Raises:
      ForeignFileError: the file has another schema, or one of a later version.
      sqlite3.Error: it cannot be opened or is no database.
    """

    def __init__(self, path: Path, *, max_size: int | None, synchronous: str) -> None:
        self.path = path
        self.max_size = max_size
        self._log_path = f"{path}-wal"
        self._reserve = LOG_RESERVE if max_size is None else min(max_size // 4, LOG_RESERVE)
        self._budget = min(self._reserve // 2, LOG_LIMIT)
        self._limit = self._delete_rows = self._page = 0  # known once the file is open
        create_private(path)
        self._db = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(synchronous)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, synchronous: str) -> None:
        run = self._db.execute
        (version,) = run("PRAGMA user_version").fetchone()
        tables = {name for (name,) in run("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if version > SCHEMA_VERSION:
            raise ForeignFileError(f"it has version {version}, this program knows up to {SCHEMA_VERSION}")
        if tables and (version == 0 or "messages" not in tables):
            raise ForeignFileError("it is another program's database")
        if tables and not {row[1] for row in run("PRAGMA table_info(messages)")}.issuperset(COLUMNS):
            raise ForeignFileError("its table messages has other columns")
        if not tables:
            run("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table, or never
        run("PRAGMA journal_mode = WAL").fetchone()
        run(f"PRAGMA synchronous = {synchronous}")
        run("PRAGMA wal_autocheckpoint = 0")  # `_fold_log` does it
        if not tables:
            self._db.executescript(f"BEGIN IMMEDIATE;{SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        (self._page,) = run("PRAGMA page_size").fetchone()
        self._limit = 0 if self.max_size is None else (self.max_size - self._reserve) // self._page
        # A deleted row may change a leaf of the table and one of each index, all of which go through the log.
        self._delete_rows = max(min(DELETE_ROWS, self._budget // (3 * self._page)), 1)
        run("BEGIN IMMEDIATE")  # shows now, not at the first message, whether the file may be written
        run("ROLLBACK")
        self._fold_log()

    def close(self) -> None:
        """Close; the log is folded into the file and removed when nobody else has it open."""
        self._db.close()

    def fitting(self, messages: Sequence[Message], start: int, end: int) -> tuple[int, int]:
        """Return how far a transaction of messages[start:end] goes, and the bytes that it takes at most.

        Raises:
          MessageTooLargeError: the first message alone is too large for the bound.
        """
        topics: set[str] = set()
        total = 4 * PAGE  # the root, the pages that change whatever is inserted
        end = min(end, start + TRANSACTION_ROWS)
        for at in range(start, end):
            message = messages[at]
            cost = cost_of(message)
            if message.topic_name not in topics:
                topics.add(message.topic_name)
                cost += 2 * PAGE  # a leaf of the index, which may split
            if total + cost > self._budget:
                if at > start:
                    return at, total
                if self.max_size is not None and total + cost > self._reserve:
                    raise MessageTooLargeError(
                        f"a message of {len(message.payload)} bytes is too large for MaxSize = {self.max_size}; "
                        f"it may have a quarter of that, at most {LOG_RESERVE}"
                    )
            total += cost
        return end, total

    def insert(self, messages: Sequence[Message], cost: int, *, progress: str | None = None) -> None:
        """Store messages in one transaction of at most `cost` bytes, having made room for it; `progress` with them."""
        if self.max_size is not None:
            if self.log_size + cost > self._reserve:
                self._fold_log()
            self._make_room(cost)
        self._transaction(_INSERT, [row_of(message) for message in messages], progress)
        if self.log_size > self._budget:
            self._fold_log()

    def _transaction(self, statement: str, rows: Sequence[Row], progress: str | None = None) -> int:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            changed = self._db.executemany(statement, rows).rowcount
            if progress is not None:
                self._db.execute("UPDATE rebuild SET progress = ?", (progress,))
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return changed

    @property
    def log_size(self) -> int:
        """Bytes of the write-ahead log."""
        try:
            return os.stat(self._log_path).st_size
        except FileNotFoundError:
            return 0

    def _fold_log(self) -> None:
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()  # a reader in the way: busy, no error

    # --- rebuilding it from an archive ---

    def rebuild_progress(self) -> str | None:
        """Return what an unfinished rebuild noted; None: there is none."""
        return noted_progress(self._db)

    def begin_rebuild(self, progress: str) -> None:
        """Note that a rebuild has begun, in a table that `finish_rebuild` removes."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("CREATE TABLE rebuild (progress TEXT NOT NULL)")
            self._db.execute("INSERT INTO rebuild VALUES (?)", (progress,))
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def note_progress(self, progress: str) -> None:
        """Note how far a rebuild has come, where it stored nothing."""
        self._transaction("UPDATE rebuild SET progress = ?", [(progress,)])

    def finish_rebuild(self) -> None:
        """Remove what a rebuild noted."""
        self._db.execute("DROP TABLE IF EXISTS rebuild")
        self._fold_log()

    def count(self) -> int:
        """Return how many messages there are."""
        (count,) = self._db.execute("SELECT count(*) FROM messages").fetchone()
        return int(count)

    def is_empty(self) -> bool:
        """Say whether there is no message."""
        return self._db.execute("SELECT 1 FROM messages LIMIT 1").fetchone() is None

    # --- bounds ---

    def _pages(self) -> tuple[int, int]:
        """Return the pages of the file and how many of them are in use."""
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (unused,) = self._db.execute("PRAGMA freelist_count").fetchone()
        return pages, pages - unused

    def _make_room(self, cost: int) -> None:
        """Delete the oldest rows until `cost` bytes fit into pages within the bound."""
        needed = -(-cost // self._page)
        pages, used = self._pages()
        before = used
        while used + needed > self._limit and self._delete_oldest(used, needed):
            pages, used = self._pages()
            if before - used > 8 * needed and pages - used >= needed:
                break  # the bound was lowered a lot: the rest is for `tend`, this transaction does not wait for it

    def _delete_oldest(self, used: int, needed: int) -> bool:
        """Delete about as many of the oldest rows as fill `needed` pages, of `used`; say whether there were any."""
        first, last = self._db.execute(
            "SELECT (SELECT min(id) FROM messages), (SELECT max(id) FROM messages)"
        ).fetchone()
        if first is None:
            return False
        rows = last - first + 1  # ids have next to no gaps: the oldest rows are deleted, no others
        chunk = min(max(rows * needed // max(used, 1), 1), self._delete_rows, rows)
        return self._delete("DELETE FROM messages WHERE id < ?", (first + chunk,)) > 0

    def _delete(self, statement: str, values: Row) -> int:
        if self.log_size > self._budget:
            self._fold_log()
        deleted = self._transaction(statement, [values])
        if self.log_size > self._budget:
            self._fold_log()
        return deleted

    def tend(self, before_ms: int | None) -> bool:
        """Do one short step towards the bounds: rows older than `before_ms`, what a lowered `max_size` leaves over.

        Returns whether there is more to do at once.
        """
        more = before_ms is not None and self._delete_before(before_ms)
        if self.max_size is None:
            return more
        pages, used = self._pages()
        if used > self._limit:
            return self._delete_oldest(used, used - self._limit) or more
        if pages > self._limit:
            # `execute` would stop after the first page: each is a row, and a row without columns ends it.
            self._db.executescript(f"PRAGMA incremental_vacuum({self._budget // self._page})")
            self._fold_log()
            return self._pages()[0] < pages or more
        return more

    def _delete_before(self, timestamp_ms: int) -> bool:
        deleted = self._delete(
            "DELETE FROM messages WHERE id IN (SELECT id FROM messages WHERE timestamp_ms < ?"
            " ORDER BY timestamp_ms LIMIT ?)",
            (timestamp_ms, self._delete_rows),
        )
        return deleted >= self._delete_rows
