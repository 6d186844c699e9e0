"""mosquitto_pub and mosquitto_sub over TLS, with a broker as people run it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import Certificates, Pair
from tests.interop.broker_process import BrokerProcess, brokers_in
from tests.interop.mosquitto import Received, Subscriber, publish
from tests.lines import LIMIT, require_tool

pytestmark = pytest.mark.interop

TLS_LISTENER = """
[[Listeners]]
Port = 0
Tls = {{ CertFile = "{0.cert_file}", KeyFile = "{0.key_file}", KeyPasswordFile = "{1}" }}

[[Listeners]]
Host = "127.0.0.2"
Port = 0
Tls = {{ CertFile = "{0.cert_file}", KeyFile = "{0.key_file}", KeyPasswordFile = "{1}", CaFile = "{2}", \
RequireClientCert = true }}
"""


class SecureBroker:
    """A broker with a TLS listener and one that wants client certificates."""

    def __init__(self, broker: BrokerProcess, certificates: Certificates) -> None:
        self.broker = broker
        self.certificates = certificates
        self.port = int(broker.output.wait_for(r"tcp\+tls 127\.0\.0\.1:(\d+)")[1])
        self.mutual_port = int(broker.output.wait_for(r"tcp\+tls 127\.0\.0\.2:(\d+)")[1])
        self.trust = ["--cafile", certificates.ca_file]

    def as_client(self, pair: Pair) -> list[str]:
        return ["-h", "127.0.0.2", *self.trust, "--insecure", "--cert", pair.cert_file, "--key", pair.key_file]


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    folder = tmp_path_factory.mktemp("tls")
    certificates = Certificates(folder)
    pair = certificates.issue("localhost", "127.0.0.1", password="a secret")
    password = folder / "password"
    password.write_text("a secret\n")
    with brokers_in(folder) as made:
        yield SecureBroker(made.start(TLS_LISTENER.format(pair, password, certificates.ca_file)), certificates)


def attempt(port: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Run mosquitto_pub, which may fail."""
    command = [require_tool("mosquitto_pub"), "-h", "127.0.0.1", "-p", str(port), "-t", "t", "-m", "m", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)


@pytest.mark.parametrize("version", ["mqttv31", "mqttv311", "mqttv5"])
@pytest.mark.parametrize("tls", ["tlsv1.2", "tlsv1.3"])
def test_messages_over_tls(secure: SecureBroker, topic: str, version: str, tls: str) -> None:
    options = [*secure.trust, "--tls-version", tls, "--tls-alpn", "mqtt"]
    with Subscriber(secure.port, topic, version=version, options=options) as subscriber:
        for qos in (0, 1, 2):
            publish(secure.port, topic, f"at {qos}", version=version, qos=qos, options=options)
        assert subscriber.received(3) == [Received(topic, f"at {qos}".encode(), qos) for qos in (0, 1, 2)]


def test_tls_and_plain_clients_meet(secure: SecureBroker, topic: str) -> None:
    with Subscriber(secure.port, topic, version="mqttv5", options=secure.trust) as subscriber:
        publish(secure.broker.port, topic, "across", version="mqttv311", qos=1)
        assert subscriber.received(1) == [Received(topic, b"across", 1)]


def test_a_client_with_the_wrong_authority(secure: SecureBroker, tmp_path: Path) -> None:
    done = attempt(secure.port, "--cafile", Certificates(tmp_path, "other").ca_file)
    assert done.returncode != 0
    secure.broker.output.wait_for("does not accept the certificate of this server")


def test_a_client_without_tls_is_named(secure: SecureBroker) -> None:
    assert attempt(secure.port).returncode != 0
    secure.broker.output.wait_for("failed: a plain MQTT CONNECT came; this port speaks TLS")


def test_client_certificates(secure: SecureBroker, tmp_path: Path) -> None:
    good = secure.certificates.client("sensor-1")
    assert attempt(secure.mutual_port, *secure.as_client(good), "-V", "5", "-q", "1").returncode == 0
    stranger = Certificates(tmp_path, "stranger").client("sensor-1")
    assert attempt(secure.mutual_port, *secure.as_client(stranger)).returncode != 0
    secure.broker.output.wait_for("failed: the certificate of the client is refused")
    assert attempt(secure.mutual_port, "-h", "127.0.0.2", *secure.trust, "--insecure").returncode != 0
    secure.broker.output.wait_for("failed: the client showed no certificate")


def test_the_summary_names_what_is_served(secure: SecureBroker) -> None:
    text = secure.broker.output.text
    assert f"tcp+tls 127.0.0.1:{secure.port}: this machine only (loopback address); TLS 1.2 and 1.3" in text
    assert "client certificates required" in text
    assert "a secret" not in text
