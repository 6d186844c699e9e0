"""An archive in Kafka beside the stores that it must rebuild [K19]; for tests and for scripts/rebuild_check."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from gateways.kafka.admin import Admin
from gateways.kafka.archive import KafkaArchiveStore
from gateways.kafka.bridge import ProducerBridge
from gateways.kafka.cluster import Cluster
from gateways.kafka.mapping import JsonMapper
from gateways.kafka.options import KafkaOptions
from gateways.kafka.precheck import probe
from gateways.kafka.topic_plan import TopicPlan
from gateways.kafka.topics import TopicManager, survey
from gateways.kafka.workers import quiet_loggers
from mqtt_trio.archive.sqlite import SqliteArchive, archive_path
from mqtt_trio.archive.sqlite_file import COLUMNS
from mqtt_trio.gateway import Message, MessageProperties, Outcome
from mqtt_trio.server.sqlite_store import FILE_NAME, SqliteStore
from tests.lines import wait_until

BATCH: Final = 1000
OUTSTANDING: Final = 10
"""Batches that neither store has confirmed."""
KILL_LIMIT: Final = 60.0
SLOWEST: Final = 1000.0
"""Rows per second that a rebuild makes in any case, beside seconds to begin with (KILL_LIMIT)."""
GROUP: Final = "Default"


def make_messages(count: int, seed: int = 1) -> Iterator[list[Message]]:
    """Make messages in batches, a millisecond apart: many topics, text and bytes, some of them retained, some of those
    removed again, some with properties."""
    rng = random.Random(seed)
    topics = max(10, count // 10)
    start = round(time.time()) - count // 1000 - 10
    users = (("unit", "°C"), ("unit", "K"))
    rich = MessageProperties(
        payload_format_indicator=0,
        message_expiry_interval=10_000_000,
        content_type="text/plain",
        response_topic="reply/to",
        correlation_data=b"\xff\x00",
        user_properties=users,
    )
    for first in range(0, count, BATCH):
        batch = []
        for number in range(first, min(first + BATCH, count)):
            kind = rng.random()
            payload = b"" if kind < 0.01 else rng.randbytes(20) if kind < 0.1 else b"%d.5" % number
            message = Message(f"plant/{rng.randrange(topics)}/value", payload, rng.randrange(3), kind < 0.2)
            message.client_id = f"device-{number % 50}"
            message.published_at = start + number / 1000
            if rng.random() < 0.05:
                message.properties = rich
            batch.append(message)
        yield batch


@attrs.define
class Original:
    """Stores that a node might have, and what it has retained."""

    folder: Path
    retained: dict[str, Message] = attrs.field(factory=dict)

    @property
    def history(self) -> Path:
        """The file of the group."""
        return archive_path(self.folder, GROUP)

    def see(self, message: Message) -> None:
        """Keep or remove a retained message."""
        if message.retain and message.payload:
            self.retained[message.topic_name] = message
        elif message.retain:
            self.retained.pop(message.topic_name, None)


def make_topic(servers: str, topic: str, partitions: int = 12) -> TopicPlan:
    """Make the archive topic."""
    plan = TopicPlan(name=topic, partitions=partitions)
    assert survey(lambda: Admin(KafkaOptions(servers=servers)), [plan]).refused == {}
    return plan


async def write_archives(servers: str, topic: str, folder: Path, count: int) -> Original:
    """Give the same messages to our archive in Kafka and to one in SQLite."""
    quiet_loggers()
    options, original = KafkaOptions(servers=servers), Original(folder)
    cluster = Cluster(options.server_names, probe(options))
    bridge = ProducerBridge(
        options, cluster, name="archive", compression="gzip", window_records=20_000, window_bytes=32 << 20
    )
    in_kafka, in_sqlite = KafkaArchiveStore(bridge, JsonMapper(topic, "node-1")), SqliteArchive(original.history)
    room = trio.Semaphore(OUTSTANDING)

    def confirm(outcome: Outcome) -> None:
        assert not outcome, outcome
        room.release()

    async with trio.open_nursery() as nursery:
        plan = await trio.to_thread.run_sync(make_topic, servers, topic)
        nursery.start_soon(TopicManager(options, cluster, [plan]).run)
        await nursery.start(bridge.run)
        await nursery.start(in_sqlite.run)
        for batch in make_messages(count):
            for message in batch:
                original.see(message)
            for store in (in_kafka, in_sqlite):
                await room.acquire()
                store.submit(batch, confirm)
        await in_kafka.stop()
        await in_sqlite.stop()
        await bridge.stop()
        nursery.cancel_scope.cancel()
    return original


def write_config(folder: Path, servers: str, more: str = "") -> Path:
    """Write the configuration of a node whose stores, in `folder`/data, are to be rebuilt."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.toml"
    config.write_text(
        f'[Kafka]\nServers = "{servers}"\n[Persistence]\nPath = "{folder / "data"}"\n'
        f'[[ArchiveGroups]]\nName = "{GROUP}"\nFilter = "#"\nStore = "SQLITE"\n{more}'
    )
    return config


def command(config: Path, topic: str, *more: str) -> list[str]:
    """Return the command line of a rebuild."""
    return [sys.executable, "-m", "mqtt_trio", "rebuild", "--config", str(config), "--from", topic, *more]


def run_and_kill(config: Path, topic: str, history: Path, rows: int = 1) -> int:
    """Begin a rebuild and end it by SIGKILL once the history has more than `rows` rows; return how many it has."""
    process = subprocess.Popen(command(config, topic), stdout=subprocess.DEVNULL)

    def has_more() -> bool:
        assert process.poll() is None, "the rebuild ended before it was killed"
        return count_rows(history) > rows

    try:
        wait_until(has_more, f"more than {rows} rows in the history", KILL_LIMIT + rows / SLOWEST)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return count_rows(history)


def count_rows(history: Path) -> int:
    """Return how many messages a history holds; 0 where there is none yet."""
    if not history.exists():
        return 0
    with closing(sqlite3.connect(f"file:{history}?mode=ro", uri=True, timeout=10)) as db:
        try:
            return int(db.execute("SELECT count(*) FROM messages").fetchone()[0])
        except sqlite3.OperationalError:  # it has no tables yet
            return 0


def rows_of(history: Path) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a history in their order, without their numbers."""
    with closing(sqlite3.connect(history)) as db:
        yield from db.execute(f"SELECT {', '.join(COLUMNS)} FROM messages ORDER BY id")


def first_difference(one: Path, other: Path) -> str | None:
    """Compare two histories, row by row; None: they are equal."""
    for number, (ours, theirs) in enumerate(zip(rows_of(one), rows_of(other), strict=False)):
        if ours != theirs:
            return f"row {number}: {ours!r} and {theirs!r}"
    counts = count_rows(one), count_rows(other)
    return None if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} rows"


def last_values(history: Path) -> dict[str, bytes]:
    """Return the last payload of each topic."""
    with closing(sqlite3.connect(history)) as db:
        return dict(
            db.execute("SELECT topic, payload FROM messages WHERE id IN (SELECT max(id) FROM messages GROUP BY topic)")
        )


def retained_of(folder: Path) -> dict[str, tuple[bytes, str, int]]:
    """Return frame, client and publish time (milliseconds) of the retained messages in a session store."""
    store = SqliteStore(folder / FILE_NAME)
    try:
        state = store.load()
        assert state.marks == {}, "what a rebuild noted is left over"
        return {row[0]: (row[1], row[2], round(row[3] * 1000)) for row in state.retained}
    finally:
        store.close()


def environment() -> dict[str, str]:
    """Return the environment without settings of a broker."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("MQTT_TRIO__")}
