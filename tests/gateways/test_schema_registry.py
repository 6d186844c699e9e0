"""The client of a schema registry: what it asks, and what it says of each refusal [K8]."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateways.kafka import build, schema_registry
from gateways.kafka.avro import RECORD_NAME, schema_text
from gateways.kafka.doctor import examine
from gateways.kafka.options import KafkaOptions, SchemaRegistryOptions, SslOptions
from gateways.kafka.schema_registry import LARGEST_ANSWER, RegistryError, SchemaRegistry
from mqtt_trio.errors import ConfigError
from mqtt_trio.gateway import Verdict
from tests.certificates import Certificates
from tests.gateways.fake_registry import FakeRegistry, serve_registry
from tests.kafka_support import unique_name
from tests.registry_support import RegistryServer

PASSWORD = "registry-secret"


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with serve_registry() as served:
        yield served


def client(url: str, **others: Any) -> SchemaRegistry:
    return SchemaRegistry(KafkaOptions(schema_registry=SchemaRegistryOptions(url=url, **others)))


def test_a_schema_is_registered_and_found_by_its_id(fake: FakeRegistry) -> None:
    registry = client(fake.url + "/")
    number = registry.id_of("mqtt.archive-value", schema_text())
    assert registry.id_of("mqtt.archive-value", schema_text()) == number
    assert registry.schema(number) == schema_text()
    registry.look()
    assert fake.asked == [
        "POST /subjects/mqtt.archive-value/versions",
        "POST /subjects/mqtt.archive-value/versions",
        f"GET /schemas/ids/{number}",
        "GET /schemas/types",
    ]


def test_without_auto_register_it_is_only_looked_up(fake: FakeRegistry) -> None:
    registry = client(fake.url, auto_register=False)
    with pytest.raises(RegistryError, match=r"subject s does not have .*AutoRegister = true"):
        registry.id_of("s", schema_text())
    assert fake.subjects == {}
    fake.subjects["s"] = {schema_text(): 41}
    assert registry.id_of("s", schema_text()) == 41


@pytest.mark.parametrize(
    "strategy,subject",
    [
        ("TopicNameStrategy", "mqtt.archive-value"),
        ("RecordNameStrategy", "at.rocworks.kafka.MqttMessage"),
        ("TopicRecordNameStrategy", "mqtt.archive-at.rocworks.kafka.MqttMessage"),
    ],
)
def test_subject_names(strategy: str, subject: str) -> None:
    assert client("http://x", subject_name_strategy=strategy).subject("mqtt.archive", RECORD_NAME) == subject


def test_a_subject_is_quoted(fake: FakeRegistry) -> None:
    client(fake.url).id_of("a/b c", schema_text())
    assert "a/b c" in fake.subjects


def test_a_login_is_sent_and_never_shown(fake: FakeRegistry, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    fake.login = ("ada", PASSWORD)
    registry = client(fake.url, username="ada", password=PASSWORD)
    assert registry.id_of("s", schema_text()) == 1
    with pytest.raises(RegistryError, match=r"refuses the login of ada; .*Username and Password"):
        client(fake.url, username="ada", password="wrong").id_of("s", schema_text())
    with pytest.raises(RegistryError, match=r"wants a login; set Kafka\.SchemaRegistry\.Username"):
        client(fake.url).id_of("s", schema_text())
    fake.status, fake.answer = 500, b'{"message": "I heard registry-secret"}'
    with pytest.raises(RegistryError, match="I heard") as caught:
        registry.id_of("s", schema_text())
    assert PASSWORD not in str(caught.value) + repr(registry.options) + caplog.text


def test_an_incompatible_schema_says_what_can_be_done(fake: FakeRegistry) -> None:
    fake.incompatible = True
    fake.subjects["s"] = {'"string"': 1}
    with pytest.raises(
        RegistryError, match=r"not compatible with what subject s has: Schema being.*KafkaTopic"
    ) as caught:
        client(fake.url).id_of("s", schema_text())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "status,answer,text",
    [
        (403, b"", "does not let strangers at subject s"),
        (404, b"<html>", r"no schema registry under this path .*Url is the base"),
        (404, b'{"error_code": 404}', "no schema registry under this path"),
        (422, b'{"error_code": 42201, "message": "Invalid"}', "does not take the schema .*: Invalid"),
        (301, b"", "sends its clients elsewhere"),
        (418, b"", "answers 418"),
        (429, b"", "answers 429"),
        (503, b'{"message": "\\u001b[31m starting"}', r"answers 503 .*: \[31m starting"),
        (200, b"no json", "no id"),
        (200, b"[1]", "no id"),
        (200, b'{"id": true}', "no id"),
        (200, b'{"id": 2147483648}', "no id"),
        (200, b'{"id": -1}', "no id"),
        (200, b"[" * 100_000, "no id"),
        (200, b" " * (LARGEST_ANSWER + 1), "more than"),
    ],
)  # fmt: skip
def test_answers_of_no_use(fake: FakeRegistry, status: int, answer: bytes, text: str) -> None:
    fake.status, fake.answer = status, answer
    with pytest.raises(RegistryError, match=text) as caught:
        client(fake.url).id_of("s", schema_text())
    assert str(caught.value).startswith(f"schema registry {fake.url}: ")
    assert caught.value.retriable, "somebody may mend it"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_does_not_get_the_password(fake: FakeRegistry, status: int) -> None:
    with serve_registry() as other:
        fake.status, fake.headers = status, {"Location": f"{other.url}/subjects"}
        with pytest.raises(RegistryError, match="sends its clients elsewhere"):
            client(fake.url, username="ada", password=PASSWORD).look()
        assert other.asked == []


def test_schemas_that_are_not_there_or_no_avro(fake: FakeRegistry) -> None:
    with pytest.raises(RegistryError, match=r"no schema with the id 9; .* another registry") as caught:
        client(fake.url).schema(9)
    assert not caught.value.retriable
    fake.answer = b'{"schema": "{}", "schemaType": "JSON"}'
    with pytest.raises(RegistryError, match="schema 9 is no Avro schema") as caught:
        client(fake.url).schema(9)
    assert not caught.value.retriable


@pytest.mark.parametrize("status,answer", [(401, b""), (404, b"<html>"), (503, b""), (200, b"[]"), (200, b"{}")])
def test_a_reader_gives_no_record_up_for_what_can_be_mended(fake: FakeRegistry, status: int, answer: bytes) -> None:
    fake.status, fake.answer = status, answer
    with pytest.raises(RegistryError) as caught:
        client(fake.url).schema(9)
    assert caught.value.retriable


def test_nobody_there() -> None:
    for url, text in (
        ("http://127.0.0.1:1", "no connection: Connection refused"),
        ("http://no-such-host.invalid", "the host cannot be found"),
    ):
        with pytest.raises(RegistryError, match=text) as caught:
            client(url).look()
        assert caught.value.retriable


def test_who_is_silent_or_slow_does_not_hold_us_up(fake: FakeRegistry) -> None:
    began = time.monotonic()
    fake.gate.clear()
    with pytest.raises(RegistryError, match="no answer in time") as caught:
        client(fake.url, timeout=0.2).look()
    assert caught.value.retriable
    assert time.monotonic() - began < 5


def test_a_name_service_that_hangs_is_left_to_one_thread(fake: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no limit of its own; and however often it is tried again, one thread waits."""
    released, asked = threading.Event(), []
    resolve = socket.getaddrinfo

    def hang(*arguments: Any) -> Any:
        asked.append(arguments[0])
        assert released.wait(30)
        return resolve(*arguments)

    def waiting() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "schema-registry"]

    monkeypatch.setattr(schema_registry, "GRACE", -9.9)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    registry = client(fake.url, timeout=10.0)
    try:
        for _ in range(5):
            with pytest.raises(RegistryError, match="no answer in time") as caught:
                registry.schema(1)
            assert caught.value.retriable
        assert "does the name service answer" in str(caught.value)
        assert len(asked) == len(waiting()) == 1
    finally:
        released.set()
    for thread in waiting():
        thread.join(30)
    monkeypatch.undo()
    with pytest.raises(RegistryError, match="no schema with the id 1"):
        registry.schema(1)


def test_who_speaks_no_http_is_named() -> None:
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            connection.recv(65_536)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        with pytest.raises(RegistryError, match="does not speak HTTP here"):
            client(f"http://127.0.0.1:{server.getsockname()[1]}").look()
        thread.join()


def test_tls_is_verified(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    pair, other = certificates.issue("127.0.0.1"), certificates.issue("other.example")
    for issued, tls, text in (
        (pair, SslOptions(truststore_location=certificates.ca_file), None),
        (pair, SslOptions(), "its certificate is not accepted"),
        (other, SslOptions(truststore_location=certificates.ca_file), "its certificate is not accepted"),
        (other, SslOptions(truststore_location=certificates.ca_file, endpoint_identification_algorithm=""), None),
    ):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(issued.cert_file, issued.key_file)
        with serve_registry(context) as served:
            registry = client(served.url, ssl=tls)
            if text is None:
                registry.look()
            else:
                with pytest.raises(RegistryError, match=text):
                    registry.look()


# --- options


@pytest.mark.parametrize(
    "values,text",
    [
        ({"url": "registry:8081"}, "expected an https:// or http:// URL"),
        ({"url": "http://ada:registry-secret@x"}, "the URL holds credentials"),
        ({"url": "http://x:port"}, "expected an https"),
        ({"url": "http://x?y"}, "without a query"),
        ({"username": "ada", "password": PASSWORD}, "Url is missing"),
        ({"url": "http://x", "username": "ada"}, "belong together"),
        ({"url": "http://x", "username": "a:b", "password": PASSWORD}, "a colon cannot stand in it"),
        ({"url": "http://x", "subject_name_strategy": "Mine"}, "must be in"),
        ({"url": "http://x", "timeout": 0}, "must be >="),
    ],
)
def test_mistakes_in_the_options_are_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        SchemaRegistryOptions(**values)
    assert PASSWORD not in str(caught.value)


def test_stores_are_looked_at_when_the_gateway_is_made() -> None:
    def problem(url: str) -> str:
        tls = SslOptions(truststore_location="/nowhere/ca.pem")
        with pytest.raises(ConfigError) as caught:
            build(KafkaOptions(schema_registry=SchemaRegistryOptions(url=url, ssl=tls)))
        return caught.value.problems[0]

    assert problem("https://x").startswith("Kafka.SchemaRegistry.SSL.TruststoreLocation: cannot read /nowhere/ca.pem")
    assert problem("http://x").startswith("Kafka.SchemaRegistry.SSL: an http:// Url does without TLS")


def test_a_password_in_the_clear_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    login: dict[str, Any] = {"username": "ada", "password": PASSWORD}
    build(KafkaOptions(schema_registry=SchemaRegistryOptions(url="http://127.0.0.1:1", **login)))
    assert not caplog.records
    build(KafkaOptions(schema_registry=SchemaRegistryOptions(url="http://registry.example", **login)))
    assert "over http:// the password is sent in the clear" in caplog.text


# --- doctor


def test_the_doctor_looks_at_the_registry(fake: FakeRegistry) -> None:
    def found(**others: Any) -> list[tuple[Verdict, str]]:
        registry = SchemaRegistryOptions(url=fake.url, **others)
        findings = examine(KafkaOptions(servers="127.0.0.1:1", schema_registry=registry), ())
        return [(one.verdict, one.text) for one in findings if one.about == "schema registry"]

    assert found() == [(Verdict.OK, f"{fake.url} answers, and knows Avro")]
    fake.login = ("ada", PASSWORD)
    ((verdict, text),) = found(username="ada", password="wrong")
    assert verdict is Verdict.PROBLEM
    assert "refuses the login of ada" in text
    assert not any(one.about == "schema registry" for one in examine(KafkaOptions(servers="127.0.0.1:1"), ()))


# --- a real one


@pytest.mark.kafka
def test_a_real_registry_understands_us(schema_registry: RegistryServer) -> None:
    registry = client(schema_registry.url, timeout=60)
    registry.look()
    subject = f"{unique_name('real')}-value"
    with pytest.raises(RegistryError, match=f"subject {subject} does not have"):
        client(schema_registry.url, timeout=60, auto_register=False).id_of(subject, schema_text())
    number = registry.id_of(subject, schema_text())
    assert client(schema_registry.url, timeout=60, auto_register=False).id_of(subject, schema_text()) == number
    assert registry.schema(number) == schema_text()
    with pytest.raises(RegistryError, match="no schema with the id 99999"):
        registry.schema(99_999)
    with pytest.raises(RegistryError, match="no schema registry under this path"):
        client(schema_registry.url.rpartition("/apis")[0], timeout=60).id_of(subject, schema_text())


@pytest.mark.kafka
def test_a_real_registry_refuses_what_is_incompatible(schema_registry: RegistryServer) -> None:
    subject = f"{unique_name('taken')}-value"
    schema_registry.ask("POST", f"/subjects/{subject}/versions", {"schema": '"string"'})
    schema_registry.ask("PUT", f"/config/{subject}", {"compatibility": "BACKWARD"})
    with pytest.raises(RegistryError, match=f"not compatible with what subject {subject} has"):
        client(schema_registry.url, timeout=60).id_of(subject, schema_text())
