"""Brokers as people run them on a secured Kafka: what is wrong is told at once and gives nothing away [K1, K2, F4]."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from mqtt_trio.config_schema import key_name
from tests.gateways.secured import FAULTS, login, trust
from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.cluster import read_topic, warnings_of
from tests.interop.paho_support import PahoClient
from tests.kafka_support import SecureKafka, unique_name

pytestmark = [pytest.mark.interop, pytest.mark.kafka]

SOON: Final = 2.0
"""Seconds from the start of a gateway until it says what is wrong."""
START: Final = 8.0
"""Seconds that an interpreter and its imports may take on a busy machine."""
ARCHIVE: Final = '[[ArchiveGroups]]\nName = "All"\nFilter = "#"\nStore = "KAFKA"\nKafkaTopic = "{}"\n'
EVERYTHING: Final = '[Logging]\nLevel = "DEBUG"\n[Logging.Loggers]\nkafka = "DEBUG"\n'


def toml(section: str, table: Mapping[str, Any]) -> str:
    """Return a section of a configuration."""
    lines = [f"{key_name(name)} = {json.dumps(value)}\n" for name, value in table.items() if value is not None]
    return f"[{section}]\n{''.join(lines)}"


def config_of(kafka: SecureKafka, way: tuple[str, Mapping[str, Any], Mapping[str, Any]]) -> str:
    listener, security, ssl = way
    servers = kafka.servers if listener == "PLAINTEXT" else kafka.address(listener)
    return toml("Kafka", {"servers": servers}) + toml("Kafka.Security", security) + toml("Kafka.SSL", ssl)


def gives_nothing_away(broker: BrokerProcess) -> bool:
    return "-secret" not in broker.output.text


@pytest.mark.parametrize(
    "fault",
    [
        "wrong password",
        "unknown authority",
        "expired",
        "wrong host",
        "mechanism not enabled",
        "plain to TLS",
        "login missing behind TLS",
        "client certificate missing",
    ],
)
def test_a_fault_is_told_soon_and_mqtt_goes_on(
    secure_kafka: SecureKafka, brokers: Brokers, topic: str, fault: str
) -> None:
    way, text = FAULTS[fault]
    config = config_of(secure_kafka, way(secure_kafka)) + ARCHIVE.format("never-made")
    broker = brokers.make(config + EVERYTHING + "[Shutdown]\nTimeout = 1\n")
    began = time.monotonic()
    broker.launch()
    line = broker.output.wait_for("is away for").string
    assert time.monotonic() - began < START + SOON
    assert text in line
    broker.wait_for_listeners()
    with PahoClient(broker) as client:
        client.subscribe(topic, qos=1)
        client.publish(topic, "while Kafka is away", qos=1)
        assert [message.payload for message in client.received(1)] == [b"while Kafka is away"]
    broker.stop()
    assert [each for each in warnings_of(broker) if "away for" in each] == [line], "once"
    assert gives_nothing_away(broker)


def test_a_mistake_of_our_own_ends_the_start(secure_kafka: SecureKafka, brokers: Brokers) -> None:
    good = login(secure_kafka, "SCRAM-SHA-512", "alice")
    wrong = trust(secure_kafka) | {"truststore_password": "wrong-secret"}
    missing = trust(secure_kafka) | {"truststore_location": "/nowhere/trust.jks"}
    store = wrong["truststore_location"]
    for ssl, text in (
        (wrong, f"Kafka.SSL.TruststorePassword: {store}: the password does not open the store (JKS)"),
        (missing, "Kafka.SSL.TruststoreLocation: cannot read /nowhere/trust.jks: No such file or directory"),
    ):
        broker = brokers.make(config_of(secure_kafka, ("SASL_SSL", good, ssl)))
        broker.launch()
        assert broker.wait_for_exit() == 78
        assert f"1 mistake in the configuration\n  {text}" in broker.output.text
        assert gives_nothing_away(broker)


def test_two_nodes_with_their_secrets_in_files_and_in_the_environment(
    secure_kafka: SecureKafka, brokers: Brokers, topic: str, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(secure_kafka.PASSWORDS["alice"] + "\n")
    security = login(secure_kafka, "SCRAM-SHA-512", "alice") | {"sasl_password": None}
    ssl = trust(secure_kafka) | {"truststore_password": "${TRUSTSTORE_PASSWORD}"}
    archive = unique_name("archive")
    config = config_of(secure_kafka, ("SASL_SSL", security, ssl)).replace(
        "[Kafka.SSL]", f'SaslPasswordFile = "{tmp_path}/password"\n[Kafka.SSL]'
    )
    bus = toml("Kafka.Bus", {"enabled": True, "topic": unique_name("bus")})
    retained = toml("Kafka.Topics.Retained", {"name": unique_name("retained")})
    # kafka-python writes a traceback at DEBUG when a reader is closed that has just asked for metadata.
    no_stream = toml("Kafka.Topics.Messages", {"enabled": False})
    config += bus + retained + no_stream + ARCHIVE.format(archive) + EVERYTHING
    nodes = [brokers.make(config, name=name) for name in ("node-a", "node-b")]
    for node in nodes:
        node.environment["TRUSTSTORE_PASSWORD"] = secure_kafka.STORE_PASSWORD
        node.start()
    a, b = nodes
    with PahoClient(a) as publisher, PahoClient(b) as subscriber:
        subscriber.subscribe(topic, qos=1)
        publisher.publish(topic, "across", qos=1)
        assert [message.payload for message in subscriber.received(1)] == [b"across"]
    a.stop()
    b.stop()
    assert [json.loads(record.value)["payload"] for record in read_topic(secure_kafka, archive)] == ["across"]
    for node in nodes:
        assert warnings_of(node) == []
        assert gives_nothing_away(node)
