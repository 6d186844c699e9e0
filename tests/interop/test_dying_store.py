"""The thread of the store dies or hangs in the middle of a commit, in a whole node."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import Publish
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

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("streams")]

SCRIPT = Path(__file__).with_name("dying_store.py")
DEATHS = ("MemoryError", "SystemExit", "ZeroDivisionError")
SHUTDOWN = 2.0
LIMIT = 60
QUICK = SHUTDOWN + 10.0
"""Seconds in which a node ends on a busy machine; a store that is waited for would hold it for ever."""


class DyingBroker(BrokerProcess):
    """A broker whose store's thread meets what `dies_of` says."""

    @property
    def flag(self) -> Path:
        return self.directory / "dies of"

    def command(self) -> Sequence[str]:
        python, _, _, *arguments = super().command()
        return [python, str(SCRIPT), *arguments]

    def dies_of(self, what: str) -> None:
        self.flag.write_text(what)

    def assert_clean_log(self) -> None:
        """It shows where it died; the test looks at that itself."""


@pytest.fixture
def dying(brokers: Brokers) -> DyingBroker:
    broker = DyingBroker(brokers.directory, config=f"[Shutdown]\nTimeout = {SHUTDOWN}\n", name="dying")
    broker.environment = {"DYING_STORE": str(broker.flag), "PYTHONPATH": ":".join(sys.path)}
    brokers.started.append(broker)
    broker.start()
    return broker


async def test_a_node_outlives_the_thread_of_its_store(brokers: Brokers, dying: DyingBroker) -> None:
    with trio.fail_after(LIMIT):
        await leave_session(dying, "once", "kept/1")
        await leave_session(dying, "exactly", "kept/2")
        first = Ledger(await connect(dying, "p1"), "kept/1", 1)
        second = Ledger(await connect(dying, "p2"), "kept/2", 2)
        for death in DEATHS:
            assert await first.publish()
            assert await second.publish()
            dying.dies_of(death)
            assert not await first.publish()
            assert not await second.publish()
            old = await connect(dying, f"old {death}", version=V311)
            with pytest.raises(ConnectionEndedError):
                await old.publish("kept/1", payload(0), qos=1)
            if death == DEATHS[0]:
                await assert_others_go_on(dying)
            dying.flag.unlink()
            await first.until_taken()
            await second.until_taken()
            line = rf"ERROR.*session store \(SQLite .*\) failed unexpectedly: {death}: planned; QoS 1 and 2"
            assert len(dying.output.matches(line)) == 1, dying.output.text
    assert len(dying.output.matches("takes messages again")) == len(DEATHS)
    assert dying.running
    dying.kill()
    again = brokers.make(name="again")
    again.data = dying.data
    again.start()
    with trio.fail_after(LIMIT):
        await assert_received(again, "once", first.acknowledged)
        await assert_received(again, "exactly", second.acknowledged)
    again.stop()


async def test_a_node_ends_though_its_store_hangs(brokers: Brokers, dying: DyingBroker) -> None:
    with trio.fail_after(LIMIT):
        await leave_session(dying, "once", "kept/1")
        first = Ledger(await connect(dying, "p1"), "kept/1", 1)
        assert await first.publish()
        dying.dies_of("hang")
        await first.client.send(Publish("kept/1", payload(1), QoS.AT_LEAST_ONCE, packet_id=99))
        plain = await connect(dying, "plain")
        await plain.subscribe("plain")
        assert await plain.publish("plain", b"x", qos=2) == 0, "what nobody keeps goes on"
        assert (await plain.next_message()).payload == b"x"
        assert await first.client.nothing_waits(), "nothing is acknowledged"
    dying.stop(QUICK)
    assert "shutdown took longer than [Shutdown] Timeout = 2 s; what was left is given up" in dying.output.text
    again = brokers.make(name="again")
    again.data = dying.data
    again.start()
    with trio.fail_after(LIMIT):
        await assert_received(again, "once", [0])
    again.stop()
