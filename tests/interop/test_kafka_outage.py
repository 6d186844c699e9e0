"""Kafka dies under load and comes back: nothing acknowledged is lost, what is lost is counted [K1, S2]."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Final

import attrs
import pytest

from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.cluster import Cluster, read_topic, warnings_of
from tests.interop.load import NumberedPublisher, number_of
from tests.interop.mosquitto import END
from tests.interop.paho_support import V311, Heard, PahoClient
from tests.kafka_support import KafkaNode
from tests.lines import wait_until

pytestmark = [pytest.mark.interop, pytest.mark.kafka, pytest.mark.timeout(300)]

WARM_UP: Final = 500
"""Messages of a publisher before Kafka dies, and again after it is back."""
RECOVERY_LIMIT: Final = 60.0
"""Seconds from the start of Kafka until every publisher is served again: the client's back-off is part of it."""
ARCHIVE_TOPIC: Final = "mqtt.load"
GROUP: Final = f"""
[Limits]
QueueMessages = 500_000
[[ArchiveGroups]]
Name = "Load"
Filter = "load/#"
Store = "KAFKA"
KafkaTopic = "{ARCHIVE_TOPIC}"
"""
SMALL_GROUP: Final = GROUP + "WindowMessages = 1500\n"
SMALL_BUS: Final = "WindowMessages = 1000\n"
RSS_LIMIT: Final = 320
"""MiB of a node whose windows are full (bus 32 MiB, archive 64 + 32 MiB, twice that in the worst case)."""
FLOOD: Final = 1_000_000
"""QoS 0 messages that meet a dead Kafka."""
TIMEOUT: Final = 5
"""[Shutdown] Timeout of the nodes that end while Kafka is dead, in seconds."""


class Watch(threading.Thread):
    """Notes the largest resident memory of each of some nodes."""

    def __init__(self, *nodes: BrokerProcess) -> None:
        super().__init__(name="memory watch")
        self.largest = dict.fromkeys(nodes, 0.0)
        self._end = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._end.wait(0.25):
            for node, largest in self.largest.items():
                self.largest[node] = max(largest, node.rss_mib)

    def end(self) -> None:
        """Stop."""
        self._end.set()
        self.join()

    def check(self) -> None:
        """Stop; no node may have had more than RSS_LIMIT."""
        self.end()
        for node, largest in self.largest.items():
            print(f"{node.name}: largest resident memory {largest:.0f} MiB")
        assert max(self.largest.values()) < RSS_LIMIT


@attrs.define
class Scene:
    """Two nodes on one Kafka, subscribers on both, a publisher for each QoS on the first."""

    a: BrokerProcess
    b: BrokerProcess
    near: PahoClient
    far: PahoClient
    publishers: list[NumberedPublisher]

    def published(self) -> dict[str, list[int]]:
        """Return what was published, per topic."""
        return {publisher.topic: list(range(publisher.published)) for publisher in self.publishers}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opens, before the nodes end."""
    with ExitStack() as opened:
        yield opened


def open_scene(brokers: Brokers, stack: ExitStack, config: str) -> Scene:
    """Start everything."""
    a, b = brokers.start(config, name="node-a"), brokers.start(config, name="node-b")
    near, far = (stack.enter_context(PahoClient(node, transport="websockets")) for node in (a, b))
    for client in (near, far):
        client.subscribe("load/#")
    publishers = []
    for qos in (0, 1, 2):
        for number in (1, 2):
            publishers.append(NumberedPublisher(a, f"load/qos{qos}/{number}", qos))
            stack.callback(publishers[-1].close)
    return Scene(a, b, near, far, publishers)


def archived(kafka: KafkaNode) -> dict[str, list[int]]:
    """Return the numbers in the archive topic per MQTT topic, in order."""
    found: dict[str, list[int]] = {}
    for record in read_topic(kafka, ARCHIVE_TOPIC):
        value = json.loads(record.value)
        if value["payload"] != END:
            found.setdefault(value["topic"], []).append(number_of(value["payload"].encode()))
    return found


def check(wanted: dict[str, list[int]], got: dict[str, list[int]], dropped_qos0: int, where: str) -> None:
    """QoS 1 and 2: everything once and in order. QoS 0: in order, and what is missing is what was counted."""
    missing = 0
    for topic, numbers in wanted.items():
        heard = got.get(topic, [])
        if "qos0" in topic:
            assert heard == sorted(set(heard)), f"{topic} at {where}: not in order, or twice"
            missing += len(numbers) - len(heard)
        else:
            assert heard == numbers, f"{topic} at {where}: {difference(numbers, heard)}"
    assert missing == dropped_qos0, f"QoS 0 at {where}: {missing} are missing, {dropped_qos0} counted"


def difference(wanted: list[int], got: list[int]) -> str:
    """Say how two lists of numbers differ, shortly."""
    counts = Counter(got)
    lost = sorted(set(wanted) - set(counts))
    twice = sorted(number for number, count in counts.items() if count > 1)
    order = "in order" if got == sorted(got) else "out of order"
    return f"{len(wanted)} published, {len(got)} arrived {order}, lost {lost[:20]}, twice {twice[:20]}"


def assert_told_once(node: BrokerProcess) -> None:
    """The log says once that Kafka is away and once that it is back."""
    told = warnings_of(node)
    for fact in (r"Kafka at \S+ is away for ", r"Kafka at \S+ is back$"):
        assert len([line for line in told if re.search(fact, line)]) == 1, told


def end_marks(scene: Scene) -> None:
    """Publish the mark behind everything, on every topic: it comes last in each."""
    with PahoClient(scene.a) as last:
        for publisher in scene.publishers:
            last.publish(publisher.topic, END, qos=2 if publisher.qos == 2 else 1)


def all_until_marks(client: PahoClient, topics: set[str]) -> dict[str, list[int]]:
    """Return the numbers that `client` heard before the mark of each topic."""
    heard: dict[str, list[int]] = {}
    for message in client.stream(RECOVERY_LIMIT):
        if message.payload != END.encode():
            heard.setdefault(message.topic, []).append(number_of(message.payload))
            continue
        topics = topics - {message.topic}
        if not topics:
            break
    return heard


@pytest.mark.parametrize(
    "down, small",
    [pytest.param(20, False, id="20 s"), pytest.param(8, True, id="8 s with small windows")],
)
def test_kafka_killed_under_load(
    own_kafka: KafkaNode, brokers: Brokers, stack: ExitStack, down: float, small: bool
) -> None:
    cluster = Cluster(own_kafka)
    group, bus = (SMALL_GROUP, SMALL_BUS) if small else (GROUP, "")
    scene = open_scene(brokers, stack, cluster.config(group, bus=bus))
    for publisher in scene.publishers:
        publisher.wait_for(WARM_UP, 30)
    watch = Watch(scene.a, scene.b)
    stack.callback(watch.end)
    own_kafka.kill()
    outage = threading.Event()
    outage.wait(down)  # the length of the outage is what the test is about
    assert all(not publisher.paho.ended.is_set() for publisher in scene.publishers), "a client was disconnected"
    before = {publisher.topic: publisher.acknowledged for publisher in scene.publishers}
    own_kafka.start()
    for publisher in scene.publishers:
        publisher.wait_for(before[publisher.topic] + WARM_UP, RECOVERY_LIMIT)
    for publisher in scene.publishers:
        publisher.finish(RECOVERY_LIMIT)
    end_marks(scene)
    wanted = scene.published()
    near, far = (all_until_marks(client, set(wanted)) for client in (scene.near, scene.far))
    watch.check()
    for publisher in scene.publishers:
        publisher.close()
    for node in (scene.a, scene.b):
        node.output.wait_for(r"Kafka at \S+ is back$", limit=RECOVERY_LIMIT)  # the stream's reader may be last
        node.stop()
        assert_told_once(node)
    counters, others = scene.a.counters(), scene.b.counters()
    lost = {name: n for found in (counters, others) for name, n in found.items() if name.startswith("dropped_") and n}
    assert not lost, "a subscriber was too slow for this load"
    check(wanted, near, 0, "the node of the publishers")
    check(wanted, far, counters.get("kafka.bus_messages_dropped", 0), "the other node")
    check(wanted, archived(own_kafka), counters.get("archive.Load.dropped_qos0", 0), "the archive")
    if small:
        assert counters.get("kafka.bus_messages_dropped", 0) > 0, "the window was never full"
        assert counters.get("archive.Load.spooled", 0) > 0, "nothing went over the spool"
        assert counters.get("kafka.bus_messages_held", 0) > 0, "no publisher was slowed"


def flood(port: int, topic: bytes, count: int, size: int) -> None:
    """Send `count` QoS 0 messages over a plain socket as fast as it takes them; return when all were handled."""
    connect = b"\x00\x04MQTT\x04\x02\x00\x00" + struct.pack(">H", 5) + b"flood"
    body = struct.pack(">H", len(topic)) + topic + bytes(size)
    length = bytes([len(body) & 0x7F | 0x80, len(body) >> 7]) if len(body) > 127 else bytes([len(body)])
    frame = b"\x30" + length + body
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"\x10" + bytes([len(connect)]) + connect)
        assert connection.recv(4, socket.MSG_WAITALL) == b"\x20\x02\x00\x00"
        for _ in range(count // 1000):
            connection.sendall(frame * 1000)
        connection.sendall(b"\xc0\x00")  # the answer to PINGREQ comes behind everything
        assert connection.recv(2, socket.MSG_WAITALL) == b"\xd0\x00"
        connection.sendall(b"\xe0\x00")


def test_full_windows_with_kafka_dead(own_kafka: KafkaNode, brokers: Brokers, stack: ExitStack) -> None:
    """Memory is bounded, QoS 1 goes to the spools, local clients go on, SIGTERM ends within its timeout."""
    cluster = Cluster(own_kafka)
    node = brokers.start(cluster.config(f"{GROUP}[Shutdown]\nTimeout = {TIMEOUT}\n"))
    client = stack.enter_context(PahoClient(node))
    client.subscribe("load/local")
    own_kafka.kill()
    client.publish("load/first", "", qos=0)
    wait_until(lambda: bool(node.output.matches("messages go to the spool")), "the archive group notices")
    flood(node.port, b"load/flood", FLOOD, 100)
    publisher = NumberedPublisher(node, "load/qos1", 1, version=V311)
    stack.callback(publisher.close)
    wait_until(lambda: publisher.acknowledged >= 10 * publisher.window, "acknowledged beside a window full of QoS 0")
    publisher.stop_publishing()
    client.publish("load/local", "still served", qos=0)
    assert client.received(1) == [Heard("load/local", b"still served", 0)]
    rss_mib = node.rss_mib
    print(f"resident memory with full windows: {rss_mib:.0f} MiB")
    assert rss_mib < RSS_LIMIT
    began = time.monotonic()
    node.stop(limit=TIMEOUT + 5)
    assert time.monotonic() - began < TIMEOUT + 1
    counters = node.counters()
    assert counters["messages_received_qos0"] == FLOOD + 2
    handled = counters["messages_received_qos0"] + counters["messages_received_qos1"]
    # Nothing of it can have left: what is not in the window, or was given up with it, was dropped and counted.
    kept = [counters.get(f"kafka.bus_messages_{name}", 0) for name in ("waiting", "failed", "sent", "refused")]
    spooled = counters["kafka.bus_spool_messages"]
    assert spooled == counters["messages_received_qos1"]
    assert counters["kafka.bus_messages_dropped"] == handled - sum(kept) - spooled
    assert sum(kept) < 1.05 * 200_000, "more than the window was kept"
    # The archive group has a spool: what found no room in its window while the disk was busy was dropped and counted.
    kept = [counters.get(f"archive.Load.{name}", 0) for name in ("waiting", "failed", "stored", "spooled")]
    assert counters.get("archive.Load.dropped_qos0", 0) == handled - sum(kept)
    assert counters["archive.Load.spooled"] > 100_000
    assert len([line for line in warnings_of(node) if "is away" in line]) == 1


def is_heard(speaker: PahoClient, listener: PahoClient, topic: str) -> bool:
    """Say something; return whether anything was heard from this speaker."""
    words = f"of {id(speaker)}"
    speaker.publish(topic, words, qos=1)
    return any(message.payload == words.encode() for message in listener.heard_so_far())


def test_kafka_comes_after_the_nodes(own_kafka: KafkaNode, brokers: Brokers, topic: str) -> None:
    """A node starts without Kafka, serves, and joins the bus when Kafka is there."""
    cluster = Cluster(own_kafka)
    own_kafka.stop()
    a, b = brokers.make(cluster.config(), name="node-a"), brokers.make(cluster.config(), name="node-b")
    for node in (a, b):
        node.launch()
    for node in (a, b):
        node.wait_for_listeners()
    with PahoClient(a) as at_a, PahoClient(b, transport="websockets") as at_b:
        for client in (at_a, at_b):
            client.subscribe(topic)
            client.publish(topic, "here and now", qos=1)
            assert client.received(1) == [Heard(topic, b"here and now", 1)]
        own_kafka.start()
        for speaker, listener in ((at_a, at_b), (at_b, at_a)):
            wait_until(partial(is_heard, speaker, listener, topic), "each node hears the other", limit=RECOVERY_LIMIT)
    for node in (a, b):
        assert_told_once(node)
