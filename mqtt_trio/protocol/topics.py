"""Topic Names and Topic Filters: their rules, shared subscriptions, matching of one filter [MQTT5-4.7, 4.8]."""

from __future__ import annotations

from typing import Final

from mqtt_trio.errors import MalformedPacketError
from mqtt_trio.protocol.codes import ReasonCode
from mqtt_trio.protocol.wire import MAXIMUM_STRING_SIZE

SHARE_PREFIX: Final = "$share/"
_CERTAINLY_SHORT: Final = MAXIMUM_STRING_SIZE // 4
"""Characters that fit in a UTF-8 Encoded String whatever they are."""


def validate_topic_name(topic_name: str) -> None:
    """Raise MalformedPacketError (TOPIC_NAME_INVALID) unless `topic_name` can be published to."""
    if not topic_name:
        raise _bad_name("a Topic Name has at least one character")  # [MQTT5-4.7.3-1]
    if "+" in topic_name or "#" in topic_name:
        raise _bad_name("a Topic Name contains a wildcard")  # [MQTT5-3.3.2-2]
    if "\0" in topic_name:
        raise _bad_name("a Topic Name contains U+0000")  # [MQTT5-4.7.3-2]
    if _too_long(topic_name):
        raise _bad_name("a Topic Name has more than 65,535 bytes")  # [MQTT5-4.7.3-3]


def validate_topic_filter(topic_filter: str) -> None:
    """Raise MalformedPacketError (TOPIC_FILTER_INVALID) unless `topic_filter` can be subscribed to.

    `$share/NAME/FILTER` is checked as a shared subscription, whatever the protocol version.
    """
    if "\0" in topic_filter:
        raise _bad_filter("a Topic Filter contains U+0000")  # [MQTT5-4.7.3-2]
    if _too_long(topic_filter):
        raise _bad_filter("a Topic Filter has more than 65,535 bytes")  # [MQTT5-4.7.3-3]
    if topic_filter.startswith(SHARE_PREFIX):
        share_name, slash, topic_filter = topic_filter[len(SHARE_PREFIX) :].partition("/")
        if not share_name or "+" in share_name or "#" in share_name:
            raise _bad_filter("a share name has at least one character and no wildcard")  # [MQTT5-4.8.2-1]
        if not slash or not topic_filter:
            raise _bad_filter("a share name is followed by / and a Topic Filter")  # [MQTT5-4.8.2-2]
    if not topic_filter:
        raise _bad_filter("a Topic Filter has at least one character")  # [MQTT5-4.7.3-1]
    if "#" in topic_filter and (
        topic_filter.find("#") != len(topic_filter) - 1 or topic_filter[-2:] not in ("#", "/#")
    ):
        raise _bad_filter("# is the whole last level or absent")  # [MQTT5-4.7.1-1]
    if "+" in topic_filter and any("+" in level and level != "+" for level in topic_filter.split("/")):
        raise _bad_filter("+ is a whole level")  # [MQTT5-4.7.1-2]


def is_system_topic(topic_name: str) -> bool:
    """Whether a topic is the server's own: `$SYS` and what is below it [MQTT5-4.7.2-1]."""
    return topic_name.startswith("$SYS") and topic_name[4:5] in ("", "/")


def split_shared(topic_filter: str) -> tuple[str | None, str]:
    """Split a valid `$share/NAME/FILTER` into (NAME, FILTER); any other filter is (None, filter)."""
    if not topic_filter.startswith(SHARE_PREFIX):
        return None, topic_filter
    share_name, _, inner = topic_filter[len(SHARE_PREFIX) :].partition("/")
    return share_name, inner


def topic_matches(topic_filter: str, topic_name: str) -> bool:
    """Say whether a valid, not shared filter matches a Topic Name. One pair at a time; the broker has a trie."""
    if topic_name[0] == "$" and topic_filter[0] in "+#":
        return False  # [MQTT5-4.7.2-1]
    filter_levels, name_levels = topic_filter.split("/"), topic_name.split("/")
    for index, level in enumerate(filter_levels):
        if level == "#":
            return True  # the parent level as well [MQTT5-4.7.1.2]
        if index >= len(name_levels) or level not in ("+", name_levels[index]):
            return False
    return len(filter_levels) == len(name_levels)


def _too_long(text: str) -> bool:
    return len(text) > _CERTAINLY_SHORT and len(text.encode(errors="surrogatepass")) > MAXIMUM_STRING_SIZE


def _bad_name(text: str) -> MalformedPacketError:
    return MalformedPacketError(text, ReasonCode.TOPIC_NAME_INVALID)


def _bad_filter(text: str) -> MalformedPacketError:
    return MalformedPacketError(text, ReasonCode.TOPIC_FILTER_INVALID)
