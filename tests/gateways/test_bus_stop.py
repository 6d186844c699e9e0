"""What a stop says of messages that no disk had room for [K22]."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.gateways.honest import KEPT
from tests.gateways.test_bus_outbox import SPOOL, leave_behind
from tests.gateways.whole_nodes import drain, open_cluster


async def test_what_a_full_spool_has_no_room_for_is_told_at_the_end(
    autojump_clock: MockClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = attrs.evolve(SPOOL, window_messages=100, spool_bytes=512 * 1024)
    async with open_cluster(settings, tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        await leave_behind(two, "kept", "t")
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        acknowledged = 0
        with trio.move_on_after(60):
            while True:
                await publisher.publish("t", b"%d" % acknowledged + bytes(1000), qos=1)
                acknowledged += 1
        with trio.move_on_after(10):
            await one.bus.stop()
        found = [re.search(r"stopped before Kafka confirmed (\d+) messages", text) for text in caplog.messages]
        told = sum(int(match[1]) for match in found if match is not None)
        assert 100 <= told < acknowledged
        assert one.memory.storage is not None
        await one.memory.storage.stop()
        await one.kill()
        cluster.kafka.come_back()
        await cluster.start("one")
        await trio.sleep(60)
        client = await two.connect("kept", **KEPT)
        got = [int(message.payload[:-1000]) for message in await drain(client)]
        assert got == list(range(acknowledged + 1 - told)), "the last one was taken and waited for its acknowledgement"
