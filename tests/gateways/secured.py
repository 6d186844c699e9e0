"""Ways to connect to the secured Kafka of `tests.kafka_support`, as options of the gateway."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from gateways.kafka.options import KafkaOptions, SecurityOptions, SslOptions
from tests.kafka_support import SecureKafka

Table: TypeAlias = dict[str, Any]
"""Attributes of options."""
Way: TypeAlias = Callable[[SecureKafka], tuple[str, Table, Table]]
"""Listener, [Kafka.Security], [Kafka.SSL]."""


def unsigned_token(subject: str, lifetime: float = 600.0) -> str:
    """Return the kind of token that Kafka's own validator takes: a JWT without a signature."""

    def part(content: Mapping[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    now = time.time()
    return f"{part({'alg': 'none'})}.{part({'sub': subject, 'iat': now - 5, 'exp': now + lifetime})}."


def trust(kafka: SecureKafka, file: str = "trust.jks") -> Table:
    """Trust the authority of the secured Kafka."""
    password = None if file.endswith(".pem") else kafka.STORE_PASSWORD
    return {"truststore_location": kafka.file(file), "truststore_password": password}


def own_key(kafka: SecureKafka, file: str) -> Table:
    """Show a client certificate."""
    if file == "client-encrypted.pem":
        return {"keystore_location": kafka.file(file), "key_password": kafka.KEY_PASSWORD}
    password = None if file.endswith(".pem") else kafka.STORE_PASSWORD
    return {"keystore_location": kafka.file(file), "keystore_password": password}


def login(kafka: SecureKafka, mechanism: str, user: str, protocol: str = "SASL_SSL") -> Table:
    """Log in with a password."""
    password = kafka.PASSWORDS[user]
    return {"protocol": protocol, "sasl_mechanism": mechanism, "sasl_username": user, "sasl_password": password}


def with_token(token: Table) -> Table:
    """Log in with an OAuth token; `token` says where it comes from."""
    return {"protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER", **token}


def options_of(kafka: SecureKafka, way: tuple[str, Table, Table], **others: Any) -> KafkaOptions:
    """Return the options of a gateway that goes this way."""
    listener, security, ssl = way
    server = kafka.servers if listener == "PLAINTEXT" else kafka.address(listener)
    return KafkaOptions(servers=server, security=SecurityOptions(**security), ssl=SslOptions(**ssl), **others)


WAYS: Mapping[str, Way] = {
    "PLAINTEXT": lambda k: ("PLAINTEXT", {}, {}),
    "SCRAM-SHA-512, JKS": lambda k: ("SASL_SSL", login(k, "SCRAM-SHA-512", "alice"), trust(k, "trust.jks")),
    "SCRAM-SHA-256, PKCS12": lambda k: ("SASL_SSL", login(k, "SCRAM-SHA-256", "alice"), trust(k, "trust.p12")),
    "PLAIN, PEM": lambda k: ("SASL_SSL", login(k, "PLAIN", "bob"), trust(k, "ca.pem")),
    "OAUTHBEARER": lambda k: (
        "SASL_SSL",
        with_token({"sasl_oauth_token": unsigned_token("oscar")}),
        trust(k),
    ),
    "client certificate, JKS": lambda k: ("SSL", {"protocol": "SSL"}, trust(k) | own_key(k, "client.jks")),
    "client certificate, PKCS12": lambda k: ("SSL", {"protocol": "SSL"}, trust(k) | own_key(k, "client.p12")),
    "client certificate, PEM": lambda k: ("SSL", {"protocol": "SSL"}, trust(k) | own_key(k, "client-encrypted.pem")),
    "SCRAM without TLS": lambda k: ("SASL_PLAINTEXT", login(k, "SCRAM-SHA-512", "alice", "SASL_PLAINTEXT"), {}),
}
"""Every protocol, mechanism and kind of store."""

OTHER: Table = {"protocol": "SSL"}
FAULTS: Mapping[str, tuple[Way, str]] = {
    "wrong password": (
        lambda k: ("SASL_SSL", login(k, "SCRAM-SHA-512", "alice") | {"sasl_password": "wrong-secret"}, trust(k)),
        "refuses the login of alice (Authentication failed",
    ),
    "wrong password of PLAIN": (
        lambda k: ("SASL_SSL", login(k, "PLAIN", "bob") | {"sasl_password": "wrong-secret"}, trust(k)),
        "refuses the login of bob (Authentication failed",
    ),
    "name with signs": (
        lambda k: ("SASL_SSL", login(k, "SCRAM-SHA-256", "bob") | {"sasl_username": "b=o,b"}, trust(k)),
        "refuses the login of b=o,b (Authentication failed",
    ),
    "token of nobody": (
        lambda k: ("SASL_SSL", with_token({"sasl_oauth_token": "wrong-secret"}), trust(k)),
        'refuses the login ({"status":"invalid_token"})',
    ),
    "no token": (
        lambda k: ("SASL_SSL", with_token({"sasl_oauth_token_file": "/nowhere/token"}), trust(k)),
        "Kafka.Security.SaslOauthTokenFile: cannot read /nowhere/token: No such file or directory",
    ),
    "unknown authority": (
        lambda k: ("SASL_SSL", login(k, "PLAIN", "bob"), {"truststore_location": k.file("otherca.pem")}),
        "shows a certificate of an authority that is not trusted",
    ),
    "no authority": (
        lambda k: ("SASL_SSL", login(k, "PLAIN", "bob"), {}),
        "shows a certificate of an authority that is not trusted",
    ),
    "expired": (lambda k: ("EXPIRED", OTHER, trust(k)), "shows a certificate that has expired on 2024-02-01"),
    "wrong host": (
        lambda k: ("WRONGHOST", OTHER, trust(k)),
        "shows a certificate for other.example, which is not for 127.0.0.1",
    ),
    "mechanism not enabled": (
        lambda k: ("SASL_PLAINTEXT", login(k, "PLAIN", "bob", "SASL_PLAINTEXT"), {}),
        "does not offer PLAIN, but SCRAM-SHA-512; Kafka.Security.SaslMechanism is one of them",
    ),
    "plain to TLS": (
        lambda k: ("SSL", {}, {}),
        'speaks TLS on this port; Kafka.Security.Protocol = "SSL" or "SASL_SSL"',
    ),
    "plain login to TLS": (
        lambda k: ("SASL_SSL", login(k, "PLAIN", "bob", "SASL_PLAINTEXT"), {}),
        "speaks TLS on this port",
    ),
    "TLS to plain": (lambda k: ("PLAINTEXT", OTHER, trust(k)), "speaks Kafka without TLS on this port"),
    "login missing": (
        lambda k: ("SASL_PLAINTEXT", {}, {}),
        'wants a login (SASL) on this port: SCRAM-SHA-512; Kafka.Security.Protocol = "SASL_PLAINTEXT"',
    ),
    "login missing behind TLS": (
        lambda k: ("SASL_SSL", OTHER, trust(k)),
        "wants a login (SASL) on this port: OAUTHBEARER, PLAIN, SCRAM-SHA-256, SCRAM-SHA-512; Kafka.Security.Protocol"
        ' = "SASL_SSL"',
    ),
    "login where there is none": (
        lambda k: ("SSL", login(k, "PLAIN", "bob"), trust(k) | own_key(k, "client.p12")),
        'takes no login (SASL) on this port; Kafka.Security.Protocol = "SSL" fits this port',
    ),
    "client certificate missing": (
        lambda k: ("SSL", OTHER, trust(k)),
        "wants a client certificate; Kafka.SSL.KeystoreLocation names the store with it",
    ),
    "client certificate expired": (
        lambda k: ("SSL", OTHER, trust(k) | own_key(k, "clientexpired.p12")),
        "does not accept the client certificate of Kafka.SSL.KeystoreLocation, valid until 2024-02-01",
    ),
}
"""What can be wrong with a server or with what we say to it -> how to get there, and what is said about it."""
