"""Who the clients are and whom they trust: [Kafka.Security] and [Kafka.SSL] as what kafka-python takes [K2].

kafka-python knows PEM files only, and reports whatever is wrong with them as a time-out. So the TLS context is made
here, of stores in any format, at start and again when a file has changed. Private keys reach OpenSSL, which takes them
from files alone, through anonymous memory and encrypted: they are never on a disk.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import logging
import os
import secrets
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from kafka.net.sasl import get_sasl_mechanism
from kafka.net.sasl.oauth import AbstractTokenProvider

from gateways.kafka.discretion import keep_secret
from gateways.kafka.greeting import Mechanism
from gateways.kafka.key_stores import LARGEST_STORE, Identity, KeyStoreError, read_identity, read_trust
from gateways.kafka.oauth import Tokens
from gateways.kafka.options import KafkaOptions, SecurityOptions, SslOptions
from mqtt_trio.errors import ConfigError

log = logging.getLogger("gateways.kafka")

PASSWORD_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_PARTS: Final = {"location": "Location", "password": "Password"}
REGISTRY: Final = SecurityOptions(protocol="SSL")
_T = TypeVar("_T")

AbstractTokenProvider.register(Tokens)  # kafka-python takes nothing else


def security_of(options: KafkaOptions) -> Security:
    """Return what all clients with these options share."""
    return _security(options.security, options.ssl)


def registry_security(options: KafkaOptions) -> Security:
    """Return what connections to a schema registry behind https:// share."""
    return _security(REGISTRY, options.schema_registry.ssl, "Kafka.SchemaRegistry.SSL")


@functools.lru_cache(maxsize=16)
def _security(security: SecurityOptions, tls: SslOptions, section: str = "Kafka.SSL") -> Security:
    return Security(security, tls, section)


class Security:
    """The security of the connections of one gateway. Blocks for files; any thread."""

    def __init__(self, options: SecurityOptions, tls: SslOptions, section: str = "Kafka.SSL") -> None:
        """`section` is where `tls` stands in the configuration."""
        self.options = options
        self._section = section
        self.tls = tls
        self.uses_tls = options.protocol in ("SSL", "SASL_SSL")
        self.logs_in = options.protocol in ("SASL_PLAINTEXT", "SASL_SSL")
        self.certificate_expires: datetime.datetime | None = None
        """The end of what the client's own certificate is valid for; None: it has none, or was not read yet."""
        self._tokens = Tokens(options, self._token_context)
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._stamp: object = None
        keep_secret(
            options.sasl_password, options.sasl_oauth_token, options.sasl_oauth_client_secret,
            tls.truststore_password, tls.keystore_password, tls.key_password,
        )  # fmt: skip

    def check(self) -> None:
        """Look at everything that can be looked at without a server.

        Raises:
          ConfigError: with a line for each mistake; none shows a secret.
        """
        problems = [*self._login_problems(), *self._tls_problems()]
        if self.uses_tls and not problems:
            try:
                self.context()
            except ConfigError as exc:
                problems += exc.problems
        if problems:
            raise ConfigError(problems)
        for warning in self._warnings():
            log.warning("%s", warning)

    def client_config(self) -> dict[str, Any]:
        """Return the options of any kafka-python client.

        Raises:
          ConfigError: a file cannot be used, and never could.
        """
        options = self.options
        config: dict[str, Any] = {"security_protocol": options.protocol}
        if self.uses_tls:
            config["ssl_context"] = self.context()
        if self.logs_in:
            config["sasl_mechanism"] = options.sasl_mechanism
        if self.logs_in and options.sasl_mechanism in PASSWORD_MECHANISMS:
            name = options.sasl_username or ""
            if options.sasl_mechanism != "PLAIN":  # kafka-python does not do it (RFC 5802, 5.1)
                name = name.replace("=", "=3D").replace(",", "=2C")
            config |= {"sasl_plain_username": name, "sasl_plain_password": options.sasl_password}
        elif self.logs_in and options.sasl_mechanism == "OAUTHBEARER":
            config["sasl_oauth_token_provider"] = self._tokens
        elif self.logs_in:
            config["sasl_kerberos_service_name"] = options.sasl_kerberos_service_name
        return config

    def login(self, host: str) -> Mechanism:
        """Begin a login as kafka-python does it: take `auth_bytes`, give the answer to `receive`, until `is_done`.

        Raises:
          TokenError: there is no token; also from `auth_bytes`.
        """
        config = self.client_config() | {
            "security_protocol": "SASL_SSL"
        }  # else it says each time that it is in the clear
        config.pop("ssl_context", None)
        mechanism: Mechanism = get_sasl_mechanism(self.options.sasl_mechanism)(host=host, **config)
        return mechanism

    # TLS

    def context(self) -> ssl.SSLContext:
        """Return the TLS context for servers; files are read again when they have changed. Those that cannot be used
        then are reported once, and what was read before stays.

        Raises:
          ConfigError: they never could be used.
        """
        with self._lock:
            stamp = self._look_at_files()
            if self._context is not None and stamp == self._stamp:
                return self._context
            try:
                context = self._make_context()
            except ConfigError as exc:
                if self._context is None:
                    raise
                log.warning("%s; what was read before stays in use", "; ".join(exc.problems))
                context = self._context
            self._context, self._stamp = context, stamp
            return context

    def _look_at_files(self) -> object:
        found: list[object] = []
        for file in filter(None, (self.tls.truststore_location, self.tls.keystore_location)):
            try:
                status = os.stat(file)
            except (OSError, ValueError) as exc:
                found.append(str(exc))
            else:
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return found

    def _make_context(self) -> ssl.SSLContext:
        context = self._trusting_context()
        context.check_hostname = self.tls.endpoint_identification_algorithm == "https"
        if self.tls.keystore_location is not None:
            identity = self._read(
                "Keystore",
                self.tls.keystore_location,
                lambda data: read_identity(data, self.tls.keystore_password, self.tls.key_password),
            )
            _show_identity(context, identity, self.tls.keystore_location, f"{self._section}.KeystoreLocation")
            self.certificate_expires = identity.expires
            if identity.expires < datetime.datetime.now(datetime.UTC):
                what = f"{self._section}.KeystoreLocation: the certificate in {self.tls.keystore_location}"
                log.warning("%s has expired on %s", what, identity.expires.date())
        return context

    def _trusting_context(self, *, system_too: bool = False) -> ssl.SSLContext:
        """Return a context that trusts the store, or where there is none, whom the operating system trusts."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as Java: whatever is in the store is trusted
        file = self.tls.truststore_location
        if file is None or system_too:
            context.load_default_certs()
        if file is not None:
            found = self._read("Truststore", file, lambda data: read_trust(data, self.tls.truststore_password))
            try:
                context.load_verify_locations(cadata=b"".join(found))
            except ssl.SSLError:
                where = f"{self._section}.TruststoreLocation"
                raise ConfigError([f"{where}: {file}: a certificate in it is damaged"]) from None
        return context

    def _token_context(self) -> ssl.SSLContext:
        return self._trusting_context(system_too=True)

    def _read(self, store: str, file: str, parse: Callable[[bytes], _T]) -> _T:
        where = f"{self._section}.{store}"
        try:
            with open(file, "rb") as stream:
                data = stream.read(LARGEST_STORE + 1)
        except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
            text = getattr(exc, "strerror", None) or str(exc)
            raise ConfigError([f"{where}Location: cannot read {file}: {text}"]) from None
        if len(data) > LARGEST_STORE:
            raise ConfigError([f"{where}Location: {file}: more than {LARGEST_STORE} bytes, which is no key store"])
        try:
            return parse(data)
        except KeyStoreError as exc:
            key = f"{self._section}.KeyPassword" if exc.part == "key password" else f"{where}{_PARTS[exc.part]}"
            raise ConfigError([f"{key}: {file}: {exc}"]) from None

    # What is wrong

    def _warnings(self) -> Iterator[str]:
        """Find what works and gives secrets to whoever listens on the way."""
        options = self.options
        if options.protocol == "SASL_PLAINTEXT" and options.sasl_mechanism in ("PLAIN", "OAUTHBEARER"):
            yield (
                f'Kafka.Security.Protocol: with "SASL_PLAINTEXT", {options.sasl_mechanism} sends its secret in the '
                "clear; SASL_SSL does not, nor does SCRAM-SHA-512"
            )
        url = urllib.parse.urlsplit(options.sasl_oauth_token_endpoint_url or "")
        if url.scheme == "http" and url.hostname not in LOOPBACK:
            yield (
                "Kafka.Security.SaslOauthTokenEndpointUrl: over http:// the client secret and the token are sent in "
                "the clear; https:// does not"
            )

    def _login_problems(self) -> Iterator[str]:
        options, section = self.options, "Kafka.Security"
        mechanism = options.sasl_mechanism
        if not self.logs_in:
            if mechanism or options.sasl_username or options.sasl_password or options.sasl_oauth_token:
                key = "SaslMechanism" if mechanism else "Protocol"
                yield f'{section}.{key}: Protocol = "{options.protocol}" does not log in; SASL_SSL does'
        elif mechanism is None:
            yield f'{section}.SaslMechanism: Protocol = "{options.protocol}" needs one, such as SCRAM-SHA-512'
        elif mechanism in PASSWORD_MECHANISMS:
            for key, value in (("SaslUsername", options.sasl_username), ("SaslPassword", options.sasl_password)):
                if not value:
                    yield f"{section}.{key}: {mechanism} needs it{' (or SaslPasswordFile)' * (key == 'SaslPassword')}"
                elif "\0" in value:
                    yield f"{section}.{key}: a NUL character is in it"
        elif mechanism == "OAUTHBEARER":
            yield from self._token_problems(section)
        elif importlib.util.find_spec("gssapi") is None:
            yield f"{section}.SaslMechanism: GSSAPI needs the library gssapi, which is not there: pip install gssapi"

    def _token_problems(self, section: str) -> Iterator[str]:
        options = self.options
        sources = {
            "SaslOauthToken": options.sasl_oauth_token,
            "SaslOauthTokenFile": options.sasl_oauth_token_file,
            "SaslOauthTokenEndpointUrl": options.sasl_oauth_token_endpoint_url,
        }
        given = [key for key, value in sources.items() if value]
        if not given:
            yield f"{section}.SaslOauthTokenFile: OAUTHBEARER needs it, or one of {', '.join(sources)}"
        elif len(given) > 1:
            yield f"{section}.{given[1]}: {given[0]} is given, too; keep one"
        elif given == ["SaslOauthTokenEndpointUrl"]:
            if not options.sasl_oauth_client_id:
                yield f"{section}.SaslOauthClientId: the token endpoint needs it"
            if not options.sasl_oauth_client_secret:
                yield f"{section}.SaslOauthClientSecret: the token endpoint needs it (or SaslOauthClientSecretFile)"

    def _tls_problems(self) -> Iterator[str]:
        tls, section = self.tls, self._section
        for name, location, password in (
            ("Truststore", tls.truststore_location, tls.truststore_password),
            ("Keystore", tls.keystore_location, tls.keystore_password or tls.key_password),
        ):
            if location is not None and not self.uses_tls:
                yield f'{section}.{name}Location: Protocol = "{self.options.protocol}" does without TLS'
            elif location is None and password is not None and self.uses_tls:
                yield f"{section}.{name}Location: it is missing, but its password is there"


def _show_identity(context: ssl.SSLContext, identity: Identity, file: str, where: str) -> None:
    """Give OpenSSL a private key and its certificates."""
    if not hasattr(os, "memfd_create"):
        raise ConfigError([f"{where}: needs anonymous files (memfd_create of Linux): the key shall be on no disk"])
    password = secrets.token_hex(16)
    descriptor = os.memfd_create("identity")
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(identity.pem(password.encode()))
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=password)
    except ssl.SSLError as exc:
        reason = (exc.reason or "unknown").lower().replace("_", " ")
        raise ConfigError([f"{where}: {file}: OpenSSL does not take its key or certificate ({reason})"]) from None
    except OSError as exc:
        raise ConfigError([f"{where}: {file}: no way to OpenSSL without a disk ({exc.strerror})"]) from None
    finally:
        os.close(descriptor)
