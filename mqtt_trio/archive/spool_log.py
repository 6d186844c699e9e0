"""The blocking half of a spool: an append-only log in segments, in a directory of its own.

`NUMBER.seg` holds records from position NUMBER on; `cursor` says in front of which position all is acknowledged. A
segment is deleted once all of it is; the cursor is written in place and not waited for, so behind a power loss what was
acknowledged last may come again. Every start, and every write that failed, begins a new segment.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from mqtt_trio.archive.spool_records import (
    CURSOR_SLOT,
    SEGMENT,
    DamagedError,
    LaterVersionError,
    SpoolRecord,
    TornRecordError,
    find_record,
    pack_cursor,
    pack_records,
    pack_segment_header,
    read_cursor,
    read_record,
    read_segment_header,
)
from mqtt_trio.errors import StoreError

BLOCK: Final = 4096
"""Bytes: of a file that the disk cannot read whole, blocks of so many are read singly."""

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class Segment:
    """One file."""

    path: Path
    first: int
    """Position of its first message."""
    end: int
    """Position behind its last message."""
    size: int
    """Bytes that count; more lie behind them where a failed write could not be taken back."""
    begin: int
    """Where its records begin."""
    damaged: bool = False
    """It is kept for people when it is done with."""


class SpoolLog:
    """One directory. Blocking: no two calls at once, none on the Trio thread.

    Positions count messages since the spool was first used. What was appended is read once, in order; what was not
    acknowledged is read again by the next process.

    Attributes:
      acknowledged: position in front of which nothing is needed any more.
      end: position of the next message.
      unread: position of the next message to be read.
      size: bytes of all segments, files that were set aside not counted.
      lost: messages that could not be read back.
    """

    def __init__(self, directory: Path, *, segment_bytes: int, synchronous: str = "FULL") -> None:
        """`segment_bytes`: where a segment ends, at the next append; `synchronous`: FULL waits for the disk with every
        append, NORMAL with every segment, OFF never: what a power loss costs."""
        self.directory = directory
        self.acknowledged = self.end = self.unread = 0
        self.size = self.lost = 0
        self._segment_bytes = segment_bytes
        self._synchronous = synchronous
        self._segments: list[Segment] = []
        self._active = self._lock = self._cursor = -1  # file descriptors
        self._cursor_number = 0
        self._handed_out = 0  # position behind the last message that was read
        self._reading: Segment | None = None
        self._buffer, self._at = b"", 0
        self._loaded = 0  # bytes of the segment that is being read, from its beginning

    # --- opening ---

    def open(self) -> None:
        """Read what there is: the cursor, the header of each segment, the whole of the last one.

        Raises:
          StoreError: the directory cannot be used; the text says what helps.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _open(self.directory / "lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open_cursor()
            self._open_segments()
        except BlockingIOError:
            self.close()
            raise StoreError(f"spool {self.directory}: another process uses it, end that one") from None
        except OSError as exc:
            self.close()
            raise self._error(exc, "cannot be opened") from exc

    def _open_cursor(self) -> None:
        path = self.directory / "cursor"
        self._cursor = _open(path, os.O_RDWR | os.O_CREAT)
        data = os.pread(self._cursor, 2 * CURSOR_SLOT, 0)
        found = read_cursor(data)
        if found is not None:
            self._cursor_number, self.acknowledged = found
        elif data.strip(b"\0"):
            logger.error("spool cursor %s is damaged: what is in the spool is sent again from its beginning", path)
        if found is None:
            os.pwrite(self._cursor, bytes(2 * CURSOR_SLOT), 0)
            if self._synchronous != "OFF":
                _sync_directory(self.directory)
                _sync_directory(self.directory.parent)

    def _open_segments(self) -> None:
        self._segments = []
        previous_ends: list[int] = []
        for path in sorted(path for path in self.directory.glob("*.seg") if path.stem.isdecimal()):
            if (found := self._look_at(path)) is not None:
                self._segments.append(found[0])
                previous_ends.append(found[1])
        for segment, later, previous_end in zip(self._segments, self._segments[1:], previous_ends[1:], strict=False):
            segment.end = max(min(previous_end, later.first), segment.first)
        if self._segments:
            self._find_end(self._segments[-1])
            self.acknowledged = max(self.acknowledged, self._segments[0].first)
            self.end = self._segments[-1].end
        self.size = sum(segment.size for segment in self._segments)
        self.end = max(self.end, self.acknowledged)
        self.unread = self._handed_out = self.acknowledged
        self._forget_acknowledged()

    def _look_at(self, path: Path) -> tuple[Segment, int] | None:
        """Read the header of a segment: return it, its end yet unknown, and where the one before it ended."""
        segment = Segment(path, int(path.stem), int(path.stem), path.stat().st_size, 0)
        try:
            previous_end = read_segment_header(self._load(segment, 0, SEGMENT.size), segment.first)
        except TornRecordError:  # its making was interrupted, before there was a record in it
            path.unlink()
            return None
        except LaterVersionError as exc:
            _set_aside(path, exc)
            return None
        except DamagedError as exc:
            self._is_damaged(segment, exc, 0)
            return segment, segment.first
        segment.begin = SEGMENT.size
        return segment, previous_end

    def _find_end(self, segment: Segment) -> None:
        """Read the last segment to its end; cut off a record that was not written whole."""
        data, at = self._load(segment, 0), segment.begin
        segment.end = segment.first
        while at < len(data):
            try:
                record, at = read_record(data, at)
                segment.end = record.end
            except TornRecordError:
                logger.info("spool segment %s: its last %d bytes, a record that was not written whole, are cut off",
                            segment.path, len(data) - at)  # fmt: skip
                os.truncate(segment.path, at)
                segment.size = at
                return
            except DamagedError as exc:
                self._is_damaged(segment, exc, at)
                at = find_record(data, at + 1)

    # --- writing ---

    def append(self, records: Sequence[SpoolRecord]) -> None:
        """Write `records` behind all others, as one. The first one's position is `end`, or above it where the messages
        between need not be kept.

        Raises:
          StoreError: none of them is there. The next attempt writes to a new file.
        """
        if not records:
            return
        data = pack_records(records)
        try:
            if self._active < 0 or self._segments[-1].size >= self._segment_bytes or records[0].position != self.end:
                self._begin_segment(records[0].position)
            segment = self._segments[-1]
            try:
                _write(self._active, data)
                if self._synchronous == "FULL":
                    os.fdatasync(self._active)
            except OSError:
                self._take_back(segment)
                raise
        except OSError as exc:
            raise self._error(exc, "cannot be written") from exc
        segment.size += len(data)
        self.size += len(data)
        segment.end = self.end = records[-1].end

    def _begin_segment(self, first: int) -> None:
        self._end_segment()
        path = self.directory / f"{first:020d}.seg"
        if self._segments and self._segments[-1].path == path:
            self._remove(self._segments.pop())  # nothing in it: its first write failed
        header = pack_segment_header(first, self.end)
        if os.path.lexists(path):
            _set_aside(path, "it is in the way of a new one")
        active = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            _write(active, header)
            if self._synchronous != "OFF":
                os.fsync(active)
                _sync_directory(self.directory)
        except OSError:
            os.close(active)
            path.unlink(missing_ok=True)
            raise
        self._active = active
        self._segments.append(Segment(path, first, first, len(header), len(header)))
        self.size += len(header)

    def _end_segment(self) -> None:
        if self._active >= 0:
            active, self._active = self._active, -1
            try:
                if self._synchronous == "NORMAL":
                    os.fdatasync(active)
            finally:
                os.close(active)

    def _take_back(self, segment: Segment) -> None:
        """Remove what a failed write left, so that no later start finds it; end the segment in any case: what a failed
        fsync left in memory is not to be trusted."""
        try:
            os.ftruncate(self._active, segment.size)
        except OSError as exc:
            logger.debug("spool segment %s cannot be cut: %s", segment.path, exc)
        active, self._active = self._active, -1
        os.close(active)

    # --- reading ---

    def read(self, limit: int) -> list[SpoolRecord]:
        """Return the next records, about `limit` bytes of them and at least one where there is one.

        Damaged places are left out: they are logged, their file is kept, their messages are counted in `lost`.

        Raises:
          StoreError: a file cannot be opened now; the next attempt may succeed.
        """
        records: list[SpoolRecord] = []
        size = 0
        try:
            while size < limit and self.unread < self.end:
                segment = self._segment_to_read()
                record = self._next_record(segment) if segment is not None else None
                if record is None:
                    self._pass_over(self.end if segment is None else segment.end)
                    continue
                if record.position > self.unread:
                    self._pass_over(record.position)
                self.unread = self._handed_out = record.end
                records.append(record)
                size += record.size
        except OSError as exc:
            if not records:
                raise self._error(exc, "cannot be read") from exc
        return records

    def _segment_to_read(self) -> Segment | None:
        if self._reading is None or self.unread >= self._reading.end:
            self._reading = next((each for each in self._segments if each.end > self.unread), None)
            self._buffer, self._at = b"", 0
            self._loaded = 0 if self._reading is None else self._reading.begin
        return self._reading

    def _next_record(self, segment: Segment) -> SpoolRecord | None:
        """Return the first record of `segment` that is not read yet; None when there is none."""
        while True:
            if self._at >= len(self._buffer):
                if self._loaded >= segment.size:
                    return None
                self._buffer, self._at = self._load(segment, self._loaded), 0
                self._loaded = segment.size
            try:
                record, self._at = read_record(self._buffer, self._at)
            except (TornRecordError, DamagedError) as exc:
                reason = "it ends within a record" if isinstance(exc, TornRecordError) else exc
                self._is_damaged(segment, reason, self._loaded - len(self._buffer) + self._at)
                self._at = find_record(self._buffer, self._at + 1)
                continue
            if record.position >= segment.end:  # of a write that failed: it was repeated elsewhere
                self._at, self._loaded = len(self._buffer), segment.size
                return None
            if record.end > self.unread:
                return record

    def _pass_over(self, position: int) -> None:
        """Go on at `position`: the messages in front of it are not there any more."""
        lost = position - self.unread
        logger.error("spool %s: %d messages could not be read back", self.directory, lost)
        self.lost += lost
        self.unread = position
        if self.acknowledged >= self._handed_out:
            self.acknowledge(position)

    def skip(self, position: int) -> None:
        """Do not read what lies in front of `position`: the caller has it."""
        if position > self.unread:
            self.unread = self._handed_out = position

    def acknowledge(self, position: int) -> None:
        """Note that nothing in front of `position` is needed any more; delete what is over."""
        if position >= self._handed_out:
            position = max(position, self.unread)  # what could not be read back as well
        if position <= self.acknowledged:
            return
        self.acknowledged = position
        self.end = max(self.end, position)
        self.skip(position)
        self._cursor_number += 1
        try:
            os.pwrite(self._cursor, pack_cursor(self._cursor_number, position), self._cursor_number % 2 * CURSOR_SLOT)
        except OSError as exc:  # no harm but that messages come again behind a restart
            logger.debug("spool %s: the cursor cannot be written: %s", self.directory, exc)
        self._forget_acknowledged()

    def _forget_acknowledged(self) -> None:
        while self._segments and self._segments[0].end <= self.acknowledged:
            if len(self._segments) == 1:
                self._end_segment()
            self._remove(self._segments.pop(0))

    def _remove(self, segment: Segment) -> None:
        self.size -= segment.size
        if segment is self._reading:
            self._reading = None
        try:
            if segment.damaged:
                _set_aside(segment.path, "see above")
            else:
                segment.path.unlink(missing_ok=True)
        except OSError as exc:
            logger.warning("spool segment %s is done with and cannot be removed: %s", segment.path, exc.strerror)

    # --- trouble ---

    def _load(self, segment: Segment, at: int, size: int | None = None) -> bytes:
        """Return `size` bytes (None: all) of `segment` from `at` on; zeros in place of what the disk cannot read."""
        end = segment.size if size is None else min(at + size, segment.size)
        try:
            descriptor = _open(segment.path, os.O_RDONLY)
        except FileNotFoundError:
            self._is_damaged(segment, "it was removed", at)
            return b""
        try:
            return _read(descriptor, at, end)
        except OSError as exc:
            self._is_damaged(segment, f"the disk cannot read it: {exc.strerror}", at)
            blocks = itertools.pairwise([at, *range(at - at % BLOCK + BLOCK, end, BLOCK), end])
            return b"".join(_read_or_zeros(descriptor, *block) for block in blocks)
        finally:
            os.close(descriptor)

    def _is_damaged(self, segment: Segment, reason: object, at: int) -> None:
        if not segment.damaged:
            segment.damaged = True
            logger.error(
                "spool segment %s is damaged: %s (byte %d). What can be read of it is used; "
                "then it is kept as %s.corrupt-N",
                *(segment.path, reason, at, segment.path),
            )

    def _error(self, exc: OSError, what: str) -> StoreError:
        return StoreError(f"spool {self.directory} {what}: {exc.strerror or exc}")

    def close(self) -> None:
        """Close all files."""
        try:
            self._end_segment()
        except OSError as exc:
            logger.warning("spool %s: its last segment cannot be synchronized: %s", self.directory, exc.strerror)
        for descriptor in (self._cursor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._cursor = self._lock = -1


def _open(path: Path, flags: int) -> int:
    """Open a file; one that is made can be read by its owner alone: the messages in it are nobody else's."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _write(descriptor: int, data: bytes) -> None:
    with memoryview(data) as rest:
        at = 0
        while at < len(data):
            at += os.write(descriptor, rest[at:])


def _read(descriptor: int, at: int, end: int) -> bytes:
    """Return the bytes from `at` to `end`; fewer only where the file ends before."""
    parts: list[bytes] = []
    while at < end and (part := os.pread(descriptor, end - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _read_or_zeros(descriptor: int, at: int, end: int) -> bytes:
    try:
        return _read(descriptor, at, end).ljust(end - at, b"\0")
    except OSError:
        return bytes(end - at)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(path: Path, reason: object) -> None:
    """Keep a file under another name, for people to look at [S3]."""
    target = next(t for n in itertools.count(1) if not os.path.lexists(t := f"{path}.corrupt-{n}"))
    os.rename(path, target)
    logger.error("spool segment %s is set aside as %s: %s", path, target, reason)
