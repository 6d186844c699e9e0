"""Checking a session store's file without changing it; blocking."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

import attrs

from mqtt_trio.errors import StoreError
from mqtt_trio.server.store_file import (
    APPLICATION_ID,
    PAGE,
    SCHEMA_VERSION,
    committed_frames,
    decode_text,
    log_aside,
    store_error,
)
from mqtt_trio.server.store_reader import read_contents

MOST_LINES: Final = 20
"""Lines of SQLite's own check that are reported, at most."""


@attrs.define
class StoreReport:
    """What `check_store_file` found."""

    lines: list[str] = attrs.Factory(list)
    """Facts, one a line, for people."""
    problems: list[str] = attrs.Factory(list)
    """What is wrong, one a line; empty when the file is sound."""
    marks: dict[str, bytes] = attrs.Factory(dict)
    """What gateways and a rebuild noted in it."""


def check_store_file(path: Path) -> StoreReport:
    """Check the whole file: header, structure, the checksum of every row. A log that waits beside it is checked, too,
    in a copy of both in the directory for temporary files.

    Raises:
      StoreError: there is no such file, a broker uses it, it cannot be read.
    """
    report = StoreReport()
    try:
        _check_unused(path)
        log_size = _size(Path(f"{path}-wal"))
        report.lines.append(f"{path}: {_size(path, required=True)} bytes, write-ahead log {log_size} bytes")
        if log_size or _size(path):
            with _readable(path, copied=log_size > 0) as db:
                _check(db, report, committed_frames(f"{path}-wal"))
        else:
            report.lines.append("it is empty, as a start that was cut off leaves it; the next one goes on")
    except OSError as exc:
        raise store_error(path, exc, "cannot be checked") from exc
    except (sqlite3.Error, UnicodeDecodeError) as exc:  # the latter for a message that quotes damage
        report.problems.append(f"SQLite cannot read it: {exc}")
    for other in sorted(path.parent.glob(f"{path.name}.corrupt-*")):
        report.lines.append(f"set aside earlier: {other}, {_size(other)} bytes")
    if log_aside(path).exists():
        report.problems.append(f"{log_aside(path)}: the log of a damaged file, left by a start that did not end")
    return report


def _size(path: Path, *, required: bool = False) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        if required:
            raise
        return 0


def _check_unused(path: Path) -> None:
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
        raise StoreError(f"session store {path} is in use by process {holder}: stop that one first") from None
    finally:
        os.close(descriptor)


@contextmanager
def _readable(path: Path, *, copied: bool) -> Iterator[sqlite3.Connection]:
    """Open for reading only; with a log, which SQLite would fold in, open a copy."""
    with tempfile.TemporaryDirectory(prefix="mqtt-trio-doctor-") as directory:
        uri = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
        if copied:
            copy = Path(directory, "store")
            shutil.copyfile(path, copy)
            shutil.copyfile(f"{path}-wal", f"{copy}-wal")
            uri = f"file:{quote(str(copy))}"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as db:
            db.text_factory = decode_text
            yield db


def _check(db: sqlite3.Connection, report: StoreReport, frames: int) -> None:
    ((application,), (version,), (pages,), (unused,)) = (
        db.execute(f"PRAGMA {name}").fetchone()
        for name in ("application_id", "user_version", "page_count", "freelist_count")
    )
    report.lines.append(f"schema version {version} (this program: {SCHEMA_VERSION})")
    report.lines.append(f"{pages} pages of {PAGE} bytes, {unused} of them unused")
    if application != APPLICATION_ID:
        report.problems.append("the header does not say that it is a session store")
    if not 1 <= version <= SCHEMA_VERSION:
        report.problems.append(f"version {version} is none that this program knows")
        return
    if frames:
        _, recovered, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        report.lines.append(f"write-ahead log: {recovered} of {frames} pages are sound")
        if recovered < frames:
            report.problems.append(f"the write-ahead log is damaged after {max(recovered, 0)} of {frames} pages")
    try:
        found = [line for (line,) in db.execute(f"PRAGMA integrity_check({MOST_LINES})")]
    except sqlite3.Error as exc:
        found = [str(exc)]
    if found != ["ok"]:
        report.problems += [f"structure: {' '.join(line.split())}" for line in found]
    contents = read_contents(db)
    report.lines += [f"{name}: {count} rows, checksums right" for name, count in contents.counts().items()]
    report.problems += contents.losses()
    report.marks = contents.state.marks
