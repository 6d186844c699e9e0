"""Choices in front of items, and what nodes say of their share groups: any bytes are read or refused [K23]."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateways.kafka.bus_choices import (
    ENTRY,
    HEAD,
    NOBODY,
    PAIR,
    TAG_CHOICES,
    Chosen,
    GroupNews,
    decode_news,
    encode_choices,
    encode_news,
    hash_of,
)
from gateways.kafka.bus_records import (
    BusRecordError,
    Item,
    decode_items,
    encode_items,
    encode_message,
    encode_run,
    messages_of,
)
from gateways.kafka.bus_slots import RECORD_SIZE, cut
from mqtt_trio.gateway import FrameRun, Message
from tests.gateways.memory_bus import NOW, run_of

NUMBERS = st.integers(0, 2**64 - 1)
CHOICES = st.dictionaries(NUMBERS, NUMBERS, min_size=1, max_size=4)
LEVELS = st.text(st.characters(codec="utf-8", exclude_characters="+#/\0$"), min_size=1, max_size=10)
NAMES = st.builds(lambda share, levels: f"$share/{share}/{'/'.join(levels)}", LEVELS, st.lists(LEVELS, min_size=1))
KINDS = st.sampled_from([(0, False), (0, True), (3, False), (3, True)])


@st.composite
def news(draw: st.DrawFn) -> GroupNews:
    name, since = draw(NAMES), draw(st.none() | st.integers(0, 2**63))
    if not draw(st.booleans()):
        return GroupNews(name, members=False, since=since)
    ready, waits = draw(KINDS)
    return GroupNews(name, ready, waits and not ready, draw(st.booleans()), since=since)


def pairs(choices: dict[int, int]) -> list[bytes]:
    return [PAIR.pack(group, node) for group, node in choices.items()]


@given(CHOICES, st.booleans(), st.integers(0, 255))
def test_a_choice_is_read_as_it_was_written(choices: dict[int, int], only: bool, hops: int) -> None:
    head = encode_choices(pairs(choices), only=only, hops=hops)
    message, run = Message("t", b"x", 1, published_at=NOW), run_of("a", b"1", b"2")
    items: list[Item] = [run_of("a", b"0"), head + encode_run(run), run_of("a", b"3"), head + encode_message(message)]
    before, one, between, two = decode_items(encode_items(items))
    assert (before, between) == (run_of("a", b"0"), run_of("a", b"3")), "the choice is for one item"
    assert one == Chosen(choices, only, hops, [run])
    assert two == Chosen(choices, only, hops, [message])
    assert [messages_of(item) for item in items] == [1, 2, 1, 1]


def test_a_run_at_qos_1_stays_behind_its_choice() -> None:
    run = FrameRun(
        run_of("a", b"1", qos=1).frames + run_of("a", b"2", qos=1).frames, 2, 1, run_of("a").protocol_version, "c", NOW
    )
    (chosen,) = decode_items(encode_choices(pairs({1: 2})) + encode_run(run))
    assert isinstance(chosen, Chosen)
    assert [item.frames[-1:] for item in chosen.items if isinstance(item, FrameRun)] == [b"1", b"2"]
    assert chosen.qos == 1


@given(CHOICES, st.data())
def test_every_truncation_and_every_changed_byte_is_read_or_refused(
    choices: dict[int, int], data: st.DataObject
) -> None:
    head = encode_choices(pairs(choices))
    body = head + encode_message(Message("t", b"x", published_at=NOW)) + head + encode_run(run_of("a", b"1"))
    for end in range(1, len(head) + 1):
        with pytest.raises(BusRecordError):
            decode_items(body[:end])
    changed = bytearray(body)
    changed[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_items(bytes(changed))
    except BusRecordError:
        pass


@pytest.mark.parametrize(
    "head",
    [
        HEAD.pack(TAG_CHOICES, 2, 0, 1) + bytes(16),  # an unknown flag
        HEAD.pack(TAG_CHOICES, 0, 0, 0),  # for no group
        HEAD.pack(TAG_CHOICES, 0, 0, 65_535) + bytes(16),
        2 * encode_choices(pairs({1: 2})),  # a choice in front of a choice
        encode_choices(pairs({1: 2})) + b"\x09",
    ],
)
def test_choices_that_lie_are_refused(head: bytes) -> None:
    with pytest.raises(BusRecordError):
        decode_items(head + encode_run(run_of("a", b"1")))


def test_slots_count_the_messages_of_packed_runs() -> None:
    """What is cut into several records must free exactly the room that it took."""
    head = encode_choices(pairs({1: 2}))
    large = head + encode_message(Message("t", bytes(RECORD_SIZE // 2), published_at=NOW))
    items: list[Item] = [head + encode_run(run_of("a", b"1", b"2", b"3")), large, large, large, large, large]
    chunks = cut(items, [], 8, 3 * RECORD_SIZE)
    assert len(chunks) > 1
    assert sum(chunk.messages for chunk in chunks) == 8


@given(st.booleans(), st.lists(news(), max_size=5))
def test_news_are_read_as_they_were_written(whole: bool, told: list[GroupNews]) -> None:
    body = bytes((whole,)) + b"".join(map(encode_news, told))
    assert decode_news(body) == (whole, told)
    for end in range(len(body)):
        try:
            assert decode_news(body[:end])[1] == told[: len(decode_news(body[:end])[1])]
        except BusRecordError:
            pass


@given(st.binary(max_size=100))
def test_garbage_about_groups_is_refused(body: bytes) -> None:
    try:
        decode_news(body)
    except BusRecordError:
        pass


def entry(name: bytes, flags: int = 1, ready: int = 1) -> bytes:
    return ENTRY.pack(flags, ready, 0, len(name)) + name


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x02",
        b"\0" + entry(b"$share/g/t", flags=8),
        b"\0" + entry(b"$share/g/t", flags=0),  # members, but none
        b"\0" + entry(b"$share/g/t", flags=3),  # waits, but not
        b"\0" + entry(b"$share/g/t", flags=2, ready=0),
        b"\0" + entry(b"t"),
        b"\0" + entry(b"$share/g"),
        b"\0" + entry(b"$share/+/t"),
        b"\0" + entry(b"$share/g/a#"),
        b"\0" + entry(b"$share/g/$SYS/#"),
        b"\0" + entry(b"$share/g/\xff"),
        b"\0" + entry(b"$share/g/t") + b"\x01",
    ],
)
def test_news_that_lie_are_refused(body: bytes) -> None:
    with pytest.raises(BusRecordError):
        decode_news(body)


@given(st.text(st.characters(codec="utf-8")))
def test_nobody_has_a_hash_of_its_own(name: str) -> None:
    assert hash_of(name) != NOBODY
    assert 0 < hash_of(name) < 2**64
