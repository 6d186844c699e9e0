"""A node on stores that a rebuild has not finished is refused, with the command that goes on [K19]."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import attrs
import pytest
import trio

from mqtt_trio import __main__ as command_line
from mqtt_trio.app import Node
from mqtt_trio.archive.rebuild import HistoryTarget, unfinished_history
from mqtt_trio.archive.sqlite import archive_path
from mqtt_trio.archive.store import Entry, Progress
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import Batch
from mqtt_trio.config import LoadedConfig, Overrides, load_config
from mqtt_trio.errors import StartError
from mqtt_trio.server.rebuild import RetainedTarget
from mqtt_trio.server.sqlite_store import FILE_NAME, SqliteStore

LIMIT = 30.0
BEGIN = Progress(source="Kafka topic mqtt.archive", identity="1", ends={0: 100, 1: 100}, next={0: 10, 1: 0})
ELSEWHERE = attrs.evolve(BEGIN, source="Kafka topic other")
CONFIG = """\
[[ArchiveGroups]]
Name = "Default"
Store = "SQLITE"
[[ArchiveGroups]]
Name = "It's hot"
Filter = "hot/#"
Store = "SQLITE"
"""


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedConfig:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)
    return load_config(config, {}, Overrides(sets=[f"Persistence.Path={tmp_path}"], port=0, ws_port=0))


@contextmanager
def begun(target: HistoryTarget | RetainedTarget, progress: Progress = BEGIN) -> Iterator[None]:
    """Have a rebuild stored a record, and stop it there."""
    assert target.open() is None
    target.begin(progress)
    target.store([Entry(Message("a", b"x", retain=True, published_at=2e9), 0, 10)])
    yield
    target.close()


def leave_unfinished(target: HistoryTarget | RetainedTarget, progress: Progress = BEGIN) -> None:
    with begun(target, progress):
        pass


def history(folder: Path, name: str = "Default") -> HistoryTarget:
    return HistoryTarget(group=name, path=archive_path(folder, name))


def retained(folder: Path) -> RetainedTarget:
    return RetainedTarget(path=folder / FILE_NAME)


async def refusal(loaded: LoadedConfig) -> str:
    """Start a node that must not start; return why."""
    node = Node(loaded)
    with trio.fail_after(LIMIT), pytest.RaisesGroup(StartError, flatten_subgroups=True) as caught:
        await node.run()
    assert not node.started.is_set()
    assert node.storage is not None
    node.storage.store.close()
    (error,) = caught.value.exceptions
    return str(error)


async def test_a_node_says_what_is_missing_and_what_goes_on(loaded: LoadedConfig, tmp_path: Path) -> None:
    leave_unfinished(retained(tmp_path))
    text = await refusal(loaded)
    given = f"--config {tmp_path / 'config.toml'} --set Persistence.Path={tmp_path}"
    assert text == (
        f"a rebuild was not finished: session store {tmp_path / FILE_NAME} (189 records of Kafka topic mqtt.archive to "
        f"go). Go on with `mqtt-trio rebuild {given} --from mqtt.archive --retained`. "
        "To start without what is in them, move the files away"
    )
    target = retained(tmp_path)  # the refused node has left it as it was
    progress = target.open()
    assert progress is not None
    assert progress.next == {0: 11, 1: 0}
    target.close()


async def test_all_stores_are_told_at_once(loaded: LoadedConfig, tmp_path: Path) -> None:
    leave_unfinished(retained(tmp_path))
    leave_unfinished(history(tmp_path))
    leave_unfinished(history(tmp_path, "It's hot"), ELSEWHERE)
    text = await refusal(loaded)
    given = f"--config {tmp_path / 'config.toml'} --set Persistence.Path={tmp_path}"
    assert f"`mqtt-trio rebuild {given} --from mqtt.archive --retained --group Default`" in text
    assert f"""`mqtt-trio rebuild {given} --from other --group 'It'"'"'s hot'`""" in text


async def test_a_place_that_the_file_names_is_not_repeated(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[Persistence]\nPath = "{tmp_path}"\n')
    leave_unfinished(retained(tmp_path))
    text = await refusal(load_config(config, {}, Overrides(port=0, ws_port=0)))
    assert f"`mqtt-trio rebuild --config {config} --from mqtt.archive --retained`" in text


async def test_finished_it_starts(loaded: LoadedConfig, tmp_path: Path) -> None:
    for target in (retained(tmp_path), history(tmp_path)):
        with begun(target):
            target.store([Entry(None, 0, 99), Entry(None, 1, 99)])
            target.finish()
    node = Node(loaded)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.run)
            await node.started.wait()
            node.stopping.set()
    assert node.broker.retained.get("a") is not None


async def test_what_was_noted_and_cannot_be_read(loaded: LoadedConfig, tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / FILE_NAME)
    store.load()
    store.commit(Batch(marks={"rebuild": b"[]"}))
    store.close()
    assert "remove the file and begin anew" in await refusal(loaded)


def test_a_killed_one_is_seen_in_the_log_of_its_file(tmp_path: Path) -> None:
    target = history(tmp_path)
    with begun(target):
        assert Path(f"{target.path}-wal").stat().st_size > 0
        progress = unfinished_history(target.path)
    assert progress is not None
    assert progress.next == {0: 11, 1: 0}


def test_files_that_are_none_are_left_to_whoever_opens_them(tmp_path: Path) -> None:
    for content in (None, b"", b"x" * 5000):
        path = tmp_path / "archive-Default.sqlite3"
        if content is not None:
            path.write_bytes(content)
        assert unfinished_history(path) is None
        assert list(tmp_path.iterdir()) == ([path] if content is not None else [])
    leave_unfinished(history(tmp_path / "other"))
    path = archive_path(tmp_path / "other", "Default")
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE rebuild SET progress = CAST(x'ff' AS TEXT)")
        db.commit()
    assert unfinished_history(path) is None


def test_the_doctor_names_the_command(loaded: LoadedConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_unfinished(retained(tmp_path))
    leave_unfinished(history(tmp_path))
    files = sorted(tmp_path.iterdir())
    code = command_line.main(["doctor", "--config", str(loaded.path), "--data", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "not finished" in line]
    assert code == 1
    assert [line.partition(" -> ")[2] for line in lines] == [
        f"mqtt-trio rebuild --config {loaded.path} --set Persistence.Path={tmp_path} --from mqtt.archive {argument}"
        for argument in ("--retained", "--group Default")
    ]
    assert all(line.startswith("PROBLEM") and "189 records of Kafka topic mqtt.archive to go" in line for line in lines)
    assert sorted(tmp_path.iterdir()) == files, "a doctor makes nothing"
