"""What a full spool or a full window of the bus does to messages at QoS 1, in an outage and at a stop [K18, K22]."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import attrs
import pytest
import trio
from trio.testing import MockClock

from mqtt_trio.archive.spool import Spool
from tests.gateways.honest import KEPT
from tests.gateways.test_bus_outbox import SPOOL, leave_behind
from tests.gateways.whole_nodes import drain, open_cluster


@pytest.mark.parametrize("ack", ["none", "store"])
@pytest.mark.parametrize("takes_all", [True, False], ids=["disk has room", "disk has none"])
async def test_a_stop_brings_to_the_disk_what_a_full_spool_had_no_room_for(
    ack: Literal["none", "store"],
    takes_all: bool,
    autojump_clock: MockClock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not takes_all:
        monkeypatch.setattr(Spool, "take_all", lambda spool: None)
    settings = attrs.evolve(SPOOL, ack=ack, window_messages=100, spool_bytes=512 * 1024)
    async with open_cluster(settings, tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        await leave_behind(two, "kept", "t")
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        acknowledged = 0
        with trio.move_on_after(20):
            while True:
                await publisher.publish("t", b"%d" % acknowledged + bytes(1000), qos=1)
                acknowledged += 1
        assert acknowledged > 400, "as many as the spool takes, at least"
        began = trio.current_time()
        with trio.move_on_after(10):
            await one.bus.stop()
        found = [re.search(r"stopped before Kafka confirmed (\d+) messages", text) for text in caplog.messages]
        told = sum(int(match[1]) for match in found if match is not None)
        if takes_all:
            assert trio.current_time() - began < 3
            assert told == 0
        elif ack == "none":
            assert 100 <= told < acknowledged
        assert one.memory.storage is not None
        await one.memory.storage.stop()
        await one.kill()
        cluster.kafka.come_back()
        await cluster.start("one")
        await trio.sleep(60)
        client = await two.connect("kept", **KEPT)
        got = [int(message.payload[:-1000]) for message in await drain(client)]
        assert got[: acknowledged - told] == list(range(acknowledged - told))


async def test_qos_0_that_waits_for_kafka_holds_nobody_up_at_qos_1(autojump_clock: MockClock, tmp_path: Path) -> None:
    settings = attrs.evolve(SPOOL, ack="none", window_messages=100)
    async with open_cluster(settings, tmp_path) as cluster:
        one = await cluster.start("one")
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        for _ in range(300):
            await publisher.publish("flood", b"?")
        with trio.fail_after(5):
            for number in range(500):
                await publisher.publish("t", b"%d" % number, qos=1)
        await trio.sleep(1)
        counters = one.bus.counters()
        assert counters["bus_messages_dropped"] == 300 - one.bus.window_qos0.messages > 150
        assert counters["bus_spool_messages"] == 500
        assert counters["bus_publishers_stopped"] == 0
