"""How `sub` prints a message: payload only, `-v`, or a format string of mosquitto_sub -F.

Formats are compiled once; what they print is bytes, because topics and payloads are.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import attrs

from mqtt_trio.commands.failures import UsageError
from mqtt_trio.commands.message_json import message_json
from mqtt_trio.protocol.packets import Publish


@attrs.frozen
class Arrived:
    """A message, and when it came."""

    message: Publish
    nanoseconds: int
    """Since 1970."""


Piece: TypeAlias = Callable[[Arrived], bytes]
Printer: TypeAlias = Callable[[Arrived], bytes]
"""Returns all bytes of a message, the end of line included.

Raises:
  message_json.InvalidPayloadError: %J, and the payload is no JSON.
"""

_ESCAPES: Final = {
    "\\": b"\\", "0": b"\0", "a": b"\a", "e": b"\x1b", "n": b"\n", "r": b"\r", "t": b"\t", "v": b"\v",
}  # fmt: skip
_SPECIFIER: Final = re.compile(r"(-?)(0?)([0-9]*)(?:\.([0-9]*))?(.?)", re.DOTALL)
_FLAGGED: Final = "ACEFIlmpRStxX"
"""Specifiers that take flags and a width."""


def plain(end: bytes) -> Printer:
    """Print the payload; nothing at all for an empty one, as mosquitto_sub."""

    def show(arrived: Arrived) -> bytes:
        payload = arrived.message.payload
        return payload + end if payload else b""

    return show


def verbose(end: bytes) -> Printer:
    """Print topic and payload, which is "(null)" when it is empty."""

    def show(arrived: Arrived) -> bytes:
        message = arrived.message
        payload = message.payload or (b"(null)" if end else b"")
        return b"".join((message.topic_name.encode(), b" ", payload, end)) if payload else b""

    return show


def formatted(text: str, end: bytes, *, pretty: bool = False) -> Printer:
    """Compile a format string.

    Raises:
      UsageError: what is wrong with it.
    """
    pieces = _compile(text, pretty)

    def show(arrived: Arrived) -> bytes:
        return b"".join([piece(arrived) for piece in pieces]) + end

    return show


def _compile(text: str, pretty: bool) -> list[Piece]:
    pieces: list[Piece] = []
    at = 0
    while at < len(text):
        mark, following = text[at], text[at + 1 : at + 2]
        at += 1
        if mark not in "%@\\":
            pieces.append(_literal(mark.encode(errors="surrogateescape")))
            continue
        if not following:
            raise UsageError(f"-F: {mark} at the end is incomplete")
        if mark == "\\":
            if following not in _ESCAPES:
                raise UsageError(f"-F: there is no escape \\{following}; known are {' '.join(_ESCAPES)}")
            pieces.append(_literal(_ESCAPES[following]))
        elif mark == "@":
            pieces.append(_time(following))
        else:
            found = _SPECIFIER.match(text, at)
            assert found is not None  # it matches anything
            pieces.append(_specifier(found, pretty))
            at = found.end()
            continue
        at += 1
    return pieces


def _literal(data: bytes) -> Piece:
    return lambda _arrived: data


def _time(letter: str) -> Piece:
    if letter == "@":
        return _literal(b"@")
    if letter == "N":
        return lambda arrived: b"%09d" % (arrived.nanoseconds % 1_000_000_000)
    return lambda arrived: local_time(arrived, f"%{letter}").encode()


def local_time(arrived: Arrived, template: str) -> str:
    """Pass a template to strftime(3)."""
    return time.strftime(template, time.localtime(arrived.nanoseconds // 1_000_000_000))


@attrs.frozen
class _Layout:
    """Flags, width and precision of a specifier."""

    left: bool
    pad: bytes
    width: int
    precision: int | None

    def number(self, value: int | None) -> bytes:
        if value is None:
            return self.pad * self.width
        text = b"%d" % value
        return text.ljust(self.width) if self.left else text.rjust(self.width, self.pad)

    def text(self, value: str | None) -> bytes:
        data = (value or "").encode()[: self.precision]
        return data.ljust(self.width) if self.left else data.rjust(self.width)

    def payload(self, data: bytes) -> bytes:
        """A width is the most that is shown of a payload, too."""
        if self.width:
            data = data[: self.width]
        return data.ljust(self.width) if self.left else data.rjust(self.width, self.pad)

    def hexadecimal(self, data: bytes) -> bytes:
        if self.width:
            data = data[: self.width // 2]
        return self.payload(data.hex().encode())


def _specifier(found: re.Match[str], pretty: bool) -> Piece:
    left, zero, width, precision, letter = found.groups()
    flagged = found[0] != letter
    if not letter:
        raise UsageError(f"-F: %{found[0]} at the end is incomplete")
    if flagged and letter not in _FLAGGED:
        raise UsageError(f"-F: %{letter} takes no flags and no width, found %{found[0]}")
    layout = _Layout(
        bool(left), b"0" if zero else b" ", int(width or 0), None if precision is None else int(precision or 0)
    )
    if letter in "jJ":
        return _json(letter == "j", pretty)
    piece = _message_pieces(layout).get(letter)
    if piece is None:
        raise UsageError(f"-F: there is no format specifier %{letter}")
    return piece


def _message_pieces(layout: _Layout) -> dict[str, Piece]:
    def of_message(name: str, show: Callable[[Any], bytes]) -> Piece:
        return lambda arrived: show(getattr(arrived.message, name))

    def of_properties(name: str, show: Callable[[Any], bytes]) -> Piece:
        return lambda arrived: show(getattr(arrived.message.properties, name))

    return {
        "%": _literal(b"%"),
        "A": of_message("topic_alias", layout.number),
        "C": of_properties("content_type", layout.text),
        "D": of_properties("correlation_data", lambda data: data or b""),
        "E": of_properties("message_expiry_interval", layout.number),
        "F": of_properties("payload_format_indicator", layout.number),
        "I": lambda arrived: layout.text(local_time(arrived, "%Y-%m-%dT%H:%M:%S%z")),
        "l": of_message("payload", lambda payload: layout.number(len(payload))),
        "m": of_message("packet_id", lambda packet_id: layout.number(packet_id or 0)),
        "P": of_properties("user_properties", lambda pairs: " ".join(f"{k}:{v}" for k, v in pairs).encode()),
        "p": of_message("payload", layout.payload),
        "q": of_message("qos", lambda qos: b"%d" % qos),
        "R": of_properties("response_topic", lambda topic: b"" if topic is None else layout.text(topic)),
        "r": of_message("retain", lambda retain: b"%d" % retain),
        "S": of_message("subscription_identifiers", lambda ids: layout.number(ids[0] if ids else None)),
        "t": of_message("topic_name", layout.text),
        "U": lambda arrived: b"%d.%09d" % divmod(arrived.nanoseconds, 1_000_000_000),
        "x": of_message("payload", layout.hexadecimal),
        "X": of_message("payload", lambda payload: layout.hexadecimal(payload).upper()),
    }


def _json(quoted: bool, pretty: bool) -> Piece:
    def show(arrived: Arrived) -> bytes:
        microseconds = arrived.nanoseconds // 1000 % 1_000_000
        stamp = local_time(arrived, f"%Y-%m-%dT%H:%M:%S.{microseconds:06d}Z%z")  # the Z is mosquitto_sub's
        return message_json(arrived.message, stamp, quoted=quoted, pretty=pretty).encode()

    return show
