"""%j and %J of `sub -F`: a message as JSON, written as mosquitto_sub writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Final

from mqtt_trio.errors import MqttTrioError
from mqtt_trio.protocol.packets import Publish

_EXACT: Final = 2**53
"""From here on not every integer has a float."""


class InvalidPayloadError(MqttTrioError):
    """%J, and the payload is no JSON."""


class Pairs(list[tuple[str, Any]]):
    """An object in its order, with names that come twice."""


def message_json(message: Publish, stamp: str, *, quoted: bool, pretty: bool = False) -> str:
    """Return one JSON object; `quoted`: the payload becomes a string, otherwise it is JSON itself and stays that.

    A payload that is no UTF-8 becomes an array of its bytes, an empty one null.

    Raises:
      InvalidPayloadError: not quoted, and the payload is no JSON.
    """
    content = Pairs(
        [
            ("tst", stamp),
            ("topic", message.topic_name),
            ("qos", int(message.qos)),
            ("retain", int(message.retain)),
            ("payloadlen", len(message.payload)),
        ]
    )
    if message.packet_id:
        content.append(("mid", message.packet_id))
    if properties := _properties(message):
        content.append(("properties", properties))
    content.append(("payload", _quoted(message.payload) if quoted else _parsed(message)))
    return write(content, pretty=pretty)


def _properties(message: Publish) -> Pairs:
    """In the order of their numbers; the packet does not tell in which they came."""
    own = message.properties
    found = Pairs(
        [
            ("payload-format-indicator", own.payload_format_indicator),
            ("message-expiry-interval", own.message_expiry_interval),
            ("content-type", own.content_type),
            ("response-topic", own.response_topic),
            ("correlation-data", None if own.correlation_data is None else _quoted(own.correlation_data) or ""),
            *[("subscription-identifier", identifier) for identifier in message.subscription_identifiers],
            ("topic-alias", message.topic_alias),
            ("user-properties", Pairs(own.user_properties) or None),
        ]
    )
    return Pairs([(name, value) for name, value in found if value is not None])


def _quoted(data: bytes) -> str | list[int] | None:
    if not data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _parsed(message: Publish) -> Any:
    if not message.payload:
        return None
    try:
        return json.loads(message.payload.decode(), object_pairs_hook=Pairs, parse_constant=_refuse)
    except (ValueError, RecursionError):
        text = f"Error: Message payload is not valid JSON on topic {message.topic_name}."
        raise InvalidPayloadError(text) from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def write(value: Any, *, pretty: bool = False, depth: int = 1) -> str:
    """Write JSON; `pretty` with tabs, objects over several lines and arrays on one."""
    if isinstance(value, Pairs):
        return _object(value, pretty, depth)
    if isinstance(value, list):
        return _array(value, pretty, depth)
    if isinstance(value, float):
        if not math.isfinite(value):  # 1e999
            return "null"
        if value.is_integer() and abs(value) < _EXACT:
            value = int(value)  # 2e3 and 2000.0 are 2000
    return json.dumps(value, ensure_ascii=False)


def _object(pairs: Sequence[tuple[str, Any]], pretty: bool, depth: int) -> str:
    colon = ":\t" if pretty else ":"
    items = [f"{write(name)}{colon}{write(value, pretty=pretty, depth=depth + 1)}" for name, value in pairs]
    if not pretty:
        return f"{{{','.join(items)}}}"
    indent = "\t" * depth
    inside = ",\n".join(f"{indent}{item}" for item in items)
    return f"{{\n{inside}\n{indent[1:]}}}" if items else f"{{\n{indent[1:]}}}"


def _array(values: Sequence[Any], pretty: bool, depth: int) -> str:
    items = [write(value, pretty=pretty, depth=depth + 1) for value in values]
    return f"[{(', ' if pretty else ',').join(items)}]"
