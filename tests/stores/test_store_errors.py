"""When the session store's file cannot be written: a clear error, nothing half done, and it goes on afterwards."""

from __future__ import annotations

import os
import resource
import select
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mqtt_trio.broker.store import Batch
from mqtt_trio.errors import StoreError
from mqtt_trio.server.sqlite_store import UNUSED_PAGES, SqliteStore
from mqtt_trio.server.store_file import CHECKPOINT_PAGES, LOG_LIMIT
from mqtt_trio.testing.stores import delivery, session
from tests.stores.sqlite_files import load, query, realistic, set_aside

LIMIT = 30.0
"""Seconds until a child process counts as stuck."""
MIB = 1024 * 1024


@contextmanager
def loaded(path: Path, synchronous: Any = "OFF") -> Iterator[SqliteStore]:
    store = SqliteStore(path, synchronous=synchronous)
    store.load()
    try:
        yield store
    finally:
        store.close()


def queue_of(first: int, count: int, size: int = 1000) -> Batch:
    return Batch(deliveries={n: delivery(n, 1, frame=b"x" * size) for n in range(first, first + count)})


def until_full(store: SqliteStore) -> tuple[int, Batch, str]:
    """Commit until it fails; return how many rows are in, the batch that is not, and why."""
    for first in range(1, 1_000_000, 100):
        batch = queue_of(first, 100)
        try:
            store.commit(batch)
        except StoreError as exc:
            return first - 1, batch, str(exc)
    raise AssertionError("it never became full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB. Mounting one takes root; otherwise a limit of the size of files does."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, before[1]))
    (folder / "ballast").touch()
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_reported_and_everything_goes_on_with_space(small_disk: Path) -> None:
    path = small_disk / "sessions.sqlite3"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * MIB)
    with loaded(path) as store:
        store.commit(session(1))
        rows, batch, reason = until_full(store)
        assert str(path) in reason
        assert "free some space" in reason or "whether there is space" in reason
        for _ in range(3):
            with suppress(StoreError):  # a failure may fold the log, which makes room
                store.commit(batch)
        ballast.unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        batch.deliveries[rows + 101] = delivery(rows + 101, 1)
        store.commit(batch)
    assert [row[0] for row in load(path).deliveries] == list(range(1, rows + 102))
    assert set_aside(path) == []


def test_a_full_disk_lets_rows_go(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    with loaded(path) as store:
        store.commit(session(1))
        assert store._db is not None
        store._db.execute("PRAGMA max_page_count = 500")
        rows, batch, reason = until_full(store)
        assert "database or disk is full (SQLITE_FULL); the disk or a quota is full: free some space" in reason
        store.commit(Batch(done=list(range(1, rows + 1))))
        store.commit(batch)
    assert len(load(path).deliveries) == 100


def test_what_fails_within_a_batch_undoes_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    bad = realistic(1, 20)
    bad.retained["site/1/temperature"] = ("site/1/temperature", None, "c", 1.0)  # type: ignore[assignment]
    with loaded(path) as store:
        with pytest.raises((StoreError, TypeError)):
            store.commit(bad)
        bad.deliveries[1] = (1, 1, 0, 0, None, 5, 1.0, 0, 2**70)  # type: ignore[assignment]
        with pytest.raises((StoreError, TypeError)):
            store.commit(bad)
        assert store._db is not None
        assert not store._db.in_transaction
        store.commit(realistic(1, 20))
    assert len(load(path).sessions) == 20


def child(code: str, path: Path) -> subprocess.Popen[bytes]:
    script = "import sys\nfrom pathlib import Path\npath = Path(sys.argv[1])\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_second_broker_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    other = child(
        """
        from mqtt_trio.server.sqlite_store import SqliteStore
        store = SqliteStore(path)
        store.load()
        print("loaded", flush=True)
        sys.stdin.read()
        """,
        path,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"loaded\n"
        with pytest.raises(StoreError, match=rf"in use by process {other.pid}: two brokers cannot share it"):
            SqliteStore(path).load()
        other.kill()
    load(path)
    with loaded(path), pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
        SqliteStore(path).load()


def test_another_program_that_locks_the_file_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    load(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"locked .*another process keeps it locked: end that one"):
            SqliteStore(path).load()
    load(path)
    assert set_aside(path) == []


def test_no_rights(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    load(folder / "sessions.sqlite3")
    for each in (tmp_path, *tmp_path.parents[:2]):
        each.chmod(0o755)  # another user may come as far as that
    folder.chmod(0o555)
    code = """
        import os
        from mqtt_trio.errors import StoreError
        from mqtt_trio.server.sqlite_store import SqliteStore
        if os.geteuid() == 0:
            os.setuid(65534)
        for each in (path / "sessions.sqlite3", path / "below" / "sessions.sqlite3"):
            try:
                SqliteStore(each).load()
            except StoreError as exc:
                print(exc)
        """
    with child(code, folder) as process:
        said, _ = process.communicate(timeout=LIMIT)
    folder.chmod(0o755)
    for line, path in zip(said.decode().splitlines(), ("", "below/"), strict=True):
        assert line.startswith(f"session store {folder}/{path}sessions.sqlite3 cannot be ")
        assert "ermission denied" in line
        assert "let the user that runs the broker write there, or choose another place with --data" in line


def test_a_file_that_may_only_be_read(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    with loaded(path) as store:
        store.commit(session(1))
        assert store._db is not None
        store._db.execute("PRAGMA query_only = ON")
        with pytest.raises(StoreError, match=r"cannot be written: attempt to write a readonly database"):
            store.commit(session(2))
        store.commit(session(2))  # by a new connection
    assert len(load(path).sessions) == 2


def test_the_directory_is_made_and_a_directory_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    load(tmp_path / "a" / "b" / "sessions.sqlite3")
    (tmp_path / "c").mkdir()
    with pytest.raises(StoreError, match="c cannot be opened: unable to open database file"):
        SqliteStore(tmp_path / "c").load()


def test_a_file_that_vanished_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    with loaded(path) as store:
        store.commit(session(1))
        store._close_db()  # as after an I/O error
        path.rename(tmp_path / "moved")
        with pytest.raises(StoreError, match="the file is gone"):
            store.commit(session(2))
        (tmp_path / "moved").rename(path)
        store.commit(session(2))
    assert len(load(path).sessions) == 2


@pytest.mark.parametrize("name", ["sessions.sqlite3", "sessions.sqlite3-wal"])
def test_what_is_removed_or_replaced_in_use_takes_no_commits(tmp_path: Path, name: str) -> None:
    """SQLite would go on in a file without a name, and everything acknowledged since would end with the process."""
    path, used = tmp_path / "sessions.sqlite3", tmp_path / name
    with loaded(path) as store:
        store.commit(session(1))
        used.rename(tmp_path / "moved")
        for _ in range(2):
            with pytest.raises(StoreError, match="was removed or replaced while in use; put it back, or restart"):
                store.commit(session(2))
            used.touch()
        (tmp_path / "moved").rename(used)
        store.commit(session(2))
    assert len(load(path).sessions) == 2


def test_the_log_and_the_file_stay_bounded(tmp_path: Path) -> None:
    path, log = tmp_path / "sessions.sqlite3", tmp_path / "sessions.sqlite3-wal"
    largest = 0
    with loaded(path) as store:
        store.commit(session(1))
        for first in range(1, 100_000, 1000):
            batch = queue_of(first, 1000)
            batch.done = [n for n in range(first - 1000, first) if n > 0]
            store.commit(batch)
            largest = max(largest, log.stat().st_size)
        assert largest < CHECKPOINT_PAGES * 4120 + 4 * MIB, "a fold's worth and the commit that reached it"
        assert path.stat().st_size < 8 * MIB, "pages are used again"
        store.commit(queue_of(200_000, 40_000))
        assert path.stat().st_size > 40 * MIB
        store.commit(Batch(done=list(range(99_001, 240_000))))
        store.commit(session(2))
        assert log.stat().st_size <= LOG_LIMIT
    assert path.stat().st_size < (UNUSED_PAGES + 100) * 4096, "closed, it has given the space back"
    assert not log.exists()
    assert len(query(path, "SELECT * FROM sessions")) == 2


WRITER = """
    from mqtt_trio.server.sqlite_store import SqliteStore
    from tests.stores.test_store_errors import life_of_batches
    store = SqliteStore(path, synchronous=sys.argv[2])
    number = store.load().last_owner
    for batch in life_of_batches(number + 1):
        store.commit(batch)
        number += 1
        print(number, flush=True)
    """
"""Commits batches and tells the number of each that is there."""


def life_of_batches(first: int) -> Iterator[Batch]:
    """Batch N begins session N with a queue, removes session N - 3 and half of the queue of session N - 1."""
    for owner in range(first, 1 << 40):
        batch = realistic(owner, 1)
        batch.groups = {}
        batch.sessions[owner - 3] = None
        batch.done = list(range((owner - 1) * 100, (owner - 1) * 100 + 5))
        batch.contents_done = [(owner - 3) * 100]
        yield batch


@pytest.mark.parametrize("synchronous", ["FULL", "OFF"])
def test_kill_at_any_instant_keeps_whole_batches_and_every_one_that_returned(synchronous: str, tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite3"
    told = 0
    script = "import sys\nfrom pathlib import Path\npath = Path(sys.argv[1])\n" + textwrap.dedent(WRITER)
    for life in range(25):
        process = subprocess.Popen([sys.executable, "-c", script, str(path), synchronous], stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            for _ in range(1 + life * 3):
                assert select.select([process.stdout], [], [], LIMIT)[0], "the child is stuck"
                told = int(process.stdout.readline())
            process.kill()  # while it goes on committing
            for line in process.stdout:
                told = int(line)
        state = load(path)
        assert set_aside(path) == []
        last = state.last_owner
        assert last >= told, "a batch whose commit returned is there"
        owners = {row[0] for row in state.sessions}
        assert owners == {n for n in (last - 2, last - 1, last) if n > 0}, "of every other batch, all or nothing"
        numbers = [n for o in sorted(owners) for n in range(o * 100 + (0 if o == last else 5), o * 100 + 11)]
        assert [row[0] for row in state.deliveries] == numbers
        assert sorted(state.contents) == [owner * 100 for owner in sorted(owners)]
        assert len(state.retained) == last
        told = last
