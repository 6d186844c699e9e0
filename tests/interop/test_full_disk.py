"""A disk without space: who is told what, what goes on, and what is there behind a kill once there was space again."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import ConnAck, Connect, Publish, PubRec, PubRel
from mqtt_trio.testing import ConnectionEndedError, TestClient
from tests.interop.broker_process import BrokerProcess, Brokers

pytestmark = pytest.mark.interop

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
LIMIT = 60
PADDING = b"." * 3000
KEPT = 3600
"""Session Expiry Interval."""
MESSAGES = 3000
"""More of them than the space that is left can take."""


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


@pytest.fixture
async def streams() -> AsyncIterator[list[trio.SocketStream]]:
    """Connections of the test, closed behind it."""
    STREAMS.clear()
    yield STREAMS
    for stream in STREAMS:
        stream.socket.close()


STREAMS: list[trio.SocketStream] = []


async def connect(
    broker: BrokerProcess, client_id: str, *, version: ProtocolVersion = V5, kept: bool = False
) -> TestClient:
    STREAMS.append(await trio.open_tcp_stream("127.0.0.1", broker.port))
    client = TestClient(STREAMS[-1], version)
    client.patience = 20
    v5 = version is V5
    await client.send(
        Connect(
            client_id=client_id,
            protocol_version=version,
            clean_start=not kept,
            session_expiry_interval=KEPT if kept and v5 else None,
        )
    )
    client.connack = await client.expect(ConnAck)
    return client


async def leave_session(broker: BrokerProcess, client_id: str, topic_filter: str) -> None:
    client = await connect(broker, client_id, kept=True)
    await client.subscribe(topic_filter)
    await client.disconnect()


def payload(number: int) -> bytes:
    return b"%d " % number + PADDING


class Ledger:
    """What one publisher was told about its messages."""

    def __init__(self, client: TestClient, topic_name: str, qos: int) -> None:
        self.client = client
        self.topic_name = topic_name
        self.qos = qos
        self.acknowledged: list[int] = []
        self.refused: list[int] = []

    async def publish(self, *, retain: bool = False) -> bool:
        """Publish the next message; say whether it was taken."""
        number = len(self.acknowledged) + len(self.refused)
        code = await self.client.publish(self.topic_name, payload(number), qos=self.qos, retain=retain)
        if code < 0x80:
            self.acknowledged.append(number)
            return True
        assert code is ReasonCode.QUOTA_EXCEEDED
        self.refused.append(number)
        return False

    async def until_refused(self) -> None:
        for _ in range(MESSAGES):
            if not await self.publish():
                return
        pytest.fail(f"{MESSAGES} messages fit a full disk")

    async def until_taken(self) -> None:
        """Publish until a message is taken; the store looks again after five seconds at the latest."""
        while not await self.publish():
            await self.client.ping()
            await trio.sleep(0.05)


async def assert_others_go_on(broker: BrokerProcess) -> None:
    """What nobody has to keep goes on as ever, new clients included."""
    reader = await connect(broker, "reader")
    await reader.subscribe("plain/#")
    sender = await connect(broker, "sender")
    for qos in (0, 1, 2):
        assert await sender.publish("plain/news", b"%d" % qos, qos=qos) is ReasonCode.SUCCESS
        assert (await reader.next_message()).payload == b"%d" % qos
    late = await connect(broker, "late", kept=True)
    assert await late.subscribe("plain/#") == (ReasonCode.GRANTED_QOS_2,)
    assert await sender.publish("plain/live", b"live") is ReasonCode.SUCCESS
    assert (await late.next_message()).payload == b"live"
    await late.disconnect()


async def assert_311_is_disconnected(broker: BrokerProcess) -> None:
    old = await connect(broker, "old", version=V311)
    with pytest.raises(ConnectionEndedError):
        await old.publish("kept/old", payload(0), qos=1, retain=True)


async def assert_received(broker: BrokerProcess, client_id: str, numbers: list[int]) -> None:
    """Resume a session: it gets these messages, in this order, and nothing else."""
    client = await connect(broker, client_id, kept=True)
    assert client.connack is not None
    assert client.connack.session_present
    found = [int(message.payload.split()[0]) for message in await client.next_messages(len(numbers))]
    assert found == numbers
    assert await client.nothing_waits()
    await client.disconnect()


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
