"""Damaged, torn, foreign and future files: the start goes on, says what happened, and loses no more than it must."""

from __future__ import annotations

import logging
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mqtt_trio.broker.store import Batch, StoredState
from mqtt_trio.errors import StoreError
from mqtt_trio.server import store_file, store_repair
from mqtt_trio.server.sqlite_store import SqliteStore
from mqtt_trio.server.store_doctor import check_store_file
from mqtt_trio.testing.stores import delivery, reload, rows_of, session
from tests.stores.sqlite_files import as_after_a_kill, fill, load, put, query, realistic, set_aside, total

FLIPS = 200
PAGE = 4096


def path_in(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sessions.sqlite3"


def assert_told(caplog: pytest.LogCaptureFixture, path: Path) -> str:
    """Exactly one ERROR that names the file, and what it was set aside as; return it."""
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    message = record.getMessage()
    assert record.exc_info is None
    (aside,) = set_aside(path)
    assert message.startswith(f"session store {path} is unusable: ")
    assert f"It is kept as {aside}." in message
    return message


def assert_subset(state: StoredState, whole: StoredState) -> None:
    """Nothing came out that was not put in."""
    found, expected = rows_of(state), rows_of(whole)
    for name, rows in expected.items():
        pairs = name in ("contents", "marks")
        extra = set(found[name].items() if pairs else found[name]) - set(rows.items() if pairs else rows)
        assert not extra, (name, extra)


def as_told(state: StoredState) -> dict[str, Any]:
    """Return the rows as far as their checksums tell them apart: the time of a delivery counts in microseconds."""
    rows = rows_of(state)
    rows["deliveries"] = [(*row[:6], int(row[6] * 1e6), *row[7:]) for row in rows["deliveries"]]
    return rows


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, StoredState]:
    path = tmp_path_factory.mktemp("sound") / "sessions.sqlite3"
    fill(path, realistic())
    return path.read_bytes(), load(path)


def test_bit_flips_anywhere_in_the_file(
    sound: tuple[bytes, StoredState], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, whole = sound
    path, chance = path_in(tmp_path), random.Random(5)
    noticed = least = total(whole)
    noticed = 0
    first_page = [*range(0, 100, 5), *(chance.randrange(100, PAGE) for _ in range(20))]
    for at in first_page + [chance.randrange(len(file)) for _ in range(FLIPS)]:
        damaged = bytearray(file)
        damaged[at] ^= 1 << chance.randrange(8)
        put(path, damaged)
        caplog.clear()
        try:
            state = load(path)
        except StoreError as exc:
            pytest.fail(f"the flip at {at} ended the start: {exc}")
        if set_aside(path):
            noticed += 1
            assert_told(caplog, path)
            assert set_aside(path)[0].read_bytes() == damaged, f"with the flip at {at} it is kept as it was"
            assert_subset(state, whole)
            if "has version" not in caplog.text:  # of a later version nothing is read
                least = min(least, total(state))
        else:
            assert as_told(state) == as_told(whole), f"the flip at {at} changed something and nobody noticed"
        assert load(path) == state, "and the next start finds the same"
    assert noticed > FLIPS / 2, "most of the file means something"
    assert least > total(whole) * 0.8, "a flipped bit costs a page, not the file"


def test_bit_flips_anywhere_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, chance = path_in(tmp_path), random.Random(6)
    batches = [realistic(first, 20) for first in range(1, 200, 20)]
    file, log = as_after_a_kill(path, *batches)
    put(path, file, log)
    whole = load(path)
    assert set_aside(path) == []
    lost_some = 0
    for at in [*range(0, 32, 2), *(chance.randrange(len(log)) for _ in range(FLIPS // 2))]:
        damaged = bytearray(log)
        damaged[at] ^= 1 << chance.randrange(8)
        put(path, file, damaged)
        caplog.clear()
        state = load(path)
        assert_subset(state, whole)
        if rows_of(state) != rows_of(whole):
            lost_some += 1
            assert set_aside(path), f"the flip at {at} of {len(log)} bytes of log lost something and nobody noticed"
            assert "write-ahead log is damaged" in assert_told(caplog, path)
            (aside,) = set_aside(path)
            assert Path(f"{aside}-wal").read_bytes() == damaged
            assert len(state.sessions) % 20 == 0, "whole batches"
    assert lost_some > 50


@pytest.mark.parametrize("garbage", [False, True])
def test_a_torn_log_loses_the_torn_commit_alone(garbage: bool, tmp_path: Path) -> None:
    path, chance = path_in(tmp_path), random.Random(7)
    batches = [realistic(first, 10) for first in range(1, 60, 10)]
    file, before = as_after_a_kill(path, *batches[:-1])
    put(path, b"")
    file, log = as_after_a_kill(path, *batches)
    for _ in range(60):
        at = chance.randrange(len(before), len(log))
        put(path, file, log[:at] + (chance.randbytes(len(log) - at) if garbage else b""))
        assert len(load(path).sessions) == 50


@pytest.mark.parametrize("tail", [b"", b"garbage" * 5000])
def test_a_torn_file_keeps_what_is_there(
    tail: bytes, sound: tuple[bytes, StoredState], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, whole = sound
    path, chance = path_in(tmp_path), random.Random(8)
    kept = []
    for at in [0, 1, 99, 100, 4095, 4096, *(chance.randrange(len(file)) for _ in range(30))]:
        put(path, file[:at] + tail)
        caplog.clear()
        state = load(path)
        assert_subset(state, whole)
        if at or tail:
            assert_told(caplog, path)
        kept.append((at, total(state)))
    assert all(rows > 0 for at, rows in kept if at > len(file) * 0.8), kept


def test_a_lost_list_of_tables_is_no_new_file(
    sound: tuple[bytes, StoredState], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, whole = sound
    path = path_in(tmp_path)
    put(path, bytes(PAGE) + file[PAGE:])
    assert rows_of(load(path)) == rows_of(whole), "everything else tells where it is"
    assert "300 sessions" in assert_told(caplog, path)


def test_a_changed_value_in_a_sound_page_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = path_in(tmp_path)
    fill(path, realistic())
    query(path, "UPDATE deliveries SET owner = owner + 1 WHERE number = 205")
    query(path, "UPDATE deliveries SET frame = frame || x'00' WHERE number = 206")
    query(path, "UPDATE subscriptions SET topic_filter = '#' WHERE session = 9")
    state = load(path)
    message = assert_told(caplog, path)
    assert "2 of deliveries are damaged" in message
    assert "1 of subscriptions are damaged" in message
    assert {205, 206}.isdisjoint(row[0] for row in state.deliveries)
    assert len(state.deliveries) == 300 * 11 - 2


def test_rows_of_nobody_are_removed_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = path_in(tmp_path)
    stray = Batch(deliveries={5: delivery(5, 77), 6: delivery(6, 1, content=99, frame=None), 7: delivery(7, 1)})
    stray.subscriptions[78, "a"] = (78, "a", 1, None)
    stray.received[79, 1] = True
    fill(path, session(1), stray)
    for _ in range(2):
        state = load(path)
        assert [row[0] for row in state.deliveries] == [7]
        assert not state.subscriptions
        assert not state.received
    assert set_aside(path) == []
    (warning,) = [r.getMessage() for r in caplog.records]
    assert "2 of deliveries belong to nothing; 1 of subscriptions" in warning


@pytest.mark.parametrize(
    "statement, reason",
    [
        ("PRAGMA user_version = 3", "version 3, this program knows up to 2"),
        ("PRAGMA user_version = 2147483647", "version 2147483647"),
    ],
)
def test_a_later_version_is_set_aside_unread(
    statement: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = path_in(tmp_path)
    fill(path, realistic())
    query(path, statement)
    assert total(load(path)) == 0
    message = assert_told(caplog, path)
    assert reason in message
    assert "nothing. Lost: none of it can be read by this program" in message
    assert query(set_aside(path)[0], "SELECT count(*) FROM sessions") == [(300,)]


def test_another_programs_database_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = path_in(tmp_path)
    path.parent.mkdir()
    query(path, "CREATE TABLE sessions (cookie TEXT)")
    assert total(load(path)) == 0
    assert "another program's database" in assert_told(caplog, path)


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = path_in(tmp_path)
    put(path, b"[Persistence]\n" * 1000)
    assert total(load(path)) == 0
    assert "file is not a database" in assert_told(caplog, path)
    assert set_aside(path)[0].read_bytes() == b"[Persistence]\n" * 1000


def test_nothing_that_was_set_aside_is_overwritten(tmp_path: Path) -> None:
    path = path_in(tmp_path)
    for number in range(3):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no database %d" % number * 100)
        load(path)
    assert sorted(p.read_bytes()[12] for p in set_aside(path)) == [ord("0"), ord("1"), ord("2")]


@pytest.mark.parametrize("step", ["connect", "rename 1", "rename 2", "rename 3"])
def test_a_replacement_goes_on_where_it_was_cut_off(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path_in(tmp_path)
    file, log = as_after_a_kill(path, realistic(1, 20), realistic(30, 20))
    damaged = bytearray(log)
    damaged[len(log) * 3 // 4] ^= 1
    put(path, file, damaged)
    expected = rows_of(load(path))
    put(path, file, damaged)

    class Cut(BaseException):
        pass

    renames = 0
    rename = store_repair.os.rename  # type: ignore[attr-defined]

    def cut_rename(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if step == f"rename {renames}":
            raise Cut
        rename(source, target)

    def cut_connect(path: Path, *, synchronous: str) -> sqlite3.Connection:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(store_repair.os, "rename", cut_rename)  # type: ignore[attr-defined]
        if step == "connect":
            patch.setattr(store_repair, "connect", cut_connect)
        with pytest.raises(Cut):
            SqliteStore(path).load()
    assert rows_of(load(path)) == expected
    assert len(expected["sessions"]) == 20
    assert len(set_aside(path)) == 1, "one from each life that got that far"
    assert not list(path.parent.glob("*.new*"))
    assert not list(path.parent.glob("*.salvage*"))


def test_an_older_version_goes_through_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path_in(tmp_path)
    fill(path, session(1))
    before = path.read_bytes()
    monkeypatch.setattr(store_file, "SCHEMA_VERSION", 4)
    monkeypatch.setitem(store_file.STEPS, 2, "UPDATE sessions SET client_id = 'second';")
    monkeypatch.setitem(store_file.STEPS, 3, "UPDATE sessions SET oops = 1;")
    with pytest.raises(StoreError, match="oops"):
        load(path)
    assert query(path, "PRAGMA user_version") == [(2,)]
    assert query(path, "SELECT client_id FROM sessions") == [("client 1",)], "all steps or none"
    put(path, before)
    monkeypatch.setitem(store_file.STEPS, 3, "CREATE TABLE third (x); UPDATE sessions SET client_id = 'client 1';")
    assert rows_of(load(path))["sessions"] == [(1, "client 1", None, 0xFFFFFFFF, None, None, None)]
    assert query(path, "PRAGMA user_version") == [(4,)]
    assert query(path, "SELECT * FROM third") == []


def as_version_1(path: Path) -> None:
    """Take out of a file what later versions brought."""
    query(path, "DROP TABLE marks")
    query(path, "VACUUM")
    query(path, "PRAGMA user_version = 1")


def test_a_file_of_version_1_is_brought_here_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = path_in(tmp_path)
    fill(path, realistic())
    expected = {**rows_of(load(path)), "marks": {}}
    as_version_1(path)
    report = check_store_file(path)
    assert report.lines[1] == "schema version 1 (this program: 2)"
    assert not report.problems
    assert rows_of(load(path)) == expected
    assert "brought from version 1 to 2" in caplog.text
    fill(path, Batch(marks={"a": b"1"}))
    caplog.clear()
    assert rows_of(load(path)) == {**expected, "marks": {"a": b"1"}}
    assert not caplog.records
    assert not set_aside(path)


def test_of_a_damaged_file_of_version_1_the_rest_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = path_in(tmp_path)
    fill(path, realistic(1, 20))
    as_version_1(path)
    query(path, "UPDATE sessions SET client_id = 'other' WHERE number = 7")
    state = load(path)
    assert len(state.sessions) == 19
    message = assert_told(caplog, path)
    assert "1 of sessions are damaged" in message
    assert "marks" not in message


def test_a_list_of_tables_that_is_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite quotes it in its message, which Python then cannot decode."""
    path = path_in(tmp_path)
    fill(path, realistic(1, 20))
    whole = rows_of(load(path))
    file = bytearray(path.read_bytes())
    file[file.index(b"CREATE TABLE contents (") + 9] = 0xD9
    put(path, file)
    assert check_store_file(path).problems
    assert rows_of(load(path)) == whole
    assert "its list of tables is damaged" in assert_told(caplog, path)


@pytest.mark.parametrize("older", [False, True])
def test_the_first_page_of_a_new_file_fits_every_file(tmp_path: Path, older: bool) -> None:
    path = path_in(tmp_path)
    fill(path, realistic())
    if older:
        as_version_1(path)
        load(path)
    copy = tmp_path / "copy"
    shutil.copyfile(path, copy)
    store_repair._renew_first_page(copy)
    with closing(sqlite3.connect(path)) as one, closing(sqlite3.connect(copy)) as other:
        schemas = [db.execute("SELECT name, rootpage, sql FROM sqlite_schema").fetchall() for db in (one, other)]
    assert schemas[0] == schemas[1]
    assert reload(lambda: SqliteStore(path)).sessions
