"""TLS for listeners: certificates of a listener, the handshake, and a stream whose ordinary ends are ordinary.

The only module that knows `ssl`. Everything above sees a trio Stream.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path as FilePath
from typing import Any, Final, cast

import attrs
import trio

from mqtt_trio.errors import MqttTrioError, StartError

CHUNK_SIZE: Final = 65_536
"""Bytes that are encrypted at a time: a client that does not read holds no second copy of its outbox."""
HANDSHAKE: Final = 0x16
"""Type of the first record of a TLS client (RFC 8446, 5.1)."""
HTTP_START: Final = re.compile(rb"(?:GET|HEAD|POST|PUT|OPTIONS|DELETE|PATCH|CONNECT|TRACE) ?")

_PRIVATE_KEY: Final = re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----")
_ENCRYPTED: Final = re.compile(r"-----BEGIN ENCRYPTED PRIVATE KEY-----|Proc-Type: 4,ENCRYPTED")
_CERTIFICATE: Final = re.compile(r"-----BEGIN (?:TRUSTED |X509 )?CERTIFICATE-----")
_ALERTS: Final = re.compile(r"(?:TLSV1|TLSV13|SSLV3)_ALERT_(\w+)")
_DISTRUST: Final = (
    "UNKNOWN_CA",
    "BAD_CERTIFICATE",
    "CERTIFICATE_UNKNOWN",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED",
)
_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client showed no certificate (RequireClientCert)",
    "UNSUPPORTED_PROTOCOL": "the client offers no version from TLS 1.2 on",
    "NO_SHARED_CIPHER": "the client offers no cipher that is served",
    "WRONG_VERSION_NUMBER": "what came is no TLS",
    "HTTP_REQUEST": "plain HTTP came; this port speaks TLS (https://, wss://)",
}


@attrs.frozen(kw_only=True)
class TlsOptions:
    """Tls = {...} of a listener. TLS 1.2 and 1.3 are served."""

    cert_file: str
    """PEM file with the certificate of the server and, behind it, those of the authorities between it and the root."""
    key_file: str
    """PEM file with its private key."""
    key_password: str | None = attrs.field(default=None, repr=False, metadata={"secret": True})
    """Opens an encrypted private key."""
    ca_file: str | None = None
    """PEM file with the authorities that client certificates are checked against. A client may show a certificate
    then; one that does not pass ends the handshake."""
    require_client_cert: bool = attrs.field(default=False)
    """Clients without a certificate that `ca_file` vouches for are turned away in the handshake."""

    @require_client_cert.validator
    def _check_authorities(self, _attribute: attrs.Attribute[bool], value: bool) -> None:
        if value and self.ca_file is None:
            raise ValueError("true needs CaFile, the authorities that client certificates are checked against")


class TlsFailure(MqttTrioError):
    """A handshake that did not succeed; the text says why, for the log."""


class TlsServer:
    """The TLS side of one listener. New connections use what `reload` read last, others keep what they have."""

    def __init__(self, options: TlsOptions, where: str, protocols: tuple[str, ...]) -> None:
        """Read the files; `where` is the path of the options in the configuration, `protocols` are those of ALPN.

        Raises:
          StartError: names the key, the file and the mend.
        """
        self.options = options
        self.where = where
        self.protocols = protocols
        self.warning: str | None = None
        """What is wrong with the certificate although it can be served: expired, not valid yet, not for servers."""
        self.subject = ""
        """Common Name or first alternative name of the certificate; empty when it did not verify."""
        self.expires = ""
        """The end of its validity as certificates write it."""
        self.context: ssl.SSLContext
        self.reload()

    def reload(self) -> None:
        """Read the files again, all or nothing.

        Raises:
          StartError: what was read before stays.
        """
        options = self.options
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        _load_certificate(context, options, self.where)
        warning, facts = _examine(context, options.cert_file)
        context.set_alpn_protocols(list(self.protocols))
        if options.ca_file is not None:
            _load_authorities(context, options.ca_file, f"{self.where}.CaFile")
            context.verify_mode = ssl.CERT_REQUIRED if options.require_client_cert else ssl.CERT_OPTIONAL
        self.context, self.warning = context, warning
        self.subject = common_name(facts) or next((str(name) for _, name in facts.get("subjectAltName", ())), "")
        self.expires = str(facts.get("notAfter", ""))

    def describe(self) -> str:
        """Say for the start-up summary what is served."""
        certificate = f"certificate of {self.subject or 'an unnamed server'} until {self.expires}"
        if self.warning is not None:
            certificate = self.warning
        clients = ""
        if self.options.require_client_cert:
            clients = ", client certificates required"
        elif self.options.ca_file is not None:
            clients = ", client certificates checked where shown"
        return f"TLS 1.2 and 1.3, {certificate}{clients}"

    async def handshake(self, stream: trio.abc.Stream) -> TlsStream:
        """Make a TLS stream of a connection; the caller bounds the time and closes `stream` when this fails.

        Raises:
          TlsFailure: nothing of it is our error.
        """
        if isinstance(stream, trio.SocketStream):
            await _look_at_first_bytes(stream)
        context = _Context(self.context)
        transport = _Transport(stream)
        secure = trio.SSLStream(transport, cast("ssl.SSLContext", context), server_side=True)
        try:
            await secure.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            reason = _what_is_wrong(exc.__cause__)
            try:
                await stream.send_all(context.last_words())
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # it did not wait for them
            raise TlsFailure(reason) from None
        transport.forgiving = True
        return TlsStream(secure, transport)


class _Context:
    """An SSLContext for one SSLStream. Trio drops the alert that says why a handshake failed; this one has it."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._outgoing: ssl.MemoryBIO | None = None

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **options: Any) -> ssl.SSLObject:
        self._outgoing = outgoing
        return self._context.wrap_bio(incoming, outgoing, **options)

    def last_words(self) -> bytes:
        """Return what OpenSSL had to say to the client and was not sent."""
        return b"" if self._outgoing is None else self._outgoing.read()


class _Transport(trio.abc.Stream):
    """What is below an SSLStream, which reads nothing more once a write failed; this one remembers the failure for
    TlsStream, so that what the client sent before it closed can still be read."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.forgiving = False
        self.failure: trio.BrokenResourceError | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            if self.failure is None:
                await self._stream.send_all(data)
        except trio.BrokenResourceError as exc:
            if not self.forgiving:
                raise
            self.failure = exc

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class TlsStream(trio.abc.Stream):
    """A trio SSLStream whose peers may leave without close_notify, as MQTT clients do: an end is an end."""

    def __init__(self, stream: trio.SSLStream[Any], transport: _Transport) -> None:
        self._stream = stream
        self._transport = transport

    @property
    def certificate_subject(self) -> str | None:
        """Common Name of the client's certificate, which was verified; None when it showed none."""
        return common_name(self._stream.getpeercert() or {})

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what came, or nothing at the end, close_notify or not."""
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError as exc:
            cause = exc.__cause__
            if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                return b""
            raise trio.BrokenResourceError(_what_is_wrong(cause)) from cause

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send, CHUNK_SIZE bytes at a time."""
        with memoryview(data) as view:
            for start in range(0, len(view), CHUNK_SIZE):
                await self._stream.send_all(view[start : start + CHUNK_SIZE])
                if self._transport.failure is not None:
                    raise trio.BrokenResourceError(str(self._transport.failure)) from self._transport.failure

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Say close_notify and close; cancelled, close at once."""
        await self._stream.aclose()


def common_name(certificate: Any) -> str | None:
    """Return the first Common Name of the subject of a decoded certificate (`SSLSocket.getpeercert`)."""
    names = (value for part in certificate.get("subject", ()) for key, value in part if key == "commonName")
    return next(names, None)


async def _look_at_first_bytes(stream: trio.SocketStream) -> None:
    """Recognise clients that speak something else, so that the log can say what.

    Raises:
      TlsFailure: what came is no TLS, or nothing came.
    """
    try:
        first = await stream.socket.recv(8, trio.socket.MSG_PEEK)
    except OSError as exc:
        raise TlsFailure(f"the network connection broke: {exc}") from None
    if not first:
        raise TlsFailure("the client left before it said anything")
    if first[0] == HANDSHAKE:
        return
    if first[0] == 0x10:
        raise TlsFailure("a plain MQTT CONNECT came; this port speaks TLS (mqtts://, or --cafile of mosquitto_pub)")
    if HTTP_START.match(first):
        raise TlsFailure(_REASONS["HTTP_REQUEST"])
    raise TlsFailure(_REASONS["WRONG_VERSION_NUMBER"])


def _what_is_wrong(exc: BaseException | None) -> str:
    """Say in words what `ssl` says in constants."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate of the client is refused: {exc.verify_message}"
    if isinstance(exc, ssl.SSLEOFError):
        return "the client left in the middle"
    if not isinstance(exc, ssl.SSLError):
        return f"the network connection broke: {exc}"
    reason = exc.reason or str(exc)
    if (alert := _ALERTS.match(reason)) is not None:
        said = alert[1].lower().replace("_", " ")
        if alert[1] in _DISTRUST:
            return f"the client does not accept the certificate of this server (its alert: {said})"
        return f"the client ended it (its alert: {said})"
    return _REASONS.get(reason, reason.lower().replace("_", " "))


# Reading the files


def _load_certificate(context: ssl.SSLContext, options: TlsOptions, where: str) -> None:
    certificate = _read(options.cert_file, f"{where}.CertFile")
    key = _read(options.key_file, f"{where}.KeyFile")
    if not _CERTIFICATE.search(certificate):
        raise StartError(f"{where}.CertFile: {options.cert_file} has no certificate in PEM (-----BEGIN CERTIFICATE)")
    if not _PRIVATE_KEY.search(key):
        raise StartError(f"{where}.KeyFile: {options.key_file} has no private key in PEM (-----BEGIN PRIVATE KEY)")
    encrypted = _ENCRYPTED.search(key) is not None
    if encrypted and options.key_password is None:
        raise StartError(
            f"{where}.KeyFile: {options.key_file} is encrypted; set {where}.KeyPassword or KeyPasswordFile, or keep "
            "the key unencrypted where only the broker can read it"
        )
    try:
        # A password of some kind is always given: without one, OpenSSL would ask for it on the terminal.
        context.load_cert_chain(options.cert_file, options.key_file, password=options.key_password or "")
    except (ssl.SSLError, ValueError) as exc:  # ValueError: a password that is too long for OpenSSL
        raise StartError(_why_not_loaded(exc, options, where, encrypted)) from None


def _why_not_loaded(exc: ssl.SSLError | ValueError, options: TlsOptions, where: str, encrypted: bool) -> str:
    reason = getattr(exc, "reason", None) or ""
    if reason == "KEY_VALUES_MISMATCH":
        return (
            f"{where}.KeyFile: {options.key_file} is not the key of the first certificate in {options.cert_file}; "
            "the certificate of the server comes first there, its authorities behind it"
        )
    if encrypted:
        return f"{where}.KeyPassword: does not open {options.key_file}"
    if reason in ("EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "CA_KEY_TOO_SMALL"):
        return f"{where}.CertFile: {options.cert_file} is too weak for TLS ({reason.lower().replace('_', ' ')})"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=options.cert_file)
    except ssl.SSLError:
        return f"{where}.CertFile: {options.cert_file} is damaged: its certificates cannot be read"
    return f"{where}.KeyFile: {options.key_file} is damaged or of an unknown kind ({reason or exc})"


def _load_authorities(context: ssl.SSLContext, file: str, where: str) -> None:
    if not _CERTIFICATE.search(_read(file, where)):
        raise StartError(f"{where}: {file} has no certificate in PEM (-----BEGIN CERTIFICATE)")
    try:
        context.load_verify_locations(cafile=file)
    except ssl.SSLError:
        raise StartError(f"{where}: {file} is damaged: its certificates cannot be read") from None
    if not context.cert_store_stats()["x509_ca"]:
        raise StartError(f"{where}: {file} has no certificate of an authority (CA), only others; name the CA's own")


def _read(file: str, where: str) -> str:
    try:
        return FilePath(file).read_bytes().decode("latin-1")
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        text = getattr(exc, "strerror", None) or str(exc)
        raise StartError(f"{where}: cannot read {file!r}: {text}") from None


def _examine(context: ssl.SSLContext, cert_file: str) -> tuple[str | None, dict[str, Any]]:
    """Shake hands with ourselves, trusting nothing but this certificate: what a client will find wrong with it beside
    its issuer and its name, and what stands in it. `ssl` has no other public way to read a certificate."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cafile=cert_file)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server)
    theirs = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs, ours, theirs):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as exc:
            return f"the certificate in {cert_file} is bad for clients that check it: {exc.verify_message}", {}
        except ssl.SSLError as exc:
            return f"the certificate in {cert_file} cannot be used: {exc.reason or exc}", {}
    return None, dict(ours.getpeercert() or {})
