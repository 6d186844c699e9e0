"""Health, readiness and metrics of a broker process beside a Kafka that comes and goes [K1, O3]."""

from __future__ import annotations

import http.client
import json
import re
from contextlib import closing
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.cluster import Cluster
from tests.interop.paho_support import PahoClient
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.interop]

RECOVERY_LIMIT: Final = 60.0
TOKEN: Final = "a-token-of-this-test"
HTTP_LINE: Final = r"^  http +http 127\.0\.0\.1:(\d+)"


def get(port: int, path: str, token: str | None = None) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def wait_for_readiness(port: int, status: int) -> None:
    wait_until(lambda: get(port, "/readyz")[0] == status, f"/readyz answers {status}", limit=RECOVERY_LIMIT)


def port_of(broker: BrokerProcess) -> int:
    return int(broker.output.wait_for(HTTP_LINE)[1])


def test_readiness_while_kafka_is_away(own_kafka: KafkaNode, brokers: Brokers) -> None:
    """A node that only archives has no traffic that would tell; its clients go on, and it says what is missing."""
    topic = unique_name("archive")
    group = f'[[ArchiveGroups]]\nName = "G"\nFilter = "#"\nStore = "KAFKA"\nKafkaTopic = "{topic}"\n'
    archiving = brokers.start(f'[Kafka]\nServers = "{own_kafka.servers}"\n{group}[Http]\nPort = 0\n', name="archiving")
    joined = brokers.start(Cluster(own_kafka).config("[Http]\nPort = 0\n"), name="joined")
    ports = [port_of(archiving), port_of(joined)]
    for port in ports:
        wait_for_readiness(port, 200)
    own_kafka.kill()
    for port in ports:
        wait_for_readiness(port, 503)
        (reason,) = json.loads(get(port, "/readyz")[1])["reasons"]
        assert reason.startswith(f"Kafka at {own_kafka.servers} is away: {own_kafka.servers} refuses connections")
        assert get(port, "/healthz")[0] == 200
    with PahoClient(archiving) as client:
        client.subscribe("a")
        client.publish("a", "served all the same", qos=1)
        assert client.received(1)
    own_kafka.start()
    for port in ports:
        wait_for_readiness(port, 200)
        check_kafka_figures(get(port, "/metrics")[1])


def check_kafka_figures(text: str) -> None:
    """Each figure of the gateway says what it counts."""
    found = [family for family in text_string_to_metric_families(text) if family.name.startswith("mqtt_trio_kafka_")]
    assert len(found) > 5
    assert [family.name for family in found if not re.fullmatch(r"[A-Z].*\.", family.documentation)] == []
    (outages,) = [family.samples[0].value for family in found if family.name == "mqtt_trio_kafka_outages"]
    assert outages >= 1  # a Kafka that has just come back may be too slow once more on a busy machine


def test_a_token_is_asked_for_and_shown_nowhere(brokers: Brokers) -> None:
    """The whole way: a file with the token, a listener for everybody, the log."""
    broker = brokers.make('[Http]\nHost = "0.0.0.0"\nPort = 0\nTokenFile = "token"\n')
    file = broker.directory / "token"
    file.write_text(f"{TOKEN}\n")
    broker.config_file.write_text(broker.config_file.read_text().replace('"token"', f'"{file}"'))
    broker.start()
    port = int(broker.output.wait_for(r"^  http +http 0\.0\.0\.0:(\d+): everybody .*; with a token")[1])
    for path in ("/", "/healthz", "/readyz", "/metrics", "/none"):
        assert get(port, path)[0] == 401
        assert get(port, path, f"{TOKEN}x")[0] == 401
        status, body = get(port, path, TOKEN)
        assert status == (404 if path == "/none" else 200)
        assert TOKEN not in body
    broker.stop()
    assert TOKEN not in broker.output.text
