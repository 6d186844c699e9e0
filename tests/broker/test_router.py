"""The subscription trie against a matcher written from the specification's words."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_trio.broker.router import Router, SubscriptionOptions
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import Subscription


def options(topic_filter: str, qos: int = 0) -> SubscriptionOptions:
    return SubscriptionOptions(topic_filter, QoS(qos))


def naive_match(topic_filter: str, topic_name: str) -> bool:
    """MQTT5-4.7 word by word; recursion is fine at this size."""
    if topic_name.startswith("$") and topic_filter[:1] in ("+", "#"):
        return False

    def rest(levels: list[str], names: list[str]) -> bool:
        if levels == ["#"]:
            return True
        if not levels or not names:
            return not levels and not names
        return levels[0] in ("+", names[0]) and rest(levels[1:], names[1:])

    return rest(topic_filter.split("/"), topic_name.split("/"))


def matching(router: Router[str], topic_name: str) -> list[tuple[str, str]]:
    return sorted((subscriber, found.topic_filter) for subscriber, found in router.match(topic_name))


LEVEL = st.sampled_from(["a", "b", "", "$SYS", "$a", "ä"])
TOPIC_NAMES = st.lists(LEVEL, min_size=1, max_size=5).map("/".join).filter(bool)
TOPIC_FILTERS = st.builds(
    lambda levels, multi: "/".join([*levels, "#"] if multi else levels),
    st.lists(st.one_of(LEVEL, st.just("+")), max_size=5),
    st.booleans(),
).filter(bool)
CHANGES = st.lists(st.tuples(st.booleans(), TOPIC_FILTERS, st.sampled_from("xyz")), max_size=30)


@pytest.mark.spec("MQTT5-4.7.1-1", "MQTT3-4.7.1-2")
@pytest.mark.parametrize(
    "topic_filter, topic_name, expected",
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("#", "any/thing", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("+/#", "finance", True),
        ("accounts", "Accounts", False),
        ("a//b", "a//b", True),
        ("a/+/b", "a//b", True),
    ],
)
def test_examples_of_the_specification(topic_filter: str, topic_name: str, expected: bool) -> None:
    router: Router[str] = Router()
    router.subscribe(topic_filter, "x", options(topic_filter))
    assert bool(router.match(topic_name)) is expected


@pytest.mark.spec("MQTT5-4.7.2-1", "MQTT3-4.7.2-1")
@pytest.mark.parametrize("topic_filter", ["#", "+", "+/#", "+/broker/uptime", "/#"])
def test_leading_wildcards_do_not_match_dollar_topics(topic_filter: str) -> None:
    router: Router[str] = Router()
    router.subscribe(topic_filter, "x", options(topic_filter))
    assert router.match("$SYS/broker/uptime") == []
    assert router.match("$SYS") == []


@pytest.mark.parametrize("topic_filter", ["$SYS/#", "$SYS/broker/+", "$SYS/broker/uptime", "$SYS/+/uptime"])
def test_filters_that_name_the_dollar_level_match(topic_filter: str) -> None:
    router: Router[str] = Router()
    router.subscribe(topic_filter, "x", options(topic_filter))
    assert matching(router, "$SYS/broker/uptime") == [("x", topic_filter)]


@given(changes=CHANGES, topic_names=st.lists(TOPIC_NAMES, min_size=1, max_size=5))
def test_any_history_matches_as_a_plain_table_does(
    changes: list[tuple[bool, str, str]], topic_names: list[str]
) -> None:
    router: Router[str] = Router()
    table: set[tuple[str, str]] = set()
    for adding, topic_filter, subscriber in changes:
        entry = (subscriber, topic_filter)
        if adding:
            assert router.subscribe(topic_filter, subscriber, options(topic_filter)) is (entry in table)
            table.add(entry)
        else:
            assert router.unsubscribe(topic_filter, subscriber) is (entry in table)
            table.discard(entry)
        assert (router.get(topic_filter, subscriber) is not None) is (entry in table)
    assert router.count == len(table)
    for topic_name in topic_names:
        expected = sorted(entry for entry in table if naive_match(entry[1], topic_name))
        assert matching(router, topic_name) == expected
    for subscriber in "xyz":
        filters = [topic_filter for name, topic_filter in table if name == subscriber]
        assert router.unsubscribe_all(filters, subscriber) == len(filters)
    assert router.count == 0
    assert router._root.empty, "nodes without subscriptions are pruned"
    assert not router._exact


def test_one_entry_per_matching_filter() -> None:
    router: Router[str] = Router()
    for topic_filter in ("a/b", "a/+", "a/#", "#", "b"):
        router.subscribe(topic_filter, "x", options(topic_filter))
    assert [found for _, found in matching(router, "a/b")] == ["#", "a/#", "a/+", "a/b"]


@pytest.mark.spec("MQTT5-3.8.4-3")
@pytest.mark.parametrize("topic_filter", ["a/b", "a/+", "a/#"])
def test_a_second_subscription_replaces_the_first(topic_filter: str) -> None:
    router: Router[str] = Router()
    assert not router.subscribe(topic_filter, "x", options(topic_filter, qos=0))
    assert router.subscribe(topic_filter, "x", options(topic_filter, qos=2))
    assert router.match("a/b") == [("x", options(topic_filter, qos=2))]
    assert router.count == 1


@pytest.mark.parametrize("topic_filter", ["a/b", "a/+", "a/#"])
def test_generation_grows_with_changes_only(topic_filter: str) -> None:
    router: Router[str] = Router()
    seen = [router.generation]
    changes: list[Callable[[], bool]] = [
        lambda: router.subscribe(topic_filter, "x", options(topic_filter)),
        lambda: router.subscribe(topic_filter, "x", options(topic_filter)),  # equal in every option
        lambda: router.subscribe(topic_filter, "x", options(topic_filter, qos=1)),
        lambda: router.unsubscribe(topic_filter, "y"),
        lambda: router.unsubscribe("b/#", "x"),
        lambda: router.unsubscribe(topic_filter, "x"),
    ]
    for change in changes:
        change()
        seen.append(router.generation)
    changed = [later > earlier for earlier, later in itertools.pairwise(seen)]
    assert changed == [True, False, True, False, False, True]


def test_65535_bytes_of_levels_need_no_recursion() -> None:
    router: Router[str] = Router()
    deep = "/" * 65_534
    for topic_filter in (deep + "+", deep + "#", deep):
        router.subscribe(topic_filter, "x", options(topic_filter))
    assert len(router.match(deep)) == 3
    assert router.match(deep[1:]) == [("x", options(deep + "#"))], "one level less: the parent of `#`"
    assert router.unsubscribe_all([deep + "+", deep + "#", deep], "x") == 3
    assert router._root.empty


def test_options_are_those_of_the_packet() -> None:
    entry = Subscription("a", QoS.EXACTLY_ONCE, no_local=True, retain_as_published=True, retain_handling=2)
    assert SubscriptionOptions.of(entry, 7) == SubscriptionOptions("a", QoS.EXACTLY_ONCE, True, True, 2, 7)
