"""The same page over WSS: MQTT.js in Chromium, the listener's certificate of an authority made for the test."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.certificates import Certificates
from tests.interop.broker_process import WEBSOCKET_LINE, BrokerProcess, brokers_in
from tests.interop.browser import Page, open_page
from tests.interop.paho_support import Heard
from tests.interop.test_browser import PAYLOADS, exchange, versions

pytestmark = pytest.mark.interop

LISTENER = """
[[Listeners]]
Type = "websocket"
Host = "127.0.0.1"
Port = 0
Tls = {{ CertFile = "{cert}", KeyFile = "{key}" }}
"""


class Secure:
    """A broker with a WSS listener, and how Chromium is told to trust its certificate and no other."""

    def __init__(self, broker: BrokerProcess, cert_file: str) -> None:
        self.broker = broker
        port = broker.output.wait_for(WEBSOCKET_LINE, count=2)[1]
        self.server = f"wss://127.0.0.1:{port}"
        public_key = x509.load_pem_x509_certificate(Path(cert_file).read_bytes()).public_key()
        digest = hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
        self.trust = f"--ignore-certificate-errors-spki-list={base64.b64encode(digest).decode()}"


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    folder = tmp_path_factory.mktemp("wss")
    pair = Certificates(folder).issue("127.0.0.1")
    with brokers_in(folder) as made:
        yield Secure(made.start(LISTENER.format(cert=pair.cert_file, key=pair.key_file)), pair.cert_file)


@pytest.fixture(scope="module")
def page(secure: Secure, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("chromium"), [secure.trust]) as opened:
        yield opened


@versions
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_both_directions(secure: Secure, page: Page, topic: str, version: int, qos: int) -> None:
    up = [Heard(f"{topic}/up/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    down = [Heard(f"{topic}/down/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    heard = exchange(secure.broker, page, topic, version=version, path="/mqtt", up=up, down=down, server=secure.server)
    assert heard == (up, down)


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_paho_js(secure: Secure, page: Page, topic: str, qos: int) -> None:
    up = [Heard(f"{topic}/up/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    heard = exchange(
        secure.broker, page, topic, version=4, path="/mqtt", up=up, down=[], server=secure.server, library="paho"
    )
    assert heard == (up, [])


def test_a_certificate_that_nobody_vouches_for_is_refused(secure: Secure, tmp_path: Path, topic: str) -> None:
    """The browser decides, and the broker goes on."""
    job = {"url": f"{secure.server}/mqtt", "version": 5, "client_id": "distrustful", "filter": topic}
    with open_page(tmp_path) as distrustful:
        report = distrustful.wait_for(distrustful.start({**job, "messages": [], "go": "", "end": ""}), "failed")
        assert report
    assert secure.broker.running
