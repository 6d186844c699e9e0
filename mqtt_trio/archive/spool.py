"""A spool: keeps on disk, in order and over restarts, what its owner cannot deliver at the moment [K10].

The Trio half. Whoever owns a spool appends inside the hot stretch; everything that came during one commit goes into the
next, so the disk sees few large writes. What is read again is acknowledged once it is delivered.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

import attrs
import trio

from mqtt_trio.archive.options import file_name
from mqtt_trio.archive.spool_log import SpoolLog
from mqtt_trio.archive.spool_records import RECORD, SEGMENT
from mqtt_trio.archive.spool_records import SpoolRecord as SpoolRecord
from mqtt_trio.errors import StoreError

T = TypeVar("T")
LARGEST_SEGMENT: Final = 8 * 1024 * 1024
LEAST_SEGMENTS: Final = 8
"""A spool gives room back by whole segments: an eighth of its bound at a time, or 8 MiB."""
PENDING_BYTES: Final = 8 * 1024 * 1024
"""Bytes that wait for the commit that is under way; beyond them nothing fits."""
READ_BYTES: Final = 256 * 1024
"""Bytes that one `read` returns, about."""
SPOOLS_OF_GROUPS: Final = "archive-"
"""What the names of their spools begin with; the rest is the group's target."""
FIRST_RETRY: Final = 0.1
LAST_RETRY: Final = 5.0
"""Seconds between attempts while the disk takes nothing: doubled from the first to the last."""

logger = logging.getLogger(__name__)


class RunSync(Protocol):
    """Runs a blocking call; one at a time."""

    async def __call__(self, function: Callable[[], T]) -> T: ...


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking call in a thread. Cancelled, it is left to itself: a disk that hangs must not hold the process."""
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))


async def inline(function: Callable[[], T]) -> T:
    """Run the call at once: for tests on a fake clock, which does not see threads."""
    await trio.lowlevel.checkpoint()
    return function()


def nothing() -> None:
    """Do nothing: the hook that is not set."""


def spool_path(directory: Path, name: str) -> Path:
    """Return the directory of spool `name`."""
    return directory / f"spool-{file_name(name)}"


@attrs.define
class _Job:
    """What the thread does in one go."""

    acknowledged: int
    records: Sequence[SpoolRecord]
    skip: int
    """Position in front of which the owner has everything."""
    reads: bool
    found: list[SpoolRecord] = attrs.Factory(list)
    write_error: StoreError | None = None
    read_error: StoreError | None = None

    def run(self, log: SpoolLog) -> None:
        """Acknowledge first: it may make the room that the append needs."""
        log.acknowledge(self.acknowledged)
        try:
            log.append(self.records)
        except StoreError as exc:
            self.write_error = exc
        log.skip(min(self.skip, log.end))
        if self.reads:
            try:
                self.found = log.read(READ_BYTES)
            except StoreError as exc:
                self.read_error = exc


def warn_of_strays(directory: Path, used: Sequence[Path]) -> None:
    """Log which spools of archive groups hold messages that no configured group will store."""
    for path in sorted(directory.glob(f"spool-{SPOOLS_OF_GROUPS}*")):
        if path not in used and any(path.glob("*.seg")):
            logger.warning(
                "spool %s may hold messages, and no archive group uses it: configure its group again and they are "
                "stored, or remove it",
                path,
            )


class Spool:
    """One spool directory; all but `run`, `read` and `stop` is synchronous, everything runs on the Trio thread.

    Positions count messages since the spool was first used, over restarts. In front of `acknowledged` nothing is needed
    any more; from there to `durable` everything is on disk; from `unread` to `end` it was not read yet.

    A disk that takes nothing (full, broken) is tried again and again, and meanwhile nothing fits; what was appended
    already stays in memory and can be read from there, so a spool whose owner can deliver again always runs empty.

    Attributes:
      changed: called after each commit, and after each reading that made room; set it to what looks at `durable` and
        `fits` again.
      end, durable, acknowledged, unread: positions, see above.
      failing: why the disk takes nothing at present, None when it does.
      max_bytes: what the segments on disk take at most, damaged ones that were set aside not counted, and what
        `take_all` lets in. An item larger than that never fits.
      commits, failures: how often the disk took something, and how often not.
      lost: messages that were on disk and could not be read back.
    """

    def __init__(
        self, directory: Path, *, max_bytes: int, synchronous: str = "FULL", run_sync: RunSync = in_thread
    ) -> None:
        """`synchronous`: FULL waits for the disk with each commit, NORMAL with each segment, OFF never: what a power
        loss costs; a kill of the process costs nothing that was `durable`."""
        self.changed: Callable[[], None] = nothing
        self.directory = directory
        self.max_bytes = max_bytes
        self.end = self.durable = self.acknowledged = self.unread = 0
        self.failing: str | None = None
        self.commits = self.failures = self.lost = 0
        segment_bytes = max(1, min(LARGEST_SEGMENT, max_bytes // LEAST_SEGMENTS))
        self._log = SpoolLog(directory, segment_bytes=segment_bytes, synchronous=synchronous)
        self._run_sync = run_sync
        self._tail: deque[SpoolRecord] = deque()  # not on disk yet, those that are being written included
        self._tail_size = self._disk_size = 0
        self._disk_end = self._disk_acknowledged = 0  # as the log has them
        self._wanted = False  # somebody waits in `read`
        self._found: list[SpoolRecord] = []
        self._write_at = self._read_at = 0.0  # not before these instants
        self._delay = FIRST_RETRY
        self._work, self._progress, self._ended = trio.Event(), trio.Event(), trio.Event()
        self._runs = self._closing = self._abandoned = self._takes_all = False
        self._lock = threading.Lock()
        self._busy = False  # the thread is at work

    # --- what its owner calls ---

    def fits(self, size: int) -> bool:
        """Whether an item of `size` bytes may be appended now."""
        if self.failing is not None or self._tail_size >= PENDING_BYTES:
            return False
        size += RECORD.size + self._tail_size
        return self._takes_all or size <= self.max_bytes - self._disk_size - 2 * SEGMENT.size

    def take_all(self) -> None:
        """The process is about to end: take what its owner still has in memory beyond `max_bytes` as well. The owner's
        window bounds that, and the next process appends nothing before it has made room."""
        self._takes_all = True
        self.changed()

    def append(self, data: bytes, messages: int = 1, *, read: bool = False) -> None:
        """Put `data`, which stands for `messages` messages, behind everything else. Never blocks and never refuses: the
        owner looks at `fits` first. `read`: the owner has it in hand, as it has all before it."""
        record = SpoolRecord(self.end, messages, data)
        self.end = record.end
        if read:
            assert self.unread == record.position, "something in front of it is not read yet"
            self.unread = self.end
        self._tail.append(record)
        self._tail_size += record.size
        self._work.set()

    async def read(self) -> list[SpoolRecord]:
        """Wait until there is something unread; return the next of it, in order, about READ_BYTES. Cancelled, nothing
        is taken. For one task at a time."""
        try:
            while True:
                if self._found:
                    found, self._found = self._found, []
                    self.unread = found[-1].end
                    return found
                if self.unread < self.end and self.unread >= self._disk_end:
                    return self._read_tail()
                self._wanted, self._progress = True, trio.Event()
                self._work.set()
                await self._progress.wait()
        finally:
            self._wanted = False

    def _read_tail(self) -> list[SpoolRecord]:
        """What the disk does not have yet is taken from memory; it is written nevertheless, for the next process."""
        found: list[SpoolRecord] = []
        size = 0
        for record in self._tail:
            if record.end > self.unread and size < READ_BYTES:
                found.append(record)
                size += record.size
        self.unread = found[-1].end
        return found

    def acknowledge(self, position: int) -> None:
        """Nothing in front of `position` is needed any more."""
        if position <= self.acknowledged:
            return
        self.acknowledged = position
        self.unread = max(self.unread, position)
        self.durable = max(self._disk_end, position)
        self._work.set()

    @property
    def messages(self) -> int:
        """Messages that are not acknowledged; some may turn out to be lost to damage."""
        return self.end - self.acknowledged

    @property
    def size(self) -> int:
        """Bytes on disk, and bytes that are on their way there."""
        return self._disk_size + self._tail_size

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "spool_messages": self.messages,
            "spool_bytes": self.size,
            "spool_lost": self.lost,
            "spool_failures": self.failures,
        }

    def describe(self) -> str:
        """One phrase for the start-up summary."""
        held = f" with {self.messages} messages from before" if self.messages else ""
        return f"spool {self.directory}{held}, at most {self.max_bytes / 1024 / 1024:g} MiB"

    # --- its task ---

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the directory until stopped or cancelled; `started()` once what the last process left is known, and
        nothing may be appended before. Cancelled, it does not wait for the disk.

        Raises:
          StoreError: the directory cannot be used.
        """
        self._runs = True
        try:
            await self._in_thread(self._log.open)
            self._look_at_log()
            self.end = self._log.end
            task_status.started()
            while not self._closing:
                await self._wait_for_work()
                await self._work_once(patient=not self._closing)
            await self._work_once(patient=False)
        finally:
            self._close()
            self._ended.set()

    async def _in_thread(self, function: Callable[[], None]) -> None:
        """Run `function`; when nobody waits for its end any more it closes the log behind itself."""

        def call() -> None:
            with self._lock:
                if self._abandoned:
                    return
                self._busy = True
            try:
                function()
            finally:
                self._let_go()

        await self._run_sync(call)

    def _let_go(self) -> None:
        with self._lock:
            self._busy = False
            if self._abandoned:
                self._log.close()

    def _close(self) -> None:
        with self._lock:
            self._abandoned = True
            if not self._busy:
                self._log.close()

    async def _wait_for_work(self) -> None:
        while not self._closing and not self._has_work():
            self._work = trio.Event()
            waits_for = [at for at in (self._write_at, self._read_at) if at > trio.current_time()]
            with trio.move_on_at(min(waits_for, default=float("inf"))):
                await self._work.wait()

    def _has_work(self) -> bool:
        return self.acknowledged > self._disk_acknowledged or self._may_write() or self._may_read()

    def _may_write(self) -> bool:
        return bool(self._tail) and trio.current_time() >= self._write_at

    def _may_read(self) -> bool:
        unread = self._wanted and not self._found and self.unread < self._disk_end
        return unread and trio.current_time() >= self._read_at

    async def _work_once(self, *, patient: bool) -> None:
        """Have the thread do what there is; `patient`: not before it is time for another attempt."""
        while self._tail and self._tail[0].end <= self.acknowledged:
            self._tail_size -= self._tail.popleft().size  # delivered from memory: nobody needs it on disk
        records = list(self._tail) if self._may_write() or not patient else []
        job = _Job(self.acknowledged, records, self.unread, self._may_read())
        size = self._disk_size
        await self._in_thread(partial(job.run, self._log))
        if job.write_error is not None:
            self._failed(job.write_error)
        elif records or not self._tail:
            self._succeeded(len(records))
        if job.read_error is not None:
            logger.error("%s. It is tried again", job.read_error)
            self._read_at = trio.current_time() + LAST_RETRY
        self._found = self._found or job.found
        self._look_at_log()
        if self._disk_size < size:
            self._write_at = 0.0  # there is room again
        self._progress.set()
        self.changed()

    def _succeeded(self, count: int) -> None:
        for _ in range(count):
            self._tail_size -= self._tail.popleft().size
        self.commits += bool(count)
        if self.failing is not None:
            self.failing = None
            self._write_at, self._delay = 0.0, FIRST_RETRY
            logger.warning("spool %s takes messages again", self.directory)

    def _failed(self, error: StoreError) -> None:
        self.failures += 1
        if self.failing is None:
            logger.error("%s. It is tried again; meanwhile it counts as full", error)
        self.failing = str(error)
        self._write_at = trio.current_time() + self._delay
        self._delay = min(2 * self._delay, LAST_RETRY)

    def _look_at_log(self) -> None:
        log = self._log
        self._disk_size, self._disk_end, self._disk_acknowledged = log.size, log.end, log.acknowledged
        self.lost = log.lost
        self.acknowledged = max(self.acknowledged, log.acknowledged)  # what could not be read back is over
        if not self._found:
            self.unread = max(self.unread, log.unread)
        self.durable = max(self._disk_end, self.acknowledged)

    async def stop(self) -> None:
        """Write what was appended, close; a disk that takes nothing is tried once more. Bounded by the caller's cancel
        scope. Idempotent."""
        self._closing = True
        self._work.set()
        if not self._runs:
            return
        await self._ended.wait()
        if self._tail:
            waiting = sum(record.messages for record in self._tail)
            logger.warning("spool %s: stopped with %d messages that are not on disk", self.directory, waiting)
