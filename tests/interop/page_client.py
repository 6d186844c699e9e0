"""An MQTT client in the page of a browser, and the TCP client that it talks with."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.certificates import Certificates
from tests.interop.broker_process import WEBSOCKET_LINE, BrokerProcess, brokers_in
from tests.interop.browser import Page
from tests.interop.paho_support import V5, V311, Heard, PahoClient

GO: Final = "now you"
END: Final = "end of test"
PAYLOADS: Final = (b"21.5", b"", bytes(range(256)), "Grüße, 世界".encode(), bytes(1000) * 200)

LISTENER: Final = """
[[Listeners]]
Type = "websocket"
Host = "127.0.0.1"
Port = 0
Tls = {{ CertFile = "{cert}", KeyFile = "{key}" }}
"""


class Secure:
    """A broker with a WSS listener, and how Chromium is told to trust its certificate and no other."""

    def __init__(self, broker: BrokerProcess, cert_file: str, ca_file: str) -> None:
        self.broker = broker
        self.ca_file = ca_file
        self.port = int(broker.output.wait_for(WEBSOCKET_LINE, count=2)[1])
        self.server = f"wss://127.0.0.1:{self.port}"
        public_key = x509.load_pem_x509_certificate(Path(cert_file).read_bytes()).public_key()
        digest = hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
        self.trust = f"--ignore-certificate-errors-spki-list={base64.b64encode(digest).decode()}"


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    """A broker with TCP, WS and WSS listeners for all tests of a module."""
    folder = tmp_path_factory.mktemp("wss")
    certificates = Certificates(folder)
    pair = certificates.issue("127.0.0.1")
    with brokers_in(folder) as made:
        broker = made.start(LISTENER.format(cert=pair.cert_file, key=pair.key_file))
        yield Secure(broker, pair.cert_file, certificates.ca_file)


@attrs.frozen
class PageClient:
    """How a client in the page connects and what it does there."""

    broker: BrokerProcess
    version: int
    """Protocol Level: 3 (3.1), 4 (3.1.1) or 5."""
    library: Literal["mqtt.js", "paho"] = "mqtt.js"
    server: str = ""
    """`wss://...` of another listener; empty: the broker's WS listener."""
    path: str = "/mqtt"
    client_id: str = ""
    """Empty: one that goes with the topic, the library and the version."""
    clean: bool = True
    session_expiry_interval: int = 0
    topic_alias_maximum: int = 0
    assign_aliases: bool = False
    """Publish with Topic Aliases, as many as the broker allows."""
    answers: bool = False
    """Answer what has a Response Topic: its payload in capitals."""
    will: Heard | None = None
    will_delay: int = 0
    filters: tuple[str, ...] = ()
    """Topic Filters beside `{topic}/down/#`."""
    qos: int = 2

    def job(self, topic: str, messages: Sequence[Heard] = (), *, in_tab: bool = False) -> dict[str, Any]:
        """Return what the page is told. `messages`: what it publishes; `in_tab`: in a tab of its own, closed as soon as
        the client is connected."""
        facts = attrs.asdict(self, recurse=False, filter=attrs.filters.exclude("broker", "server", "path"))
        return facts | {
            "url": (self.server or f"ws://127.0.0.1:{self.broker.ws_port}") + self.path,
            # Paho JS follows the 23 characters of 3.1.
            "client_id": self.client_id or f"p{topic.rpartition('/')[2][:20]}{self.library[0]}{self.version}",
            "filters": [f"{topic}/down/#", *self.filters],
            "messages": [for_page(message) for message in messages],
            "will": None if self.will is None else for_page(self.will),
            "in_tab": in_tab,
            "go": GO,
            "end": END,
        }


def for_page(message: Heard) -> dict[str, Any]:
    """Put a message in the words of the page."""
    facts = attrs.asdict(message)
    facts["payload"] = message.payload.hex()
    facts["correlation_data"] = None if message.correlation_data is None else message.correlation_data.hex()
    return facts


def from_page(facts: dict[str, Any]) -> Heard:
    """Read a message in the words of the page."""
    data = facts["correlation_data"]
    known = {name: facts[name] for name in attrs.fields_dict(Heard)}
    return Heard(
        **known
        | {
            "payload": bytes.fromhex(facts["payload"]),
            "user_properties": tuple((name, value) for name, value in facts["user_properties"]),
            "correlation_data": None if data is None else bytes.fromhex(data),
        }
    )


class Conversation:
    """A client in the page that has its SUBACKs, and a TCP client: `device` hears `{topic}/up/#`, the page
    `{topic}/down/#`."""

    def __init__(self, page: Page, topic: str, client: PageClient, messages: Sequence[Heard] = ()) -> None:
        self.page = page
        self.topic = topic
        self.up_count = sum(message.topic.startswith(f"{topic}/up/") for message in messages)
        self.device = PahoClient(client.broker, version=V5 if client.version == 5 else V311)
        self.sent: list[tuple[str, int | None]] = []
        """Topic Name and Topic Alias of each PUBLISH that MQTT.js put on the wire, known at the end."""
        self.shortened: list[bool] = []
        """Whether each message came with an alias in place of its Topic Name, known at the end."""
        try:
            self.device.subscribe(f"{topic}/up/#")
            self.job = page.start(client.job(topic, messages))
            assert page.wait_for(self.job, "ready")["granted"] == [client.qos] * (1 + len(client.filters))
        except BaseException:
            self.device.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.device.close()

    def let_page_publish(self) -> list[Heard]:
        """Let the page publish its messages; return what the TCP client heard."""
        self.device.publish(f"{self.topic}/down/go", GO, qos=2)
        self.page.wait_for(self.job, "go")
        heard = self.device.received(self.up_count)
        self.device.publish(f"{self.topic}/up/end", END, qos=2)
        assert self.device.until(END.encode()) == heard, "more than was published"
        return heard

    def end(self) -> list[Heard]:
        """Let the client in the page, and others of the same topic, disconnect; return what it heard."""
        self.device.publish(f"{self.topic}/down/end", END, qos=2)
        return self.ended()

    def ended(self) -> list[Heard]:
        """Wait until the client in the page has disconnected; return what it heard."""
        report = self.page.wait_for(self.job, "done")
        self.sent = [(topic, alias) for topic, alias in report["sent"]]
        self.shortened = [facts["shortened"] for facts in report["messages"]]
        return [from_page(facts) for facts in report["messages"]]


def exchange(
    page: Page, topic: str, client: PageClient, up: Sequence[Heard], down: Sequence[Heard]
) -> tuple[list[Heard], list[Heard]]:
    """Let the page publish `up` and a TCP client publish `down`; return what the TCP client and what the page heard."""
    with Conversation(page, topic, client, up) as conversation:
        for message in down:
            conversation.device.publish_message(message)
        return conversation.let_page_publish(), conversation.end()


def connect_in_tab(page: Page, topic: str, client: PageClient) -> None:
    """Let a client connect in a tab of the browser, and close the tab: it sends no DISCONNECT."""
    page.wait_for(page.start(client.job(topic, in_tab=True)), "closed")
