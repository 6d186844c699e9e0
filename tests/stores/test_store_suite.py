"""Every store passes the suite; random batches leave the same in all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.errors import StoreError
from mqtt_trio.server.sqlite_store import SqliteStore
from mqtt_trio.testing.stores import (
    Fault,
    FaultyStore,
    Reopen,
    apply,
    check_store,
    delivery,
    everything,
    reload,
    rows_of,
    session,
)

PARTS = [field.name for field in attrs.fields(Batch)]


def memory_place() -> Reopen:
    store = MemoryStore()
    return lambda: store


def sqlite_places(directory: Path, numbers: itertools.count[int]) -> Callable[[], Reopen]:
    def make() -> Reopen:
        path = directory / str(next(numbers)) / "sessions.sqlite3"
        return lambda: SqliteStore(path, synchronous="OFF")

    return make


def test_memory_store() -> None:
    check_store(memory_place)


def test_sqlite_store(tmp_path: Path) -> None:
    check_store(sqlite_places(tmp_path, itertools.count()))


def test_a_faulty_store_without_faults_is_a_store() -> None:
    def make() -> Reopen:
        store = MemoryStore()
        return lambda: FaultyStore(store)

    check_store(make)


class ForgetfulStore(MemoryStore):
    """Loses what is easily lost; the suite must tell."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def commit(self, batch: Batch) -> None:
        kept = {name: getattr(batch, name) for name in PARTS if name != self.part}
        super().commit(Batch(**kept))


@pytest.mark.parametrize("part", PARTS)
def test_the_suite_notices_what_a_store_forgets(part: str) -> None:
    def make() -> Reopen:
        store = ForgetfulStore(part)
        return lambda: store

    with pytest.raises((AssertionError, KeyError, IndexError)):
        check_store(make)


class TornStore(MemoryStore):
    """A commit that dies leaves some of its rows."""

    def commit(self, batch: Batch) -> None:
        try:
            super().commit(batch)
        except BaseException:
            super().commit(Batch(deliveries=dict(dict.items(batch.deliveries))))
            raise


class WedgedStore(MemoryStore):
    """Takes nothing any more once a commit has died."""

    died = False

    def commit(self, batch: Batch) -> None:
        if self.died:
            raise StoreError("planned: a commit is still open")
        self.died = True
        super().commit(batch)
        self.died = False


class SilentStore(MemoryStore):
    """Returns as if all were well."""

    def commit(self, batch: Batch) -> None:
        try:
            super().commit(batch)
        except BaseException as exc:
            self.swallowed = exc


@pytest.mark.parametrize("kind", [TornStore, WedgedStore, SilentStore])
def test_the_suite_notices_what_a_dying_commit_leaves(kind: type[MemoryStore]) -> None:
    def make() -> Reopen:
        store = kind()
        return lambda: store

    with pytest.raises((AssertionError, StoreError)) as caught:
        check_store(make)
    assert caught.value.__notes__ == ["in _survives_a_commit_that_dies"]


@pytest.mark.parametrize("fault", [Fault.BEFORE, Fault.AFTER])
def test_a_batch_that_failed_comes_again(fault: Fault) -> None:
    disk = MemoryStore()
    store = FaultyStore(disk, [Fault.NONE, fault])
    store.load()
    store.commit(session(1))
    batch = Batch(deliveries={1: delivery(1, 1)})
    with pytest.raises(StoreError, match="planned"):
        store.commit(batch)
    assert (len(disk.load().deliveries) == 1) == (fault is Fault.AFTER)
    batch.deliveries[2] = delivery(2, 1)
    store.commit(batch)
    assert [row[0] for row in disk.load().deliveries] == [1, 2]


@pytest.mark.parametrize("fault", [Fault.DIES, Fault.DIES_AFTER])
def test_a_commit_that_died_is_no_end(fault: Fault) -> None:
    disk = MemoryStore()
    store = FaultyStore(disk, [fault], dies_of=MemoryError())
    with pytest.raises(MemoryError):
        store.commit(session(1))
    assert (len(disk.load().sessions) == 1) == (fault is Fault.DIES_AFTER)
    store.commit(session(2))
    assert disk.load().sessions[-1][0] == 2


@pytest.mark.parametrize("fault, kept", [(Fault.CRASH, 0), (Fault.CRASH_AFTER, 1)])
def test_after_a_crash_this_life_writes_nothing(fault: Fault, kept: int) -> None:
    disk = MemoryStore()
    store = FaultyStore(disk, [fault])
    for number in (1, 2):
        with pytest.raises(StoreError, match="planned"):
            store.commit(session(number))
    assert store.commits == 2
    assert len(FaultyStore(disk).load().sessions) == kept


# --- random batches ---

TEXTS = st.sampled_from(["a", "b/c", "ü", "\0", ""])
FRAMES = st.binary(max_size=40) | st.just(b"\xff" * 70_000)
TIMES = st.floats(min_value=0, max_value=4e9)


class World:
    """Draws batches that the core could send: rows that belong to something, numbers that grow."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.owners: dict[int, bool] = {}  # True: a session
        self.deliveries: dict[int, int] = {}
        self.contents: set[int] = set()
        self.owner = self.number = 0

    def several(self, things: Any) -> list[Any]:
        ordered = sorted(things)
        return self.draw(st.lists(st.sampled_from(ordered), max_size=6, unique=True)) if ordered else []

    def batch(self) -> Batch:
        draw, batch = self.draw, Batch()
        for number in self.several(self.deliveries):
            if draw(st.booleans()):
                owner = draw(st.sampled_from(sorted(self.owners)))
                batch.moves[number] = (owner, draw(st.integers(0, 3)), draw(st.integers(0, 15)))
                self.deliveries[number] = owner
            else:
                batch.done.append(number)
                del self.deliveries[number]
        for owner in self.several(self.owners):
            (batch.sessions if self.owners.pop(owner) else batch.groups)[owner] = None
            self.deliveries = {n: whose for n, whose in self.deliveries.items() if whose != owner}
        self._grow(batch)
        for topic in draw(st.lists(TEXTS, max_size=3)):
            row = (topic, draw(FRAMES), draw(TEXTS), draw(TIMES))
            batch.retained[topic] = row if draw(st.booleans()) else None
        for name in draw(st.lists(TEXTS, max_size=2)):
            batch.marks[name] = draw(st.none() | FRAMES)
        return batch

    def _grow(self, batch: Batch) -> None:
        draw = self.draw
        for _ in range(draw(st.integers(0, 3))):
            self.owner += draw(st.integers(1, 3))
            self.owners[self.owner] = is_session = draw(st.booleans())
            if is_session:
                ended_at = draw(st.none() | TIMES)
                batch.sessions[self.owner] = (self.owner, draw(TEXTS), None, 0xFFFFFFFF, ended_at, None, None)
            else:
                batch.groups[self.owner] = draw(TEXTS)
        for owner in [owner for owner in self.several(self.owners) if self.owners[owner]]:
            topic = draw(TEXTS)
            row = (owner, topic, draw(st.integers(0, 255)), draw(st.none() | st.integers(1, 268_435_455)))
            batch.subscriptions[owner, topic] = row if draw(st.booleans()) else None
            batch.received[owner, draw(st.integers(1, 4))] = draw(st.booleans())
        if draw(st.booleans()):
            self.number += 1
            batch.contents[self.number] = draw(FRAMES)
            self.contents.add(self.number)
        for owner in self.several(self.owners) * draw(st.sampled_from([1, 1, 20])):
            self.number += draw(st.sampled_from([1, 1, 1, 5]))
            content = draw(st.sampled_from([0, *sorted(self.contents)]))
            frame = None if content else draw(FRAMES)
            batch.deliveries[self.number] = delivery(
                self.number, owner, draw(st.integers(0, 2)), content=content, frame=frame, published_at=draw(TIMES)
            )
            self.deliveries[self.number] = owner


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_random_batches_leave_the_same_as_in_memory(data: st.DataObject) -> None:
    world = World(data.draw)
    model = MemoryStore()
    with TemporaryDirectory() as directory:
        path = Path(directory, "sessions.sqlite3")
        store = SqliteStore(path, synchronous="OFF")
        store.load()
        for _ in range(data.draw(st.integers(1, 8))):
            batch = world.batch()
            model.commit(batch)
            store.commit(batch)
            if data.draw(st.sampled_from([True, False, False])):
                store.commit(Batch(moves=dict(batch.moves), done=list(batch.done), retained=dict(batch.retained)))
            if data.draw(st.booleans()):
                store.close()
                loaded = store.load()
                assert rows_of(loaded) == rows_of(model.load())
                assert loaded.last_number >= model.load().last_number
                assert loaded.last_owner == model.load().last_owner
        store.close()
        assert rows_of(reload(lambda: SqliteStore(path))) == rows_of(model.load())


def test_a_batch_of_everything_is_the_same_in_both(tmp_path: Path) -> None:
    places = (memory_place(), sqlite_places(tmp_path, itertools.count())())
    first, second = (rows_of(apply(place, everything())) for place in places)
    assert first == second
