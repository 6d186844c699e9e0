"""A whole node on store files that it cannot or may not use: flipped bits, foreign and later files, other owners."""

from __future__ import annotations

import logging
import random
import re
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.server.sqlite_store import FILE_NAME, SqliteStore
from mqtt_trio.server.storage import Storage
from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.paho_support import V311, PahoClient
from tests.stores.large_store import Size, build
from tests.stores.sqlite_files import fill, put, set_aside
from tests.wire import V5, connect

pytestmark = pytest.mark.interop

SIZE = Size(sessions=200, queued=5, retained=500)
FLIPS = 200
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


async def start(path: Path) -> tuple[int, int, int]:
    """Load a store into a broker; return the sessions, queued and retained messages that it has then."""
    broker = Broker(Limits(), random_id=lambda: "x", wall_offset=1.9e9, journal=Journal())
    storage = Storage(broker, SqliteStore(path, synchronous="OFF"))
    await storage.load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.run)
        await storage.stop()
    metrics = broker.metrics
    return metrics.sessions, metrics.messages_queued, metrics.retained_messages


def test_a_flipped_bit_anywhere_costs_a_page_at_most_and_is_told(
    sound: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, chance = tmp_path / "data" / FILE_NAME, random.Random(51)
    noticed = 0
    for at in (chance.randrange(len(sound)) for _ in range(FLIPS)):
        put(path, flipped(sound, at, chance))
        caplog.clear()
        found = trio.run(start, path)
        aside = set_aside(path)
        errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert not [record for record in caplog.records if record.exc_info], f"flip at {at}: a traceback"
        if not aside:
            assert found == WHOLE, f"the flip at {at} lost something silently"
            assert not errors
            continue
        noticed += 1
        (error,) = errors
        text = error.getMessage()
        assert str(path) in text
        assert str(aside[0]) in text
        assert re.search(r"is unusable: \S.*\. It is kept as ", text), text
        if "has version" not in text:  # a later version's file is not read
            assert sum(found) > 0.7 * sum(WHOLE), f"the flip at {at} cost {WHOLE} but {found}: {text}"
    assert noticed > FLIPS / 3


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
