"""Retained messages: replacement, removal, the bound, expiry, and matching against a plain table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_trio.broker.message import Message
from mqtt_trio.broker.retained import RetainedMessages
from mqtt_trio.protocol.packets import MessageProperties

UTC = 1_000_000.0


def message(topic_name: str, payload: bytes = b"x", expiry: int | None = None, at: float = UTC) -> Message:
    properties = MessageProperties(message_expiry_interval=expiry)
    return Message(topic_name, payload, retain=True, properties=properties, published_at=at)


def names(messages: list[Message]) -> list[str]:
    return sorted(m.topic_name for m in messages)


def plainly_matches(topic_filter: str, topic_name: str) -> bool:
    """Compare level by level, from the front."""
    levels, present = topic_filter.split("/"), topic_name.split("/")
    if topic_name.startswith("$") and levels[0] in ("+", "#"):
        return False
    for level in levels:
        if level == "#":
            return True
        if not present or level not in ("+", present.pop(0)):
            return False
    return not present


LEVEL = st.sampled_from(["a", "b", "", "$SYS"])
TOPIC_NAMES = st.lists(LEVEL, min_size=1, max_size=4).map("/".join).filter(bool)
TOPIC_FILTERS = st.builds(
    lambda levels, multi: "/".join([*levels, "#"] if multi else levels),
    st.lists(st.one_of(LEVEL, st.just("+")), max_size=4),
    st.booleans(),
).filter(bool)


@given(
    changes=st.lists(st.tuples(TOPIC_NAMES, st.sampled_from([b"", b"1", b"2"])), max_size=30),
    topic_filters=st.lists(TOPIC_FILTERS, min_size=1, max_size=5),
)
def test_any_history_matches_as_a_plain_table_does(changes: list[tuple[str, bytes]], topic_filters: list[str]) -> None:
    retained = RetainedMessages(1000)
    table: dict[str, bytes] = {}
    for topic_name, payload in changes:
        assert retained.set(message(topic_name, payload))
        table[topic_name] = payload
        if not payload:
            del table[topic_name]
    assert {m.topic_name: m.payload for m in retained} == table
    assert len(retained) == len(table)
    for topic_filter in topic_filters:
        expected = sorted(name for name in table if plainly_matches(topic_filter, name))
        assert names(retained.match(topic_filter, UTC)) == expected
    for topic_name in table:
        assert retained.remove(topic_name)
    assert not retained._root.children, "nodes without messages are pruned"


@pytest.mark.spec("MQTT5-3.3.1-5", "MQTT3-3.3.1-5")
def test_a_new_message_replaces_the_old_one() -> None:
    retained = RetainedMessages(1)
    assert retained.set(message("a/b", b"old"))
    assert retained.set(message("a/b", b"new")), "replacing needs no room"
    assert [m.payload for m in retained.match("a/+", UTC)] == [b"new"]
    assert len(retained) == 1


@pytest.mark.spec("MQTT5-3.3.1-6", "MQTT5-3.3.1-7", "MQTT3-3.3.1-10", "MQTT3-3.3.1-11")
def test_an_empty_payload_removes_and_is_not_kept() -> None:
    retained = RetainedMessages(10)
    retained.set(message("a"))
    assert retained.set(message("a", b""))
    assert retained.set(message("never/there", b""))
    assert retained.get("a") is None
    assert retained.match("#", UTC) == []
    assert len(retained) == 0


def test_the_bound_refuses_new_topics_only() -> None:
    retained = RetainedMessages(2)
    assert retained.set(message("a"))
    assert retained.set(message("b"))
    assert not retained.set(message("c"))
    assert retained.set(message("a", b""))
    assert retained.set(message("c"))
    assert names(list(retained)) == ["b", "c"]


@pytest.mark.spec("MQTT5-4.7.2-1")
@pytest.mark.parametrize(
    "topic_filter, expected",
    [
        ("#", ["a"]),
        ("+/x", []),
        ("+", ["a"]),
        ("$SYS/#", ["$SYS", "$SYS/$x", "$SYS/x"]),
        ("$SYS/+", ["$SYS/$x", "$SYS/x"]),
    ],
)
def test_leading_wildcards_do_not_match_dollar_topics(topic_filter: str, expected: list[str]) -> None:
    retained = RetainedMessages(10)
    for topic_name in ("a", "$SYS", "$SYS/x", "$SYS/$x"):
        retained.set(message(topic_name))
    assert names(retained.match(topic_filter, UTC)) == expected


@pytest.mark.spec("MQTT5-3.3.2-5")
@pytest.mark.parametrize("topic_filter", ["a/short", "a/+", "#"])
def test_expired_messages_are_left_out_and_dropped(topic_filter: str) -> None:
    retained = RetainedMessages(10)
    retained.set(message("a/short", expiry=10))
    assert names(retained.match(topic_filter, UTC + 9.5)) == ["a/short"]
    assert retained.match(topic_filter, UTC + 10) == []
    assert len(retained) == 0


def test_drop_expired_takes_what_is_due_and_not_its_successor() -> None:
    retained = RetainedMessages(10)
    retained.set(message("a", expiry=10))
    retained.set(message("b", expiry=10))
    retained.set(message("b", expiry=100))
    retained.set(message("c", expiry=30))
    retained.set(message("d"))
    assert retained.drop_expired(UTC + 9) == 0
    assert retained.drop_expired(UTC + 30) == 2
    assert names(list(retained)) == ["b", "d"]
    assert retained.drop_expired(UTC + 99.9) == 0
    assert retained.drop_expired(UTC + 100) == 1


def test_replacing_one_topic_for_ever_does_not_fill_the_heap() -> None:
    retained = RetainedMessages(10)
    for second in range(1000):
        retained.set(message("a", expiry=10, at=UTC + second))
    assert len(retained._expiries) <= 2 * len(retained) + 64
    assert retained.drop_expired(UTC + 1000) == 0
    assert retained.drop_expired(UTC + 1009) == 1


def test_65535_bytes_of_levels_need_no_recursion() -> None:
    retained = RetainedMessages(10)
    deep = "/" * 65_535
    retained.set(message(deep))
    assert names(retained.match("#", UTC)) == [deep]
    assert names(retained.match("+/" * 65_535 + "+", UTC)) == [deep]
    assert retained.remove(deep)
    assert not retained._root.children
