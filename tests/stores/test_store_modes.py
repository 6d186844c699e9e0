"""Who may read the files of the session store: their owner alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mqtt_trio.server import store_repair
from mqtt_trio.server.sqlite_store import SqliteStore
from mqtt_trio.server.store_reader import Contents
from tests.stores.sqlite_files import fill, load, put, realistic, set_aside

PRIVATE = 0o600


@pytest.fixture(autouse=True)
def generous() -> Iterator[None]:
    """A umask that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Return the mode of every file."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_new_files_are_their_owners(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s", synchronous="OFF")
    store.load()
    store.commit(realistic(count=5))
    assert modes(tmp_path) == {"s": PRIVATE, "s-wal": PRIVATE, "s.lock": PRIVATE}
    store.close()


def test_a_file_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    """The operator may have let a group read it."""
    path = tmp_path / "s"
    fill(path)
    path.chmod(0o640)
    fill(path, realistic(count=5))
    assert modes(tmp_path) == {"s": 0o640, "s.lock": PRIVATE}


def test_what_replaces_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    fill(path, realistic(count=20))
    put(path, path.read_bytes().replace(b"frame that many share 7", b"frame that many share 8"))
    path.chmod(0o640)
    meanwhile: dict[str, int] = {}
    read = store_repair._read

    def look_and_read(copy: Path) -> Contents:
        meanwhile.update(modes(tmp_path))
        return read(copy)

    monkeypatch.setattr(store_repair, "_read", look_and_read)
    load(path)
    (aside,) = set_aside(path)
    kept = dict.fromkeys((aside.name, f"{aside.name}-wal"), 0o640)
    assert modes(tmp_path) == {"s": PRIVATE, "s.lock": PRIVATE, **kept}
    assert meanwhile["s.salvage"] == PRIVATE


def test_a_log_without_its_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = SqliteStore(path, synchronous="OFF")
    store.load()
    store.commit(realistic(count=5))
    log = Path(f"{path}-wal").read_bytes()
    store.close()
    put(path, b"", log)
    path.unlink()
    load(path)
    (aside,) = set_aside(path)
    assert modes(tmp_path)[path.name] == modes(tmp_path)[aside.name] == PRIVATE
