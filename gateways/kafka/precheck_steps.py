"""The steps of a connection to Kafka, taken one by one, so that the one that fails can be named.

What Kafka, OpenSSL and others answer to a client that asks wrongly was measured; docs/kafka-security.md says what each
means.
"""

from __future__ import annotations

import enum
import re
import socket
import ssl
import struct
import time
from typing import Final, Literal, TypeAlias

import attrs
from cryptography import x509

from gateways.kafka.discretion import hide
from gateways.kafka.greeting import Address, ErrorCode, Greeting, NotKafkaError
from gateways.kafka.oauth import TokenError
from gateways.kafka.security import Security
from mqtt_trio.errors import ConfigError

MOST_BROKERS: Final = 3
"""Advertised addresses that are tried."""

SECOND_LOOK: Final = 0.5
"""Seconds for a second connection that only makes a message better."""

Name: TypeAlias = Literal["options", "name", "tcp", "tls", "kafka", "mechanism", "login", "brokers"]


class Fault(enum.Enum):
    """What can be wrong."""

    OPTIONS = "a store or key of our own cannot be used"
    UNKNOWN_HOST = "the host name is unknown"
    REFUSED = "connection refused"
    UNREACHABLE = "no way to the host"
    SILENT = "no answer"
    NEEDS_TLS = "we speak plainly, it speaks TLS"
    NOT_TLS = "we speak TLS, it does not"
    TLS_FAILED = "no common TLS version or cipher"
    UNTRUSTED = "the server's certificate is of an unknown authority"
    EXPIRED = "the server's certificate is expired, or not valid yet"
    WRONG_NAME = "the server's certificate is of another host"
    CLIENT_CERTIFICATE_MISSING = "the server wants a client certificate"
    CLIENT_CERTIFICATE_REFUSED = "the server does not accept our certificate"
    NOT_KAFKA = "something else answers"
    NEEDS_LOGIN = "we do not log in, it wants it"
    NO_LOGIN = "we log in, it does not know how"
    MECHANISM = "the server does not have our mechanism"
    LOGIN_REFUSED = "wrong user or password, or a token that is not accepted"
    NO_TOKEN = "there is no token to log in with"
    LOST = "the connection ends, and nothing says why"
    ADVERTISED = "the brokers' own addresses cannot be reached"


@attrs.frozen(kw_only=True)
class Step:
    """One step of a connection; the first one with a fault is the last."""

    name: Name
    text: str
    """What was found, as a predicate of the server: "refuses connections"."""
    fault: Fault | None = None
    mend: str = ""
    """What to do about a fault, without a full stop."""


class Failed(Exception):
    """A step found a fault."""

    def __init__(self, name: Name, fault: Fault, text: str, mend: str = "") -> None:
        super().__init__(text)
        self.step = Step(name=name, fault=fault, text=text, mend=mend)


class Connection:
    """The steps, each a method that appends what it found or raises `Failed`."""

    def __init__(self, security: Security, host: str, port: int, deadline: float, steps: list[Step]) -> None:
        self.at: Name = "options"
        self._security = security
        self._host, self._port = host, port
        self._deadline = deadline
        self._steps = steps

    def go(self, *, log_in: bool = True) -> None:
        """Take all steps; without `log_in`, those that servers let anybody take."""
        context = self._own_context()
        with self._reach(self._host, self._port, context) as connection:
            greeting = Greeting(connection, self._deadline)
            self._greet(greeting, connection)
            if not log_in:
                return
            if self._security.logs_in:
                self._log_in(greeting)
            brokers = self._ask_for_brokers(greeting)
        self._try_brokers(brokers, context)

    def _own_context(self) -> ssl.SSLContext | None:
        try:
            return self._security.context() if self._security.uses_tls else None
        except ConfigError as exc:
            raise Failed("options", Fault.OPTIONS, "is not asked: " + "; ".join(exc.problems)) from None

    def _found(self, text: str) -> None:
        self._steps.append(Step(name=self.at, text=text))

    # Name, TCP, TLS

    def _reach(self, host: str, port: int, context: ssl.SSLContext | None) -> socket.socket:
        connection = self._connect(host, port)
        if context is None:
            return connection
        try:
            return self._shake_hands(connection, context, host)
        except BaseException:
            connection.close()
            raise

    def _connect(self, host: str, port: int) -> socket.socket:
        self.at = "name"
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            text = f"cannot be found: the host name {host!r} is unknown"
            raise Failed("name", Fault.UNKNOWN_HOST, text, "check Kafka.Servers and the name service") from None
        self._found(f"is {', '.join(dict.fromkeys(str(address[4][0]) for address in addresses))}")
        self.at = "tcp"
        error: OSError = TimeoutError()
        for number, (family, kind, protocol, _, address) in enumerate(addresses):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(self._left() / (len(addresses) - number))
                connection.connect(address)
            except OSError as exc:
                connection.close()
                error = exc
            else:
                self._found("takes connections")
                return connection
        if isinstance(error, ConnectionRefusedError):
            raise Failed("tcp", Fault.REFUSED, "refuses connections", "is Kafka running, and is this its port?")
        if isinstance(error, TimeoutError):
            raise Failed("tcp", Fault.SILENT, "does not answer", "a firewall may be in between")
        raise Failed("tcp", Fault.UNREACHABLE, f"cannot be reached ({error.strerror or type(error).__name__})")

    def _shake_hands(self, connection: socket.socket, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
        self.at = "tls"
        connection.settimeout(self._left())
        try:
            secure = context.wrap_socket(connection, server_hostname=host.rstrip("."))
        except ssl.SSLCertVerificationError as exc:
            raise self._bad_certificate(exc, host) from None
        except TimeoutError:
            raise Failed("tls", Fault.SILENT, "does not answer a TLS handshake", _PLAIN_MEND) from None
        except OSError as exc:
            raise self._no_handshake(exc) from None
        self._found(f"speaks {secure.version()}, and its certificate is good")
        return secure

    def _bad_certificate(self, exc: ssl.SSLCertVerificationError, host: str) -> Failed:
        certificate = self._see_certificate()
        if exc.verify_code in _WRONG_NAME:
            names = f" for {', '.join(_names(certificate))}" if certificate is not None else ""
            text = f"shows a certificate{names}, which is not for {host}"
            mend = "use a name that it holds in Kafka.Servers, or give the server a certificate with this one"
            return Failed("tls", Fault.WRONG_NAME, text, mend)
        if exc.verify_code == _EXPIRED:
            date = f" on {certificate.not_valid_after_utc.date()}" if certificate is not None else ""
            text = f"shows a certificate that has expired{date}"
            return Failed("tls", Fault.EXPIRED, text, "the server needs a new one")
        if exc.verify_code == _NOT_YET_VALID:
            return Failed("tls", Fault.EXPIRED, "shows a certificate that is not valid yet", "check the clocks")
        text = f"shows a certificate of an authority that is not trusted ({exc.verify_message})"
        mend = "the authority's own certificate belongs into the store of Kafka.SSL.TruststoreLocation"
        return Failed("tls", Fault.UNTRUSTED, text, mend)

    def _no_handshake(self, exc: OSError) -> Failed:
        reason = getattr(exc, "reason", None) or ""
        if _CLIENT_ALERT.search(reason):
            return self._client_certificate(reason)
        if self._is_plain_kafka():
            return Failed("tls", Fault.NOT_TLS, "speaks Kafka without TLS on this port", _PLAIN_MEND)
        if "ALERT" in reason or "PROTOCOL" in reason:
            return Failed("tls", Fault.TLS_FAILED, f"ends the TLS handshake ({_words(reason)})")
        return Failed("tls", Fault.NOT_TLS, f"does not speak TLS on this port ({_words(reason) or exc})", _PLAIN_MEND)

    def _client_certificate(self, reason: str) -> Failed:
        if self._security.tls.keystore_location is None:
            mend = "Kafka.SSL.KeystoreLocation names the store with it"
            return Failed("tls", Fault.CLIENT_CERTIFICATE_MISSING, "wants a client certificate", mend)
        expires = self._security.certificate_expires
        until = f", valid until {expires.date()}" if expires is not None else ""
        text = f"does not accept the client certificate of Kafka.SSL.KeystoreLocation{until} ({_words(reason)})"
        mend = "a certificate that is valid and of an authority that the server trusts is needed"
        return Failed("tls", Fault.CLIENT_CERTIFICATE_REFUSED, text, mend)

    # Kafka

    def _greet(self, greeting: Greeting, connection: socket.socket) -> None:
        """Exchange the first words. With TLS 1.3 a server says only now what it thinks of the client's certificate."""
        self.at = "kafka"
        try:
            greeting.api_versions()
        except ssl.SSLError as exc:
            reason = exc.reason or ""
            raise (
                self._client_certificate(reason)
                if _CLIENT_ALERT.search(reason)
                else Failed("tls", Fault.TLS_FAILED, f"ends the TLS connection ({_words(reason)})")
            ) from None
        except (TimeoutError, ErrorCode, NotKafkaError, struct.error) as exc:
            raise self._no_kafka(exc) from None
        except (OSError, EOFError):
            raise self._hung_up(connection) from None
        self._found("speaks Kafka")

    def _no_kafka(self, exc: Exception) -> Failed:
        if isinstance(exc, TimeoutError):
            text = "takes connections, but does not answer a request of Kafka"
            return Failed("kafka", Fault.SILENT, text, "it may hang, or be no Kafka")
        if isinstance(exc, ErrorCode):
            return Failed("kafka", Fault.NOT_KAFKA, f"answers the first request of Kafka with error {exc.code}")
        start = exc.start if isinstance(exc, NotKafkaError) else b""
        if start[:2] == _TLS_ALERT:
            return Failed("kafka", Fault.NEEDS_TLS, "speaks TLS on this port", _TLS_MEND)
        shown = "".join(char if char.isprintable() else "." for char in start[:40].decode("latin-1"))
        return Failed("kafka", Fault.NOT_KAFKA, f"is not Kafka, it answers {shown!r}", "check host and port")

    def _hung_up(self, connection: socket.socket) -> Failed:
        """Find out why the connection ended at the first request."""
        if isinstance(connection, ssl.SSLSocket):
            return self._hung_up_behind_tls()
        if self._speaks_tls():
            return Failed("kafka", Fault.NEEDS_TLS, "speaks TLS on this port", _TLS_MEND)
        text = "ends the connection at the first request of Kafka"
        return Failed("kafka", Fault.NOT_KAFKA, text, "is it Kafka?")

    def _hung_up_behind_tls(self) -> Failed:
        """The alert that says why can be lost when the server closes on what was sent meanwhile: listen only."""
        context = self._own_context()
        assert context is not None
        try:
            with self._reach(self._host, self._port, context) as connection:
                Greeting(connection, self._deadline).wait_for_end(SECOND_LOOK)
        except ssl.SSLError as exc:
            if _CLIENT_ALERT.search(exc.reason or ""):
                return self._client_certificate(exc.reason or "")
        except Failed as exc:
            return exc
        except (OSError, EOFError):
            pass
        text = "ends the connection after the TLS handshake"
        return Failed("kafka", Fault.LOST, text, "it may want another client certificate, or be no Kafka")

    # Login, brokers

    def _log_in(self, greeting: Greeting) -> None:
        self.at = "mechanism"
        mechanism = self._security.options.sasl_mechanism or ""
        try:
            others = greeting.mechanisms(mechanism)
        except ErrorCode:
            mend = f'Kafka.Security.Protocol = "{"SSL" if self._security.uses_tls else "PLAINTEXT"}" fits this port'
            raise Failed("mechanism", Fault.NO_LOGIN, "takes no login (SASL) on this port", mend) from None
        except TimeoutError:
            raise Failed("mechanism", Fault.SILENT, "does not answer when we want to log in") from None
        except (OSError, EOFError, NotKafkaError, struct.error):
            raise Failed("mechanism", Fault.LOST, "ends the connection at the login") from None
        if others:
            text = f"does not offer {mechanism}, but {', '.join(sorted(others))}"
            raise Failed("mechanism", Fault.MECHANISM, text, "Kafka.Security.SaslMechanism is one of them")
        self._found(f"offers {mechanism}")
        self.at = "login"
        try:
            greeting.authenticate(self._security.login(self._host))
        except TokenError as exc:
            raise Failed("login", Fault.NO_TOKEN, f"is not asked to let us in: {exc}") from None
        except TimeoutError:  # it may also make those wait whom it refuses
            raise Failed("login", Fault.SILENT, "does not answer the login") from None
        except (EOFError, OSError):
            raise Failed("login", Fault.LOST, "ends the connection within the login") from None
        except ErrorCode as exc:
            raise self._login_refused(exc.text) from None
        except Exception as exc:  # of a mechanism that does not understand the server
            text = f"answers the login in a way that is no {mechanism} ({type(exc).__name__})"
            raise Failed("login", Fault.LOGIN_REFUSED, text) from None
        self._found("lets us in")

    def _login_refused(self, said: str) -> Failed:
        options = self._security.options
        name = f" of {options.sasl_username}" if options.sasl_username else ""
        why = f" ({hide(_clean(said))})" if said else ""
        keys = "the token" if options.sasl_mechanism == "OAUTHBEARER" else "SaslUsername and SaslPassword"
        return Failed("login", Fault.LOGIN_REFUSED, f"refuses the login{name}{why}", f"check {keys} of Kafka.Security")

    def _ask_for_brokers(self, greeting: Greeting) -> list[Address]:
        self.at = "brokers"
        try:
            brokers = greeting.brokers()
        except TimeoutError:
            raise Failed("brokers", Fault.SILENT, "does not say where its brokers are") from None
        except (OSError, EOFError, NotKafkaError, struct.error):
            raise self._no_brokers() from None
        self._found(f"has its brokers at {', '.join(f'{host}:{port}' for host, port in brokers[:10])}")
        return brokers

    def _no_brokers(self) -> Failed:
        """A listener with a login drops whoever asks for anything before it."""
        if self._security.logs_in:
            return Failed("brokers", Fault.LOST, "ends the connection after the login")
        mechanisms: list[str] = []
        try:
            with self._reach(self._host, self._port, self._own_context()) as connection:
                mechanisms = Greeting(connection, self._deadline).mechanisms("?")
        except (Failed, OSError, EOFError, NotKafkaError, ErrorCode, struct.error):
            pass
        if not mechanisms:
            return Failed("brokers", Fault.LOST, "ends the connection when it is asked for its brokers")
        text = f"wants a login (SASL) on this port: {', '.join(sorted(mechanisms))}"
        protocol = "SASL_SSL" if self._security.uses_tls else "SASL_PLAINTEXT"
        return Failed("login", Fault.NEEDS_LOGIN, text, f'Kafka.Security.Protocol = "{protocol}" with a SaslMechanism')

    def _try_brokers(self, brokers: list[Address], context: ssl.SSLContext | None) -> None:
        """Clients go on to the addresses that the brokers give: one of them must be right."""
        others = [broker for broker in brokers if broker != (self._host, self._port)]
        if len(others) < len(brokers) or not others:
            return
        failures = []
        steps, self._steps = self._steps, []
        for host, port in others[:MOST_BROKERS]:
            try:
                self._reach(host, port, context).close()
            except Failed as exc:
                failures.append(f"{host}:{port} {exc.step.text}")
            else:
                return
        self._steps = steps
        text = f"sends clients on to addresses of no use: {', '.join(failures)}"
        raise Failed(
            "brokers", Fault.ADVERTISED, text, "advertised.listeners of the brokers names what clients can reach"
        )

    # A second look

    def _speaks_tls(self) -> bool:
        return self._see_certificate() is not None

    def _is_plain_kafka(self) -> bool:
        try:
            with self._connect(self._host, self._port) as connection:
                Greeting(connection, min(self._deadline, time.monotonic() + SECOND_LOOK)).api_versions()
        except (Failed, OSError, EOFError, NotKafkaError, struct.error):
            return False
        except ErrorCode:
            pass
        return True

    def _see_certificate(self) -> x509.Certificate | None:
        """Return the certificate that the server shows, to say what is wrong with it; nothing is sent."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with self._connect(self._host, self._port) as plain:
                plain.settimeout(self._left())
                with context.wrap_socket(plain, server_hostname=self._host.rstrip(".")) as secure:
                    return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
        except (Failed, OSError, ValueError):
            return None

    def _left(self) -> float:
        return max(0.01, self._deadline - time.monotonic())


_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9
_WRONG_NAME: Final = (62, 64)
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL."""
_TLS_ALERT: Final = b"\x15\x03"
_CLIENT_ALERT: Final = re.compile(
    r"ALERT_(?:BAD_CERT|CERT|UNKNOWN_CA|NO_CERT|UNSUPPORTED_CERT|ACCESS)|CERTIFICATE_REQ", re.I
)
_TLS_MEND: Final = 'Kafka.Security.Protocol = "SSL" or "SASL_SSL"'
_PLAIN_MEND: Final = 'Kafka.Security.Protocol = "PLAINTEXT" or "SASL_PLAINTEXT", or another port'


def _words(reason: str) -> str:
    """Say in words what OpenSSL says in constants."""
    return reason.lower().replace("_", " ")


def _clean(text: str) -> str:
    """Return what a server says as one short line."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:200]


def _names(certificate: x509.Certificate) -> list[str]:
    """Return the names of the hosts that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = [str(name.value) for name in names]
    except (x509.ExtensionNotFound, ValueError):
        found = []
    return [_clean(name) for name in found[:5]] or ["no host"]
