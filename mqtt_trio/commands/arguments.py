"""The flags that pub and sub share, with mosquitto's names, and what they mean for the connection."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import attrs

from mqtt_trio.commands.endpoint import Endpoint, TlsFiles
from mqtt_trio.commands.failures import UsageError
from mqtt_trio.commands.properties import message_properties, parse_properties, width
from mqtt_trio.errors import MqttTrioError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import Connect, Disconnect, Will
from mqtt_trio.protocol.topics import validate_topic_filter, validate_topic_name
from mqtt_trio.protocol.wire import write_string

V5: Final = ProtocolVersion.MQTT_5_0
VERSIONS: Final = {
    "mqttv31": ProtocolVersion.MQTT_3_1,
    "31": ProtocolVersion.MQTT_3_1,
    "mqttv311": ProtocolVersion.MQTT_3_1_1,
    "311": ProtocolVersion.MQTT_3_1_1,
    "mqttv5": V5,
    "5": V5,
}
NEVER_EXPIRES: Final = 0xFFFF_FFFF
"""Session Expiry Interval of a session that stays [MQTT5-3.1.2.11.2]."""
_DEFAULT_PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "ws": 8083, "wss": 8084}


class Parser(argparse.ArgumentParser):
    """argparse with mosquitto's grammar: whatever follows an option that takes a value is its value, also `-m -5 °C`;
    `-h` is the host; options are neither abbreviated nor joined."""

    def __init__(self, command: str, usage: str, description: str) -> None:
        super().__init__(
            prog=f"mqtt-trio {command}",
            usage=f"mqtt-trio {command} {usage}",
            description=description,
            add_help=False,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._takes_value: set[str] = set()
        self.add_argument("--help", action="help", help="show this and exit")

    def option(self, *names: str, **details: Any) -> None:
        """Add an option that takes one value."""
        self._takes_value.update(names)
        self.add_argument(*names, **details)

    def switch(self, *names: str, **details: Any) -> None:
        """Add an option without a value."""
        self.add_argument(*names, action="store_true", **details)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; `properties` of the result has the arguments of each -D.

        Raises:
          UsageError: what cannot be used. `--help` ends with SystemExit.
        """
        joined: list[str] = []
        properties: list[Sequence[str]] = []
        rest = list(arguments)
        while rest:
            name = rest.pop(0)
            if name in ("-D", "--property"):
                count = width(rest)
                properties.append(rest[:count])
                del rest[:count]
            elif name in self._takes_value and rest:
                joined.append(f"{name}={rest.pop(0)}")
            else:
                joined.append(name)
        parsed = self.parse_args(joined)
        parsed.properties = properties
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def integer(minimum: int, maximum: int) -> Callable[[str], int]:
    """Return a converter for argparse."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"expected a number from {minimum} to {maximum}, got {text!r}")
        return value

    return convert


def utf8(text: str) -> str:
    """Check that an argument is a UTF-8 Encoded String of MQTT."""
    try:
        write_string(text)
    except MqttTrioError:
        raise argparse.ArgumentTypeError(f"expected UTF-8 of at most 65,535 bytes, got {text[:40]!r}") from None
    return text


def topic_name(text: str) -> str:
    """Check that an argument is a Topic Name."""
    try:
        validate_topic_name(utf8(text))
    except MqttTrioError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is no topic to publish to: {exc}") from None
    return text


def topic_filter(text: str) -> str:
    """Check that an argument is a Topic Filter."""
    try:
        validate_topic_filter(utf8(text))
    except MqttTrioError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is no topic to subscribe to: {exc}") from None
    return text


def _session_expiry(text: str) -> int:
    return NEVER_EXPIRES if text in ("-1", "∞") else integer(0, NEVER_EXPIRES)(text)


def add_connection_flags(parser: Parser) -> None:
    """Add what both commands need to connect."""
    option, switch, number = parser.option, parser.switch, integer(0, 2)
    option("-h", "--host", help="server (localhost)")
    option("-p", "--port", type=integer(1, 65_535), help="1883; with TLS 8883, WebSocket 8083, both 8084")
    option("--unix", metavar="PATH", help="Unix socket in place of host and port")
    option("-L", "--url", metavar="URL", help="mqtt[s]:// or ws[s]://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC")
    option("-A", dest="bind_address", metavar="ADDRESS", help="local address to connect from")
    switch("--ws", help="MQTT over WebSocket")
    option("--ws-path", metavar="PATH", help="path of the WebSocket (/mqtt); implies --ws")
    option("-V", "--protocol-version", dest="version", metavar="VERSION", help="31, 311 or 5 (311; with -D or -x: 5)")
    option("-i", "--id", dest="client_id", type=utf8, metavar="ID", help="Client Identifier (chosen by the server)")
    option("-I", "--id-prefix", type=utf8, metavar="PREFIX", help="Client Identifier: PREFIX and the process id")
    option("-u", "--username", type=utf8, help="user name")
    option("-P", "--pw", metavar="PASSWORD", help="password; other users of the machine may see it in its process list")
    option("-k", "--keepalive", type=integer(0, 65_535), default=60, metavar="SECONDS", help="Keep Alive (60); 0: off")
    switch("-c", "--disable-clean-session", dest="keep_session", help="go on with a session and keep it (needs -i)")
    option("-x", dest="session_expiry", type=_session_expiry, metavar="SECONDS", help="Session Expiry; -1 or ∞: never")
    option("--will-topic", type=topic_name, metavar="TOPIC", help="topic of the Will")
    option("--will-payload", metavar="TEXT", help="its payload (empty)")
    option("--will-qos", type=number, default=0, metavar="QOS", help="its QoS (0)")
    switch("--will-retain", help="it is to be retained")
    option("-D", "--property", metavar="COMMAND NAME VALUE", help="5.0 property of connect, publish, will, ...")
    option("--cafile", metavar="FILE", help="TLS: trusted authorities, PEM (those of the system)")
    option("--capath", metavar="DIR", help="TLS: directory of trusted authorities")
    switch("--tls-use-os-certs", help="TLS: trust the authorities of the system")
    option("--cert", metavar="FILE", help="TLS: certificate of the client, PEM")
    option("--key", metavar="FILE", help="TLS: its private key, PEM")
    switch("--insecure", help="TLS: do not compare the host with the certificate's names")
    option("--tls-alpn", metavar="PROTOCOL", help="TLS: ALPN protocol, such as mqtt")
    switch("-d", "--debug", help="say on stderr which packets come and go")
    switch("--quiet", help="no messages on stderr")


@attrs.frozen(kw_only=True)
class Connection:
    """What the shared flags say."""

    endpoint: Endpoint
    connect: Connect
    disconnect: Disconnect
    properties: dict[str, dict[str, Any]]
    """Of -D, by command; `connect`, `disconnect` and `will` are used up."""
    topic: str | None
    """Of the URL."""

    def check_unused(self, *commands: str) -> None:
        """Raise UsageError where -D names a packet that is none of `commands`, which the caller sends."""
        for command, values in self.properties.items():
            if values and command not in commands:
                raise UsageError(f"-D {command}: no such packet is sent by this command")


def read_connection(parsed: argparse.Namespace, command: str) -> Connection:
    """Make sense of the shared flags.

    Raises:
      UsageError: they contradict each other.
      CommandError: a certificate that cannot be read.
    """
    url = _Url.parse(parsed.url) if parsed.url is not None else _Url()
    properties = parse_properties(parsed.properties)
    version = _version(parsed)
    connect = _connect(parsed, url, version, properties)
    if connect.client_id == "" and version is ProtocolVersion.MQTT_3_1:
        connect.client_id = f"mqtt-trio-{command}-{os.getpid()}"[:23]  # 3.1 has no empty one
    reason = ReasonCode.NORMAL_DISCONNECTION
    return Connection(
        endpoint=_endpoint(parsed, url),
        connect=connect,
        disconnect=Disconnect(reason, **properties.pop("disconnect")),
        properties=properties,
        topic=url.topic,
    )


@attrs.frozen(kw_only=True)
class _Url:
    scheme: str = "mqtt"
    host: str | None = None
    port: int | None = None
    user_name: str | None = None
    password: str | None = None
    topic: str | None = None

    @classmethod
    def parse(cls, text: str) -> _Url:
        """Take a URL apart; the topic is verbatim, with its # and %."""
        from urllib.parse import unquote, urlsplit

        scheme, mark, rest = text.partition("://")
        authority, slash, topic = rest.partition("/")
        if not mark or scheme.lower() not in _DEFAULT_PORTS:
            raise UsageError("-L: expected mqtt://, mqtts://, ws:// or wss://")
        if not slash or not topic:
            raise UsageError("-L: the topic is missing: mqtt://HOST/TOPIC")
        try:
            parts = urlsplit(f"//{authority}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if not host:
            raise UsageError("-L: expected HOST or HOST:PORT behind the ://")
        user_name = None if parts.username is None else unquote(parts.username)
        password = None if parts.password is None else unquote(parts.password)
        return cls(scheme=scheme.lower(), host=host, port=port, user_name=user_name, password=password, topic=topic)


def _version(parsed: argparse.Namespace) -> ProtocolVersion:
    needs_5 = [flag for flag, given in (("-D", parsed.properties), ("-x", parsed.session_expiry)) if given]
    if parsed.version is None:
        return V5 if needs_5 else ProtocolVersion.MQTT_3_1_1
    if parsed.version not in VERSIONS:
        raise UsageError(f"argument -V: expected one of {', '.join(VERSIONS)}, got {parsed.version!r}")
    version = VERSIONS[parsed.version]
    if needs_5 and version is not V5:
        raise UsageError(f"{' and '.join(needs_5)} is for MQTT 5.0: say -V 5 or leave -V out")
    return version


def _connect(
    parsed: argparse.Namespace, url: _Url, version: ProtocolVersion, properties: dict[str, dict[str, Any]]
) -> Connect:
    user_name = parsed.username if parsed.username is not None else url.user_name
    password = parsed.pw if parsed.pw is not None else url.password
    if password is not None and user_name is None and version is not V5:
        raise UsageError("-P needs -u: before MQTT 5.0 there is no password without a user name")  # [MQTT3-3.1.2-22]
    if parsed.client_id is not None and parsed.id_prefix is not None:
        raise UsageError("-i and -I cannot be used together")
    client_id = parsed.client_id or (f"{parsed.id_prefix}{os.getpid()}" if parsed.id_prefix else "")
    fields = properties.pop("connect")
    if parsed.session_expiry is not None:
        if "session_expiry_interval" in fields:
            raise UsageError("-x and -D connect session-expiry-interval say the same")
        fields["session_expiry_interval"] = parsed.session_expiry
    elif parsed.keep_session and version is V5:
        fields.setdefault("session_expiry_interval", NEVER_EXPIRES)
    if parsed.client_id in (None, "") and (
        parsed.keep_session or fields.get("session_expiry_interval") == NEVER_EXPIRES
    ):
        raise UsageError("-c and a session that never expires need a Client Identifier: -i ID")
    return Connect(
        client_id=client_id,
        protocol_version=version,
        clean_start=not parsed.keep_session,
        keep_alive=parsed.keepalive,
        will=_will(parsed, properties.pop("will")),
        user_name=user_name,
        password=None if password is None else os.fsencode(password),
        **fields,
    )


def _will(parsed: argparse.Namespace, fields: dict[str, Any]) -> Will | None:
    if parsed.will_topic is None:
        if parsed.will_payload is not None or parsed.will_qos or parsed.will_retain or fields:
            raise UsageError("a Will needs --will-topic")
        return None
    properties = message_properties(fields)
    return Will(
        topic_name=parsed.will_topic,
        payload=os.fsencode(parsed.will_payload or ""),
        qos=QoS(parsed.will_qos),
        retain=parsed.will_retain,
        properties=properties,
        **fields,
    )


def _endpoint(parsed: argparse.Namespace, url: _Url) -> Endpoint:
    if (parsed.cert is None) is not (parsed.key is None):
        raise UsageError("--cert and --key belong together")
    websocket_path = parsed.ws_path or ("/mqtt" if parsed.ws or url.scheme in ("ws", "wss") else None)
    if websocket_path is not None and not websocket_path.startswith("/"):
        raise UsageError("--ws-path: a path starts with /")
    flags = (parsed.cafile, parsed.capath, parsed.cert, parsed.tls_alpn, parsed.insecure, parsed.tls_use_os_certs)
    tls = any(flags) or url.scheme in ("mqtts", "wss")
    files = TlsFiles(
        ca_file=parsed.cafile,
        ca_path=parsed.capath,
        cert_file=parsed.cert,
        key_file=parsed.key,
        check_host_name=not parsed.insecure,
        alpn=parsed.tls_alpn,
    )
    scheme = ("ws" if websocket_path else "mqtt") + ("s" if tls else "")
    return Endpoint(
        host=parsed.host or url.host or "localhost",
        port=parsed.port or url.port or _DEFAULT_PORTS[scheme],
        unix_path=parsed.unix,
        bind_address=parsed.bind_address,
        tls=files.context() if tls else None,
        websocket_path=websocket_path,
    )
