"""`-D COMMAND NAME VALUE`: 5.0 properties of the packets that pub and sub send."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from mqtt_trio.commands.failures import UsageError
from mqtt_trio.errors import MqttTrioError
from mqtt_trio.protocol.codes import PacketType, PropertyId
from mqtt_trio.protocol.packets import MessageProperties
from mqtt_trio.protocol.properties import PROPERTIES, WILL, WRITE, Property, WireType

Values: TypeAlias = Mapping[str, Any]
"""Attribute of the packet class -> value."""

OWNERS: Final = {
    "connect": int(PacketType.CONNECT),
    "publish": int(PacketType.PUBLISH),
    "subscribe": int(PacketType.SUBSCRIBE),
    "unsubscribe": int(PacketType.UNSUBSCRIBE),
    "disconnect": int(PacketType.DISCONNECT),
    "will": WILL,
}
_NAMES: Final = {row.property_id.name.lower().replace("_", "-"): row for row in PROPERTIES}
_SERVERS_ONLY: Final = {
    (OWNERS["publish"], PropertyId.SUBSCRIPTION_IDENTIFIER),
    (OWNERS["disconnect"], PropertyId.SERVER_REFERENCE),
}


def width(arguments: Sequence[str]) -> int:
    """Return how many of the arguments behind `-D` belong to it.

    Raises:
      UsageError: too few.
    """
    count = 4 if len(arguments) > 1 and arguments[1] == "user-property" else 3
    if len(arguments) < count:
        raise UsageError("-D: expected COMMAND NAME VALUE, or COMMAND user-property KEY VALUE")
    return count


def parse_properties(given: Iterable[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Return the values of each command in OWNERS; `given` are the arguments of each `-D`.

    Raises:
      UsageError: an unknown command or property, one that the command does not have, a value that it cannot have.
    """
    values: dict[str, dict[str, Any]] = {command: {} for command in OWNERS}
    for command, name, *texts in given:
        row = _row(command, name)
        owner = OWNERS[command]
        value, attribute = _value(row, name, texts), row.attribute(owner)
        if owner in row.repeatable:
            values[command][attribute] = (*values[command].get(attribute, ()), value)
        elif attribute in values[command]:
            raise UsageError(f"-D {command} {name}: given twice")
        else:
            values[command][attribute] = value
    return values


def message_properties(values: dict[str, Any]) -> MessageProperties:
    """Take the properties that belong to the message out of `values`."""
    names = MessageProperties.__attrs_attrs__
    return MessageProperties(**{each.name: values.pop(each.name) for each in names if each.name in values})


def _row(command: str, name: str) -> Property:
    if command not in OWNERS:
        raise UsageError(f"-D: the command is one of {', '.join(OWNERS)}, not {command!r}")
    row, owner = _NAMES.get(name), OWNERS[command]
    if row is None:
        raise UsageError(f"-D {command}: there is no property {name!r}")
    if owner not in row.packets or (owner, row.property_id) in _SERVERS_ONLY:
        allowed = ", ".join(
            n for n, r in _NAMES.items() if owner in r.packets and (owner, r.property_id) not in _SERVERS_ONLY
        )
        raise UsageError(f"-D {command}: {name} is none of its properties, which are {allowed}")
    return row


def _value(row: Property, name: str, texts: Sequence[str]) -> Any:
    value: Any
    if row.wire_type is WireType.UTF8_STRING_PAIR:
        value = (texts[0], texts[1])
    elif row.wire_type is WireType.UTF8_STRING:
        value = texts[0]
    elif row.wire_type is WireType.BINARY_DATA:
        value = os.fsencode(texts[0])
    else:
        try:
            value = int(texts[0])
        except ValueError:
            raise UsageError(f"-D: {name} is a number, not {texts[0]!r}") from None
        if value < row.minimum or (row.maximum is not None and value > row.maximum):
            raise UsageError(f"-D: {name} must not be {value}")
    try:
        WRITE[row.wire_type](value)
    except MqttTrioError as exc:  # too large, no UTF-8
        raise UsageError(f"-D: {name}: {exc}") from None
    return value
