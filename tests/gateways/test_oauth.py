"""OAuth tokens for logins at Kafka: fixed, from a file, from an endpoint [K2]."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from gateways.kafka import oauth
from gateways.kafka.oauth import TokenError, Tokens
from gateways.kafka.options import KafkaOptions, SecurityOptions, SslOptions
from gateways.kafka.precheck import precheck
from gateways.kafka.security import Security
from tests.certificates import Certificates
from tests.gateways.secured import unsigned_token
from tests.kafka_support import SecureKafka

SECRET = "client+secret/ä"


@attrs.define
class Endpoint:
    """A token endpoint: what it answers, and what it was asked."""

    url: str
    status: int = 200
    answer: bytes = b'{"access_token": "one", "expires_in": 100}'
    headers: dict[str, str] = attrs.field(factory=dict)
    asked: list[tuple[str, dict[str, list[str]]]] = attrs.field(factory=list)
    """Authorization and form of each request."""

    def says(self, token: str, expires_in: float | None = 100) -> None:
        self.answer = json.dumps({"access_token": token, "expires_in": expires_in}).encode()


@contextmanager
def serve_tokens(context: ssl.SSLContext | None = None) -> Iterator[Endpoint]:
    """Serve tokens on loopback."""
    served: Endpoint

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            form = self.rfile.read(int(self.headers["Content-Length"])).decode()
            served.asked.append((self.headers["Authorization"], urllib.parse.parse_qs(form)))
            self.send_response(served.status)
            for name, value in served.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(served.answer)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # clients that do not trust its certificate

    with Server(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        served = Endpoint(f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}/token")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serve_tokens() as served:
        yield served


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time, as tokens see it."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def options_for(endpoint: Endpoint, **others: Any) -> SecurityOptions:
    return SecurityOptions(
        protocol="SASL_SSL",
        sasl_mechanism="OAUTHBEARER",
        sasl_oauth_token_endpoint_url=endpoint.url,
        sasl_oauth_client_id="my client",
        sasl_oauth_client_secret=SECRET,
        **others,
    )


def tokens_for(endpoint: Endpoint, **others: Any) -> Tokens:
    return Tokens(options_for(endpoint, **others), ssl.create_default_context)


def test_a_fixed_token() -> None:
    assert (
        Tokens(SecurityOptions(sasl_oauth_token="a.b-c_d~e+f/g=="), ssl.create_default_context).token()
        == "a.b-c_d~e+f/g=="
    )


@pytest.mark.parametrize("text", ["", "two words", "a\x01auth=x", "ä", "line\nline"])
def test_what_is_no_token_is_not_sent(text: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    for options in (SecurityOptions(sasl_oauth_token=text), SecurityOptions(sasl_oauth_token_file=str(file))):
        with pytest.raises(TokenError, match="what it holds is no token"):
            Tokens(options, ssl.create_default_context).token()


def test_a_file_is_read_at_each_login(tmp_path: Path) -> None:
    file = tmp_path / "token"
    tokens = Tokens(SecurityOptions(sasl_oauth_token_file=str(file)), ssl.create_default_context)
    with pytest.raises(TokenError, match=r"SaslOauthTokenFile: cannot read .*: No such file"):
        tokens.token()
    for text in ("first", "second"):
        file.write_text(text + "\n")
        assert tokens.token() == text


def test_an_endpoint_is_asked_with_the_clients_own_credentials(endpoint: Endpoint) -> None:
    assert tokens_for(endpoint, sasl_oauth_scope="kafka write").token() == "one"
    ((authorization, form),) = endpoint.asked
    assert authorization == "Basic bXkrY2xpZW50OmNsaWVudCUyQnNlY3JldCUyRiVDMyVBNA=="  # both encoded: RFC 6749, 2.3.1
    assert form == {"grant_type": ["client_credentials"], "scope": ["kafka write"]}


def test_a_token_is_used_for_most_of_its_life(endpoint: Endpoint, clock: list[float]) -> None:
    tokens = tokens_for(endpoint)
    assert tokens.token() == "one"
    endpoint.says("two")
    clock[0] += 79
    assert tokens.token() == "one"
    clock[0] += 2
    assert tokens.token() == "two"
    assert len(endpoint.asked) == 2


def test_an_endpoint_that_is_gone_costs_nothing_while_the_token_lives(endpoint: Endpoint, clock: list[float]) -> None:
    tokens = tokens_for(endpoint)
    assert tokens.token() == "one"
    endpoint.status = 503
    clock[0] += 99
    assert tokens.token() == "one"
    clock[0] += 2
    with pytest.raises(TokenError, match="answers 503"):
        tokens.token()


@pytest.mark.parametrize("life", [None, -1, "soon", True])
def test_a_life_that_is_not_stated_is_short(endpoint: Endpoint, clock: list[float], life: Any) -> None:
    endpoint.says("one", life)
    tokens = tokens_for(endpoint)
    tokens.token()
    clock[0] += 61
    tokens.token()
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize(
    "status,answer,text",
    [
        (401, b'{"error": "invalid_client"}', "answers 401 (invalid_client)"),
        (400, b'{"error": "client+secret"}', "answers 400"),
        (500, b"<html>", "answers 500"),
        (200, b"<html>", "the answer is no JSON over HTTP"),
        (200, b"[]", "the answer holds no access_token"),
        (200, b'{"access_token": 7}', "the answer holds no access_token"),
        (200, b'{"access_token": "a b"}', "what it holds is no token"),
    ],
)
def test_answers_of_no_use(endpoint: Endpoint, status: int, answer: bytes, text: str) -> None:
    endpoint.status, endpoint.answer = status, answer
    with pytest.raises(TokenError) as raised:
        tokens_for(endpoint).token()
    assert str(raised.value).startswith(f"Kafka.Security.SaslOauthTokenEndpointUrl: {endpoint.url}")
    assert str(raised.value).endswith(text)
    assert "client+" not in str(raised.value)


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_does_not_get_the_secret(endpoint: Endpoint, status: int) -> None:
    with serve_tokens() as other:
        endpoint.status, endpoint.headers = status, {"Location": other.url}
        with pytest.raises(TokenError, match=f"answers {status}"):
            tokens_for(endpoint).token()
        assert other.asked == []


def test_nobody_there() -> None:
    with pytest.raises(TokenError, match="Connection refused"):
        tokens_for(Endpoint("http://127.0.0.1:1/token")).token()
    with pytest.raises(TokenError, match=r"http://no-such-host\.invalid/token: "):
        tokens_for(Endpoint("http://no-such-host.invalid/token")).token()


def test_an_endpoint_behind_tls_is_verified(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    pair = certificates.issue("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert_file, pair.key_file)
    with serve_tokens(context) as endpoint:
        trusting = Security(options_for(endpoint), SslOptions(truststore_location=certificates.ca_file))
        provider = trusting.client_config()["sasl_oauth_token_provider"]
        assert provider.token() == "one"
        assert provider.extensions() == {}
        with pytest.raises(TokenError, match="its certificate is not trusted"):
            tokens_for(endpoint).token()


def test_an_endpoint_that_hangs_does_not_hold_a_check_up() -> None:
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TokenError, match="no answer"):
        tokens_for(Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/")).token()
    assert time.monotonic() - began < oauth.FETCH_TIMEOUT + 1.5


@pytest.mark.kafka
def test_kafka_takes_the_token_of_an_endpoint(secure_kafka: SecureKafka, endpoint: Endpoint) -> None:
    endpoint.says(unsigned_token("oscar"))
    server = secure_kafka.address("SASL_SSL")
    tls = SslOptions(truststore_location=secure_kafka.file("ca.pem"))
    options = KafkaOptions(servers=server, security=options_for(endpoint), ssl=tls)
    assert [step.fault for step in precheck(options, server)] == [None] * 7
    assert len(endpoint.asked) == 1
