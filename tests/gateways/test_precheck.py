"""Why Kafka does not let us in: every fault has its own words, soon, and shows no secret [K2]."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from gateways.kafka.cluster import REFUSAL_MEMORY, AwayError, Cluster
from gateways.kafka.options import KafkaOptions, SecurityOptions, SslOptions
from gateways.kafka.precheck import LIMIT, Fault, precheck, probe, split_server
from tests.certificates import Certificates
from tests.gateways.secured import FAULTS, WAYS, options_of
from tests.kafka_support import SecureKafka

SLACK = 1.5
"""Seconds that a busy machine may take beyond the limit."""


def ask(options: KafkaOptions) -> str | None:
    return probe(options)(options.server_names)


@pytest.mark.kafka
@pytest.mark.parametrize("name", WAYS)
def test_every_way_that_is_right_is_found_right(secure_kafka: SecureKafka, name: str) -> None:
    options = options_of(secure_kafka, WAYS[name](secure_kafka))
    steps = precheck(options, options.server_names[0])
    assert [step.fault for step in steps] == [None] * len(steps)
    names = [step.name for step in steps]
    assert [names[0], names[1], names[-1]] == ["name", "tcp", "brokers"]
    assert ("tls" in names, "login" in names) == (
        options.security.protocol.endswith("SSL"),
        options.security.protocol.startswith("SASL"),
    )
    assert ask(options) is None


@pytest.mark.kafka
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_has_its_own_words(secure_kafka: SecureKafka, name: str) -> None:
    way, expected = FAULTS[name]
    options = options_of(secure_kafka, way(secure_kafka))
    began = time.monotonic()
    reason = ask(options)
    assert time.monotonic() - began < LIMIT + SLACK
    assert reason is not None
    assert expected in reason
    assert "\n" not in reason
    assert "-secret" not in reason


@pytest.mark.kafka
def test_a_wrong_password_is_tried_at_one_server_only(
    secure_kafka: SecureKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateways.kafka.precheck.HEAD_START", LIMIT)
    wrong = options_of(secure_kafka, FAULTS["wrong password"][0](secure_kafka))
    reason = probe(wrong)([*wrong.server_names, "127.0.0.1:1", "127.0.0.1:2"])
    assert str(reason).count("127.0.0.1") == 1
    assert "refuses the login of alice" in str(reason)


@pytest.mark.kafka
def test_a_glance_does_not_log_in(secure_kafka: SecureKafka) -> None:
    wrong = options_of(secure_kafka, FAULTS["wrong password"][0](secure_kafka))
    assert probe(wrong, log_in=False)(wrong.server_names) is None
    expired = options_of(secure_kafka, FAULTS["expired"][0](secure_kafka))
    assert "has expired" in str(probe(expired, log_in=False)(expired.server_names))


@pytest.mark.kafka
def test_one_good_server_is_enough(secure_kafka: SecureKafka) -> None:
    listener, security, tls = WAYS["PLAINTEXT"](secure_kafka)
    good = options_of(secure_kafka, (listener, security, tls))
    assert probe(good)(["127.0.0.1:1", "no-such-host.invalid:9092", *good.server_names]) is None


@pytest.mark.kafka
def test_the_check_of_names_can_be_switched_off(secure_kafka: SecureKafka) -> None:
    listener, security, tls = FAULTS["wrong host"][0](secure_kafka)
    tls["endpoint_identification_algorithm"] = ""
    assert ask(options_of(secure_kafka, (listener, security, tls))) is None
    # Whether the authority is trusted and the certificate valid is looked at nevertheless.
    listener, security, tls = FAULTS["expired"][0](secure_kafka)
    tls["endpoint_identification_algorithm"] = ""
    assert "has expired" in str(ask(options_of(secure_kafka, (listener, security, tls))))


# Without Kafka


@contextmanager
def serving(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve on loopback; `behave` gets each connection, which is closed when it returns."""
    kept: list[threading.Thread] = []

    def handle(connection: socket.socket) -> None:
        with closing(connection):
            try:
                behave(connection)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            kept.append(threading.Thread(target=handle, args=(connection,)))
            kept[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for each in kept:
                each.join()


def reads_until_the_end(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def says(data: bytes) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        connection.sendall(data)
        reads_until_the_end(connection)

    return behave


API_VERSIONS = b"\0\0\0\x0a\0\0\0\1\0\0\0\0\0\0"


@pytest.mark.parametrize(
    "behave,fault,text",
    [
        (says(b"SSH-2.0-OpenSSH_9.2\r\n"), Fault.NOT_KAFKA, "is not Kafka, it answers 'SSH-2.0-OpenSSH_9.2..'"),
        (says(b"HTTP/1.1 400 Bad\x1b[31m"), Fault.NOT_KAFKA, "it answers 'HTTP/1.1 400 Bad.[31m'"),
        (says(b"\x15\x03\x03\0\2\2\x50"), Fault.NEEDS_TLS, "speaks TLS"),
        (says(b"\0\0\0\4\0\0\0\1"), Fault.NOT_KAFKA, "is not Kafka"),
        (says(b"\0\0\0\6\0\0\0\1\0\x23"), Fault.NOT_KAFKA, "answers the first request of Kafka with error 35"),
        (says(b"\0\0\0\x0a\0\0\0\2\0\0\0\0\0\0"), Fault.NOT_KAFKA, "is not Kafka"),
        (says(API_VERSIONS + b"\0\0\0\x06\0\0\0\1\x7f\xff"), Fault.LOST, "ends the connection"),
        (lambda connection: None, Fault.NOT_KAFKA, "ends the connection at the first request of Kafka"),
        (reads_until_the_end, Fault.SILENT, "does not answer a request of Kafka"),
    ],
)
def test_what_is_no_kafka_is_told(behave: Callable[[socket.socket], None], fault: Fault, text: str) -> None:
    with serving(behave) as server:
        step = precheck(KafkaOptions(servers=server), server)[-1]
    assert (step.fault, text in step.text) == (fault, True), step


@pytest.mark.parametrize(
    "server,fault",
    [("127.0.0.1:1", Fault.REFUSED), ("no-such-host.invalid", Fault.UNKNOWN_HOST), ("a..b:1", Fault.UNKNOWN_HOST)],
)
def test_nobody_there(server: str, fault: Fault) -> None:
    assert precheck(KafkaOptions(servers=server), server)[-1].fault is fault


def test_a_frozen_server_takes_no_longer_than_the_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = [f"127.0.0.1:{server.getsockname()[1]}"] * 5
        began = time.monotonic()
        reason = probe(KafkaOptions(servers=names))(names)
    assert time.monotonic() - began < LIMIT + SLACK
    assert str(reason).count("does not answer") == 5


def test_silence_keeps_no_client_from_trying() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        name = f"127.0.0.1:{server.getsockname()[1]}"
        options = KafkaOptions(servers=name)
        assert probe(options, certain=True)([name]) is None
    assert "refuses connections" in str(probe(options, certain=True)([name]))


def test_parts_that_come_together_share_one_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked, refusal = [0.0], [0], ["no"]

    def gate(servers: Sequence[str]) -> str | None:
        asked[0] += 1
        return refusal[0] or None

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cluster = Cluster(["k"], lambda servers: "other", gate=gate)
    for _ in range(3):
        with pytest.raises(AwayError, match="no"):
            cluster.when_let_in(lambda: "client")
    assert (asked[0], cluster.probe()) == (1, "no")
    refusal[0] = ""
    now[0] += REFUSAL_MEMORY
    assert cluster.probe() == "other"
    assert cluster.when_let_in(lambda: "client") == cluster.when_let_in(lambda: "client") == "client"
    assert asked[0] == 3, "that it lets us in is not remembered"


def test_a_name_service_that_hangs_takes_no_longer_either(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hanging.wait(30) and [])
    began = time.monotonic()
    step = precheck(KafkaOptions(servers="k"), "k")[-1]
    hanging.set()
    assert time.monotonic() - began < LIMIT + SLACK
    assert (step.name, step.fault) == ("name", Fault.SILENT)


def test_brokers_that_send_clients_on_to_nowhere_are_told() -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(API_VERSIONS)
        connection.recv(4096)
        host = b"no-such-host.invalid"
        brokers = b"\0\0\0\1" + b"\0\0\0\1" + b"\0\x14" + host + b"\0\0\x23\x84" + b"\xff\xff" + b"\0\0\0\1\0\0\0\0"
        connection.sendall((4 + len(brokers)).to_bytes(4, "big") + b"\0\0\0\1" + brokers)
        reads_until_the_end(connection)

    with serving(behave) as server:
        step = precheck(KafkaOptions(servers=server), server)[-1]
    assert step.fault is Fault.ADVERTISED
    assert "no-such-host.invalid:9092 cannot be found" in step.text
    assert "advertised.listeners" in step.mend


def test_a_login_that_gets_no_answer_is_silence() -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(API_VERSIONS)
        connection.recv(4096)
        connection.sendall(b"\0\0\0\x0a\0\0\0\1\0\0\0\0\0\0")  # it has the mechanism
        reads_until_the_end(connection)

    security = SecurityOptions(
        protocol="SASL_PLAINTEXT", sasl_mechanism="PLAIN", sasl_username="u", sasl_password="p-secret"
    )
    with serving(behave) as server:
        options = KafkaOptions(servers=server, security=security)
        step = precheck(options, server)[-1]
        assert probe(options, certain=True)([server]) is None
    assert (step.name, step.fault, step.text) == ("login", Fault.SILENT, "does not answer the login")


def test_an_address_that_is_a_black_hole_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(says(API_VERSIONS)) as server, socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with ExitStack() as stack:
            for _ in range(3):  # a queue of one that nobody takes from: the next connection hangs
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            answers = [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in (full.getsockname(), split_server(server))
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
            steps = precheck(KafkaOptions(servers="k"), "k")
    assert [step.name for step in steps if step.fault is None][:3] == ["name", "tcp", "kafka"]


def test_tls_that_is_no_kafka(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    pair = certificates.issue("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert_file, pair.key_file)

    def behave(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(100)
            secure.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    tls = SslOptions(truststore_location=certificates.ca_file)
    with serving(behave) as server:
        options = KafkaOptions(servers=server, security=SecurityOptions(protocol="SSL"), ssl=tls)
        step = precheck(options, server)[-1]
    assert (step.name, step.fault) == ("kafka", Fault.NOT_KAFKA)
    assert "HTTP/1.1 400" in step.text


@pytest.mark.parametrize(
    "server,expected",
    [("a", ("a", 9092)), ("a:1", ("a", 1)), ("[::1]", ("::1", 9092)), ("[::1]:7", ("::1", 7))],
)
def test_servers_are_split(server: str, expected: tuple[str, int]) -> None:
    assert split_server(server) == expected
