"""A whole node on store files that it cannot or may not use: flipped bits, foreign and later files, other owners."""

from __future__ import annotations

import logging
import random
import re
import socket
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import pytest
import trio
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.session import NEVER
from mqtt_trio.server.sqlite_store import FILE_NAME, SqliteStore
from mqtt_trio.server.storage import Storage
from mqtt_trio.testing import open_memory_broker
from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.paho_support import V311, PahoClient
from tests.stores.large_store import Size, build, publish
from tests.stores.sqlite_files import file_and_log, fill, put, set_aside
from tests.wire import V5, connect

pytestmark = pytest.mark.interop

SIZE = Size(sessions=200, queued=5, retained=500)
FLIPS, LOG_FLIPS = 200, 50
COMMITS = 20
PROCESSES = 12
WHOLE = (SIZE.sessions, SIZE.messages, SIZE.retained)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a broker that had clients."""
    path = tmp_path_factory.mktemp("sound") / FILE_NAME
    trio.run(build, path, SIZE)
    return path.read_bytes()


def flipped(file: bytes, at: int, chance: random.Random) -> bytes:
    damaged = bytearray(file)
    damaged[at] ^= 1 << chance.randrange(8)
    return bytes(damaged)


Facts: TypeAlias = frozenset[tuple[str | bytes, ...]]
"""What clients could notice: sessions, subscriptions, queued and retained messages."""


async def start(path: Path) -> Facts:
    """Start as a node does, as far as the store goes, and stop in order; return what the broker had then."""
    broker = Broker(Limits(), random_id=lambda: "x", wall_offset=1.9e9, journal=Journal())
    storage = Storage(broker, SqliteStore(path, synchronous="OFF"))
    await storage.load()
    found = facts_of(broker)
    assert storage.describe().endswith(
        f"with {broker.metrics.sessions} sessions, {broker.metrics.messages_queued} queued and"
        f" {broker.metrics.retained_messages} retained messages"
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.run)
        await storage.stop()
    return found


async def killed_at_work(path: Path) -> tuple[bytes, bytes]:
    """Return file and log as a kill leaves them behind some more messages."""
    async with open_memory_broker(Limits(session_expiry_interval=NEVER), store=SqliteStore(path)) as memory:
        for turn in range(COMMITS):
            for number in range(10):
                publish(memory, f"site/{number}/orders", b"%d %d " % (number, SIZE.queued + turn), retain=False)
                publish(memory, f"late/{number}/{turn}", b"%d" % turn, retain=True)
            memory.broker.flush()
            await trio.testing.wait_all_tasks_blocked()
        return file_and_log(path)


def facts_of(broker: Broker) -> Facts:
    facts: set[tuple[str | bytes, ...]] = set()
    for message in broker.retained:
        facts.add(("retained", message.topic_name, message.payload))
    for client_id, session in broker.connections.sessions.items():
        facts.add(("session", client_id))
        facts |= {("subscription", client_id, topic_filter) for topic_filter in session.subscriptions}
        queued = [delivery.message for delivery in session.queue]
        facts |= {("queued", client_id, message.topic_name, message.payload) for message in queued}
        turns = [int(message.payload.split()[1]) for message in queued]
        assert turns == sorted(turns), f"{client_id}: {turns}"
    return frozenset(facts)


def told(caplog: pytest.LogCaptureFixture, path: Path) -> str | None:
    """Return the message that something was set aside, which names file, reason and copy; None when nothing was."""
    assert not [record for record in caplog.records if record.exc_info], "a traceback"
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    aside = set_aside(path)
    if not aside:
        assert errors == []
        return None
    (error,) = errors
    assert re.match(rf"session store {re.escape(str(path))} is unusable: \S.*\. It is kept as ", error), error
    assert f"It is kept as {aside[0]}." in error
    return error


def test_a_flipped_bit_anywhere_costs_a_page_at_most_and_is_told(
    sound: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, chance = tmp_path / "data" / FILE_NAME, random.Random(51)
    put(path, sound)
    whole = trio.run(start, path)
    assert Counter(kind for kind, *_ in whole) == {
        "session": SIZE.sessions,
        "subscription": SIZE.sessions,
        "queued": SIZE.messages,
        "retained": SIZE.retained,
    }
    noticed = 0
    for at in (chance.randrange(len(sound)) for _ in range(FLIPS)):
        damaged = flipped(sound, at, chance)
        put(path, damaged)
        caplog.clear()
        found = trio.run(start, path)
        error = told(caplog, path)
        if error is None:
            assert found == whole, f"the flip at {at} changed something and nobody was told: {found ^ whole}"
            continue
        noticed += 1
        assert set_aside(path)[0].read_bytes() == damaged, "it is kept as it was"
        assert found <= whole, f"the flip at {at} made something: {found - whole}"
        if "has version" not in error:  # a later version's file is not read
            assert len(found) > 0.7 * len(whole), f"the flip at {at} left {len(found)} of {len(whole)}: {error}"
        if noticed % 10 == 0:
            caplog.clear()
            assert trio.run(start, path) == found, "the next start finds the same"
            assert caplog.records == []
    assert noticed > FLIPS / 3


def test_a_flipped_bit_in_the_log_of_a_killed_broker_is_told(
    sound: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The start behind a kill: what came last stands in the log alone."""
    path, chance = tmp_path / "data" / FILE_NAME, random.Random(52)
    put(path, sound)
    before = trio.run(start, path)
    put(path, sound)
    file, log = trio.run(killed_at_work, path)
    put(path, file, log)
    whole = trio.run(start, path)
    assert len(whole - before) == 2 * COMMITS * 10
    assert told(caplog, path) is None
    lost = 0
    for at in (chance.randrange(len(log)) for _ in range(LOG_FLIPS)):
        put(path, file, flipped(log, at, chance))
        caplog.clear()
        found = trio.run(start, path)
        if told(caplog, path) is None:
            assert found == whole, f"the flip at {at} changed something and nobody was told"
        else:
            assert before <= found <= whole
        lost += found != whole
    assert lost > LOG_FLIPS / 3


def data_with(brokers: Brokers, file: bytes, name: str = "broker") -> BrokerProcess:
    broker = brokers.make(name=name)
    put(broker.data / FILE_NAME, file)
    return broker


def assert_serves(broker: BrokerProcess) -> None:
    with socket.create_connection(("127.0.0.1", broker.port), timeout=10) as client:
        client.sendall(connect(V5))
        assert client.recv(4)[0] == 0x20


@pytest.mark.parametrize("number", range(PROCESSES))
def test_a_process_serves_on_a_file_with_a_flipped_bit(sound: bytes, brokers: Brokers, number: int) -> None:
    chance = random.Random(number)
    at = chance.randrange(4096) if number < 4 else chance.randrange(len(sound))
    broker = data_with(brokers, flipped(sound, at, chance)).start()
    assert_serves(broker)
    path = broker.data / FILE_NAME
    errors = broker.output.matches(r"\bERROR\b")
    if set_aside(path):
        (error,) = errors
        assert f"session store {path} is unusable: " in error.string
    else:
        assert errors == []
        assert f"{WHOLE[0]} sessions, {WHOLE[1]} queued and {WHOLE[2]} retained messages" in broker.output.text
    broker.stop()  # exit code 0, no traceback


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE recipes (name)")
        db.commit()


def later(path: Path) -> None:
    fill(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize("make, reason", [(foreign, "another program's database"), (later, "it has version 99")])
def test_a_foreign_or_later_file_is_set_aside(brokers: Brokers, make: Callable[[Path], None], reason: str) -> None:
    broker = brokers.make(name="broker")
    path = broker.data / FILE_NAME
    path.parent.mkdir(parents=True)
    make(path)
    broker.start()
    assert_serves(broker)
    (error,) = broker.output.matches(r"\bERROR\b")
    assert f"session store {path} is unusable: " in error.string
    assert reason in error.string
    assert len(set_aside(path)) == 1
    broker.stop()


def refusal(broker: BrokerProcess) -> str:
    """Launch a broker that cannot start: exit code 1 and one line; return that."""
    broker.launch()
    assert broker.wait_for_exit() == 1
    broker.assert_clean_log()
    (line,) = broker.output.lines
    assert line.startswith("mqtt-trio: session store ")
    return line


def test_a_file_that_another_broker_has_is_refused(brokers: Brokers) -> None:
    first = brokers.start(name="first")
    second = brokers.make(name="second")
    second.data = first.data
    line = refusal(second)
    assert str(first.data / FILE_NAME) in line
    assert f"in use by process {first.output.process.pid}" in line
    assert_serves(first)


def test_a_directory_that_cannot_be_written_is_refused(brokers: Brokers) -> None:
    broker = brokers.make(name="broker")
    (broker.directory / "file").write_text("no directory")
    broker.data = broker.directory / "file" / "data"
    line = refusal(broker)
    assert str(broker.data / FILE_NAME) in line
    assert "--data" in line


def test_what_was_kept_of_a_damaged_file_is_delivered(sound: bytes, brokers: Brokers) -> None:
    # One message, also where a page that is in use no more has a copy of it.
    damaged = re.sub(rb"(?s)(site/4/orders.{0,4}4 )0( \.)", rb"\g<1>9\g<2>", sound)
    assert damaged != sound
    broker = data_with(brokers, damaged).start()
    (error,) = broker.output.matches(r"\bERROR\b")
    assert "1 of deliveries are damaged" in error.string
    with PahoClient(broker, version=V311, client_id="device-4", clean=False) as client:
        turns = {message.payload.split()[1] for message in client.received(SIZE.queued - 1)}
    assert len(turns) == SIZE.queued - 1
    broker.stop()
