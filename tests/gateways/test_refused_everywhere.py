"""What an archive group refuses, the subscribers of no node get [K10, K22]: groups are asked before the bus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.bus_settings import BusSettings
from mqtt_trio.archive.groups import ArchiveGroup, ArchiveGroupOptions
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import Publish, Will
from mqtt_trio.testing import ConnectionEndedError, TestClient
from tests.archive_support import FakeStore
from tests.gateways.whole_nodes import SOON, WholeCluster, WholeNode, drain, open_cluster

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
STRICT: dict[str, Any] = {"on_outage": "reject"}


async def archive(cluster: WholeCluster, node: WholeNode, name: str, **options: Any) -> tuple[FakeStore, ArchiveGroup]:
    """Give a node an archive group, as the app does: behind the bus."""
    store = FakeStore()
    group = ArchiveGroup(ArchiveGroupOptions(name=name, **options), store, node.memory.host)
    await cluster.nursery.start(group.run)
    node.memory.broker.add_tap(group)
    return store, group


async def refused(client: TestClient, topic: str, payload: bytes, qos: int, *, retain: bool = False) -> None:
    """Publish what the node does not take."""
    if client.connection.protocol_version == V5:
        assert await client.publish(topic, payload, qos=qos, retain=retain) is ReasonCode.QUOTA_EXCEEDED
        return
    await client.send(Publish(topic, payload, QoS(qos), retain, packet_id=1))
    with pytest.raises(ConnectionEndedError):
        await client.next_packet()


@pytest.mark.parametrize("ack", ["none", "store"])
@pytest.mark.parametrize("version", [V311, V5])
async def test_a_group_that_refuses_is_asked_before_the_bus(
    autojump_clock: MockClock, tmp_path: Path, version: ProtocolVersion, ack: str
) -> None:
    async with open_cluster(BusSettings(ack=ack, on_outage="spool"), tmp_path) as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        lenient, _ = await archive(cluster, one, "Lenient")
        store, group = await archive(cluster, one, "Strict", **STRICT)
        at_home, elsewhere = await one.connect("at home", "#"), await two.connect("elsewhere", "#")
        for qos in (1, 2):
            publisher = await one.connect("publisher", version=version)
            for number in range(3):  # the first one of a topic takes the full path, the others the fast lane
                await publisher.publish("t", b"%d" % number, qos=qos)
            store.go_away()
            await refused(publisher, "t", b"refused", qos)
            publisher = await one.connect("publisher", version=version)
            await refused(publisher, "t", b"refused", qos, retain=True)
            store.come_back()
            await trio.sleep(SOON)
            publisher = await one.connect("publisher", version=version)
            await publisher.publish("t", b"behind", qos=qos, retain=False)
        expected = [b"0", b"1", b"2", b"behind"]
        for client in (at_home, elsewhere):
            assert [message.payload for message in await drain(client)] == expected * 2
        lenient.finish_all()
        await trio.sleep(SOON)
        lenient.finish_all()
        assert b"refused" not in lenient.payloads, "nor has a group that would have taken it"
        assert group.rejected == 4
        assert cluster.kafka.records("mqtt.retained")[1:] == [], "beside how topics are spread"
        for node in (one, two):
            assert len(node.memory.broker.retained) == 0


async def test_what_the_bus_refuses_is_in_the_archive(autojump_clock: MockClock) -> None:
    """The other way round there is no way to take it back: the archive has it at least once."""
    async with open_cluster(BusSettings(on_outage="reject")) as cluster:
        one = await cluster.start("one")
        store, group = await archive(cluster, one, "Strict", **STRICT)
        at_home = await one.connect("at home", "#")
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        await refused(publisher, "t", b"1", 1)
        cluster.kafka.come_back()
        await publisher.publish("t", b"1", qos=1)
        await trio.sleep(SOON)
        store.finish_all()
        await trio.sleep(SOON)
        store.finish_all()
        assert [message.payload for message in await drain(at_home)] == [b"1"]
        assert store.payloads == [b"1", b"1"]
        assert group.rejected == 0


async def test_a_will_has_nobody_to_be_refused_to(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        store, group = await archive(cluster, one, "Strict", **STRICT)
        at_home, elsewhere = await one.connect("at home", "#"), await two.connect("elsewhere", "#")
        store.go_away()
        mortal = await one.connect("mortal", will=Will(topic_name="w", payload=b"gone", qos=QoS(1)))
        await mortal.cut()
        for client in (at_home, elsewhere):
            assert [message.payload for message in await drain(client)] == [b"gone"]
        assert group.rejected == 1
