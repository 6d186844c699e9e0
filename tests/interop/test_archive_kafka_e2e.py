"""Archive groups from MQTT clients to Kafka and to SQLite, read by programs that know nothing of us [K7, K8]."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
from kafka import KafkaConsumer
from kafka.partitioner.default import murmur2

from tests.interop.broker_process import ROOT, BrokerProcess, Brokers
from tests.interop.cluster import read_topic
from tests.interop.mosquitto import publish
from tests.interop.paho_support import V311, Heard, PahoClient
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import LIMIT, require_tool, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.kafka]

SCHEMAS: Final = ROOT / "gateways" / "kafka" / "schemas"
KAFKA_TOPIC: Final = "mqtt.sensors"
PARTITIONS: Final = 12
PAYLOADS: Final = {
    "text": b"21.5",
    "unicode": "21,5 °C — 世界 😀".encode(),
    "empty": b"",
    "json": b'{"value": 21.5, "unit": "C"}',
    "binary": bytes(range(256)),
    "surrogate": b"\xed\xa0\x80",
    "large": os.urandom(1_000_000),
}


def config(kafka: KafkaNode, default: str = "") -> str:
    """Return the configuration of the two groups; `default`: further keys of the default group."""
    return f"""
[Kafka]
Servers = "{kafka.servers}"
[[ArchiveGroups]]
Name = "Default"
Filter = "#"
Store = "SQLITE"
{default}
[[ArchiveGroups]]
Name = "Sensors"
Filter = "sensors/+"
Store = "KAFKA"
KafkaTopic = "{KAFKA_TOPIC}"
"""


def payload_of(value: dict[str, Any]) -> bytes:
    """Return the payload of an archive record as a consumer has to."""
    text: str = value["payload"]
    return base64.b64decode(text, validate=True) if value.get("payloadEncoding") == "base64" else text.encode()


def sqlite3_shell(file: Path, query: str) -> list[list[str]]:
    """Run the sqlite3 program on a store; return its rows."""
    command = [require_tool("sqlite3"), "-readonly", "-batch", "-noheader", "-separator", "|", str(file), query]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in done.stdout.splitlines()]


def archive_file(broker: BrokerProcess) -> Path:
    """Return the SQLite file of the default group."""
    (file,) = broker.data.glob("*Default*.sqlite3")
    return file


def test_sensors_reach_their_kafka_topic(kafka: KafkaNode, brokers: Brokers) -> None:
    name = unique_name("s")
    node = brokers.start(config(kafka), node_id="archiver")
    users = (("unit", "°C"), ("unit", "K"), ("", ""))
    rich = Heard(f"sensors/{name}-rich", b"rich", 1, True, users, "text/plain", None, b"\xff\0")
    began = time.time()
    with PahoClient(node, client_id=name) as device, PahoClient(node, client_id=f"{name}-3", version=V311) as older:
        for kind, payload in PAYLOADS.items():
            for qos in (0, 1, 2):
                (device if qos else older).publish(f"sensors/{name}-{kind}", payload, qos=qos)
        device.publish_message(rich)
        for outside in (f"sensors/{name}/b", f"sensors/{name}-text/b", f"other/{name}", "sensors"):
            device.publish(outside, "not for this topic", qos=1)
    node.stop()  # what was taken is stored before the end
    ended = time.time()

    schema = json.loads((SCHEMAS / "mqtt_message.schema.json").read_text("utf-8"))
    check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    found: dict[str, list[tuple[int, bytes]]] = {}
    for record in read_topic(kafka, KAFKA_TOPIC):
        value = json.loads(record.value)
        check.validate(value)
        assert record.key.decode() == value["topic"]
        assert record.partition == (murmur2(record.key) & 0x7FFF_FFFF) % PARTITIONS
        assert name in value["topic"], "the topic belongs to this test alone"
        assert value["brokerId"] == "archiver"
        assert value["clientId"] == (name if value["qos"] else f"{name}-3")
        assert value["retained"] is (value["topic"] == rich.topic)
        assert began - 0.001 <= record.timestamp / 1000 <= ended
        assert value["timestamp"].endswith(f".{record.timestamp % 1000:03d}Z")
        if value["topic"] == rich.topic:
            pairs = [list(pair) for pair in users]
            correlation = {"correlationId": "/wA=", "correlationIdEncoding": "base64"}
            assert value["headers"] == {"contentType": "text/plain", "userProperties": pairs, **correlation}
        headers = dict(record.headers)
        assert (headers["mqtt.topic"], headers["mqtt.qos"]) == (record.key, b"%d" % value["qos"])
        found.setdefault(value["topic"], []).append((value["qos"], payload_of(value)))
    wanted = {f"sensors/{name}-{kind}": [(q, payload) for q in (0, 1, 2)] for kind, payload in PAYLOADS.items()}
    wanted[rich.topic] = [(1, b"rich")]
    assert {topic: sorted(messages) for topic, messages in found.items()} == wanted

    columns = "topic, qos, retained, client_id, hex(payload)"
    rows = sqlite3_shell(archive_file(node), f"SELECT {columns} FROM messages ORDER BY id")
    assert len(rows) == 3 * len(PAYLOADS) + 5, "the default group keeps everything"
    stored: dict[str, list[tuple[int, bytes]]] = {}
    for topic, at, retained, client_id, hexadecimal in rows:
        assert client_id == (name if at != "0" else f"{name}-3")
        assert retained == str(int(topic == rich.topic))
        stored.setdefault(topic, []).append((int(at), bytes.fromhex(hexadecimal)))
    assert {topic: sorted(messages) for topic, messages in stored.items() if topic in wanted} == wanted
    assert f"sensors/{name}/b" in stored


def test_consumer_follows_live(kafka: KafkaNode, brokers: Brokers) -> None:
    """A plain consumer that subscribes reads records while the broker runs, not only when it ends."""
    name = unique_name("live")
    kafka_topic = unique_name("mqtt.live")
    node = brokers.start(config(kafka).replace(KAFKA_TOPIC, kafka_topic))
    options: dict[str, Any] = {"auto_offset_reset": "earliest", "enable_auto_commit": False, "group_id": name}
    with closing(KafkaConsumer(bootstrap_servers=kafka.servers, **options)) as consumer:
        # The node may be making the topic still, and who joins a group before there is one may stay without a share.
        wait_until(lambda: consumer.partitions_for_topic(kafka_topic), "the topic", limit=30)
        consumer.subscribe([kafka_topic])
        for number in range(10):
            publish(node.port, f"sensors/{name}", f"{number}", version="mqttv5", qos=number % 3)
        values: list[str] = []

        def poll() -> bool:
            for batch in consumer.poll(timeout_ms=100).values():
                values.extend(json.loads(record.value)["payload"] for record in batch)
            return len(values) >= 10

        wait_until(poll, "ten records in Kafka while the broker runs", limit=30)
        assert values == [f"{number}" for number in range(10)]


def test_default_group_stays_within_its_bounds(brokers: Brokers, topic: str) -> None:
    group = '[[ArchiveGroups]]\nName = "Default"\nFilter = "#"\nStore = "SQLITE"\nMaxSize = "1MiB"\nRetention = "1h"\n'
    node = brokers.start(group)
    payloads = [os.urandom(10_000) for _ in range(300)]
    with PahoClient(node) as device:
        for payload in payloads:
            device.publish(topic, payload, qos=1)

    def newest() -> bool:
        rows = sqlite3_shell(archive_file(node), "SELECT hex(payload) FROM messages ORDER BY id DESC LIMIT 1")
        return bool(rows) and bytes.fromhex(rows[0][0]) == payloads[-1]

    wait_until(newest, "the newest message in the store, read beside the running broker")
    node.stop()
    files = [file for file in node.data.iterdir() if file.name.startswith(archive_file(node).name)]
    assert sum(file.stat().st_size for file in files) <= 1024 * 1024
    rows = sqlite3_shell(archive_file(node), "SELECT hex(payload) FROM messages ORDER BY id")
    kept = [bytes.fromhex(row[0]) for row in rows]
    assert kept == payloads[-len(kept) :]
    assert len(kept) > 30, "most of the room is used"


def test_what_kafka_cannot_take_is_refused_and_a_dead_letter(kafka: KafkaNode, brokers: Brokers) -> None:
    name, dlq = unique_name("gated"), unique_name("dlq")
    node = brokers.start(
        f"""
[Kafka]
Servers = "{kafka.servers}"
[Kafka.Topics.Archive]
Config."max.message.bytes" = 5000
[Kafka.Topics.Dlq]
Name = "{dlq}"
[[ArchiveGroups]]
Name = "Gated"
Filter = "#"
Store = "KAFKA"
KafkaTopic = "{name}"
Ack = "store"
""",
        node_id="gatekeeper",
    )
    noise = os.urandom(8000)
    with PahoClient(node, client_id="device") as device:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        device.client.on_publish = lambda client, data, number, code, properties: answers.put(code)
        failed = []
        for number, payload in enumerate((b"1", noise, b"2")):
            device.client.publish(f"a/{number}", payload, qos=1)
            failed.append(answers.get(timeout=LIMIT).is_failure)
    node.stop()
    assert failed == [False, True, False]
    assert [json.loads(record.value)["payload"] for record in read_topic(kafka, name)] == ["1", "2"]
    (record,) = read_topic(kafka, dlq)
    letter = json.loads(record.value)
    jsonschema.validate(letter, json.loads((SCHEMAS / "mqtt_dlq.schema.json").read_text("utf-8")))
    assert (letter["reason"], letter["brokerId"], letter["target"]) == ("too_large", "gatekeeper", name)
    assert (letter["source"]["topic"], letter["source"]["clientId"]) == ("a/1", "device")
    assert letter["payload"] == {"size": 8000, "sha256": hashlib.sha256(noise).hexdigest()}
