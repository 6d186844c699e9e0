"""`$SYS` topics: names, values, load averages, and that they stay on this node."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.sys_topics import PREFIX, LoadAverages, SysTopics
from mqtt_trio.broker.tap import Answer, FrameRun, TapRoute
from mqtt_trio.protocol.topics import is_system_topic


class WatchfulTap:
    """Wants every topic."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def route(self, topic_name: str) -> TapRoute:
        self.shown.append(topic_name)
        return self

    def take(self, message: Message) -> Answer:
        self.shown.append(message.topic_name)
        return None

    def take_run(self, run: FrameRun) -> Answer:
        self.shown.append(str(run))
        return None


@pytest.fixture
def broker() -> Broker:
    numbers = itertools.count()
    return Broker(Limits(), random_id=lambda: f"auto-{next(numbers)}", wall_offset=1000.0)


@pytest.fixture
def sys_topics(broker: Broker) -> SysTopics:
    return SysTopics(broker, version="mqtt_trio version 1.2.3", started_at=100.0)


def retained(broker: Broker) -> dict[str, str]:
    return {message.topic_name.removeprefix(PREFIX): message.payload.decode() for message in broker.retained}


def changed(broker: Broker, sys_topics: SysTopics, now: float) -> Iterator[str]:
    """Publish; yield the names that were."""
    sys_topics.publish(now)
    at = now + broker.wall_offset
    return (one.topic_name.removeprefix(PREFIX) for one in broker.retained if one.published_at == at)


def test_values(broker: Broker, sys_topics: SysTopics) -> None:
    metrics = broker.metrics
    metrics.sessions, metrics.clients_connected, metrics.sessions_expired = 7, 5, 2
    metrics.packets_received, metrics.packets_sent = 50, 30
    metrics.messages_received_qos0 = metrics.messages_received_qos1 = metrics.messages_received_qos2 = 10
    metrics.messages_sent_qos0, metrics.messages_sent_qos1, metrics.messages_sent_qos2 = 1, 2, 3
    metrics.dropped_outbox_full, metrics.dropped_queue_full, metrics.dropped_expired = 4, 5, 100
    metrics.bytes_received, metrics.bytes_sent = 1234, 5678
    metrics.subscriptions, metrics.shared_subscriptions, metrics.connections_opened = 9, 1, 12
    broker.retained.set(Message("a", b"12345"))
    assert (
        sys_topics.values(161.9).items()
        >= {
            "version": "mqtt_trio version 1.2.3",
            "uptime": "61 seconds",
            "clients/connected": "5",
            "clients/active": "5",
            "clients/disconnected": "2",
            "clients/inactive": "2",
            "clients/total": "7",
            "clients/maximum": "5",
            "clients/expired": "2",
            "connections/socket/count": "12",
            "messages/received": "50",
            "messages/sent": "36",
            "messages/stored": "1",
            "store/messages/count": "1",
            "store/messages/bytes": str(Message("a", b"12345").size),
            "retained messages/count": "1",
            "subscriptions/count": "9",
            "shared_subscriptions/count": "1",
            "publish/messages/received": "30",
            "publish/messages/sent": "6",
            "publish/messages/dropped": "9",
            "bytes/received": "1234",
            "bytes/sent": "5678",
        }.items()
    )


def test_the_most_clients_are_remembered(broker: Broker, sys_topics: SysTopics) -> None:
    for connected in (3, 8, 2):
        broker.metrics.clients_connected = connected
        values = sys_topics.values(200.0)
    assert (values["clients/connected"], values["clients/maximum"]) == ("2", "8")


def test_everything_is_retained_from_the_start(broker: Broker, sys_topics: SysTopics) -> None:
    sys_topics.publish(100.0)
    assert retained(broker).keys() == sys_topics.values(100.0).keys()
    assert all(message.retain and message.topic_name.startswith("$SYS/broker/") for message in broker.retained)
    assert retained(broker)["load/sockets/15min"] == "0.00"
    assert broker.metrics.retained_messages == len(broker.retained)


def test_only_what_changed_is_published(broker: Broker, sys_topics: SysTopics) -> None:
    sys_topics.publish(100.0)
    # The topics that were made at the first time are counted at the second one.
    stored = {"messages/stored", "store/messages/count", "store/messages/bytes", "retained messages/count"}
    assert set(changed(broker, sys_topics, 110.0)) == {"uptime", *stored}
    assert set(changed(broker, sys_topics, 120.0)) - {"store/messages/bytes"} == {"uptime"}
    broker.metrics.bytes_sent = 600
    loads = {f"load/bytes/sent/{minutes}min" for minutes in (1, 5, 15)}
    assert set(changed(broker, sys_topics, 130.0)) - {"store/messages/bytes"} == {"uptime", "bytes/sent", *loads}


def test_nobody_outside_sees_them(broker: Broker, sys_topics: SysTopics) -> None:
    tap = WatchfulTap()
    broker.add_tap(tap)
    sys_topics.publish(100.0)
    assert tap.shown == []
    broker.publish(Message("a"), 100.0, tapped=True)
    assert tap.shown == ["a", "a"]


def test_a_full_table_of_retained_messages_is_no_error() -> None:
    broker = Broker(Limits(retained_messages=3), random_id=str)
    sys_topics = SysTopics(broker, version="v", started_at=0.0)
    for now in (0.0, 10.0):
        sys_topics.publish(now)
    assert len(broker.retained) == 3
    assert broker.metrics.retained_refused == 0


def test_bytes_of_retained_messages_follow_every_change(broker: Broker) -> None:
    store = broker.retained
    store.set(Message("a", b"1"))
    store.set(Message("b", bytes(1000)))
    store.set(Message("b", bytes(10)))
    assert store.size == sum(message.size for message in store)
    store.set(Message("a", b""))
    assert store.size == Message("b", bytes(10)).size
    assert store.remove("b")
    assert not store.remove("b")
    assert store.size == 0


def test_load_averages_decay_as_in_mosquitto() -> None:
    loads = LoadAverages()
    loads.move_on({"x": 0}, 0.0)
    assert loads.values() == {"load/x/1min": "0.00", "load/x/5min": "0.00", "load/x/15min": "0.00"}
    loads.move_on({"x": 100}, 10.0)  # 600 a minute for 10 seconds
    for minutes in (1, 5, 15):
        expected = 600 - 600 * math.exp(-10 / (60 * minutes))
        assert loads.values()[f"load/x/{minutes}min"] == f"{expected:.2f}"
    loads.move_on({"x": 100}, 70.0)  # then a silent minute
    expected = (600 - 600 * math.exp(-10 / 60)) * math.exp(-1)
    assert loads.values()["load/x/1min"] == f"{expected:.2f}"


def test_a_steady_load_is_its_own_average() -> None:
    loads = LoadAverages()
    for second in range(0, 7200, 10):
        loads.move_on({"x": 5 * second}, float(second))
    assert loads.values() == {"load/x/1min": "300.00", "load/x/5min": "300.00", "load/x/15min": "299.90"}


def test_two_looks_at_one_instant_change_nothing() -> None:
    loads = LoadAverages()
    loads.move_on({"x": 0}, 5.0)
    loads.move_on({"x": 9}, 5.0)
    assert set(loads.values().values()) == {"0.00"}


@pytest.mark.parametrize(
    "topic_name, is_system", [("$SYS", True), ("$SYS/a", True), ("$SYSx", False), ("a/$SYS", False)]
)
def test_system_topics(topic_name: str, is_system: bool) -> None:
    assert is_system_topic(topic_name) is is_system
