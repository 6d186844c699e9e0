"""Opening the session store's file: lock, schema and its versions, write-ahead log, what errors of SQLite mean."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
import struct
from contextlib import closing
from pathlib import Path
from typing import Final

from mqtt_trio.archive.sqlite_file import create_private
from mqtt_trio.errors import StoreError
from mqtt_trio.server.store_rows import MARKS, SCHEMA, TABLES

APPLICATION_ID: Final = 0x4D515454
"""`PRAGMA application_id` of our files: MQTT."""
SCHEMA_VERSION: Final = 2
"""`PRAGMA user_version` of the files that we write."""
STEPS: Final[dict[int, str]] = {1: MARKS.create}
"""Version -> statements that make the next version of it, for each version before SCHEMA_VERSION."""

PAGE: Final = 4096
"""Bytes of a page."""
CHECKPOINT_PAGES: Final = 1000
"""Pages in the write-ahead log from where on a commit folds it into the file: 4 MiB, a few milliseconds of work. This
connection is the only one, so the fold is always whole and the next commit starts the log again at its beginning."""
LOG_LIMIT: Final = 8 * 1024 * 1024
"""Bytes that the log is cut to after a fold, when a single large commit made it longer."""
CACHE: Final = 32 * 1024 * 1024
"""Bytes of pages that SQLite keeps in memory, at most."""

CORRUPT: Final = frozenset((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))
_MENDS: Final = {
    sqlite3.SQLITE_FULL: "the disk or a quota is full: free some space",
    sqlite3.SQLITE_BUSY: "another process keeps it locked: end that one",
    sqlite3.SQLITE_LOCKED: "another process keeps it locked: end that one",
    sqlite3.SQLITE_IOERR: "the disk or file system fails: check it, and whether there is space",
    sqlite3.SQLITE_NOMEM: "memory is short",
    sqlite3.SQLITE_TOOBIG: "a row is larger than SQLite takes",
    sqlite3.SQLITE_READONLY: "let the user that runs the broker write there, or choose another place with --data",
    sqlite3.SQLITE_CANTOPEN: "let the user that runs the broker write there, or choose another place with --data",
    sqlite3.SQLITE_PERM: "let the user that runs the broker write there, or choose another place with --data",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restart the broker, which keeps what can be read of it",
    sqlite3.SQLITE_NOTADB: "the file is damaged: restart the broker, which keeps what can be read of it",
}
"""Primary result code -> what helps."""
_SYSTEM_MENDS: Final = {
    errno.ENOSPC: _MENDS[sqlite3.SQLITE_FULL],
    errno.EDQUOT: _MENDS[sqlite3.SQLITE_FULL],
    errno.EIO: _MENDS[sqlite3.SQLITE_IOERR],
    errno.ENOENT: "check the path",
}

logger = logging.getLogger(__name__)


class UnusableFileError(Exception):
    """The file is there and cannot be used as it is [S3].

    Attributes:
      ours: True when its rows are worth reading, False for a later version's or another program's file.
    """

    def __init__(self, text: str, *, ours: bool) -> None:
        super().__init__(text)
        self.ours = ours


def code_of(exc: sqlite3.Error) -> int:
    """Return the primary result code, 0 when there is none."""
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF


def store_error(path: Path, exc: sqlite3.Error | OSError, what: str) -> StoreError:
    """Return the error that tells people what could not be done, why, and what helps."""
    if isinstance(exc, sqlite3.Error):
        mend = _MENDS.get(code_of(exc), "check the file")
        return StoreError(f"session store {path} {what}: {exc} ({getattr(exc, 'sqlite_errorname', 'no code')}); {mend}")
    mend = _SYSTEM_MENDS.get(exc.errno or 0, _MENDS[sqlite3.SQLITE_PERM])
    return StoreError(f"session store {path} {what}: {exc.strerror or exc}; {mend}")


def lock_file(path: Path) -> int:
    """Make the directory of the store, take `PATH.lock` for this process and return its descriptor.

    The lock ends with the process, however that ends; the file stays. SQLite's own lock would not do: it is gone while
    a damaged file is replaced.

    Raises:
      StoreError: another process, named in the text, has it, or it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise store_error(path, exc, f"cannot be locked ({path}.lock)") from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StoreError(
            f"session store {path} is in use by process {holder}: two brokers cannot share it, "
            "end that one or choose another place with --data"
        ) from None
    except OSError:
        pass  # the process number is a help for people; a full disk is reported by what needs the space
    return descriptor


def connect(path: Path, *, synchronous: str) -> sqlite3.Connection:
    """Open the file, new or not, and bring it to this version.

    Raises:
      UnusableFileError: it is damaged, another program's or of a later version.
      sqlite3.Error: it cannot be opened or written.
    """
    frames = committed_frames(f"{path}-wal")
    if frames and (not path.exists() or not path.stat().st_size):
        os.replace(f"{path}-wal", log_aside(path))  # SQLite would delete it
        create_private(path)
        raise UnusableFileError("it is empty and its write-ahead log is not", ours=True)
    create_private(path)
    # check_same_thread: the thread that loads need not be the one that commits; there is one at a time.
    db = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()  # no -shm file, no locks to take for each commit
        db.text_factory = decode_text
        new = _check_header(path, db)
        _check_log(db, frames)
        _set_up(db, new=new, synchronous=synchronous)  # until here nothing was written
        _upgrade(db)
    except BaseException as exc:
        damaged = isinstance(exc, sqlite3.Error) and code_of(exc) in CORRUPT
        if damaged or isinstance(exc, UnusableFileError):
            close_keeping_log(path, db)
        else:
            db.close()
        if damaged:
            raise UnusableFileError(str(exc), ours=True) from exc
        raise
    return db


def _set_up(db: sqlite3.Connection, *, new: bool, synchronous: str) -> None:
    """Have SQLite work as a store with one writer and many small commits needs it."""
    run = db.execute
    if new:
        run(f"PRAGMA page_size = {PAGE}")
        run("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table, or never
    run(f"PRAGMA cache_size = {-CACHE // 1024}")
    run("PRAGMA secure_delete = OFF")
    run("PRAGMA recursive_triggers = OFF")  # on, REPLACE looks for triggers
    run(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    run(f"PRAGMA journal_size_limit = {LOG_LIMIT}").fetchall()
    run("PRAGMA journal_mode = WAL").fetchall()
    run(f"PRAGMA synchronous = {synchronous}")


def log_aside(path: Path) -> Path:
    """Return where the log of a file that is about to be set aside waits for it."""
    return Path(f"{path}-wal.aside")


def close_keeping_log(path: Path, db: sqlite3.Connection) -> None:
    """Close a file that is unusable. SQLite folds the log in, as far as it is good, and deletes it; so it is moved."""
    try:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except (sqlite3.Error, UnicodeDecodeError):  # the latter for a message that quotes damage
        pass
    try:
        os.replace(f"{path}-wal", log_aside(path))
    except OSError:
        pass  # none there
    db.close()


def decode_text(data: bytes) -> str:
    """Decode a text of the file; what is no UTF-8 becomes what no checksum accepts."""
    return data.decode("utf-8", "surrogateescape")  # it is that row's damage, not the end of all reading


def _check_header(path: Path, db: sqlite3.Connection) -> bool:
    """Return whether the file is empty; raise UnusableFileError when it is none of ours, or damaged at first sight."""
    try:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as exc:
        if exc.args and "malformed" in str(exc) and code_of(exc) not in CORRUPT:  # SQLITE_ERROR for a bad schema
            raise UnusableFileError(str(exc), ours=True) from exc
        raise
    except UnicodeDecodeError as exc:  # SQLite's own message quotes what is no UTF-8
        raise UnusableFileError("its list of tables is damaged", ours=True) from exc
    if not tables and not application and not version:
        size = path.stat().st_size
        if size % PAGE or size > 2 * PAGE:  # more than a start that was cut off leaves
            raise UnusableFileError("its list of tables is empty", ours=True)
        return True
    ours = {table.name for table in TABLES if table.since <= max(version, 1)} <= tables
    if application != APPLICATION_ID and not ours:
        raise UnusableFileError("it is another program's database", ours=False)
    if version > SCHEMA_VERSION:
        raise UnusableFileError(f"it has version {version}, this program knows up to {SCHEMA_VERSION}", ours=False)
    if application != APPLICATION_ID or not 1 <= version <= SCHEMA_VERSION or (version == SCHEMA_VERSION and not ours):
        raise UnusableFileError("its header is damaged", ours=True)
    if version == SCHEMA_VERSION and not _definitions_of_this_version() <= _definitions(db):
        raise UnusableFileError("its list of tables is damaged", ours=True)
    return False


def _check_log(db: sqlite3.Connection, frames: int) -> None:
    """Fold the log in and raise UnusableFileError when that ended before the last commit of its `frames`."""
    recovered = max(db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1], 0)  # -1: no log
    if recovered < frames:
        raise UnusableFileError(
            f"its write-ahead log is damaged after {recovered} of {frames} pages, the commits behind them are lost",
            ours=True,
        )


def _definitions(db: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"))


def _definitions_of_this_version() -> set[tuple[str, str]]:
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        return _definitions(db)


def _upgrade(db: sqlite3.Connection) -> None:
    """Make the tables of a new file, or take an older one through the STEPS, in one transaction."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    steps = [STEPS[each] for each in range(version, SCHEMA_VERSION)] if version else [SCHEMA]
    db.executescript(
        "BEGIN IMMEDIATE;"
        + "".join(steps)
        + f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    )
    if version:
        logger.info("session store: brought from version %d to %d", version, SCHEMA_VERSION)


def committed_frames(log: str) -> int:
    """Return how many pages a whole write-ahead log holds up to its last commit, judging by the heads of its frames.

    SQLite takes the frames up to the first one whose checksum is wrong and drops the others without a word: right for
    a write that was cut short, a silent loss when the damage is in the middle.
    """
    try:
        with open(log, "rb") as file:
            head = file.read(32)
            if len(head) < 32:
                return 0
            page = struct.unpack(">I", head[8:12])[0]
            # Of a damaged head nothing is believed; the frames are still there, each with the salt of its generation.
            salt = head[16:24] if _head_is_good(head) else None
            count = committed = 0
            size = PAGE if salt is None else page
            while len(frame := file.read(24)) == 24 and len(file.read(size)) == size:
                salt = salt or frame[8:16]
                count += 1
                # What an earlier generation left behind the last frame differs in both halves of the salt.
                ours = frame[8:12] == salt[:4] or frame[12:16] == salt[4:]
                if ours and frame[4:8] != b"\0\0\0\0":
                    committed = count
            return committed
    except FileNotFoundError:
        return 0


def _head_is_good(head: bytes) -> bool:
    """Whether the checksum of a log's head is right: two sums over its words, in the byte order that its magic says."""
    words = struct.unpack(f"{'>' if head[3] & 1 else '<'}6I", head[:24])
    first = second = 0
    for x, y in zip(words[::2], words[1::2], strict=True):
        first = (first + x + second) & 0xFFFFFFFF
        second = (second + y + first) & 0xFFFFFFFF
    return struct.unpack(">2I", head[24:]) == (first, second) and head[:3] == b"\x37\x7f\x06"
