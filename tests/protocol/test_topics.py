"""Topic Names and Topic Filters."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_trio.errors import MalformedPacketError
from mqtt_trio.protocol.codes import ReasonCode
from mqtt_trio.protocol.topics import split_shared, topic_matches, validate_topic_filter, validate_topic_name

LONGEST = "a" * 65_535


def shorten(text: str) -> str:
    return text if len(text) < 30 else f"{text[:2]}x{len(text)}"


@pytest.mark.parametrize(
    "name", ["a", "/", "//", " ", "a b/c", "$SYS/x", "ä/€/𝄞", "\ufeff", LONGEST, "é" * 32_767], ids=shorten
)
def test_good_names_are_good_filters(name: str) -> None:
    validate_topic_name(name)
    validate_topic_filter(name)
    assert topic_matches(name, name)
    assert not topic_matches(name, name + "x")


@pytest.mark.spec("MQTT5-4.7.0-1", "MQTT5-4.7.3-1", "MQTT5-4.7.3-2", "MQTT5-4.7.3-3", "MQTT5-3.3.2-2")
@pytest.mark.spec("MQTT3-4.7.1-1", "MQTT3-4.7.3-1", "MQTT3-4.7.3-2", "MQTT3-4.7.3-3", "MQTT3-3.3.2-2")
@pytest.mark.parametrize("name", ["", "+", "a/#", "a+b", "\0", "a\0b", LONGEST + "a", "é" * 32_768], ids=shorten)
def test_bad_names(name: str) -> None:
    with pytest.raises(MalformedPacketError) as caught:
        validate_topic_name(name)
    assert caught.value.reason_code == ReasonCode.TOPIC_NAME_INVALID


@pytest.mark.spec("MQTT5-4.7.1-1", "MQTT5-4.7.1-2", "MQTT5-4.8.2-1", "MQTT5-4.8.2-2")
@pytest.mark.parametrize(
    "topic_filter",
    [
        "#",
        "+",
        "/#",
        "+/#",
        "a/+/b",
        "+/+",
        "/+",
        "+/",
        "a/b/#",
        "$SYS/#",
        "$share/g/#",
        "$share/g//",
        "$shared",
        "$share",
    ],
)
def test_good_filters(topic_filter: str) -> None:
    validate_topic_filter(topic_filter)
    share_name, inner = split_shared(topic_filter)
    assert (inner if share_name is None else f"$share/{share_name}/{inner}") == topic_filter


@pytest.mark.spec("MQTT5-4.7.1-1", "MQTT5-4.7.1-2", "MQTT5-4.8.2-1", "MQTT5-4.8.2-2")
@pytest.mark.spec("MQTT3-4.7.1-2", "MQTT3-4.7.1-3")
@pytest.mark.parametrize(
    "topic_filter",
    [
        *("", "a#", "#/", "#/a", "a/#/b", "##", "+#", "a+", "+a", "a/b+/c", "++", "a/++", "\0", "a/\0", LONGEST + "a"),
        *("$share/", "$share/g", "$share/g/", "$share//a", "$share/+/a", "$share/g#/a", "$share/g/a#"),
    ],
    ids=shorten,
)
def test_bad_filters(topic_filter: str) -> None:
    with pytest.raises(MalformedPacketError) as caught:
        validate_topic_filter(topic_filter)
    assert caught.value.reason_code == ReasonCode.TOPIC_FILTER_INVALID


def test_split_shared() -> None:
    assert split_shared("$share/group/a/+/#") == ("group", "a/+/#")
    assert split_shared("$share/group//") == ("group", "/")
    assert split_shared("$shared/group/a") == (None, "$shared/group/a")
    assert split_shared("a/b") == (None, "a/b")


@pytest.mark.spec("MQTT5-4.7.2-1", "MQTT3-4.7.2-1", "MQTT5-4.7.3-4", "MQTT3-4.7.3-4")
@pytest.mark.parametrize(
    "topic_filter,name,expected",
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("sport/#", "sports", False),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/x", False),
        ("+/monitor/Clients", "$SYS/monitor/Clients", False),
        ("$SYS/#", "$SYS/x", True),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
        ("ACCOUNTS", "Accounts", False),
        ("a", "a/", False),
        ("a/", "a", False),
        ("#", "/", True),
    ],
)
def test_matching(topic_filter: str, name: str, expected: bool) -> None:
    assert topic_matches(topic_filter, name) is expected


LEVELS = st.sampled_from(["", "a", "b", "$x", "+"])


@given(st.lists(LEVELS, min_size=1, max_size=4), st.booleans(), st.lists(LEVELS, min_size=1, max_size=4))
def test_matching_equals_a_regular_expression(levels: list[str], hashed: bool, name_levels: list[str]) -> None:
    name = "/".join(name_levels).replace("+", "c") or "c"
    topic_filter = "/".join(levels) or "a"
    pattern = "/".join("[^/]*" if level == "+" else re.escape(level) for level in topic_filter.split("/"))
    if hashed:
        topic_filter, pattern = topic_filter + "/#", pattern + "(/.*)?"
    validate_topic_filter(topic_filter)
    hidden = name.startswith("$") and topic_filter.startswith("+")
    assert topic_matches(topic_filter, name) is (re.fullmatch(pattern, name) is not None and not hidden)
