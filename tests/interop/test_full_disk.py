"""A disk without space: who is told what, what goes on, and what is there behind a kill once there was space again."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from mqtt_trio.protocol.codes import QoS, ReasonCode
from mqtt_trio.protocol.packets import Publish, PubRec, PubRel
from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.kept_clients import (
    Ledger,
    assert_311_is_disconnected,
    assert_others_go_on,
    assert_received,
    connect,
    leave_session,
)

pytestmark = pytest.mark.interop

LIMIT = 60


class TinyDisk:
    """A file system of 8 MiB; full, when another file takes the rest of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
        subprocess.run(command, check=True, capture_output=True)

    def fill(self, broker: BrokerProcess) -> None:
        with (self.directory / "filler").open("ab", buffering=0) as file:
            for size in (65_536, 4096):
                try:
                    while file.write(b"\0" * size) == size:
                        pass
                except OSError:
                    pass

    def free(self, broker: BrokerProcess) -> None:
        (self.directory / "filler").unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.directory)], check=True, capture_output=True)


class Quota:
    """A limit on the size of the broker's files: what everybody may set."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def fill(self, broker: BrokerProcess) -> None:
        self._limit(broker, 65_536)

    def free(self, broker: BrokerProcess) -> None:
        self._limit(broker, resource.RLIM_INFINITY)

    def _limit(self, broker: BrokerProcess, size: int) -> None:
        pid = broker.output.process.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]))

    def close(self) -> None:
        """It ends with the process."""


@pytest.fixture(params=["disk", "quota"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TinyDisk | Quota]:
    """Where only root may mount, others get the quota twice."""
    made = TinyDisk(tmp_path / "disk") if request.param == "disk" and os.geteuid() == 0 else Quota(tmp_path / "disk")
    yield made
    made.close()


@pytest.mark.usefixtures("streams")
async def test_a_full_disk_is_told_and_survived(brokers: Brokers, disk: TinyDisk | Quota) -> None:
    broker = brokers.make(name="broker", config='[Logging.Loggers]\n"mqtt_trio.clients" = "DEBUG"\n')
    broker.data = disk.directory / "data"
    broker.start()
    with trio.fail_after(LIMIT):
        await leave_session(broker, "once", "kept/1")
        await leave_session(broker, "exactly", "kept/2")
        waiting = await connect(broker, "waiting", kept=True)
        await waiting.subscribe("flow")
        first = Ledger(await connect(broker, "p1"), "kept/1", 1)
        second = Ledger(await connect(broker, "p2"), "kept/2", 2)
        for _ in range(20):
            assert await first.publish()
            assert await second.publish()
        await first.client.publish("flow", b"flow", qos=2)
        message = await waiting.expect(Publish)
        assert message.qos is QoS.EXACTLY_ONCE

        disk.fill(broker)
        await first.until_refused()
        assert not await second.publish()
        assert await second.client.publish("kept/r", b"new", qos=1, retain=True) is ReasonCode.QUOTA_EXCEEDED
        await waiting.send(PubRec(message.packet_id or 0))
        await assert_others_go_on(broker)
        await assert_311_is_disconnected(broker)
        await first.until_refused()

        disk.free(broker)
        assert (await waiting.expect(PubRel)).packet_id == message.packet_id
        await first.until_taken()
        for _ in range(20):
            assert await first.publish()
            assert await second.publish()
    assert len(broker.output.matches(r"\bERROR\b")) == 1, broker.output.text
    assert len(broker.output.matches("refused until it takes them again")) == 1
    assert len(broker.output.matches("takes messages again")) == 1
    assert len(broker.output.matches("OutageBegan")) == len(broker.output.matches("OutageEnded")) == 1

    broker.kill()
    again = brokers.make(name="again")
    again.data = broker.data
    again.start()
    with trio.fail_after(LIMIT):
        await assert_received(again, "once", first.acknowledged)
        await assert_received(again, "exactly", second.acknowledged)
        await assert_received(again, "once", [])
        disk.fill(again)
        third = Ledger(await connect(again, "p3"), "kept/1", 1)
        await third.until_refused()
        disk.free(again)
        await third.until_taken()
    again.stop()
    counters = again.counters()
    assert counters["refused_by_store"] == len(third.refused)
    assert counters["store_failures"] >= 1
