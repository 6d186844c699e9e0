"""Nodes that nothing but a real Kafka joins: each message once, properties intact, no old traffic [K4, K21, K23]."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Final

import attrs
import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.cluster import Cluster, committed_offsets, warnings_of
from tests.interop.mosquitto import END, Received, Subscriber, publish
from tests.interop.paho_support import V5, V31, V311, Heard, PahoClient, retained_at
from tests.kafka_support import KafkaNode
from tests.lines import wait_until

pytestmark = [pytest.mark.interop, pytest.mark.kafka]

PROPERTIES: Final = (
    ("user-property", "unit", "°C"),
    ("user-property", "unit", "K"),
    ("content-type", "text/plain"),
    ("response-topic", "reply/to"),
    ("correlation-data", "4711"),
)
BUS_GROUP: Final = "mqtt-trio-bus-node-b"
OPTIONS: Final = [word for words in PROPERTIES for word in ("-D", "publish", *words)]


@pytest.fixture
def cluster(kafka: KafkaNode) -> Cluster:
    """Topics of one test on the Kafka of the test run."""
    return Cluster(kafka)


def expected(topic: str, payload: str, qos: int) -> Heard:
    """What subscribers hear of a message with `OPTIONS`."""
    users = (("unit", "°C"), ("unit", "K"))
    return Heard(topic, payload.encode(), qos, False, users, "text/plain", "reply/to", b"4711")


@pytest.mark.parametrize("count", [2, 3])
def test_once_everywhere(cluster: Cluster, brokers: Brokers, topic: str, count: int) -> None:
    nodes = [brokers.start(cluster.config(), name=f"node-{letter}") for letter in "abc"[:count]]
    with ExitStack() as stack:
        own = stack.enter_context(PahoClient(nodes[0]))
        program = stack.enter_context(Subscriber(nodes[0].port, topic, version="mqttv5"))
        own.subscribe(topic)
        far = [stack.enter_context(PahoClient(node, transport="websockets")) for node in nodes[1:]]
        for client in far:
            client.subscribe(topic)
        began = time.time()
        for qos in (0, 1, 2):
            publish(nodes[0].port, topic, f"at {qos}", version="mqttv5", qos=qos, options=["-i", "device", *OPTIONS])
        publish(nodes[0].port, topic, END, version="mqttv5", qos=2)
        messages = [expected(topic, f"at {qos}", qos) for qos in (0, 1, 2)]
        for client in far:
            assert client.until(END.encode()) == messages
        ended = time.time()
        # One topic is one partition: who has heard the answer of the other node has read all that lies before it on the
        # bus, its own messages included.
        far[0].publish(topic, "answer", qos=2)
        for client in (own, *far):
            assert client.until(b"answer") == [*messages, Heard(topic, END.encode(), 2)]
        heard = [Received(topic, text.encode(), qos) for text, qos in (("at 0", 0), ("at 1", 1), ("at 2", 2), (END, 2))]
        assert program.received(5) == [*heard, Received(topic, b"answer", 2)]
    on_bus = cluster.bus_messages(topic)
    assert [message.payload.decode() for message in on_bus] == ["at 0", "at 1", "at 2", END, "answer"]
    for qos, message in enumerate(on_bus[:3]):
        properties = message.properties
        assert (message.client_id, message.qos, message.retain) == ("device", qos, False)
        assert list(map(tuple, properties.user_properties)) == [("unit", "°C"), ("unit", "K")]
        assert (properties.content_type, properties.response_topic) == ("text/plain", "reply/to")
        assert properties.correlation_data == b"4711"
        assert began - 0.001 <= message.published_at <= ended
    for node in nodes:
        node.stop()


@pytest.mark.parametrize("version", [V31, V311, V5])
def test_burst_in_both_directions(cluster: Cluster, brokers: Brokers, topic: str, version: MQTTProtocolVersion) -> None:
    a, b = (brokers.start(cluster.config(), name=name) for name in ("node-a", "node-b"))
    numbers = [f"{number}".encode() for number in range(400)]
    with PahoClient(a, version=version) as at_a, PahoClient(b, version=version, transport="websockets") as at_b:
        at_a.subscribe(f"{topic}/b/+")
        at_b.subscribe(f"{topic}/a/+")
        for client, side in ((at_a, "a"), (at_b, "b")):
            for number in numbers:
                for qos in (0, 1, 2):
                    client.client.publish(f"{topic}/{side}/{qos}", number, qos)
        for client, side in ((at_b, "a"), (at_a, "b")):
            heard = client.received(3 * len(numbers))
            for qos in (0, 1, 2):
                wanted = [Heard(f"{topic}/{side}/{qos}", number, qos) for number in numbers]
                assert [message for message in heard if message.topic.endswith(f"/{qos}")] == wanted


def test_will_reaches_the_other_node(cluster: Cluster, brokers: Brokers, topic: str) -> None:
    a, b = (brokers.start(cluster.config(), name=name) for name in ("node-a", "node-b"))
    will = attrs.evolve(expected(topic, "gone", 1), retain=True)
    with PahoClient(b, transport="websockets") as watcher:
        watcher.subscribe(topic)
        with PahoClient(a, will=will) as dying:
            dying.cut()
        assert watcher.received(1) == [attrs.evolve(will, retain=False)]
    # What is retained reaches other nodes by a topic of its own, a moment later perhaps.
    wait_until(lambda: retained_at(b, topic) == will, "the retained will on node B")


def test_late_node_gets_retained_messages_and_no_old_traffic(cluster: Cluster, brokers: Brokers, topic: str) -> None:
    a, b = (brokers.start(cluster.config(), name=name) for name in ("node-a", "node-b"))
    kept = attrs.evolve(expected(f"{topic}/kept", "state", 1), retain=True)
    with PahoClient(a) as at_a, PahoClient(b) as at_b:
        at_b.subscribe(f"{topic}/#")
        for number in range(100):
            at_a.publish(f"{topic}/live", f"{number}", qos=number % 3)
        at_a.publish(f"{topic}/kept", "older state", qos=1, retain=True)
        at_a.publish_message(kept)
        at_a.publish(f"{topic}/removed", "state", qos=1, retain=True)
        at_a.publish(f"{topic}/removed", None, qos=1, retain=True)
        at_b.publish(f"{topic}/from b", "state", qos=2, retain=True)
        at_b.received(105)
        from_b = Heard(f"{topic}/from b", b"state", 2, retain=True)
        late = brokers.start(cluster.config(), name="node-c")
        with PahoClient(late, transport="websockets") as at_c, PahoClient(late) as retained_only:
            at_c.subscribe(f"{topic}/#")
            assert sorted(at_c.received(2), key=lambda message: message.topic) == [from_b, kept]
            for name in ("live", "kept", "removed", "from b"):
                at_a.publish(f"{topic}/{name}", END, qos=1)
            ends = at_c.received(6)[2:]
            assert sorted(m.topic for m in ends) == [f"{topic}/{n}" for n in ("from b", "kept", "live", "removed")]
            assert {(message.payload, message.retain) for message in ends} == {(END.encode(), False)}
            retained_only.subscribe(f"{topic}/kept")
            assert retained_only.received(1) == [kept]


def test_retained_message_is_replaced_on_all_nodes(cluster: Cluster, brokers: Brokers, topic: str) -> None:
    a, b = (brokers.start(cluster.config(), name=name) for name in ("node-a", "node-b"))

    def payload_at(node: BrokerProcess) -> bytes | None:
        found = retained_at(node, topic)
        return None if found is None else found.payload

    with PahoClient(a) as at_a, PahoClient(b) as at_b:
        at_b.subscribe(topic)
        at_a.publish(topic, "one", qos=1, retain=True)
        at_b.received(1)
        wait_until(lambda: payload_at(b) == b"one", "the first state on node B")
        at_b.publish(topic, "two", qos=1, retain=True)
        wait_until(lambda: payload_at(a) == b"two", "the second state on node A")
        at_a.publish(topic, None, qos=1, retain=True)
        wait_until(lambda: payload_at(b) is None, "no state on node B")
        assert payload_at(a) is None


def settle(one: BrokerProcess, other: BrokerProcess, topic: str) -> None:
    """Return when what happened at `one` up to now is in Kafka's log: it is not told in an order of its own."""
    with PahoClient(one) as speaker, PahoClient(other) as listener:
        listener.subscribe(f"{topic}/settled")
        speaker.publish(f"{topic}/settled", "", qos=1)
        listener.received(1)


def test_client_moves_with_its_id(cluster: Cluster, brokers: Brokers, topic: str) -> None:
    """It is connected to one node at a time; a session that outlives the connection stays on its node."""
    a, b, c = (brokers.start(cluster.config(), name=name) for name in ("node-a", "node-b", "node-c"))
    name = f"mover-{topic}"
    with PahoClient(a, client_id=name, clean=False, session_expiry_interval=600) as at_a:
        at_a.subscribe(topic)
        settle(a, b, topic)
        with PahoClient(b, client_id=name, clean=False, transport="websockets") as at_b:
            assert at_a.ended.wait(10)
            assert at_a.reason is not None
            assert at_a.reason.value == 0x8E
            at_b.subscribe(topic)
            settle(b, a, topic)
            with PahoClient(c, client_id=name, version=V311, clean=False) as at_c:
                assert at_b.ended.wait(10)
                settle(c, a, topic)
                at_c.publish(topic, "from c", qos=1)
                with PahoClient(a, client_id=name, clean=False, session_expiry_interval=600) as again:
                    assert at_c.ended.wait(10)
                    assert again.flags is not None
                    assert again.flags.session_present
                    assert again.received(1) == [Heard(topic, b"from c", 1)]
                    again.publish(topic, "still here", qos=1)
                    assert again.received(2)[1:] == [Heard(topic, b"still here", 1)]
    log = [found.string for found in b.output.matches("taken over by node node-c")]
    assert len(log) == 1


def test_second_live_node_with_one_id_ends(cluster: Cluster, brokers: Brokers, topic: str) -> None:
    first = brokers.start(cluster.config(), name="first", node_id="twin")
    second = brokers.make(cluster.config(), name="second", node_id="twin")
    second.launch()
    assert second.wait_for_exit() == 1
    assert len(second.output.matches(r"Node\.Id 'twin' is taken")) == 1, second.output.text
    assert not second.output.matches(r"127\.0\.0\.1:\d+: this machine"), "it opened its listeners"
    second.assert_clean_log()
    with PahoClient(first) as client:
        client.subscribe(topic)
        client.publish(topic, "still here", qos=1)
        client.received(1)
    first.stop()


def test_restart_after_kill_is_no_second_node(cluster: Cluster, brokers: Brokers, topic: str) -> None:
    witness = brokers.start(cluster.config(), name="witness")
    brokers.start(cluster.config(), name="killed", node_id="phoenix").kill()
    risen = brokers.start(cluster.config(), name="risen", node_id="phoenix")
    with PahoClient(risen) as at_risen, PahoClient(witness) as at_witness:
        at_witness.subscribe(topic)
        at_risen.publish(topic, "back", qos=1)
        assert at_witness.received(1) == [Heard(topic, b"back", 1)]


def stored_of_bus(cluster: Cluster) -> list[int]:
    """Other tests have nodes of that name on the same Kafka, with topics of their own."""
    stored = committed_offsets(cluster.kafka, BUS_GROUP)
    return [partition for topic, partition in stored if topic == cluster.bus_topic]


def test_sessions_get_what_came_while_their_node_was_away(cluster: Cluster, brokers: Brokers, topic: str) -> None:
    """Once and again, for it is killed each time."""
    a = brokers.start(cluster.config(), name="node-a")
    with PahoClient(a) as publisher:
        sent: list[bytes] = []
        for life in range(3):
            b = brokers.make(cluster.config(), name=f"node-b{life}", node_id="node-b")
            b.data = brokers.directory / "data of node b"
            b.start()
            with PahoClient(b, client_id="kept", clean=False, session_expiry_interval=600) as kept:
                kept.subscribe(f"{topic}/#")
                assert sorted(message.payload for message in kept.received(len(sent))) == sorted(sent)
                publisher.publish(f"{topic}/live", f"{life} live", qos=2)
                kept.received(len(sent) + 1)
            if life == 2:  # tools see it as well, seconds later
                wait_until(lambda: len(stored_of_bus(cluster)) == 12, "offsets in Kafka", 30)
            b.kill()
            sent = [f"{life} {number}".encode() for number in range(100)]
            for number, payload in enumerate(sent):
                publisher.publish(f"{topic}/{number % 7}", payload, qos=1 + number % 2)
                publisher.publish(f"{topic}/{number % 7}", "not kept", qos=0)


@pytest.mark.parametrize("bus", [False, True])
def test_unknown_kafka_host(brokers: Brokers, topic: str, bus: bool) -> None:
    config = f"""
[Kafka]
Servers = "kafka.invalid:9092"
[Kafka.Bus]
Enabled = {str(bus).lower()}
[Shutdown]
Timeout = 3
"""
    node = brokers.start(config)
    with PahoClient(node) as client:
        client.subscribe(topic)
        for qos in (0, 1, 2):
            client.publish(topic, "works", qos=qos)
        assert client.received(3) == [Heard(topic, b"works", qos) for qos in (0, 1, 2)]
    (told,) = warnings_of(node)
    assert "kafka.invalid" in told
    began = time.monotonic()
    node.stop()
    assert time.monotonic() - began < 6
