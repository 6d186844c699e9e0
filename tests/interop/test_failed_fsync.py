"""A disk that fails to sync, for real: fsync of a running broker says EIO while a file is there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio

from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import Publish, PubRec, PubRel
from mqtt_trio.testing import ConnectionEndedError
from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.kept_clients import (
    V311,
    Ledger,
    assert_others_go_on,
    assert_received,
    connect,
    leave_session,
    payload,
)
from tests.lines import require_tool

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("streams")]

SOURCE = Path(__file__).with_name("failing_sync.c")
CONFIG = '[Persistence]\nSynchronous = "FULL"\n'
LIMIT = 60
END = -1
"""Number of the message that is published last."""


class Sync:
    """Whether fsync works in the brokers that were started with it."""

    def __init__(self, directory: Path) -> None:
        self.flag = directory / "no fsync"
        self.library = directory / "failing_sync.so"
        command = [require_tool("cc"), "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", str(self.library), str(SOURCE), "-ldl"], check=True, timeout=LIMIT)

    def preload(self, broker: BrokerProcess) -> BrokerProcess:
        broker.environment = {"LD_PRELOAD": str(self.library), "FAILING_SYNC": str(self.flag)}
        return broker

    def fail(self, suffix: str = "") -> None:
        """From now on it fails for files whose path ends like this."""
        self.flag.write_text(suffix)

    def mend(self) -> None:
        self.flag.unlink()


@pytest.fixture
def sync(tmp_path: Path) -> Sync:
    return Sync(tmp_path)


def broker_with(brokers: Brokers, sync: Sync, *, name: str, like: BrokerProcess | None = None) -> BrokerProcess:
    broker = sync.preload(brokers.make(CONFIG, name=name))
    if like is not None:
        broker.data = like.data
    return broker


async def numbers_for(broker: BrokerProcess, client_id: str, topic_name: str, qos: int) -> list[int]:
    """Resume a session and return the numbers of all that it is owed."""
    sender = await connect(broker, f"sender for {client_id}")
    assert await sender.publish(topic_name, payload(END), qos=qos) < 0x80
    client = await connect(broker, client_id, kept=True)
    assert client.connack is not None
    assert client.connack.session_present
    found: list[int] = []
    while not found or found[-1] != END:
        found.append(int((await client.next_message()).payload.split()[0]))
    return found[:-1]


async def test_a_failed_fsync_is_told_and_survived(brokers: Brokers, sync: Sync) -> None:
    broker = broker_with(brokers, sync, name="broker").start()
    with trio.fail_after(LIMIT):
        await leave_session(broker, "once", "kept/1")
        await leave_session(broker, "exactly", "kept/2")
        await leave_session(broker, "old reader", "kept/old/+")
        waiting = await connect(broker, "waiting", kept=True)
        await waiting.subscribe("flow")
        first = Ledger(await connect(broker, "p1"), "kept/1", 1)
        second = Ledger(await connect(broker, "p2"), "kept/2", 2)
        old = [await connect(broker, f"old {qos}", version=V311) for qos in (1, 2)]
        for _ in range(10):
            assert await first.publish()
            assert await second.publish()
        await first.client.publish("flow", b"flow", qos=2)
        message = await waiting.expect(Publish)
        assert message.qos is QoS.EXACTLY_ONCE

        sync.fail()
        assert not await first.publish()
        assert not await second.publish()
        for qos, client in enumerate(old, 1):
            with pytest.raises(ConnectionEndedError):
                await client.publish(f"kept/old/{qos}", payload(0), qos=qos)
        await waiting.send(PubRec(message.packet_id or 0))
        await assert_others_go_on(broker)
        assert not await first.publish()

        sync.mend()
        assert (await waiting.expect(PubRel)).packet_id == message.packet_id
        await first.until_taken()
        await second.until_taken()
        for qos in (1, 2):
            client = await connect(broker, f"old {qos}", version=V311)
            assert await client.publish(f"kept/old/{qos}", payload(0), qos=qos) == 0
    assert len(broker.output.matches(r"\bERROR\b")) == 1, broker.output.text
    assert len(broker.output.matches("the disk or file system fails.*refused until it takes them again")) == 1
    assert len(broker.output.matches("takes messages again")) == 1

    broker.kill()
    again = broker_with(brokers, sync, name="again", like=broker).start()
    with trio.fail_after(LIMIT):
        await assert_received(again, "once", first.acknowledged)
        await assert_received(again, "exactly", second.acknowledged)
        await assert_received(again, "old reader", [0, 0])
    again.stop()


async def test_killed_while_fsync_fails_it_has_what_was_acknowledged(brokers: Brokers, sync: Sync) -> None:
    broker = broker_with(brokers, sync, name="broker").start()
    with trio.fail_after(LIMIT):
        await leave_session(broker, "once", "kept/1")
        await leave_session(broker, "exactly", "kept/2")
        first = Ledger(await connect(broker, "p1"), "kept/1", 1)
        second = Ledger(await connect(broker, "p2"), "kept/2", 2)
        for _ in range(10):
            assert await first.publish()
            assert await second.publish()
        sync.fail()
        for _ in range(3):
            assert not await first.publish()
            assert not await second.publish()
    broker.kill()

    refused = broker_with(brokers, sync, name="refused", like=broker)
    refused.launch()
    assert refused.wait_for_exit() == 1
    (line,) = refused.output.lines
    assert str(broker.data) in line
    assert "the disk or file system fails" in line

    sync.mend()
    again = broker_with(brokers, sync, name="again", like=broker).start()
    assert again.output.matches(r"\b(ERROR|corrupt)\b") == [], "nothing is wrong with the file"
    with trio.fail_after(LIMIT):
        for client_id, ledger in (("once", first), ("exactly", second)):
            found = await numbers_for(again, client_id, ledger.topic_name, ledger.qos)
            assert found[:10] == ledger.acknowledged
            # A disk that reports an error may have written all the same: docs/reliability.md, "When the store fails".
            assert found[10:] in ([], *([number] for number in ledger.refused))
    again.stop()


def log_size(broker: BrokerProcess) -> int:
    return (broker.data / "sessions.sqlite3-wal").stat().st_size


async def test_a_fold_that_cannot_be_synced_costs_nothing(brokers: Brokers, sync: Sync) -> None:
    """The log takes commits while the file itself fails, and keeps them over a kill."""
    broker = broker_with(brokers, sync, name="broker").start()
    size = 100_000
    with trio.fail_after(LIMIT):
        await leave_session(broker, "once", "kept/1")
        publisher = await connect(broker, "p")
        sync.fail("sessions.sqlite3")
        for number in range(60):
            assert await publisher.publish("kept/1", b"%d " % number + b"." * size, qos=1) == 0
    assert log_size(broker) > 5 * 2**20, "it could not be folded into the file at 4 MiB"
    broker.kill()
    sync.mend()
    again = broker_with(brokers, sync, name="again", like=broker).start()
    with trio.fail_after(LIMIT):
        await assert_received(again, "once", list(range(60)))
    again.stop()
