"""[Kafka.Security] and [Kafka.SSL]: mistakes that show at start, TLS contexts of any store, discretion [K2, F4]."""

from __future__ import annotations

import datetime
import logging
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    load_pem_private_key,
    pkcs12,
)
from kafka.protocol.sasl import SaslAuthenticateRequest

from gateways.kafka import build
from gateways.kafka.discretion import Discretion, keep_secret
from gateways.kafka.key_stores import to_pem
from gateways.kafka.options import KafkaOptions, SecurityOptions, SslOptions
from gateways.kafka.security import Security, security_of
from gateways.kafka.workers import common_config
from mqtt_trio.__main__ import main
from mqtt_trio.config import load_config
from mqtt_trio.errors import ConfigError
from tests.certificates import Certificates, Pair

PASSWORD = "store-secret"
SCRAM: Mapping[str, Any] = {
    "protocol": "SASL_SSL",
    "sasl_mechanism": "SCRAM-SHA-512",
    "sasl_username": "alice",
    "sasl_password": "alice-secret",
}


@attrs.frozen
class Stores:
    """Files of an authority, a server and a client."""

    folder: Path
    certificates: Certificates
    server: Pair
    client: Pair

    @property
    def trust(self) -> str:
        return self.certificates.ca_file

    def pkcs12(self) -> str:
        key = load_pem_private_key(Path(self.client.key_file).read_bytes(), None)
        leaf = x509.load_pem_x509_certificate(Path(self.client.cert_file).read_bytes())
        path = self.folder / "client.store"
        encryption = BestAvailableEncryption(PASSWORD.encode())
        path.write_bytes(pkcs12.serialize_key_and_certificates(b"me", key, leaf, [], encryption))  # type: ignore[arg-type]
        return str(path)

    def pem(self) -> str:
        path = self.folder / "client.both"
        path.write_bytes(Path(self.client.key_file).read_bytes() + Path(self.client.cert_file).read_bytes())
        return str(path)


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    certificates = Certificates(tmp_path)
    server = certificates.issue("kafka.example")
    return Stores(tmp_path, certificates, server, certificates.issue("client.example", common_name="gateway"))


def security_for(table: Mapping[str, Any], tls: Mapping[str, Any]) -> Security:
    return Security(SecurityOptions(**table), SslOptions(**tls))


# Mistakes at start


def problems_of(table: Mapping[str, Any], tls: Mapping[str, Any]) -> list[str]:
    options = KafkaOptions(security=SecurityOptions(**table), ssl=SslOptions(**tls))
    with pytest.raises(ConfigError) as raised:
        build(options)
    assert "-secret" not in str(raised.value)
    return list(raised.value.problems)


OAUTH: Mapping[str, Any] = {"protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}
ENDPOINT: Mapping[str, Any] = {**OAUTH, "sasl_oauth_token_endpoint_url": "https://login.example/token"}


@pytest.mark.parametrize(
    "table,tls,expected",
    [
        ({"protocol": "SASL_SSL"}, {}, ["Kafka.Security.SaslMechanism: "]),
        ({"protocol": "SSL", "sasl_mechanism": "PLAIN"}, {}, ["Kafka.Security.SaslMechanism: "]),
        ({"sasl_password": "x-secret"}, {}, ["Kafka.Security.Protocol: "]),
        ({**SCRAM, "sasl_password": None}, {}, ["Kafka.Security.SaslPassword: SCRAM-SHA-512 needs it"]),
        ({**SCRAM, "sasl_password": ""}, {}, ["Kafka.Security.SaslPassword: "]),
        (
            {**SCRAM, "sasl_username": None, "sasl_password": None},
            {},
            ["Kafka.Security.SaslUsername: ", "Kafka.Security.SaslPassword: "],
        ),
        ({**SCRAM, "sasl_password": "a\0-secret"}, {}, ["Kafka.Security.SaslPassword: a NUL"]),
        (OAUTH, {}, ["Kafka.Security.SaslOauthTokenFile: OAUTHBEARER needs it, or one of"]),
        (
            {**OAUTH, "sasl_oauth_token": "t-secret", "sasl_oauth_token_file": "f"},
            {},
            ["Kafka.Security.SaslOauthTokenFile: SaslOauthToken is given, too; keep one"],
        ),
        (ENDPOINT, {}, ["Kafka.Security.SaslOauthClientId: ", "Kafka.Security.SaslOauthClientSecret: "]),
        ({"protocol": "SASL_SSL", "sasl_mechanism": "GSSAPI"}, {}, ["Kafka.Security.SaslMechanism: GSSAPI needs"]),
        ({}, {"truststore_location": "x"}, ['Kafka.SSL.TruststoreLocation: Protocol = "PLAINTEXT" does without TLS']),
        ({"protocol": "SSL"}, {"truststore_password": "x-secret"}, ["Kafka.SSL.TruststoreLocation: it is missing"]),
        ({"protocol": "SSL"}, {"key_password": "x-secret"}, ["Kafka.SSL.KeystoreLocation: it is missing"]),
        (
            {"protocol": "SSL"},
            {"truststore_location": "/nowhere/trust.jks"},
            ["Kafka.SSL.TruststoreLocation: cannot read /nowhere/trust.jks: No such file or directory"],
        ),
        (
            {"protocol": "SSL"},
            {"keystore_location": "/nowhere/key.jks"},
            ["Kafka.SSL.KeystoreLocation: cannot read /nowhere/key.jks: No such file or directory"],
        ),
        ({"protocol": "SSL"}, {"keystore_location": "a\0b"}, ["Kafka.SSL.KeystoreLocation: cannot read"]),
        ({"protocol": "SSL"}, {"truststore_location": "/dev/zero"}, ["Kafka.SSL.TruststoreLocation: /dev/zero: more"]),
    ],
)
def test_mistakes_show_at_start_with_their_key(
    table: Mapping[str, Any], tls: Mapping[str, Any], expected: list[str]
) -> None:
    problems = problems_of(table, tls)
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)


def test_stores_that_cannot_be_used_name_the_key_to_blame(stores: Stores) -> None:
    other = stores.folder / "other.both"
    other.write_bytes(Path(stores.server.key_file).read_bytes() + Path(stores.client.cert_file).read_bytes())
    encrypted = stores.certificates.issue("x", password="key-secret")
    both = stores.folder / "encrypted.both"
    both.write_bytes(Path(encrypted.key_file).read_bytes() + Path(encrypted.cert_file).read_bytes())
    path = stores.pkcs12()
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"keystore_location": path, "keystore_password": "wrong-secret"},
            f"KeystorePassword: {path}: the password does",
        ),
        ({"keystore_location": path}, f"KeystorePassword: {path}: the password of the store is missing"),
        ({"keystore_location": str(other)}, f"KeystoreLocation: {other}: the private key in it does not belong"),
        ({"keystore_location": str(both)}, f"KeyPassword: {both}: the private key is encrypted, and its password"),
        ({"keystore_location": str(both), "key_password": "no-secret"}, f"KeyPassword: {both}: the password does not"),
        (
            {"truststore_location": stores.client.key_file},
            f"TruststoreLocation: {stores.client.key_file}: no certificate",
        ),
    ]
    for tls, text in cases:
        (problem,) = problems_of({"protocol": "SSL"}, tls)
        assert problem.startswith(f"Kafka.SSL.{text}")


@pytest.mark.parametrize(
    "text,path",
    [
        ('Protocol = "TLS"', "Kafka.Security.Protocol"),
        ('SaslMechanism = "scram"', "Kafka.Security.SaslMechanism"),
        ('SaslOauthTokenEndpointUrl = "ftp://x/"', "Kafka.Security.SaslOauthTokenEndpointUrl"),
        ('SaslOauthTokenEndpointUrl = "https://id:word-secret@x/"', "Kafka.Security.SaslOauthTokenEndpointUrl"),
    ],
)
def test_values_of_no_meaning(tmp_path: Path, text: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"[Kafka.Security]\n{text}\n")
    assert main(["check", "--config", str(config)]) == 78
    said = capsys.readouterr().err
    assert f"  {path}: " in said
    assert "-secret" not in said


def test_clients_take_no_security_of_their_own() -> None:
    with pytest.raises(ConfigError) as raised:
        build(
            KafkaOptions(
                producer={"ssl.cafile": "x", "sasl_plain_password": "y"}, consumer={"security_protocol": "SSL"}
            )
        )
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "Kafka.Producer.ssl_cafile",
        "Kafka.Producer.sasl_plain_password",
        "Kafka.Consumer.security_protocol",
    ]


@pytest.mark.parametrize(
    "table,warning",
    [
        ({**SCRAM, "protocol": "SASL_PLAINTEXT"}, None),
        (
            {**SCRAM, "protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN"},
            'Kafka.Security.Protocol: with "SASL_PLAI',
        ),
        ({**SCRAM, "sasl_mechanism": "PLAIN"}, None),
        ({**ENDPOINT, "sasl_oauth_client_id": "me", "sasl_oauth_client_secret": "x-secret"}, None),
        (
            {**ENDPOINT, "sasl_oauth_client_id": "me", "sasl_oauth_client_secret": "x-secret"}
            | {"sasl_oauth_token_endpoint_url": "http://login.example/token"},
            "Kafka.Security.SaslOauthTokenEndpointUrl: over http:// the client secret",
        ),
        (
            {**ENDPOINT, "sasl_oauth_client_id": "me", "sasl_oauth_client_secret": "x-secret"}
            | {"sasl_oauth_token_endpoint_url": "http://127.0.0.1:7/token"},
            None,
        ),
    ],
)
def test_secrets_in_the_clear_are_told(
    table: Mapping[str, Any], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    security_for(table, {}).check()
    assert [text[:40] for text in caplog.messages] == ([warning[:40]] if warning else [])


# Secrets from elsewhere


def test_secrets_come_from_files_and_the_environment(stores: Stores, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("password", "trust", "key", "client")
    for name in names:
        (stores.folder / name).write_text(f"{name}-secret\n")
    config = stores.folder / "config.toml"
    config.write_text(f"""
[Kafka.Security]
Protocol = "SASL_PLAINTEXT"
SaslMechanism = "PLAIN"
SaslUsername = "${{KAFKA_USERNAME}}"
SaslPasswordFile = "{stores.folder}/password"
SaslOauthClientSecretFile = "{stores.folder}/client"
[Kafka.SSL]
TruststorePasswordFile = "{stores.folder}/trust"
KeystorePassword = "${{KEYSTORE_PASSWORD}}"
KeyPasswordFile = "{stores.folder}/key"
""")
    environment = {
        "KAFKA_USERNAME": "0815",
        "KEYSTORE_PASSWORD": "4711",
        "MQTT_TRIO__KAFKA__SECURITY__SASLOAUTHTOKEN": "7",
    }
    loaded = load_config(config, environment, None, {"Kafka": KafkaOptions})
    options = loaded.gateways["Kafka"]
    assert isinstance(options, KafkaOptions)
    assert (options.security.sasl_username, options.security.sasl_password) == ("0815", "password-secret")
    assert (options.security.sasl_oauth_client_secret, options.security.sasl_oauth_token) == ("client-secret", "7")
    assert options.ssl.truststore_password == "trust-secret"
    assert (options.ssl.keystore_password, options.ssl.key_password) == ("4711", "key-secret")
    assert "secret" not in repr(options).replace("sasl_oauth_client_secret", "")
    assert "4711" not in repr(options)


def test_check_shows_stars(stores: Stores, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYSTORE_PASSWORD", PASSWORD)
    config = stores.folder / "config.toml"
    config.write_text(f"""
[Kafka.Security]
Protocol = "SASL_SSL"
SaslMechanism = "SCRAM-SHA-256"
SaslUsername = "alice"
SaslPassword = "alice-secret"
[Kafka.SSL]
TruststoreLocation = "{stores.trust}"
KeystoreLocation = "{stores.pkcs12()}"
KeystorePassword = "${{KEYSTORE_PASSWORD}}"
""")
    assert main(["check", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert 'SaslUsername = "alice"' in shown
    assert 'SaslPassword = "********"' in shown
    assert 'KeystorePassword = "********"' in shown
    assert "-secret" not in shown


# TLS


def shake_hands(client: ssl.SSLContext, stores: Stores, name: str = "kafka.example") -> str | None:
    """Let a client meet a server that wants a certificate; return the Common Name that the server has seen."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(stores.server.cert_file, stores.server.key_file)
    server.load_verify_locations(stores.trust)
    server.verify_mode = ssl.CERT_OPTIONAL
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=name)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs, ours, theirs):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    subject: Any = (theirs.getpeercert() or {}).get("subject", ())
    return next((value for part in subject for key, value in part if key == "commonName"), None)


def test_every_kind_of_store_makes_a_context(stores: Stores) -> None:
    for tls in (
        {},
        {"keystore_location": stores.pem()},
        {"keystore_location": stores.pkcs12(), "keystore_password": PASSWORD},
    ):
        made = security_for({"protocol": "SSL"}, {"truststore_location": stores.trust, **tls})
        made.check()
        context = made.client_config()["ssl_context"]
        assert shake_hands(context, stores) == ("gateway" if tls else None)
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
        assert context.verify_mode is ssl.CERT_REQUIRED


def test_servers_are_verified(stores: Stores) -> None:
    trusting = security_for({"protocol": "SSL"}, {"truststore_location": stores.trust}).context()
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(trusting, stores, "other.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        shake_hands(security_for({"protocol": "SSL"}, {}).context(), stores)
    lenient = {"truststore_location": stores.trust, "endpoint_identification_algorithm": ""}
    shake_hands(security_for({"protocol": "SSL"}, lenient).context(), stores, "other.example")
    without_authority = security_for({"protocol": "SSL"}, {"endpoint_identification_algorithm": ""}).context()
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(without_authority, stores)


def test_the_certificate_of_one_server_may_be_all_that_is_trusted(stores: Stores) -> None:
    pinned = security_for({"protocol": "SSL"}, {"truststore_location": stores.server.cert_file}).context()
    assert shake_hands(pinned, stores) is None


def test_a_private_key_touches_no_disk(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str | None, bytes]] = []

    load = ssl.SSLContext.load_cert_chain

    def spy(context: ssl.SSLContext, certfile: Any, keyfile: Any = None, password: Any = None) -> None:
        loaded.append((os.readlink(certfile), keyfile, Path(certfile).read_bytes()))
        load(context, certfile, keyfile, password)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    before = set(os.listdir("/proc/self/fd"))
    security_for({"protocol": "SSL"}, {"keystore_location": stores.pkcs12(), "keystore_password": PASSWORD}).context()
    assert set(os.listdir("/proc/self/fd")) == before
    ((where, key_file, content),) = loaded
    assert where.startswith("/memfd:")
    assert key_file is None
    assert b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in content
    assert b"-----BEGIN PRIVATE KEY-----" not in content


def test_without_anonymous_files_a_key_store_is_refused(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    (problem,) = problems_of({"protocol": "SSL"}, {"keystore_location": stores.pem()})
    assert problem.startswith("Kafka.SSL.KeystoreLocation: needs anonymous files")


def test_files_that_change_are_read_again(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    trust, other = stores.folder / "trust.pem", Certificates(stores.folder, "other")
    trust.write_bytes(Path(other.ca_file).read_bytes())
    made = security_for({"protocol": "SSL"}, {"truststore_location": str(trust)})
    first = made.context()
    assert made.context() is first
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(first, stores)

    trust.write_bytes(Path(stores.trust).read_bytes() + Path(other.ca_file).read_bytes())
    second = made.context()
    shake_hands(second, stores)

    trust.write_text("half of somethi")
    assert made.context() is second
    assert made.context() is second
    trust.unlink()
    assert made.context() is second
    assert [record.message.split("; what")[0] for record in caplog.records] == [
        f"Kafka.SSL.TruststoreLocation: {trust}: it is neither JKS nor PKCS12 nor PEM",
        f"Kafka.SSL.TruststoreLocation: cannot read {trust}: No such file or directory",
    ]


def test_an_expired_certificate_of_our_own_is_told(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    long_ago = datetime.datetime(2024, 2, 1, tzinfo=datetime.UTC)
    old = stores.certificates.issue("client.example", not_after=long_ago)
    path = stores.folder / "old.both"
    path.write_bytes(Path(old.key_file).read_bytes() + Path(old.cert_file).read_bytes())
    made = security_for({"protocol": "SSL"}, {"keystore_location": str(path)})
    made.check()
    assert made.certificate_expires == long_ago
    assert caplog.messages == [f"Kafka.SSL.KeystoreLocation: the certificate in {path} has expired on 2024-02-01"]


# What kafka-python gets


def test_all_clients_share_one_security() -> None:
    options = KafkaOptions(security=SecurityOptions(**{**SCRAM, "sasl_username": "a=b,c"}))
    config = common_config(options, "x")
    assert config["security_protocol"] == "SASL_SSL"
    assert config["sasl_mechanism"] == "SCRAM-SHA-512"
    assert config["sasl_plain_username"] == "a=3Db=2Cc"
    assert (
        config["ssl_context"] is common_config(KafkaOptions(servers="y", security=options.security), "y")["ssl_context"]
    )
    assert security_of(options) is security_of(KafkaOptions(security=options.security))
    plain = common_config(KafkaOptions(), "x")
    assert not [key for key in plain if key.startswith(("sasl", "ssl"))]


# Discretion


def test_kafka_python_logs_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    keep_secret('it\'s a "secret"', "naïve")
    logger = logging.getLogger("kafka.net.connection")

    request = SaslAuthenticateRequest(b"token")
    assert "token" in str(request), "else it would need no care"

    with caplog.at_level(logging.DEBUG, "kafka.net.connection"):
        keep_secret(None)
        logger.debug("config %s", {"sasl_plain_password": "naïve", "other": 1})
        logger.debug("%s Request %d: %s", "x", 1, request)
        logger.debug("bytes %r and text %r", "a naïve b".encode(), 'it\'s a "secret"')
    assert caplog.messages == [
        "config {'sasl_plain_password': '********', 'other': 1}",
        "x Request 1: SaslAuthenticateRequest",
        "bytes b'a ******** b' and text '********'",
    ]


def test_the_longer_secret_goes_first() -> None:
    discretion = Discretion()
    discretion.learn(["ab", "abc"])
    assert discretion.hide("abc ab a") == "******** ******** a"


def test_stores_in_der_are_pem_as_well(stores: Stores) -> None:
    leaf = x509.load_pem_x509_certificate(Path(stores.server.cert_file).read_bytes())
    der = leaf.public_bytes(Encoding.DER)
    assert x509.load_pem_x509_certificate(to_pem(der)) == leaf
