"""The time and the memory that a broker needs to start on a full store."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.interop.broker_process import BrokerProcess, brokers_in
from tests.interop.paho_support import V311, PahoClient
from tests.stores.large_store import Size, build

pytestmark = pytest.mark.interop

SIZE = Size()
START_LIMIT = 5.0
"""Seconds of CPU, which other programs on the machine do not change: on two quiet cores the clock says the same."""
MEMORY_LIMIT = 600
"""MiB."""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """A broker that is not started, on a store of SIZE."""
    with brokers_in(tmp_path_factory.mktemp("startup")) as made:
        broker = made.make(name="full")
        trio.run(build, broker.data / "sessions.sqlite3", SIZE)
        yield broker


def test_a_full_store_is_there_within_five_seconds(full: BrokerProcess) -> None:
    begin = time.monotonic()
    full.start(limit=60)
    seconds, cpu, memory = time.monotonic() - begin, cpu_seconds(full.output.process.pid), full.rss_mib
    what = f"{SIZE.sessions} sessions, {SIZE.messages} queued and {SIZE.retained} retained messages"
    print(f"start with {what}: {seconds:.2f} s, {cpu:.2f} s of CPU, {memory:.0f} MiB")
    assert what in full.output.text
    assert cpu < START_LIMIT
    assert memory < MEMORY_LIMIT
    with PahoClient(full, version=V311, client_id="device-4200", clean=False) as client:
        assert client.flags is not None
        assert client.flags.session_present
        received = client.received(SIZE.queued)
        assert [message.payload.split()[:2] for message in received] == [
            [b"4200", b"%d" % turn] for turn in range(SIZE.queued)
        ]
    with PahoClient(full) as client:
        client.subscribe("plant/7/line/+/temperature")
        assert len({message.topic for message in client.received(SIZE.retained // 100)}) == SIZE.retained // 100
