"""The SQLite archive store: what is in the file, its bounds, and what happens when it cannot be used."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mqtt_trio.archive.groups import ArchiveGroup, ArchiveGroupOptions
from mqtt_trio.archive.spool import Spool
from mqtt_trio.archive.sqlite import SqliteArchive, archive_path
from mqtt_trio.archive.sqlite_file import SCHEMA_VERSION, ArchiveFile, cost_of
from mqtt_trio.archive.store import ArchiveStore, Outcome
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import Answer, FrameRun, Hold
from mqtt_trio.errors import StoreError
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import MessageProperties
from tests.archive.store_suite import LIMIT, SAMPLES, check_archive_store

MIB = 1024 * 1024
NOW = 1_800_000_000.0


class QuietHost:
    def flush(self) -> None:
        """No client waits for anything here."""

    def stop_publishers(self, owner: object) -> None:
        raise AssertionError("far from the hard bound")

    def resume_publishers(self, owner: object) -> None:
        raise AssertionError("nobody was stopped")


def query(path: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(statement).fetchall()


def read_file(path: Path) -> list[Message]:
    messages = []
    for row in query(path, "SELECT * FROM messages ORDER BY id"):
        _, at, topic, payload, qos, retained, client, content, reply, correlation, users, indicator, expiry = row
        properties = MessageProperties(
            payload_format_indicator=indicator,
            message_expiry_interval=expiry,
            content_type=content,
            response_topic=reply,
            correlation_data=correlation,
            user_properties=tuple((name, value) for name, value in json.loads(users or "[]")),
        )
        messages.append(Message(topic, payload, qos, bool(retained), properties, client, at / 1000))
    return messages


@asynccontextmanager
async def running(store: SqliteArchive) -> AsyncIterator[SqliteArchive]:
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield store
            await store.stop()


async def store_all(store: SqliteArchive, messages: Sequence[Message]) -> Outcome:
    """Submit one batch and wait for what becomes of it."""
    outcomes, done = list[Outcome](), trio.Event()

    def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)
        done.set()

    store.submit(messages, keep)
    await done.wait()
    return outcomes[0]


class LogWatch(logging.Handler):
    """Wakes a task when the store's thread logs a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text, self._seen, self._token = text, trio.Event(), trio.lowlevel.current_trio_token()

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self._token.run_sync_soon(self._seen.set)

    async def __aenter__(self) -> None:
        logging.getLogger("mqtt_trio.archive.sqlite").addHandler(self)

    async def __aexit__(self, *_: object) -> None:
        await self._seen.wait()
        logging.getLogger("mqtt_trio.archive.sqlite").removeHandler(self)


async def test_sqlite_store_passes_the_suite(tmp_path: Path) -> None:
    made: list[Path] = []

    def make() -> tuple[ArchiveStore, Callable[[], Awaitable[Sequence[Message]]]]:
        path = archive_path(tmp_path, f"group {len(made)}")
        made.append(path)

        async def read() -> list[Message]:
            return read_file(path)

        return SqliteArchive(path, max_size=64 * MIB), read

    await check_archive_store(make)


def test_file_names_are_safe_and_distinct(tmp_path: Path) -> None:
    names = ["Default", "../../etc/passwd", "a b", "a/b", ".", "ü" * 100, "ü" * 99 + "a", "x\0y", "a%20b"]
    paths = [archive_path(tmp_path, name) for name in names]
    assert paths[0].name == "archive-Default.sqlite3"
    assert len(set(paths)) == len(names)
    for path in paths:
        assert path.parent == tmp_path
        assert len(path.name.encode()) <= 200
        path.touch()


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def test_new_files_are_their_owners(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite3"
    before = os.umask(0)
    try:
        async with running(SqliteArchive(path)) as store:
            assert await store_all(store, SAMPLES) == {}
            modes = {name.removeprefix(path.name): mode_of(tmp_path / name) for name in os.listdir(tmp_path)}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("", "-wal", "-shm"), 0o600)
    path.chmod(0o640)
    async with running(SqliteArchive(path)) as store:
        assert await store_all(store, SAMPLES) == {}
    assert mode_of(path) == 0o640, "one that is there keeps its mode"


async def test_rows_are_readable_with_the_sqlite3_shell(tmp_path: Path) -> None:
    path = archive_path(tmp_path, "Default")
    async with running(SqliteArchive(path)) as store:
        await store_all(store, SAMPLES)
        statement = "SELECT topic, hex(payload), qos, retained, client_id, timestamp_ms FROM messages WHERE id = 2"
        shell = await trio.run_process(["sqlite3", str(path), statement], capture_stdout=True)  # beside the broker
    assert shell.stdout.decode() == f"a/b|{bytes(range(256)).hex().upper()}|1|1|dévice|1700000000125\n"
    check = await trio.run_process(["sqlite3", str(path), "PRAGMA integrity_check"], capture_stdout=True)
    assert check.stdout == b"ok\n"
    assert query(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]


async def test_group_keeps_bursts_in_its_file_in_order(tmp_path: Path) -> None:
    path = archive_path(tmp_path, "Default")
    group = ArchiveGroup(ArchiveGroupOptions(name="Default", window_messages=5000), SqliteArchive(path), QuietHost())
    frames = b"".join(b"\x30\x08\x00\x01t" + b"%05d" % n for n in range(4000))
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: group.run(task_status=task_status))
            group.take_run(FrameRun(frames, 4000, 0, ProtocolVersion.MQTT_3_1_1, "c", NOW))
            answers = [group.take(Message("t", b"%05d" % n, 1, published_at=NOW)) for n in range(4000, 6000)]
            await group.stop()
    assert [int(message.payload) for message in read_file(path)] == list(range(6000))
    assert {name: n for name, n in group.counters().items() if n} == {"stored": 6000, "held": 1000}
    assert [answer is None for answer in answers] == [True] * 1000 + [False] * 1000
    assert all(answer.released for answer in answers if isinstance(answer, Hold))


async def test_history_queries_use_the_indexes(tmp_path: Path) -> None:
    async with running(SqliteArchive(tmp_path / "a.sqlite3")) as store:
        await store_all(store, SAMPLES)
    where = {"topic = 'a' AND timestamp_ms > 5": "messages_by_topic", "timestamp_ms > 5": "messages_by_time"}
    for condition, index in where.items():
        plan = query(tmp_path / "a.sqlite3", f"EXPLAIN QUERY PLAN SELECT payload FROM messages WHERE {condition}")
        assert index in plan[0][3]


async def test_retention_deletes_old_rows(tmp_path: Path) -> None:
    path, now = tmp_path / "a.sqlite3", NOW
    old = [Message("t", b"old", published_at=NOW - 100 + n * 0.001) for n in range(5000)]
    async with running(SqliteArchive(path, retention=3600, clock=lambda: now)) as store:
        assert await store_all(store, [*old, Message("t", b"new", published_at=NOW)]) == {}
    assert len(read_file(path)) == 5001
    now = NOW + 3550
    async with running(SqliteArchive(path, retention=3600, clock=lambda: now)) as store:
        while len(query(path, "SELECT id FROM messages")) > 1:
            await store_all(store, [])  # each round of the thread deletes some
    assert [message.payload for message in read_file(path)] == [b"new"]


def disk_size(path: Path) -> int:
    return sum(os.path.getsize(f"{path}{end}") for end in ("", "-wal") if os.path.exists(f"{path}{end}"))


@pytest.mark.parametrize("topics, payload", [(1, 100), (2000, 20), (7, 30_000)])
async def test_file_stays_within_max_size_under_sustained_writes(tmp_path: Path, topics: int, payload: int) -> None:
    path, largest = tmp_path / "a.sqlite3", 0
    total = 4 * MIB // (payload + 200)
    async with running(SqliteArchive(path, max_size=MIB)) as store:
        for start in range(0, total, 50):
            batch = [
                Message(f"topic/{n % topics}", b"%06d" % n + os.urandom(payload), published_at=NOW + n)
                for n in range(start, min(start + 50, total))
            ]
            assert await store_all(store, batch) == {}
            largest = max(largest, disk_size(path))
    assert largest <= MIB
    numbers = [int(message.payload[:6]) for message in read_file(path)]
    assert numbers == list(range(numbers[0], total)), "the oldest go first, the newest are all there"
    assert sum(len(message.payload) for message in read_file(path)) > (0.2 if topics == 2000 else 0.5) * MIB * 0.6
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


async def test_message_that_max_size_leaves_no_room_for_fails_alone(tmp_path: Path) -> None:
    async with running(SqliteArchive(tmp_path / "a.sqlite3", max_size=MIB)) as store:
        outcome = await store_all(store, [Message("t", b"1"), Message("t", bytes(300_000)), Message("t", b"3")])
        assert await store_all(store, [Message("t", bytes(200_000))]) == {}
    assert list(outcome) == [1]
    assert "300000 bytes is too large for MaxSize = 1048576" in str(outcome[1])
    assert [len(message.payload) for message in read_file(tmp_path / "a.sqlite3")] == [1, 1, 200_000]


async def test_lowered_max_size_shrinks_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite3"
    async with running(SqliteArchive(path)) as store:
        await store_all(store, [Message(f"t/{n % 50}", b"%04d" % n + bytes(2400)) for n in range(2000)])
    assert disk_size(path) > 4 * MIB
    async with running(SqliteArchive(path, max_size=MIB)) as store:
        while disk_size(path) > MIB:
            await store_all(store, [])  # each round of the thread deletes or gives back some
    kept = [int(message.payload[:4]) for message in read_file(path)]
    assert kept == list(range(kept[0], 2000))
    assert len(kept) > 150


def test_one_step_gives_back_as_many_pages_as_the_log_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite3"
    messages = [Message("a", b"x" * 2000, published_at=NOW) for _ in range(3000)]
    file = ArchiveFile(path, max_size=64 * MIB, synchronous="OFF")
    file.insert(messages, sum(map(cost_of, messages)))
    file.close()
    file = ArchiveFile(path, max_size=2 * MIB, synchronous="OFF")
    (before,) = query(path, "PRAGMA page_count")[0]
    sizes = [before]
    while file.tend(None):
        (pages,) = query(path, "PRAGMA page_count")[0]
        if pages < sizes[-1]:
            sizes.append(pages)
    file.close()
    assert disk_size(path) <= 2 * MIB
    assert len(sizes) < 30, "a page at a time would need a thousand steps"


async def test_message_that_cannot_be_written_fails_alone(tmp_path: Path) -> None:
    broken = Message("t", b"2", properties=MessageProperties(content_type="\ud800"))  # no UTF-8: a bug upstream
    async with running(SqliteArchive(tmp_path / "a.sqlite3")) as store:
        outcome = await store_all(store, [Message("t", b"1"), broken, Message("t", b"3")])
    assert list(outcome) == [1]
    assert isinstance(outcome[1], StoreError)
    assert [message.payload for message in read_file(tmp_path / "a.sqlite3")] == [b"1", b"3"]


CHILD = """
import sys, trio
from pathlib import Path
from mqtt_trio.archive.groups import ArchiveGroup, ArchiveGroupOptions
from mqtt_trio.archive.sqlite import SqliteArchive
from mqtt_trio.broker.message import Message

async def main():
    store = SqliteArchive(Path(sys.argv[1]), max_size=8 * 1024 * 1024)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for start in range(0, 10**9, 10):
            batch = [Message(f"t/{n % 7}", b"%d" % n) for n in range(start, start + 10)]
            stored = trio.Event()
            store.submit(batch, lambda outcome: (print(start + 9, flush=True), stored.set()))
            await stored.wait()

trio.run(main)
"""


async def test_committed_rows_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite3"
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(path)]
    with trio.fail_after(LIMIT):
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        reported = b""
        try:
            while reported.count(b"\n") < 200:
                chunk = await process.stdout.receive_some()
                assert chunk, "the child ended"
                reported += chunk
        finally:
            process.kill()  # SIGKILL, in the middle of something
            async for chunk in process.stdout:
                reported += chunk
            await process.wait()
    last = int(reported[: reported.rindex(b"\n")].split()[-1])
    async with running(SqliteArchive(path, max_size=8 * MIB)) as store:  # takes the log that the killed process left
        await store_all(store, [Message("t", b"after")])
    payloads = [message.payload for message in read_file(path)]
    assert payloads.pop() == b"after"
    assert [int(payload) for payload in payloads] == list(range(len(payloads)))
    assert len(payloads) > last
    assert "a.sqlite3.corrupt-1" not in os.listdir(tmp_path)


def make_garbage(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


def make_future(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"CREATE TABLE messages (id INTEGER); PRAGMA user_version = {SCHEMA_VERSION + 1};")


def make_foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE TABLE bookmarks (id INTEGER);")


def make_other_columns(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"CREATE TABLE messages (id INTEGER); PRAGMA user_version = {SCHEMA_VERSION};")


@pytest.mark.parametrize(
    "make, reason",
    [
        (make_garbage, "file is not a database"),
        (make_future, f"it has version {SCHEMA_VERSION + 1}, this program knows up to {SCHEMA_VERSION}"),
        (make_foreign, "it is another program's database"),
        (make_other_columns, "its table messages has other columns"),
    ],
)
async def test_unusable_file_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "archive-A.sqlite3"
    for number in (1, 2):  # the second does not replace the first
        path.unlink(missing_ok=True)
        make(path)
        before = path.read_bytes()
        async with running(SqliteArchive(path)) as store:
            assert await store_all(store, SAMPLES) == {}
        aside = tmp_path / f"archive-A.sqlite3.corrupt-{number}"
        assert aside.read_bytes() == before
        assert f"archive store {path} is unusable: {reason}. It is kept as {aside}" in caplog.text
        assert len(read_file(path)) == len(SAMPLES)


async def test_file_that_is_damaged_while_in_use_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.sqlite3"
    async with running(SqliteArchive(path)) as store:
        await store_all(store, [Message(f"t/{n}", bytes(500)) for n in range(500)])
    size = path.stat().st_size
    with path.open("r+b") as file:  # the first page stays, so that the damage shows at the first insert only
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    async with running(SqliteArchive(path)) as store:
        assert await store_all(store, SAMPLES) == {}
    assert read_file(path) == list(SAMPLES)
    assert (tmp_path / "a.sqlite3.corrupt-1").stat().st_size >= size
    assert "is kept as" in caplog.text


async def test_locked_file_keeps_the_batch_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path, outcomes = tmp_path / "a.sqlite3", list[Outcome]()
    async with running(SqliteArchive(path)) as store:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            async with LogWatch("cannot be written: database is locked; another process keeps it locked"):
                store.submit(SAMPLES[:2], outcomes.append)
                store.submit(SAMPLES[2:], outcomes.append)
            assert outcomes == []
            async with LogWatch("is written again"):
                other.execute("ROLLBACK")
    assert outcomes == [{}, {}]
    assert read_file(path) == list(SAMPLES)
    assert caplog.text.count("cannot be written") == 1


async def test_while_the_file_is_locked_messages_go_over_the_spool(tmp_path: Path) -> None:
    """Acknowledged is what the spool has; when the file is free all of it is there, once and in order [K9, K10]."""
    path = tmp_path / "a.sqlite3"
    options = ArchiveGroupOptions(name="G", ack="store", on_outage="spool")
    group = ArchiveGroup(options, SqliteArchive(path), QuietHost(), Spool(tmp_path / "spool", max_bytes=1 << 30))
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: group.run(task_status=task_status))
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                holds = [group.take(Message("t", b"%d" % number, 1, published_at=NOW)) for number in range(3)]
                await released(holds)
                holds = [group.take(Message("t", b"%d" % number, 2, published_at=NOW)) for number in range(3, 6)]
                await released(holds)
                assert query(path, "SELECT count(*) FROM messages") == [(0,)]
                assert group.store.trouble() == f"archive store {path} cannot be written: database is locked"
                other.execute("ROLLBACK")
            while group.shipper.stored < 6:
                await trio.testing.wait_all_tasks_blocked(0.01)
            await group.stop()
    assert [message.payload for message in read_file(path)] == [b"%d" % number for number in range(6)]
    assert group.counters()["spooled"] == 3


async def released(answers: Sequence[Answer]) -> None:
    """Wait until all of these were released."""
    for answer in answers:
        assert isinstance(answer, Hold)
        event = trio.Event()
        answer.when_released(event.set)
        await event.wait()
        assert answer.refused is None


async def test_full_disk_keeps_the_batch(tmp_path: Path) -> None:
    store, outcomes = SqliteArchive(tmp_path / "a.sqlite3"), list[Outcome]()
    async with running(store):
        file = store._worker._file
        assert file is not None
        file._db.execute("PRAGMA max_page_count = 10").fetchone()  # SQLite then answers as on a full disk
        async with LogWatch("the disk is full, free some space"):
            store.submit([Message("t", bytes(100_000))], outcomes.append)
        assert outcomes == []
        file._db.execute("PRAGMA max_page_count = 1000000").fetchone()
    assert outcomes == [{}]
    assert len(read_file(tmp_path / "a.sqlite3")) == 1


async def test_cancelled_stop_gives_up_at_once(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "a.sqlite3", list[Outcome]()
    store = SqliteArchive(path)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                store.submit(SAMPLES, outcomes.append)
                with trio.move_on_after(0.01) as scope:
                    await store.stop()
                assert scope.cancelled_caught
                other.execute("ROLLBACK")
    assert outcomes in ([], [{}])


@pytest.mark.parametrize("place", ["file/archive", "directory"])
async def test_unusable_place_is_named_with_its_mend(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    path = tmp_path / place / "a.sqlite3"
    if place == "directory":
        path.mkdir(parents=True)
    async with trio.open_nursery() as nursery:
        with pytest.raises(StoreError, match=r"a\.sqlite3.*let the user that runs the broker write there"):
            await nursery.start(SqliteArchive(path).run)


def test_description_names_file_and_bounds(tmp_path: Path) -> None:
    assert SqliteArchive(tmp_path / "a").describe() == f"SQLite {tmp_path}/a"
    bounded = SqliteArchive(tmp_path / "a", retention=7 * 86_400, max_size=1024 * MIB)
    assert bounded.describe() == f"SQLite {tmp_path}/a, at most 1024 MiB, kept for 168 h"
