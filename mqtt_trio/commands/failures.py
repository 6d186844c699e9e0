"""How commands fail: one line for stderr and an exit code, in mosquitto's words where mosquitto has some."""

from __future__ import annotations

from typing import Final

from mqtt_trio.errors import MqttTrioError
from mqtt_trio.protocol.codes import CONNECT_RETURN_CODES, ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import ConnAck, Disconnect

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
EXIT_TIMED_OUT: Final = 27
"""What mosquitto_sub -W ends with."""

_CONNECT_RETURN_TEXTS: Final = {
    1: "Connection Refused: unacceptable protocol version.",
    2: "Connection Refused: identifier rejected.",
    3: "Connection Refused: broker unavailable.",
    4: "Connection Refused: bad user name or password.",
    5: "Connection Refused: not authorised.",
}
"""3.x, by return code."""
_REASON_TEXTS: Final = {
    ReasonCode.BAD_USER_NAME_OR_PASSWORD: "Bad username or password",
    ReasonCode.QOS_NOT_SUPPORTED: "QoS not supported",
}
_FINAL_DISCONNECTS: Final = frozenset(
    (
        ReasonCode.NOT_AUTHORIZED,
        ReasonCode.BANNED,
        ReasonCode.BAD_AUTHENTICATION_METHOD,
        ReasonCode.SESSION_TAKEN_OVER,
        ReasonCode.TOPIC_FILTER_INVALID,
        ReasonCode.TOPIC_NAME_INVALID,
        ReasonCode.MALFORMED_PACKET,
        ReasonCode.PROTOCOL_ERROR,
        ReasonCode.PACKET_TOO_LARGE,
        ReasonCode.USE_ANOTHER_SERVER,
        ReasonCode.SERVER_MOVED,
    )
)
"""Reasons of a server that another connection would meet again; one that takes its session back would fight for it."""


class CommandError(MqttTrioError):
    """A command cannot do what it was asked to. The text is one line for the person who asked.

    Attributes:
      exit_code: of the process.
    """

    def __init__(self, text: str, exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class UsageError(CommandError):
    """The command line cannot be used: exit code 2."""

    def __init__(self, text: str) -> None:
        super().__init__(text, EXIT_USAGE)


class RefusedError(CommandError):
    """The server refused the CONNECT; the exit code is that of the CONNACK, as with mosquitto's clients."""

    def __init__(self, connack: ConnAck, version: ProtocolVersion) -> None:
        reason = connack.reason_code
        if version is ProtocolVersion.MQTT_5_0:
            text, code = reason_text(reason), int(reason)
            if reason is ReasonCode.UNSUPPORTED_PROTOCOL_VERSION:
                text += ". Try -V 311"
            elif connack.server_reference:
                text += f" ({connack.server_reference})"
        else:
            code = CONNECT_RETURN_CODES.get(reason, 5)
            text = _CONNECT_RETURN_TEXTS[code]
        super().__init__(f"Connection error: {with_reason(text, connack.reason_string)}", code)


class UnreachableError(CommandError):
    """No network connection, or no answer on it; another attempt may succeed."""


class ConnectionLostError(CommandError):
    """The network connection ended without a word from the server; another one may last longer."""


class DisconnectedError(CommandError):
    """The server said DISCONNECT.

    Attributes:
      final: another connection would end in the same way.
    """

    def __init__(self, disconnect: Disconnect) -> None:
        text = reason_text(disconnect.reason_code)
        if disconnect.server_reference:
            text += f" ({disconnect.server_reference})"
        super().__init__(f"Error: the server disconnected: {with_reason(text, disconnect.reason_string)}")
        self.final = disconnect.reason_code in _FINAL_DISCONNECTS


def reason_text(reason_code: ReasonCode) -> str:
    """Say a reason code as mosquitto does: "Not authorized"."""
    return _REASON_TEXTS.get(reason_code) or reason_code.name.replace("_", " ").capitalize()


def with_reason(text: str, reason_string: str | None) -> str:
    """Add the server's own words."""
    if not reason_string:
        return text
    return f"{text}: {printable(reason_string)}"


def printable(text: str) -> str:
    """Make what a server says one line that cannot move the cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)
