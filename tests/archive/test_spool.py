"""The Trio half of a spool: group commit, reading up to the present, bounds, disks that fail, ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mqtt_trio.archive.spool import LAST_RETRY, PENDING_BYTES, Spool, SpoolRecord, in_thread, inline, spool_path
from mqtt_trio.archive.spool_log import SpoolLog
from mqtt_trio.errors import StoreError

T = TypeVar("T")
BIG = 1 << 30


class Disk:
    """Makes appends and reads of all spools fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = self.unreadable = False
        self.attempts = 0
        append, read = SpoolLog.append, SpoolLog.read

        def failing_append(log: SpoolLog, records: list[SpoolRecord]) -> None:
            self.attempts += bool(records)
            if self.full and records:
                raise StoreError("spool X cannot be written: No space left on device")
            append(log, records)

        def failing_read(log: SpoolLog, limit: int) -> list[SpoolRecord]:
            if self.unreadable:
                raise StoreError("spool X cannot be read: Too many open files")
            return read(log, limit)

        monkeypatch.setattr(SpoolLog, "append", failing_append)
        monkeypatch.setattr(SpoolLog, "read", failing_read)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def make_spool(path: Path, *, max_bytes: int = BIG) -> Spool:
    return Spool(path, max_bytes=max_bytes, synchronous="OFF", run_sync=inline)


@asynccontextmanager
async def running(spool: Spool) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: spool.run(task_status=task_status))
        yield
        await spool.stop()


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.seg"))


async def read_all(spool: Spool) -> list[bytes]:
    found: list[bytes] = []
    while spool.unread < spool.end:
        found += [record.data for record in await spool.read()]
    return found


async def test_what_comes_together_is_one_commit(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    told: list[int] = []
    spool.changed = lambda: told.append(spool.durable)
    async with running(spool):
        for number in range(100):
            spool.append(b"%d" % number)
        assert (spool.end, spool.durable, spool.messages) == (100, 0, 100)
        await wait_all_tasks_blocked()
        assert (spool.durable, spool.commits, told) == (100, 1, [100])
        assert await read_all(spool) == [b"%d" % number for number in range(100)]
        spool.acknowledge(60)
    again = make_spool(tmp_path)
    async with running(again):
        assert (again.acknowledged, again.unread, again.durable, again.end) == (60, 60, 100, 100)
        assert again.describe() == f"spool {tmp_path} with 40 messages from before, at most 1024 MiB"
        again.append(b"new", 5)
        assert await read_all(again) == [*(b"%d" % number for number in range(60, 100)), b"new"]
        again.acknowledge(again.end)
        await wait_all_tasks_blocked()
        assert again.counters() == {"spool_messages": 0, "spool_bytes": 0, "spool_lost": 0, "spool_failures": 0}


async def test_a_reader_waits_and_is_cancelled_without_loss(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    found: list[bytes] = []

    async def reader() -> None:
        while True:
            found.extend(record.data for record in await spool.read())

    async with running(spool), trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await wait_all_tasks_blocked()
        for word in (b"a", b"b", b"c"):
            spool.append(word)
            await wait_all_tasks_blocked()
        assert found == [b"a", b"b", b"c"]
        nursery.cancel_scope.cancel()
        spool.append(b"d")
    assert spool.unread == 3
    spool = make_spool(tmp_path)
    async with running(spool):
        assert await read_all(spool) == [b"a", b"b", b"c", b"d"]


async def test_what_was_read_waits_for_its_reader_over_further_commits(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    async with running(spool):
        for word in (b"a", b"b"):
            spool.append(word)
            await wait_all_tasks_blocked()
        spool.changed = lambda: spool.append(b"c") if spool.end < 5 else None
        found = [record.data for record in await spool.read()]
        assert found == [b"a", b"b"]
        more: list[bytes] = []
        while len(more) < 3:
            more += [record.data for record in await spool.read()]
        assert more == [b"c"] * 3


async def test_a_reader_overtakes_the_commit_and_the_next_process_reads_it_again(tmp_path: Path) -> None:
    """Otherwise a spool under load would never be empty."""
    release = threading.Event()

    async def held_back(function: Callable[[], T]) -> T:
        return await in_thread(lambda: (release.wait(20), function())[1])

    spool = Spool(tmp_path, max_bytes=BIG, synchronous="OFF", run_sync=held_back)
    release.set()
    async with running(spool):
        release.clear()
        spool.append(b"being written")
        await wait_all_tasks_blocked()
        spool.append(b"waiting")
        assert [record.data for record in await spool.read()] == [b"being written", b"waiting"]
        assert (spool.unread, spool.durable) == (2, 0)
        spool.append(b"in hand", 3, read=True)
        assert (spool.unread, spool.end) == (5, 5)
        release.set()
    assert spool.durable == 5
    again = make_spool(tmp_path)
    async with running(again):
        assert await read_all(again) == [b"being written", b"waiting", b"in hand"]


async def test_bound(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, max_bytes=100_000)
    async with running(spool):
        count = 0
        while spool.fits(1000):
            spool.append(bytes(1000))
            count += 1
            if not count % 7:
                await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        on_disk = sum(path.stat().st_size for path in segments(tmp_path))
        assert 98_000 < on_disk == spool.size <= 100_000
        assert not spool.fits(1000)
        assert len(await read_all(spool)) == count
        changes: list[bool] = []
        spool.changed = lambda: changes.append(spool.fits(1000))
        spool.acknowledge(20)
        await wait_all_tasks_blocked()
        assert changes == [True], "segments that are over give room"


async def test_nothing_fits_while_the_disk_is_slower_than_what_comes(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    async with running(spool):
        spool.append(bytes(PENDING_BYTES))
        assert not spool.fits(1)
        await wait_all_tasks_blocked()
        assert spool.fits(1)


async def test_a_full_disk_counts_as_the_bound_and_recovers(
    tmp_path: Path, disk: Disk, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    spool = make_spool(tmp_path)
    async with running(spool):
        spool.append(b"before")
        await trio.sleep(0.01)
        disk.full = True
        spool.append(b"late")
        await trio.sleep(60)
        assert (spool.durable, spool.fits(1), spool.failing is not None) == (1, False, True)
        assert 12 <= spool.failures == disk.attempts - 1 <= 20, "it is tried again, ever more slowly"
        disk.full = False
        await trio.sleep(LAST_RETRY)
        assert (spool.durable, spool.fits(1), spool.failing) == (2, True, None)
        assert await read_all(spool) == [b"before", b"late"]
    assert [(line.levelno, line.getMessage()) for line in caplog.records] == [
        (
            logging.ERROR,
            "spool X cannot be written: No space left on device. It is tried again; meanwhile it counts as full",
        ),
        (logging.WARNING, f"spool {tmp_path} takes messages again"),
    ]


async def test_a_disk_that_stays_broken_does_not_keep_the_owner_from_delivering(
    tmp_path: Path, disk: Disk, autojump_clock: MockClock
) -> None:
    spool = make_spool(tmp_path)
    async with running(spool):
        spool.append(b"on disk")
        await trio.sleep(1)
        disk.full = True
        spool.append(b"in memory")
        await trio.sleep(1)
        assert await read_all(spool) == [b"on disk", b"in memory"]
        assert spool.durable == 1
        spool.acknowledge(2)
        assert spool.durable == 2, "delivered is as good as on disk"
        await trio.sleep(1)
        assert (spool.failing, spool.fits(1), spool.size) == (None, True, 0), "nothing is left to be tried"
        disk.full = False
        spool.append(b"next")
        await trio.sleep(1)
        assert await read_all(spool) == [b"next"]
    again = make_spool(tmp_path)
    async with running(again):
        assert (again.acknowledged, again.lost, await read_all(again)) == (2, 0, [b"next"])


async def test_room_that_is_made_is_used_at_once(tmp_path: Path, disk: Disk, autojump_clock: MockClock) -> None:
    spool = make_spool(tmp_path, max_bytes=8000)
    async with running(spool):
        for number in range(4):
            spool.append(b"%d" % number * 1000)
            await trio.sleep(0.01)
        disk.full = True
        spool.append(b"4")
        await trio.sleep(20)
        disk.full = False
        assert len(await read_all(spool)) == 5
        changed = trio.Event()
        spool.changed = lambda: changed.set() if spool.failing is None else None
        at = trio.current_time()
        spool.acknowledge(3)
        await changed.wait()
        assert trio.current_time() == at


async def test_a_read_that_fails_is_tried_again(
    tmp_path: Path, disk: Disk, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    spool = make_spool(tmp_path)
    async with running(spool):
        spool.append(b"x")
        await trio.sleep(1)
        disk.unreadable = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, spool)
            await trio.sleep(LAST_RETRY / 2)
            assert spool.fits(1), "writing is another matter"
            disk.unreadable = False
        assert spool.unread == 1
    assert [line.getMessage() for line in caplog.records] == [
        "spool X cannot be read: Too many open files. It is tried again"
    ]


async def test_messages_that_are_lost_are_passed_over(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    async with running(spool):
        for word in (b"a", b"b", b"c"):
            spool.append(word, 10)
            await wait_all_tasks_blocked()
        (file,) = segments(tmp_path)
        data = file.read_bytes()
        file.write_bytes(data[:-1] + b"?")
        assert [record.data for record in await spool.read()] == [b"a", b"b"]
        spool.acknowledge(20)
        with trio.move_on_after(0.1):
            await spool.read()
        assert (spool.lost, spool.messages, spool.unread) == (10, 0, 30)
        spool.append(b"d")
        assert await read_all(spool) == [b"d"]


async def test_stop_writes_what_waits_and_says_what_it_could_not(
    tmp_path: Path, disk: Disk, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    spool = make_spool(tmp_path / "a")
    async with running(spool):
        spool.append(b"last words")
    await spool.stop()
    assert spool.durable == 1
    spool = make_spool(tmp_path / "b")
    async with running(spool):
        disk.full = True
        spool.append(b"in vain", 7)
    assert caplog.records[-1].getMessage() == f"spool {tmp_path / 'b'}: stopped with 7 messages that are not on disk"


async def test_cancelled_it_lets_go_of_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a commit: the thread closes the files behind it."""
    at_work, release, closed = threading.Event(), threading.Event(), threading.Event()
    append, close = SpoolLog.append, SpoolLog.close

    def slow_append(log: SpoolLog, records: list[SpoolRecord]) -> None:
        at_work.set()
        assert release.wait(20)
        append(log, records)

    def told_close(log: SpoolLog) -> None:
        close(log)
        closed.set()

    monkeypatch.setattr(SpoolLog, "append", slow_append)
    monkeypatch.setattr(SpoolLog, "close", told_close)
    spool = Spool(tmp_path, max_bytes=BIG, synchronous="OFF")
    async with trio.open_nursery() as nursery:
        await nursery.start(spool.run)
        spool.append(b"x")
        assert await trio.to_thread.run_sync(at_work.wait, 20)
        nursery.cancel_scope.cancel()
    assert not closed.is_set()
    release.set()
    assert await trio.to_thread.run_sync(closed.wait, 20)
    for _ in range(2):
        spool = make_spool(tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(spool.run)
            assert await read_all(spool) == [b"x"]
            spool.append(b"y")
            nursery.cancel_scope.cancel()


async def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be opened"):
        await make_spool(tmp_path / "s").run()
    await make_spool(tmp_path / "never run").stop()


def test_names_become_directories() -> None:
    assert spool_path(Path("data"), "bus") == Path("data/spool-bus")
    assert spool_path(Path("data"), "archive-a/b ü") == Path("data/spool-archive-a%2Fb%20%C3%BC")
    assert len(spool_path(Path("data"), "ü" * 100).name) < 200
