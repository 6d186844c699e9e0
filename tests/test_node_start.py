"""What a node does between its store and its listeners."""

from __future__ import annotations

from pathlib import Path

import trio

from mqtt_trio.app import Node
from mqtt_trio.archive.memory import MemoryStore
from mqtt_trio.broker.journal import frame_of
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import Batch
from mqtt_trio.config import Overrides, load_config
from mqtt_trio.server.sqlite_store import FILE_NAME, SqliteStore

LIMIT = 30.0


async def test_wills_that_are_due_at_the_start_are_archived(tmp_path: Path) -> None:
    """[K7]: of clients that were connected when the process was killed, and whose delay ran out while it was down."""
    store = SqliteStore(tmp_path / FILE_NAME)
    store.load()
    batch = Batch()
    for number, ended_at in ((1, None), (2, 1000.0)):
        will = b"\0\0\0\0" + frame_of(Message(f"gone/{number}", b"w", 1))
        batch.sessions[number] = (number, f"c{number}", None, 0xFFFFFFFF, ended_at, will, ended_at)
    store.commit(batch)
    store.close()
    config = tmp_path / "config.toml"
    config.write_text('[[ArchiveGroups]]\nName = "All"\nFilter = "#"\nStore = "MEMORY"\n')
    node = Node(load_config(config, {}, Overrides(sets=[f"Persistence.Path={tmp_path}"], port=0, ws_port=0)))
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.run)
            await node.started.wait()
            node.stopping.set()
    (group,) = node.groups
    assert isinstance(group.store, MemoryStore)
    assert sorted(message.topic_name for message in group.store.messages()) == ["gone/1", "gone/2"]
    assert node.broker.metrics.wills_published == 2
