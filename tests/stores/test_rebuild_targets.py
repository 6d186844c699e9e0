"""Stores that are rebuilt [K19]: what they take, what they refuse, and where they go on."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import attrs
import pytest

from gateways.kafka.rebuild_command import opened
from gateways.kafka.rebuild_reader import MergingReader
from gateways.kafka.records import ConsumedRecord
from mqtt_trio.archive.rebuild import HistoryTarget
from mqtt_trio.archive.sqlite_file import ArchiveFile
from mqtt_trio.archive.store import Entry, NotEmptyError, Progress, RebuildTarget
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import Batch
from mqtt_trio.errors import GatewayError, StoreError
from mqtt_trio.protocol.packets import MessageProperties
from mqtt_trio.server.rebuild import RetainedTarget
from mqtt_trio.server.sqlite_store import FILE_NAME, SqliteStore

NOW = 1_800_000_000.0
BEGIN = Progress(source="Kafka topic t", identity="1", ends={0: 100, 1: 100}, next={0: 0, 1: 0})


def entry(offset: int, topic: str = "a", payload: bytes = b"x", *, partition: int = 0, **more: object) -> Entry:
    at = more.pop("at", NOW + offset)
    return Entry(Message(topic, payload, published_at=at, **more), partition, offset)  # type: ignore[arg-type]


def stored(path: Path) -> list[tuple[str, bytes]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT topic, payload FROM messages ORDER BY id").fetchall()


def make_history(folder: Path, **more: object) -> HistoryTarget:
    return HistoryTarget(group="g", path=folder / "h.sqlite3", clock=lambda: NOW, **more)  # type: ignore[arg-type]


def make_retained(folder: Path, **_: object) -> RetainedTarget:
    return RetainedTarget(path=folder / FILE_NAME, clock=lambda: NOW)


Make = Callable[[Path], HistoryTarget | RetainedTarget]

# --- both


@pytest.mark.parametrize("make", [make_history, make_retained])
def test_it_goes_on_where_it_was(make: Make, tmp_path: Path) -> None:
    target = make(tmp_path)
    assert target.open() is None
    target.begin(BEGIN)
    target.store([entry(0, retain=True), Entry(None, 1, 0)])
    target.close()
    target = make(tmp_path)
    progress = target.open()
    assert progress == attrs.evolve(BEGIN, next={0: 1, 1: 1})
    assert not progress.is_complete
    target.store([entry(0, payload=b"again", retain=True), entry(1, "b", retain=True)])  # the first one it has
    target.store([Entry(None, 0, 99), Entry(None, 1, 99)])
    target.close()
    target = make(tmp_path)
    progress = target.open()
    assert progress is not None
    assert progress.is_complete
    assert target.finish()
    target.close()
    with pytest.raises(NotEmptyError, match="is not empty"):
        make(tmp_path).open()


@pytest.mark.parametrize("make", [make_history, make_retained])
def test_a_progress_that_cannot_be_read_is_told(make: Make, tmp_path: Path) -> None:
    target = make(tmp_path)
    target.open()
    target.begin(BEGIN)
    target.close()
    if make is make_history:
        with closing(sqlite3.connect(target.path)) as db:
            db.execute("UPDATE rebuild SET progress = '{}'")
            db.commit()
    else:
        store = SqliteStore(target.path)
        store.load()
        store.commit(Batch(marks={"rebuild": b"[]"}))
        store.close()
    target = make(tmp_path)
    with pytest.raises(StoreError, match="remove the file and begin anew"):
        target.open()
    target.close()


# --- the history


def test_a_history_takes_what_its_group_would_have(tmp_path: Path) -> None:
    target = make_history(tmp_path, filters=["a/+", "b"], retention=50.0, max_size=1024 * 1024)
    target.open()
    target.begin(BEGIN)
    large = b"x" * 600_000
    target.store(
        [
            entry(0, "a/1", at=NOW - 60),
            entry(1, "a/1", b"1"),
            entry(2, "a/b/c"),
            entry(3, "b", large),
            entry(4, "b", b"2"),
        ]
    )
    assert target.finish() == ["2 messages are in it", "1 are older than Retention", "1 are too large for MaxSize"]
    target.close()
    assert stored(target.path) == [("a/1", b"1"), ("b", b"2")]
    ArchiveFile(target.path, max_size=None, synchronous="NORMAL").close()  # as the broker opens it


def test_a_history_is_bounded_while_it_is_rebuilt(tmp_path: Path) -> None:
    target = make_history(tmp_path, max_size=1024 * 1024)
    target.open()
    target.begin(BEGIN)
    for first in range(0, 4000, 1000):
        target.store([entry(n, payload=b"%d" % n + b"x" * 1000) for n in range(first, first + 1000)])
        size = sum(Path(f"{target.path}{suffix}").stat().st_size for suffix in ("", "-wal"))
        assert size <= 1024 * 1024
    target.close()
    payloads = [int(payload.rstrip(b"x")) for _, payload in stored(target.path)]
    assert payloads == list(range(payloads[0], 4000)), "the oldest went first"


def test_a_position_never_runs_ahead_of_its_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_history(tmp_path, max_size=1024 * 1024)
    target.open()
    target.begin(BEGIN)
    real, calls = ArchiveFile.insert, [0]

    def fail_later(self: ArchiveFile, messages: Sequence[Message], cost: int, *, progress: str | None = None) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise sqlite3.OperationalError("database or disk is full")
        real(self, messages, cost, progress=progress)

    monkeypatch.setattr(ArchiveFile, "insert", fail_later)
    entries = [entry(n, payload=b"%d" % n + b"x" * 1000) for n in range(400)]
    with pytest.raises(StoreError, match="cannot be written: database or disk is full"):
        target.store(entries)
    target.close()
    target = make_history(tmp_path, max_size=1024 * 1024)
    progress = target.open()
    assert progress is not None
    assert 0 < progress.next[0] == len(stored(target.path)) < 400
    target.store(entries)
    target.close()
    assert [int(payload.rstrip(b"x")) for _, payload in stored(target.path)] == list(range(400))


# --- retained messages


def test_retained_messages_are_those_that_a_node_would_have(tmp_path: Path) -> None:
    target = make_retained(tmp_path)
    target.open()
    target.begin(BEGIN)
    expiring = MessageProperties(message_expiry_interval=10)
    target.store(
        [
            entry(0, "a", b"old", retain=True),
            entry(1, "a", b"not retained"),
            entry(2, "a", b"new", retain=True, client_id="c"),
            entry(3, "b", b"x", retain=True),
            entry(4, "b", b"", retain=True),
            entry(5, "c", b"x", retain=True, properties=expiring, at=NOW - 11),
            entry(6, "d", b"x", retain=True, properties=expiring, at=NOW - 9),
        ]
    )
    target.store(
        [
            entry(0, "d", b"of an older partition", partition=1, retain=True, at=NOW - 10),
            entry(7, "d", b"y", retain=True, at=NOW - 12),  # the clock went back; in its partition it is the newest
        ]
    )
    assert target.finish() == ["2 topics have one"]
    target.close()
    store = SqliteStore(target.path)
    rows = {row[0]: (row[1], row[2]) for row in store.load().retained}
    store.close()
    assert {topic: frame[-1:] for topic, (frame, _) in rows.items()} == {"a": b"w", "d": b"y"}
    assert rows["a"][1] == "c"


# --- the end


@attrs.define
class FakeTarget:
    name: str
    outcome: Progress | StoreError | None

    def open(self) -> Progress | None:
        if isinstance(self.outcome, StoreError):
            raise self.outcome
        return self.outcome


class FakeConsole:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_kill_among_the_last_steps_is_overcome() -> None:
    """Some stores are finished, others lack nothing but that."""
    complete = attrs.evolve(BEGIN, next=BEGIN.ends)
    finished, last = FakeTarget("one", NotEmptyError("one is not empty")), FakeTarget("two", complete)
    console = FakeConsole()
    targets: list[RebuildTarget] = [finished, last]  # type: ignore[list-item]
    assert [target.name for target, _ in opened(targets, console)] == ["two"]  # type: ignore[arg-type]
    assert console.lines == ["one: was finished before"]
    for outcome in (BEGIN, None, NotEmptyError("two is not empty")):
        last.outcome = outcome
        with pytest.raises(NotEmptyError, match="one is not empty"):
            opened(targets, console)  # type: ignore[arg-type]


# --- the order


class FakeConsumer:
    """Partitions of one topic: values are the times of their records. It brings a few of whichever are not paused."""

    def __init__(self, log: dict[int, list[int]], size: int = 1) -> None:
        self.log = log
        self.size = size
        self.next: dict[int, int] = {}
        self.paused: set[int] = set()
        self.most = 0
        self.given = 0

    def assign(self, offsets: dict[tuple[str, int], int]) -> None:
        self.next = {number: at for (_, number), at in offsets.items()}

    def pause(self, partitions: Sequence[tuple[str, int]]) -> None:
        self.paused |= {number for _, number in partitions}

    def resume(self, partitions: Sequence[tuple[str, int]]) -> None:
        self.paused -= {number for _, number in partitions}

    def poll(self, timeout: float) -> list[ConsumedRecord]:
        found = []
        for number in self.next:
            if number in self.paused:
                continue
            for at in range(self.next[number], min(self.next[number] + 700, len(self.log[number]))):
                if (time := self.log[number][at]) >= 0:  # others are markers
                    found.append(ConsumedRecord("t", number, at, None, b"v" * self.size, (), time))
                self.next[number] = at + 1
        self.given += len(found)
        return found

    def position(self, partition: tuple[str, int]) -> int:
        return self.next[partition[1]]


def test_records_come_in_the_order_of_their_times_within_bounds() -> None:
    log = {0: list(range(0, 60_000, 3)), 1: [], 2: list(range(1, 9000, 3)), 3: [8, 5, 100_000, -1, -1]}
    consumer = FakeConsumer(log)
    ends = {("t", number): len(times) for number, times in log.items()}
    found: list[ConsumedRecord] = []
    for record in MergingReader(consumer, dict.fromkeys(ends, 0), ends):  # type: ignore[arg-type]
        found.append(record)
        assert consumer.given - len(found) <= 4 * 1700
    times = [record.timestamp_ms for record in found]
    assert sorted(times) == sorted(time for times in log.values() for time in times if time >= 0)
    assert [time for time in times if time != 5] == sorted(time for time in times if time != 5)
    assert times[times.index(8) + 1] == 5, "within a partition the order of the records holds"


def test_large_records_are_held_back_by_their_bytes() -> None:
    log = {0: list(range(3000)), 1: list(range(10_000, 13_000))}
    consumer = FakeConsumer(log, size=100_000)
    ends = {("t", number): len(times) for number, times in log.items()}
    seen = 0
    for _ in MergingReader(consumer, dict.fromkeys(ends, 0), ends):  # type: ignore[arg-type]
        seen += 1
        assert consumer.given - seen <= 2 * 711
    assert seen == 6000


def test_a_silent_kafka_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.topic_reader.PATIENCE", 0.01)
    consumer = FakeConsumer({0: [1]})
    with pytest.raises(GatewayError, match="nothing comes from t-0 any more"):
        list(MergingReader(consumer, {("t", 0): 0}, {("t", 0): 2}))  # type: ignore[arg-type]
