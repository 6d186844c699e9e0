"""`$SYS` topics as clients see them, on a fake clock."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from mqtt_trio.broker.sys_topics import SysTopics
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import ConnAck, Connect, Will
from mqtt_trio.server.timers import SysTopicsTimer
from mqtt_trio.testing import MemoryBroker, TestClient

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


@pytest.fixture
async def served(memory_broker: MemoryBroker) -> MemoryBroker:
    """A broker that publishes `$SYS` every 10 seconds, the first time now."""
    sys_topics = SysTopics(memory_broker.broker, version="v", started_at=trio.current_time())
    memory_broker.nursery.start_soon(SysTopicsTimer(sys_topics, 10.0).run)
    await trio.testing.wait_all_tasks_blocked()
    return memory_broker


async def collect(client: TestClient) -> dict[str, str]:
    """Return what has come so far."""
    await client.nothing_waits()
    found = {}
    while client.waiting:
        message = await client.next_message()
        found[message.topic_name] = message.payload.decode()
    return found


async def test_a_subscriber_gets_all_values_at_once(served: MemoryBroker, autojump_clock: MockClock) -> None:
    client = await served.connect("c")
    await client.subscribe("$SYS/#", qos=0)
    values = await collect(client)
    assert len(values) > 45
    assert values["$SYS/broker/version"] == "v"
    assert values["$SYS/broker/clients/connected"] == "0"  # as they were at the last look


@pytest.mark.parametrize("version", [V311, V5])
async def test_changes_come_at_the_interval(
    served: MemoryBroker, autojump_clock: MockClock, version: ProtocolVersion
) -> None:
    client = await served.connect("c", version=version)
    await client.subscribe("$SYS/broker/uptime", "$SYS/broker/clients/+", qos=2)
    await collect(client)
    start = trio.current_time()
    assert (await client.next_message()).topic_name == "$SYS/broker/clients/connected"
    assert trio.current_time() - start == 10.0
    changes = await collect(client)
    assert changes["$SYS/broker/uptime"] == "10 seconds"
    assert changes["$SYS/broker/clients/maximum"] == "1"
    assert "$SYS/broker/clients/expired" not in changes
    await trio.sleep(10)
    assert await collect(client) == {"$SYS/broker/uptime": "20 seconds"}
    await trio.sleep(10)
    message = await client.next_message()
    assert (message.payload, message.qos, message.retain) == (b"30 seconds", 2, False)


@pytest.mark.spec("MQTT5-4.7.2-1", "MQTT3-4.7.2-1")
@pytest.mark.parametrize("topic_filter", ["#", "+/#", "+/broker/uptime", "+/broker/#"])
async def test_a_wildcard_in_front_does_not_match(
    served: MemoryBroker, autojump_clock: MockClock, topic_filter: str
) -> None:
    client = await served.connect("c")
    await client.subscribe(topic_filter)
    await trio.sleep(25)
    assert await client.nothing_waits()


@pytest.mark.parametrize("topic_name", ["$SYS/broker/uptime", "$SYS/mine", "$SYS"])
@pytest.mark.parametrize("retain", [False, True])
async def test_clients_may_not_publish_there(
    served: MemoryBroker, autojump_clock: MockClock, topic_name: str, retain: bool
) -> None:
    """As in mosquitto: 5.0 gets Not authorized, 3.x the acknowledgement that is all it has; nobody gets the message."""
    watcher = await served.connect("watcher")
    await watcher.subscribe("$SYS/#", "$SYS", qos=0)
    await collect(watcher)
    before = served.broker.retained.get(topic_name)
    for version, code in ((V5, ReasonCode.NOT_AUTHORIZED), (V311, ReasonCode.SUCCESS)):
        client = await served.connect(f"c{version}", version=version)
        for qos in (0, 1, 2):
            expected = code if qos else ReasonCode.SUCCESS
            assert await client.publish(topic_name, b"mine", qos=qos, retain=retain) == expected
        assert await client.nothing_waits()
    assert await watcher.nothing_waits()
    assert served.broker.retained.get(topic_name) is before
    assert served.broker.metrics.dropped_not_authorized == 6


async def test_a_will_may_not_go_there(served: MemoryBroker, autojump_clock: MockClock) -> None:
    client = TestClient(await served.open_stream(), V5)
    await client.send(Connect(client_id="c", will=Will(topic_name="$SYS/mine"), protocol_version=V5))
    assert (await client.expect(ConnAck)).reason_code == ReasonCode.NOT_AUTHORIZED


async def test_an_error_does_not_end_the_node(
    memory_broker: MemoryBroker, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys_topics = SysTopics(memory_broker.broker, version="v", started_at=0.0)
    calls: list[float] = []

    def broken(now: float) -> None:
        calls.append(now)
        raise ValueError("broken")

    monkeypatch.setattr(sys_topics, "publish", broken)
    memory_broker.nursery.start_soon(SysTopicsTimer(sys_topics, 2.5).run)
    await trio.sleep(6)
    assert calls == [0.0, 2.5, 5.0]
    assert memory_broker.broker.metrics.client_failures == 3
