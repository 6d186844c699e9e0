"""Java programs on our topics [K14, K15]: a Kafka Streams topology and a Spring KafkaTemplate, as Maven projects.

A job of its own, `scripts/test java`: Maven fetches some 30 MB of jars for it at the first time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from gateways.kafka.admin import Admin
from gateways.kafka.options import KafkaOptions
from gateways.kafka.topic_plan import TopicPlan
from gateways.kafka.topics import survey
from lib.kafka_install import DEPENDENCY_PLUGIN, QUICK_JVM, java
from lib.kafka_process import locked
from tests.interop.broker_process import Brokers
from tests.interop.cluster import read_topic
from tests.interop.paho_support import PahoClient
from tests.interop.sensors import SKIPPED, Readings, aggregates_of, anomalies_of, make_readings, write
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import LineProcess, require_tool, wait_until

pytestmark = [pytest.mark.java, pytest.mark.interop, pytest.mark.kafka, pytest.mark.timeout(600)]
PROJECTS: Final = Path(__file__).parent / "java"
COMPILER_PLUGIN: Final = "org.apache.maven.plugins:maven-compiler-plugin:3.13.0"
LIMIT: Final = 120.0
COUNT: Final = 6


def build(name: str) -> str:
    """Build a project with Maven, in the cache; return the class path of its program."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "mqtt-trio" / f"java-{name}"
    with locked(folder / ".lock"):
        shutil.copytree(PROJECTS / name, folder / "project", dirs_exist_ok=True)
        goals = [f"{COMPILER_PLUGIN}:compile", f"{DEPENDENCY_PLUGIN}:copy-dependencies"]
        subprocess.run(
            [require_tool("mvn"), "-q", "-B", "-f", str(folder / "project" / "pom.xml"), *goals],
            check=True,
            timeout=400,
        )
    target = folder / "project" / "target"
    return f"{target / 'classes'}:{target / 'dependency'}/*"


def program(name: str, *arguments: str, class_name: str) -> list[str]:
    """Return the command line of a project's program."""
    return [java(), "-Xmx256m", *QUICK_JVM, "-cp", build(name), class_name, *arguments]


def make(kafka: KafkaNode, *topics: str) -> None:
    """Make topics with two partitions."""
    plans = [TopicPlan(name=topic, partitions=2) for topic in topics]
    assert survey(lambda: Admin(KafkaOptions(servers=kafka.servers)), plans).refused == {}


def records_of(kafka: KafkaNode, topic: str) -> list[Any]:
    """Return what is in a topic of results."""
    return read_topic(kafka, topic)


def test_the_topology_comes_to_what_is_computed_by_hand(kafka: KafkaNode, tmp_path: Path) -> None:
    """The same input as for examples/sensor_streams.py, and the same windows: so the two programs agree."""
    source, aggregates, anomalies = (unique_name(name) for name in ("archive", "aggregates", "anomalies"))
    readings: Readings = make_readings()
    make(kafka, aggregates, anomalies)
    write(kafka.servers, source, readings.messages, b"{", b"[]")
    arguments = [kafka.servers, unique_name("streams"), source, aggregates, anomalies, str(tmp_path / "state")]
    topology = LineProcess(program("streams", *arguments, class_name="SensorStreams"))
    try:
        topology.wait_for("started", limit=LIMIT)
        expected = readings.aggregates()
        wait_until(lambda: aggregates_of(records_of(kafka, aggregates)) == expected, "the aggregates", LIMIT)
        wait_until(lambda: anomalies_of(records_of(kafka, anomalies)) == readings.anomalies(), "the anomalies", LIMIT)
        assert topology.terminate(LIMIT) == 143, topology.text  # how Java ends after SIGTERM
    finally:
        topology.kill()
    skipped = sum(m.payload in SKIPPED for m in readings.messages if m.topic_name.startswith("sensors/"))
    assert f"skipped {skipped}" in topology.text


def test_a_spring_template_reaches_subscribers(kafka: KafkaNode, brokers: Brokers) -> None:
    """Its header __TypeId__ is tolerated, as are all others."""
    stream = unique_name("messages")
    topic = f"spring/{stream}"
    make(kafka, stream)
    node = brokers.start(
        f"""
[Kafka]
Servers = "{kafka.servers}"
[Kafka.Topics.Messages]
Name = "{stream}"
Enabled = true
"""
    )
    command = program("spring", kafka.servers, stream, topic, str(COUNT), class_name="TemplateProducer")
    with PahoClient(node) as client:
        client.subscribe(topic)
        sent = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert sent.returncode == 0, sent.stderr
        heard = client.received(COUNT, limit=LIMIT)
    assert sorted(message.payload for message in heard) == [b"message %d" % number for number in range(COUNT)]
    records = records_of(kafka, stream)
    assert {dict(record.headers)["__TypeId__"] for record in records} == {b"TemplateProducer$MqttMessage"}
    assert {json.loads(record.value)["topic"] for record in records} == {topic}
