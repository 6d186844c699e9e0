"""A store without space takes what needs none: one outage, told once, with tries that become rare."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from mqtt_trio.broker.events import OutageBegan, OutageEnded
from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.errors import StoreError
from mqtt_trio.protocol.codes import ReasonCode
from mqtt_trio.server.storage import RETRY_LAST
from mqtt_trio.testing import open_memory_broker


class NoSpace(MemoryStore):
    """Refuses messages while it is full."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False

    def commit(self, batch: Batch) -> None:
        if self.full and batch.brings_messages:
            raise StoreError("planned: no space")
        super().commit(batch)


async def test_an_outage_is_one(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    store = NoSpace()
    async with open_memory_broker(store=store) as memory:
        kept = await memory.connect("kept", session_expiry_interval=3600)
        await kept.subscribe("kept/#", qos=1)
        await kept.disconnect()
        publisher = await memory.connect("p")
        store.full = True
        for number in range(100):
            code = await publisher.publish(f"kept/{number}", b"x", qos=1)
            assert code is ReasonCode.QUOTA_EXCEEDED
            late = await memory.connect(f"late-{number}", session_expiry_interval=3600)  # its row needs no space
            await late.disconnect()
            await trio.sleep(0.5)
        assert memory.broker.metrics.refused_by_store == 100
        assert 10 <= memory.broker.metrics.store_failures < 25, "once in RETRY_LAST seconds"
        store.full = False
        await trio.sleep(RETRY_LAST)
        assert await publisher.publish("kept/last", b"x", qos=1) is ReasonCode.SUCCESS
        outages = [event for event in memory.events if isinstance(event, OutageBegan | OutageEnded)]
        assert [type(event) for event in outages] == [OutageBegan, OutageEnded]
        assert isinstance(outages[1], OutageEnded)
        assert outages[1].duration == pytest.approx(50 + RETRY_LAST, abs=1)
        assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
        again = await memory.reconnect(kept)
        assert [message.topic_name for message in await again.waiting_messages()] == ["kept/last"]
