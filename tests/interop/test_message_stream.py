"""Outside producers and MQTT subscribers meet in mqtt.messages, on a real Kafka [K11, K12]."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from jsonschema import Draft202012Validator
from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import RetriableError

from gateways.kafka.schema_files import load_schema
from mqtt_trio.__main__ import main
from tests.interop.broker_process import Brokers
from tests.interop.cluster import Cluster, committed_offsets, read_topic, warnings_of
from tests.interop.paho_support import Heard, PahoClient, retained_at
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import wait_until

pytestmark = [
    pytest.mark.interop,
    pytest.mark.kafka,
    # Producers are written like that, and kafka-python serves them.
    pytest.mark.filterwarnings("ignore:value_serializer does not implement:DeprecationWarning"),
]
PARTITIONS = 6
JOIN_LIMIT = 60.0
"""Seconds: a member that was killed is waited for by its group for a while."""


@attrs.frozen
class Stream:
    """The topics and the group of one test."""

    cluster: Cluster
    messages: str = attrs.field(factory=lambda: unique_name("messages"))
    dlq: str = attrs.field(factory=lambda: unique_name("dlq"))
    group: str = attrs.field(factory=lambda: unique_name("group"))
    events: str = attrs.field(factory=lambda: unique_name("events"))
    metrics: str = attrs.field(factory=lambda: unique_name("metrics"))

    def config(self, more: str = "Filter = []") -> str:
        """The configuration of a node; `more`: keys of [Kafka.Topics.Messages]."""
        return self.cluster.config(
            f"""
[Kafka.Topics.Messages]
Name = "{self.messages}"
Group = "{self.group}"
Partitions = {PARTITIONS}
{more}
[Kafka.Topics.Dlq]
Name = "{self.dlq}"
[Kafka.Topics.Events]
Enabled = true
Name = "{self.events}"
[Kafka.Topics.Metrics]
Name = "{self.metrics}"
[Kafka.Metrics]
Enabled = true
Interval = "1s"
Reporters = ["kafka"]
"""
        )

    @property
    def stored(self) -> dict[int, int]:
        """The group's offsets; none while Kafka is about to make a place for those of groups."""
        try:
            found = committed_offsets(self.cluster.kafka, self.group)
        except RetriableError:
            return {}
        return {number: offset for (topic, number), offset in found.items() if topic == self.messages}

    @property
    def shares(self) -> list[int]:
        """How many partitions each member of the group has."""
        admin = KafkaAdminClient(bootstrap_servers=self.cluster.kafka.servers)
        try:
            facts = admin.describe_groups([self.group])[self.group]
        finally:
            admin.close()
        assigned = [member["member_assignment"] for member in facts["members"]]
        return sorted(sum(len(each["partitions"]) for each in one["assigned_partitions"]) for one in assigned if one)

    def is_done(self, records: int) -> bool:
        """Say whether so many records are done with, as the group sees it."""
        return sum(self.stored.values()) == records

    @contextmanager
    def producer(self) -> Iterator[KafkaProducer]:
        """The producer of somebody who knows Kafka and not this broker."""
        made = KafkaProducer(
            bootstrap_servers=[self.cluster.kafka.servers], value_serializer=lambda v: json.dumps(v).encode("utf-8")
        )
        try:
            yield made
            made.flush(30)
        finally:
            made.close()

    def put(self, *values: dict[str, Any], **more: Any) -> None:
        with self.producer() as producer:
            for value in values:
                producer.send(self.messages, value, **more)


@pytest.fixture
def stream(kafka: KafkaNode) -> Stream:
    return Stream(Cluster(kafka))


def numbered(topic: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    moment = "2024-01-15T10:00:00Z"
    return [{"topic": f"{topic}/{n % 7}", "payload": f"{n}", "timestamp": moment} for n in range(first, first + count)]


def test_an_outside_producer_reaches_subscribers_of_every_node_once(
    stream: Stream, brokers: Brokers, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [brokers.start(stream.config(), name=f"node-{letter}") for letter in "ab"]
    with ExitStack() as stack:
        clients = [stack.enter_context(PahoClient(node)) for node in nodes]
        for client in clients:
            client.subscribe(f"{topic}/+", qos=2)
        wait_until(lambda: stream.shares == [3, 3], "both nodes have their share", JOIN_LIMIT)
        stream.put(*numbered(topic, 200))
        for client in clients:
            got = client.received(200)
            assert Counter(message.payload for message in got) == Counter(b"%d" % n for n in range(200))
        wait_until(lambda: stream.is_done(200), "all offsets in the group", JOIN_LIMIT)

        # What has a key, a header of Spring's, and everything else that a record of ours may have.
        whole = {
            "topic": f"{topic}/whole", "payload": "/wA=", "payloadEncoding": "base64", "qos": 2, "retained": True,
            "clientId": "maker", "headers": {"contentType": "x/y", "userProperties": [["a", "1"]]},
        }  # fmt: skip
        stream.put(whole, key=b"some key", headers=[("__TypeId__", b"com.example.MqttMessage")])
        wanted = Heard(f"{topic}/whole", b"\xff\0", 2, False, (("a", "1"),), "x/y")
        for client in clients:
            assert client.received(201)[200:] == [wanted]
        kept = attrs.evolve(wanted, retain=True)
        wait_until(lambda: [retained_at(node, f"{topic}/whole") for node in nodes] == [kept, kept], "the retained one")

        # What is no message is a letter; mended, it comes once.
        stream.put({"topic": f"{topic}/mended"}, {"topic": f"{topic}/end", "payload": "end"})
        for client in clients:
            assert client.received(202)[201:] == [Heard(f"{topic}/end", b"end", 1)]
        wait_until(lambda: stream.is_done(203), "all offsets in the group")
        (record,) = read_topic(stream.cluster.kafka, stream.dlq)
        letter = json.loads(record.value)
        assert (letter["reason"], letter["stage"], letter["error"]) == ("malformed", "consume", "payload is missing")
        source = letter["source"]
        assert (source["type"], source["topic"]) == ("kafka", stream.messages)
        place = [r for r in read_topic(stream.cluster.kafka, stream.messages) if r.partition == source["partition"]]
        assert json.loads(place[source["offset"]].value) == {"topic": f"{topic}/mended"}
        mended = tmp_path / "mended.json"
        mended.write_text(json.dumps({"topic": f"{topic}/mended", "payload": "now"}))
        command = ["dlq", "redrive", "--config", str(nodes[0].config_file), "--id", letter["id"][:12]]
        command += ["--value", str(mended), "--execute"]
        assert main(command) == 0
        assert "1 of 1 records were written" in capsys.readouterr().out
        assert main(command) == 0
        assert "There is nothing to write" in capsys.readouterr().out
        stream.put({"topic": f"{topic}/end", "payload": "end"})
        for client in clients:
            more = client.received(204)[202:]
            assert sorted(message.payload for message in more) == [b"end", b"now"]
    for node in nodes:
        node.stop()
    totals: Counter[str] = Counter()
    for node in nodes:
        totals.update(node.counters())
    assert totals["kafka.stream_messages_published"] == 204
    assert totals["kafka.stream_records_malformed"] == 1
    assert all(node.counters().get("kafka.stream_messages_published") for node in nodes), "they share the work"


def test_what_clients_publish_is_in_the_stream_once_and_comes_back_to_nobody(
    stream: Stream, brokers: Brokers, topic: str
) -> None:
    nodes = [brokers.start(stream.config(f'Filter = ["{topic}/+"]'), name=f"node-{letter}") for letter in "ab"]
    with ExitStack() as stack:
        clients = [stack.enter_context(PahoClient(node, client_id=f"at-{node.name}")) for node in nodes]
        for client in clients:
            client.subscribe(f"{topic}/#")
        wanted = [Heard(f"{topic}/{n % 3}", b"%d" % n, n % 3) for n in range(60)]
        for message in wanted:
            clients[message.qos % 2].publish_message(message)
        whole = Heard(f"{topic}/whole", b"\xff\0", 1, False, (("a", "1"), ("a", "2")), "x/y", None, b"id")
        clients[0].publish_message(whole)
        clients[0].publish(f"{topic}/not/in/it", "x", qos=1)
        stream.put({"topic": f"{topic}/end", "payload": "end"})
        for client in clients:
            got = client.received(63)
            assert Counter(map(str, got)) == Counter(
                map(str, [*wanted, whole, Heard(f"{topic}/not/in/it", b"x", 1), Heard(f"{topic}/end", b"end", 1)])
            )
        wait_until(lambda: stream.is_done(62), "the group has read it all", JOIN_LIMIT)
        assert all(len(client.heard_so_far()) == 63 for client in clients)
    # They measure once a second, and tell once a second what they measured last.
    wait_until(
        lambda: told_lags(stream) == set(range(PARTITIONS)), "the nodes told the lag of their shares", JOIN_LIMIT
    )
    records = read_topic(stream.cluster.kafka, stream.messages)
    validator = Draft202012Validator(load_schema("mqtt_message.schema.json"))
    found: dict[str, list[bytes]] = {}
    for record in records:
        value = json.loads(record.value)
        if value["payload"] == "end":
            assert not record.headers, "it is still the only one of its kind"
            continue
        validator.validate(value)
        headers = dict(record.headers)
        assert headers["mqtt.publishedBy"].decode() == value["brokerId"]
        assert value["clientId"] == f"at-{value['brokerId']}"
        assert record.key.decode() == value["topic"] == headers["mqtt.topic"].decode()
        found.setdefault(value["topic"], []).append(value["payload"].encode())
        if value["topic"] == f"{topic}/whole":
            assert value["payloadEncoding"] == "base64"
            assert value["headers"] == {
                "contentType": "x/y", "correlationId": "id", "userProperties": [["a", "1"], ["a", "2"]],
            }  # fmt: skip
    assert found == {
        **{f"{topic}/{qos}": [b"%d" % n for n in range(60) if n % 3 == qos] for qos in range(3)},
        f"{topic}/whole": [b"/wA="],
    }
    for node in nodes:
        node.stop()
    totals: Counter[str] = Counter()
    for node in nodes:
        totals.update(node.counters())
    check_events(stream, topic)
    check_metrics(stream, totals["kafka.metrics_written"])
    assert totals["kafka.stream_messages_written"] == 61
    assert totals["kafka.stream_records_own"] == 61
    assert totals["kafka.stream_messages_published"] == 1


def told_metrics(stream: Stream) -> list[tuple[str, dict[str, Any]]]:
    """Return the figures that the nodes have told, each behind the name of its node."""
    return [
        (record.key.decode(), json.loads(record.value)) for record in read_topic(stream.cluster.kafka, stream.metrics)
    ]


def told_lags(stream: Stream) -> set[int]:
    """Return the partitions whose lag is in the last figures of any node."""
    values = dict(told_metrics(stream)).values()
    gauges = [one for value in values for one in value["gauges"] if one["name"] == "mqtt_trio_kafka_records_lag"]
    return {int(one["labels"]["partition"]) for one in gauges if one["labels"]["topic"] == stream.messages}


def check_metrics(stream: Stream, count: int) -> None:
    """Each node has told its figures, with the lag of what it reads by partition."""
    validator = Draft202012Validator(load_schema("mqtt_metrics.schema.json"))
    told = told_metrics(stream)
    for node_id, value in told:
        validator.validate(value)
        assert value["brokerId"] == node_id
    assert len(told) == count
    assert dict(told).keys() == {"node-a", "node-b"}
    assert told_lags(stream) == set(range(PARTITIONS))


def check_events(stream: Stream, topic: str) -> None:
    """Everything that happened to the clients, and the nodes, is in mqtt.events."""
    validator = Draft202012Validator(load_schema("mqtt_event.schema.json"))
    seen: dict[str, list[str]] = {}
    for record in read_topic(stream.cluster.kafka, stream.events):
        value = json.loads(record.value)
        validator.validate(value)
        seen.setdefault(record.key.decode(), []).append(value["event"])
        if value["event"] == "subscribe":
            assert (value["topicFilter"], value["qos"]) == (f"{topic}/#", 2)
    for letter in "ab":
        assert seen[f"at-node-{letter}"] == ["connect", "subscribe", "disconnect"]
        assert seen[f"node-{letter}"] == ["node_up", "node_down"]


def test_a_killed_node_loses_nothing_for_clients_that_come_back_late(
    stream: Stream, brokers: Brokers, topic: str
) -> None:
    """Records go on coming while one of two nodes is killed and started again, and nobody is connected."""
    killed, other = (brokers.start(stream.config(), name=name) for name in ("node-a", "node-b"))
    for node, name in ((killed, "late-a"), (other, "late-b")):
        with PahoClient(node, client_id=name, clean=False, session_expiry_interval=600) as client:
            client.subscribe(f"{topic}/#", qos=1)
    values = numbered(topic, 600)
    with stream.producer() as producer:
        for number, value in enumerate(values):
            producer.send(stream.messages, value)
            if number == 300:
                producer.flush(30)
                wait_until(lambda: sum(stream.stored.values()) > 50, "some are done with", JOIN_LIMIT)
                killed.kill()
    risen = brokers.make(stream.config(), name="risen", node_id="node-a")
    risen.data = killed.data
    risen.start()
    wait_until(lambda: stream.is_done(600), "all are done with", JOIN_LIMIT)
    wanted = {b"%d" % number for number in range(600)}
    for node, name in ((risen, "late-a"), (other, "late-b")):
        with PahoClient(node, client_id=name, clean=False, session_expiry_interval=600) as client:
            wait_until(lambda: {message.payload for message in client.heard_so_far()} == wanted, f"all for {name}", 30)


def test_automatic_commits_store_what_was_read(stream: Stream, brokers: Brokers, topic: str) -> None:
    """[K16]: what old set-ups could not choose, said again in their words; and another place to begin at."""
    table = "[Kafka.Consumer]\nauto.offset.reset = 'earliest'\nauto.commit.interval.ms = 300\n"
    config = stream.config().replace("[Kafka]\n", '[Kafka]\nProfile = "compat"\n') + table
    node = brokers.start(config)
    with PahoClient(node) as client:
        client.subscribe(f"{topic}/+", qos=1)
        stream.put(*numbered(topic, 40))
        got = client.received(40)
        assert {message.payload for message in got} == {b"%d" % n for n in range(40)}
        wait_until(lambda: stream.is_done(40), "all offsets in the group", JOIN_LIMIT)
    assert warnings_of(node) == []
    node.stop()
    new = unique_name("group")
    late = brokers.start(config.replace("'earliest'", "'latest'").replace(stream.group, new), name="late")
    begun = attrs.evolve(stream, group=new)
    wait_until(lambda: begun.is_done(40), "it begins at the end", JOIN_LIMIT)
    with PahoClient(late) as client:
        client.subscribe(f"{topic}/+", qos=1)
        stream.put({"topic": f"{topic}/new", "payload": "new"})
        assert [message.payload for message in client.received(1)] == [b"new"]
    late.stop()
    assert "kafka.stream_consumer_rebuilds" not in node.counters(), "kafka-python took the words"


def test_while_kafka_is_away_clients_do_not_wait_for_the_stream(
    own_kafka: KafkaNode, brokers: Brokers, topic: str
) -> None:
    """What the window holds is in the stream when Kafka is back, what it cannot hold is counted [K1]."""
    stream = Stream(Cluster(own_kafka))
    node = brokers.start(
        f"""
[Kafka]
Servers = "{own_kafka.servers}"
WindowMessages = 100
[Kafka.Topics.Messages]
Enabled = true
Name = "{stream.messages}"
Group = "{stream.group}"
"""
    )
    with PahoClient(node) as client:
        client.publish(topic, "before", qos=1)
        wait_until(lambda: stream.is_done(1), "the group has read it", JOIN_LIMIT)
        own_kafka.stop()
        node.output.wait_for("is away for", limit=30)
        for number in range(150):
            client.publish(topic, f"{number}", qos=1 + number % 2)
        own_kafka.start()
        node.output.wait_for("is back", limit=JOIN_LIMIT)
        wait_until(lambda: sum(stream.stored.values()) >= 101, "the group has read what the window held", JOIN_LIMIT)
        client.publish(topic, "behind", qos=1)
        wait_until(lambda: sum(stream.stored.values()) >= 102, "the group has read that as well", JOIN_LIMIT)
    node.stop()
    found = [json.loads(record.value)["payload"] for record in read_topic(own_kafka, stream.messages)]
    counters = node.counters()
    left_out = counters["kafka.stream_messages_left_out"]
    assert left_out in (49, 50), "one more may be taken before the producer knows of the outage"
    assert found == ["before", *map(str, range(150 - left_out)), "behind"]
    assert counters["kafka.stream_messages_written"] == len(found)
