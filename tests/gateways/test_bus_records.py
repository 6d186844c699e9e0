"""Packed bus records: what goes in comes out, and nothing else gets past [K21]."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateways.kafka import bus_records
from gateways.kafka.bus_choices import Chosen
from gateways.kafka.bus_records import (
    BusRecordError,
    Flag,
    Item,
    Kind,
    UnknownVersionError,
    cut_body,
    decode_header,
    decode_items,
    encode_header,
    encode_items,
    encode_message,
    split_frames,
)
from gateways.kafka.node_facts import NodeFacts, decode_facts, encode_facts
from mqtt_trio.gateway import NO_PROPERTIES, FrameRun, Message, MessageProperties, ProtocolVersion
from tests.gateways.memory_bus import NOW, frame, run_of

INSTANCE = bytes(range(16))
V4, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
topics = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="+#\0"), min_size=1, max_size=20)
instants = st.floats(0, 1e11, allow_nan=False)
properties = st.builds(
    MessageProperties,
    payload_format_indicator=st.none() | st.integers(0, 1),
    message_expiry_interval=st.none() | st.integers(0, 0xFFFF_FFFF),
    content_type=st.none() | names,
    response_topic=st.none() | names,
    correlation_data=st.none() | st.binary(max_size=20),
    user_properties=st.lists(st.tuples(names, names), max_size=4).map(tuple),
)
messages = st.builds(
    Message,
    topic_name=topics,
    payload=st.binary(max_size=50),
    qos=st.integers(0, 2),
    retain=st.booleans(),
    properties=st.just(NO_PROPERTIES) | properties,
    client_id=names,
    published_at=instants,
)


@st.composite
def runs(draw: st.DrawFn) -> FrameRun:
    qos = draw(st.integers(0, 2))
    version = draw(st.sampled_from([V4, V5]))
    payloads = draw(st.lists(st.binary(max_size=20), min_size=1, max_size=1 if qos else 5))
    frames = b"".join(frame("a/b", payload, qos, v5=version == V5) for payload in payloads)
    client_id, at = draw(st.sampled_from(["", "one", "twö"])), draw(st.sampled_from([0.0, NOW, NOW + 1e-6]))
    return FrameRun(frames, len(payloads), qos, version, client_id, at)


def flat(items: Sequence[FrameRun | Message | Chosen]) -> list[object]:
    """Every packet of every run on its own: merging may move the borders between runs, nothing else."""
    result: list[object] = []
    for item in items:
        if isinstance(item, Chosen):
            result += [item.choices, *flat(item.items)]
            continue
        if isinstance(item, Message):
            result.append(item)
            continue
        frames = split_frames(item.frames)
        assert len(frames) == item.count
        assert item.qos == 0 or item.count == 1
        result += [(piece, item.qos, item.protocol_version, item.client_id, item.published_at) for piece in frames]
    return result


def packed(items: list[FrameRun | Message]) -> bytes:
    waiting: list[Item] = [encode_message(item) if isinstance(item, Message) else item for item in items]
    return encode_items(waiting)


@given(st.lists(runs() | messages, max_size=12))
def test_round_trip(items: list[FrameRun | Message]) -> None:
    assert flat(decode_items(packed(items))) == flat(items)


@given(
    st.sampled_from(Kind),
    st.binary(min_size=16, max_size=16),
    names.filter(str.isprintable),
    st.integers(0, bus_records.LAST_SEQUENCE),
    st.sampled_from(list(bus_records._FLAGS.values())),
    st.binary(max_size=10),
)
def test_header_round_trip(kind: Kind, instance: bytes, node: str, sequence: int, flags: Flag, body: bytes) -> None:
    value = encode_header(kind, instance, node, sequence, flags) + body
    header = decode_header(value)
    assert (header.kind, header.instance_id, header.node_id) == (kind, instance, node)
    assert (header.sequence, header.flags) == (sequence, flags)
    assert value[header.body_start :] == body
    assert value[bus_records.INSTANCE] == instance


@given(
    st.builds(
        NodeFacts,
        host=names.filter(str.isprintable),
        pid=st.integers(0, 2**63),
        started_at=instants,
        hello_partition=st.integers(-1, 1000),
        hello_offset=st.integers(-1, 2**62),
        target=st.binary(min_size=16, max_size=16),
    )
)
def test_facts_round_trip(facts: NodeFacts) -> None:
    assert decode_facts(b"ab" + encode_facts(facts), 2) == facts


def sample() -> bytes:
    full = MessageProperties(
        payload_format_indicator=1,
        message_expiry_interval=60,
        content_type="text/plain",
        response_topic="r",
        correlation_data=b"\0\xff",
        user_properties=(("a", "b"), ("a", "c")),
    )
    message = Message("t/ä", b"payload", 2, True, full, "client", NOW)
    return packed([run_of("a", b"1", b"2"), run_of("a", b"3", qos=1), run_of("a", b"4", qos=1), message])


def test_every_truncation_is_refused_or_ends_between_items() -> None:
    body = sample()
    whole = flat(decode_items(body))
    cuts = []
    for end in range(len(body)):
        try:
            items = flat(decode_items(body[:end]))
        except BusRecordError:
            continue
        assert items == whole[: len(items)]
        cuts.append(len(items))
    assert cuts == [0, 2, 4]  # nothing, the first run, both runs


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_never_crashes(place: int, byte: int) -> None:
    body = bytearray(sample())
    body[place % len(body)] = byte
    try:
        items = decode_items(bytes(body))
    except BusRecordError:
        return
    for item in items:
        for each in item.items if isinstance(item, Chosen) else [item]:
            assert math.isfinite(each.published_at)
            assert each.qos in (0, 1, 2)


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    for read in (decode_header, decode_items, lambda value: decode_facts(value, 0), split_frames):
        try:
            read(data)
        except BusRecordError:
            continue


def test_header_truncations_and_versions() -> None:
    value = encode_header(Kind.BATCH, INSTANCE, "node", 7)
    for end in range(len(value)):
        with pytest.raises(BusRecordError):
            decode_header(value[:end])
    for version in (0, bus_records.FORMAT_VERSION + 1, 255):
        with pytest.raises(UnknownVersionError, match=f"format version {version}") as caught:
            decode_header(bytes((version,)) + value[1:])
        assert caught.value.version == version
    with pytest.raises(BusRecordError, match="unknown kind"):
        decode_header(value[:1] + b"\x63" + value[2:])
    with pytest.raises(BusRecordError, match="unknown kind or flags"):
        decode_header(value[:2] + b"\x80" + value[3:])


def test_names_that_forge_log_lines_are_refused() -> None:
    with pytest.raises(BusRecordError, match="cannot be shown"):
        decode_header(encode_header(Kind.BATCH, INSTANCE, "a\nERROR b", 1))
    with pytest.raises(BusRecordError, match="cannot be shown"):
        decode_facts(encode_facts(NodeFacts("\x1b[2J", 1, 1.0)), 0)


@pytest.mark.parametrize("topic", ["a/+", "#", "a\0b", ""])
def test_message_for_a_topic_that_nobody_may_publish_to_is_refused(topic: str) -> None:
    with pytest.raises(BusRecordError):
        decode_items(encode_message(Message(topic, b"x", published_at=NOW)))


def run_head(version: int = 4, qos: int = 0, count: int = 1, size: int = 5, at: float = NOW) -> bytes:
    return struct.pack(">BBBHdII", 1, version, qos, 0, at, count, size)


@pytest.mark.parametrize(
    "body",
    [
        run_head(version=3) + frame("a", b""),
        run_head(version=6) + frame("a", b""),
        run_head(qos=3) + b"\x36\x03\0\x01a",
        run_head(count=0) + frame("a", b""),
        run_head(count=3) + frame("a", b""),
        run_head(at=math.nan) + frame("a", b""),
        run_head(at=math.inf) + frame("a", b""),
        run_head() + b"\x31\x03\0\x01a",  # RETAIN
        run_head() + b"\x38\x03\0\x01a",  # DUP
        run_head(qos=1) + frame("a", b""),  # says QoS 1, is 0
        run_head(qos=1, count=2, size=14) + 2 * frame("a", b"", 1)[:-1] + b"\x05\x05",
        run_head(qos=1, count=2, size=7) + frame("a", b"", 1),
        b"\x03",
    ],
)
def test_runs_that_lie_are_refused(body: bytes) -> None:
    with pytest.raises(BusRecordError):
        decode_items(body)


def test_a_count_of_properties_that_lies_allocates_nothing() -> None:
    head = struct.pack(">BBBdHHI", 2, 0, 0x40, NOW, 1, 0, 0)
    began = time.process_time()
    with pytest.raises(BusRecordError, match="room for"):
        decode_items(head + b"a" + b"\xff\xff\xff\xff")
    assert time.process_time() - began < 1


def test_runs_side_by_side_of_one_client_and_instant_become_one() -> None:
    items = decode_items(encode_items([run_of("a", b"1"), run_of("b", b"2", b"3"), run_of("a", b"4", at=NOW + 1)]))
    assert [(item.count, item.frames) for item in items if isinstance(item, FrameRun)] == [
        (3, frame("a", b"1") + frame("b", b"2") + frame("b", b"3")),
        (1, frame("a", b"4")),
    ]


@pytest.mark.parametrize(
    "other",
    [
        run_of("a", b"2", client_id="other"),
        run_of("a", b"2", qos=1),
        FrameRun(frame("a", v5=True), 1, 0, V5, "c", NOW),
    ],
)
def test_runs_that_differ_stay_apart(other: FrameRun) -> None:
    assert decode_items(encode_items([run_of("a", b"1"), other])) == [run_of("a", b"1"), other]


def test_qos_1_packets_come_out_one_by_one() -> None:
    """A FrameRun at QoS 1 or 2 has one packet; on the wire they share a head."""
    items: list[Item] = [run_of("a", bytes((number,)), qos=1) for number in range(100)]
    body = encode_items(items)
    assert len(body) < 100 * len(frame("a", b"x", 1)) + 50
    assert decode_items(body) == items


def test_message_that_no_record_can_hold() -> None:
    for bad in (
        Message("t" * 65_536, published_at=NOW),
        Message("t", properties=MessageProperties(content_type="\ud800"), published_at=NOW),
        Message("t", properties=MessageProperties(message_expiry_interval=1 << 32), published_at=NOW),
    ):
        with pytest.raises(BusRecordError):
            encode_message(bad)


@given(st.binary(max_size=100), st.integers(1, 120))
def test_parts_make_the_body_again(body: bytes, part_size: int) -> None:
    parts = cut_body(body, part_size)
    assert b"".join(parts) == body
    assert all(len(part) <= part_size for part in parts)


def test_split_frames_reads_long_lengths() -> None:
    frames = [b"\x30" + length + bytes(size) for length, size in ((b"\x80\x01", 128), (b"\x80\x80\x01", 16_384))]
    assert split_frames(b"".join(frames)) == frames
    with pytest.raises(BusRecordError, match="broken length"):
        split_frames(b"\x30\x80\x80\x80\x80\x01")


def test_packing_is_cheap() -> None:
    """Far above what is measured (0.2 µs), so that a busy machine does not matter."""
    items: list[Item] = [run_of("a", b"x", client_id=str(number % 10)) for number in range(20_000)]
    best = math.inf
    for _ in range(3):
        began = time.process_time()
        encode_items(items)
        best = min(best, time.process_time() - began)
    assert best / len(items) < 5e-6
