"""A node that lost its disk: its stores come back out of its archive in Kafka [K19]."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mqtt_trio.archive.sqlite import archive_path
from tests.interop.broker_process import Brokers
from tests.interop.mosquitto import publish
from tests.interop.paho_support import PahoClient
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import LIMIT
from tests.rebuild_support import command, environment, retained_of, rows_of

pytestmark = [pytest.mark.interop, pytest.mark.kafka]


def by_topic(history: Path) -> list[tuple[Any, ...]]:
    """Return the rows of a history: in their order for a topic, whatever lies between."""
    return sorted(rows_of(history), key=lambda row: str(row[1]))


def test_stores_equal_those_of_the_node_that_archived(kafka: KafkaNode, brokers: Brokers, tmp_path: Path) -> None:
    topic = unique_name("archive")
    node = brokers.start(
        f"""
[Kafka]
Servers = "{kafka.servers}"
[[ArchiveGroups]]
Name = "Default"
Store = "SQLITE"
[[ArchiveGroups]]
Name = "Kafka"
Store = "KAFKA"
KafkaTopic = "{topic}"
"""
    )
    rich = ["-D", "publish", "user-property", "unit", "K", "-D", "publish", "response-topic", "reply/to"]
    rich += ["-D", "publish", "message-expiry-interval", "3600", "-D", "publish", "correlation-data", "4711"]
    with PahoClient(node, client_id="device") as device:
        for number in range(60):
            device.publish(f"room-{number % 7}/t", b"%d" % number, qos=number % 3, retain=number % 4 == 0)
        device.publish("room-1/t", b"", qos=1, retain=True)
        device.publish("binary", bytes(range(256)), qos=2, retain=True)
    publish(node.port, "rich", "21.5", version="mqttv5", qos=1, options=["-r", "-i", "other", *rich])
    node.stop()

    fresh = tmp_path / "fresh"
    line = [*command(node.config_file, topic), "--set", f"Persistence.Path={fresh}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert by_topic(archive_path(fresh, "Default")) == by_topic(archive_path(node.data, "Default"))
    found = retained_of(fresh)
    assert found == retained_of(node.data)
    assert set(found) >= {"binary", "rich"}
    assert "room-1/t" not in found
