"""Checking a store's file: what is told, and that nothing is changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mqtt_trio import __main__ as command_line
from mqtt_trio.errors import StoreError
from mqtt_trio.server.sqlite_store import FILE_NAME, SqliteStore
from mqtt_trio.server.store_doctor import check_store_file
from tests.stores.sqlite_files import as_after_a_kill, fill, load, put, query, realistic


def everything_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    fill(path, realistic(1, 20))
    before = everything_in(tmp_path)
    report = check_store_file(path)
    assert report.problems == []
    assert report.lines[0] == f"{path}: {path.stat().st_size} bytes, write-ahead log 0 bytes"
    assert report.lines[1] == "schema version 2 (this program: 2)"
    assert "sessions: 20 rows, checksums right" in report.lines
    assert "deliveries: 220 rows, checksums right" in report.lines
    assert everything_in(tmp_path) == before


def test_a_log_that_waits_is_checked_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "data" / "sessions.sqlite3"
    file, log = as_after_a_kill(path, realistic(1, 20), realistic(30, 20))
    put(path, file, log)
    before = everything_in(path.parent)
    report = check_store_file(path)
    assert report.problems == []
    assert "sessions: 40 rows, checksums right" in report.lines
    frames = len(log) // 4120
    assert f"write-ahead log: {frames} of {frames} pages are sound" in report.lines
    assert everything_in(path.parent) == before
    damaged = bytearray(log)
    damaged[-100] ^= 1
    put(path, file, damaged)
    (problem,) = check_store_file(path).problems
    assert problem.startswith("the write-ahead log is damaged after ")


def test_damage_is_told_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    fill(path, realistic(1, 20))
    query(path, "UPDATE retained SET frame = x'00' WHERE topic_name LIKE 'site/1%'")
    query(path, "DELETE FROM sessions WHERE number = 3")
    problems = check_store_file(path).problems
    assert problems[:1] == ["11 of retained are damaged"]
    assert problems[1:] == [f"{n} of {name} belong to nothing" for n, name in _ORPHANS]
    ((root,),) = query(path, "SELECT rootpage FROM sqlite_schema WHERE name = 'deliveries'")
    file = bytearray(path.read_bytes())
    file[(root - 1) * 4096 + 3 : (root - 1) * 4096 + 5] = b"\xff\xff"  # how many cells it has
    put(path, file)
    before = everything_in(tmp_path)
    assert [line for line in check_store_file(path).problems if line.startswith("structure: ")]
    assert everything_in(tmp_path) == before


_ORPHANS = ((11, "deliveries"), (1, "subscriptions"), (1, "received"))


@pytest.mark.parametrize(
    "statement, problem",
    [
        ("PRAGMA user_version = 9", "version 9 is none that this program knows"),
        ("PRAGMA application_id = 9", "the header does not say that it is a session store"),
    ],
)
def test_a_wrong_header(statement: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    fill(path, realistic(1, 2))
    query(path, statement)
    assert check_store_file(path).problems == [problem]


def test_what_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    path.write_bytes(b"text" * 1000)
    assert check_store_file(path).problems == ["SQLite cannot read it: file is not a database"]
    load(path)
    report = check_store_file(path)
    assert report.problems == []
    assert report.lines[-1].startswith(f"set aside earlier: {path}.corrupt-")


def test_what_a_start_that_was_cut_off_leaves_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    path.touch()
    report = check_store_file(path)
    assert report.problems == []
    assert report.lines[-1].startswith("it is empty, ")


def test_no_file_and_a_file_in_use(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    with pytest.raises(StoreError, match=r"cannot be checked: No such file or directory"):
        check_store_file(path)
    store = SqliteStore(path)
    store.load()
    with pytest.raises(StoreError, match=r"is in use by process \d+: stop that one first"):
        check_store_file(path)
    store.close()
    assert check_store_file(path).problems == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / FILE_NAME
    arguments = ["doctor", "--data", str(tmp_path)]
    assert command_line.main(arguments) == 0
    assert f"note     session store {path}: is not there yet; the first start makes it\n" in capsys.readouterr().out
    fill(path, realistic(1, 5))
    assert command_line.main(arguments) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^ok       session store {path}: .*; checksums are right of sessions: 5, ", said, re.MULTILINE)
    assert said.endswith("\nno problem found\n")
    query(path, "UPDATE groups SET name = 'other'")
    assert command_line.main(arguments) == 1
    said = capsys.readouterr().out
    assert f"\nPROBLEM  session store {path}: 1 of groups are damaged -> the next start keeps what is readable" in said
    assert said.endswith("\n1 problem found\n")
    store = SqliteStore(path)
    store.load()
    assert command_line.main(arguments) == 0, "not being checked is no damage"
    assert "not checked: " in capsys.readouterr().out
    store.close()
