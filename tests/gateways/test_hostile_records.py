"""Records that nobody should write, on the topics that a node reads: counted, bounded, and they stop nobody."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import MockClock

from gateways.kafka import bus_inbox, bus_records
from gateways.kafka.bus_clients import encode_newcomer
from gateways.kafka.bus_records import (
    MAX_PACKETS,
    MAX_PROPERTIES,
    SMALL_BODY,
    BusRecordError,
    Flag,
    Item,
    Kind,
    decode_header,
    decode_items,
    encode_header,
    encode_items,
    encode_message,
)
from gateways.kafka.node_facts import NodeFacts, decode_facts, encode_facts
from gateways.kafka.records import ConsumedRecord, Reason
from gateways.kafka.retained import MAP_KEY
from mqtt_trio.gateway import Message, MessageProperties, Newcomer
from tests.gateways.memory_bus import NOW, run_of
from tests.gateways.whole_nodes import SOON, WholeCluster, open_cluster

MiB = 1 << 20
RUN = struct.Struct(">BBBHdII")
PROPERTIES = MessageProperties(
    message_expiry_interval=60,
    content_type="t",
    response_topic="r",
    correlation_data=b"c",
    user_properties=(("a", "b"),),
)


def run(frames: bytes, count: int, qos: int) -> bytes:
    return RUN.pack(bus_records.TAG_RUN, 4, qos, 0, NOW, count, len(frames)) + frames


@contextmanager
def bounded(memory: int, seconds: float = 5.0) -> Iterator[None]:
    """The body may take so many bytes at its peak, and so much time of a processor (with room for a busy machine)."""
    tracemalloc.start()
    began = time.process_time()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < memory
        assert time.process_time() - began < seconds
    finally:
        tracemalloc.stop()


TINY = b"\x30\x03\x00\x01a"
TINY_QOS_1 = b"\x32\x05\x00\x01a\x00\x01"
FLOODS: dict[str, Callable[[], bytes]] = {
    "packets": lambda: run(TINY * (6 * MiB // 5), 6 * MiB // 5, 0),
    "packets that are not counted": lambda: run(TINY * (6 * MiB // 5), 1, 0),
    "packets with acknowledgements": lambda: run(TINY_QOS_1 * MiB, MiB, 1),
    "packets with acknowledgements that are not counted": lambda: run(TINY_QOS_1 * MiB, 1, 1),
    "runs": lambda: run(TINY, 1, 0) * (MAX_PACKETS + 1),
    "messages": lambda: encode_message(Message("a", published_at=NOW)) * (MAX_PACKETS + 1),
    "properties": lambda: (
        struct.pack(">BBBdHHI", 2, 0, 0x40, NOW, 1, 0, 0)
        + b"a"
        + struct.pack(">I", MAX_PROPERTIES + 1)
        + bytes(4 * (MAX_PROPERTIES + 1))
    ),
    "empty packets": lambda: run(b"\x32\x00" * MiB, MiB, 1),
    "a cut item": lambda: bytes([bus_records.TAG_RUN]) + bytes(SMALL_BODY + 1),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_in_one_record_is_refused_before_it_fills_the_memory(flood: Callable[[], bytes]) -> None:
    body = flood()
    with bounded(3 * len(body) + 30 * MiB), pytest.raises(BusRecordError):
        decode_items(body)


def test_what_a_node_may_write_is_read() -> None:
    """The bounds are above what the largest reads and slots of a node can hold."""
    most = [run_of("a", b"", qos=1)] * (384 * 1024 // 7)
    assert len(decode_items(encode_items(most))) == len(most)
    large: list[Item] = [
        run_of("a", b"x"),
        encode_message(Message("a", bytes(5 * MiB), published_at=NOW)),
        run_of("a", b"y", b"z"),
    ]
    assert [len(getattr(item, "payload", b"")) for item in decode_items(encode_items(large))] == [0, 5 * MiB, 0]
    pairs = tuple(("k", str(number)) for number in range(100_000))
    message = Message("a", properties=MessageProperties(user_properties=pairs), published_at=NOW)
    (found,) = decode_items(encode_message(message))
    assert found == message


def test_what_would_not_be_read_is_not_written() -> None:
    pairs = (("", ""),) * (MAX_PROPERTIES + 1)
    with pytest.raises(BusRecordError, match="user properties"):
        encode_message(Message("a", properties=MessageProperties(user_properties=pairs)))


@pytest.mark.parametrize("at", [-1.0, 1e300, float("nan"), float("inf"), bus_records.LATEST + 1])
def test_times_that_no_calendar_shows_are_refused(at: float) -> None:
    with pytest.raises(BusRecordError):
        decode_items(encode_message(Message("a", published_at=at)))
    with pytest.raises(BusRecordError):
        decode_items(encode_items([run_of("a", b"1", at=at)]))
    with pytest.raises(BusRecordError):
        decode_facts(encode_facts(NodeFacts("host", 1, at)), 0)


def test_names_and_sequences_that_would_spoil_logs_and_counters_are_refused() -> None:
    with pytest.raises(BusRecordError, match="too long"):
        decode_header(encode_header(Kind.BATCH, bytes(16), "n" * 2000, 1))
    with pytest.raises(BusRecordError, match="too long"):
        decode_facts(encode_facts(NodeFacts("h" * 2000, 1, NOW)), 0)
    with pytest.raises(BusRecordError, match="sequence"):
        decode_header(encode_header(Kind.BATCH, bytes(16), "n", 2**64 - 1))


@pytest.mark.parametrize("topic", ["$SYS", "$SYS/broker/version"])
def test_what_is_each_nodes_own_does_not_come_from_others(topic: str) -> None:
    with pytest.raises(BusRecordError, match=r"\$SYS"):
        decode_items(encode_message(Message(topic, b"1", published_at=NOW)))


@pytest.fixture
async def cluster() -> AsyncIterator[WholeCluster]:
    async with open_cluster() as cluster:
        yield cluster


def corpus(instance: bytes) -> list[tuple[str, bytes | None, bytes]]:
    """Records as nodes write them: topic, key, value."""
    message = Message("a/b", b"payload", 1, properties=PROPERTIES, client_id="c", published_at=NOW)
    kept = encode_message(Message("a/b", b"kept", 1, True, published_at=NOW))
    facts = encode_facts(NodeFacts("host", 1, NOW, 0, 5, bytes(16)))
    newcomer = encode_newcomer(Newcomer("device", "user", True, NOW))
    runs = [run_of("a/b", b"1", b"2"), run_of("a/b", b"3", qos=1), run_of("a/c", b"4", qos=2)]
    bodies = [
        (Kind.BATCH, encode_items([*runs, encode_message(message), run_of("a/b", b"5")])),
        (Kind.HELLO, facts), (Kind.ANNOUNCE, facts), (Kind.ALIVE, facts), (Kind.GOODBYE, facts),
        (Kind.CLIENTS, newcomer),
    ]  # fmt: skip
    found: list[tuple[str, bytes | None, bytes]] = [
        ("monster", None, encode_header(kind, instance, "foreign", 1) + body) for kind, body in bodies
    ]
    part = encode_header(Kind.BATCH, instance, "foreign", 1, Flag.MORE)
    found.append(("monster", None, part + encode_message(message)))
    found.append(("mqtt.retained", b"a/b", encode_header(Kind.BATCH, instance, "foreign", 1) + kept))
    found.append(("mqtt.retained", MAP_KEY, encode_header(Kind.PARTITIONS, instance, "foreign", 0) + b"\0\0\0\x0c"))
    return found


def damage(rng: random.Random, value: bytes) -> bytes:
    """Change a record somewhere, as bit flips, lies about lengths and cuts do."""
    changed = bytearray(value)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)])
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(20))
            case 4:
                changed += changed[at:]
    return bytes(changed)


@pytest.mark.parametrize("seed", range(3))
async def test_damaged_records_of_every_kind_stop_nobody(
    autojump_clock: MockClock, cluster: WholeCluster, seed: int
) -> None:
    rng = random.Random(seed)
    one, two = await cluster.start("one"), await cluster.start("two")
    reader = await two.connect("reader", "good", version=5)
    before = two.counters()
    count = 1500
    for number in range(count):
        topic, key, value = rng.choice(corpus(rng.randbytes(16)))
        headers = [(rng.choice(["mqtt.sequence", "mqtt.instance", "x"]), rng.randbytes(rng.randrange(20)))]
        if key is not None and rng.random() < 0.3:
            key = damage(rng, key)
        content = None if rng.random() < 0.02 else damage(rng, value)
        record = ConsumedRecord(
            topic, rng.randrange(12), 1000 + number, key, content, headers, rng.choice([0, -1, 2**63 - 1])
        )
        two.bus.on_records([record])
    writer = await one.connect("writer")
    await writer.publish("good", b"behind", qos=1)
    await trio.sleep(SOON)
    assert (await reader.next_message()).payload == b"behind"
    after = two.counters()
    assert after["bus_records_undelivered"] == before["bus_records_undelivered"] == 0
    refused = sum(
        after[f"{name}_{what}"] - before[f"{name}_{what}"]
        for name in ("bus_records", "retained_records")
        for what in ("malformed", "unknown_version")
    )
    letters = two.bus.dead_letters
    assert count / 2 < refused < count
    assert refused == letters.letters[Reason.MALFORMED] + letters.letters[Reason.UNKNOWN_VERSION] + letters.left_out
    two.bus.counters()


async def test_begun_bodies_are_bounded_and_the_oldest_goes(
    autojump_clock: MockClock, cluster: WholeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_inbox, "MAX_PARTS_SIZE", 10_000)
    node = await cluster.start("one")
    for number in range(100):
        value = encode_header(Kind.BATCH, number.to_bytes(16, "big"), "foreign", 1, Flag.MORE) + bytes(900)
        node.bus.on_records([ConsumedRecord("monster", 0, number, None, value, (), 0)])
    inbox = node.bus.inbox
    assert len(node.bus.positions.of(0).begun) == 11
    assert inbox._begun_size == 11 * 900
    assert node.counters()["bus_bodies_lost"] == 89
    empty = encode_header(Kind.BATCH, b"e" * 16, "foreign", 1, Flag.MORE)
    huge = encode_header(Kind.BATCH, b"h" * 16, "foreign", 1, Flag.MORE) + bytes(20_000)
    for offset, value in enumerate((empty, huge), 200):
        node.bus.on_records([ConsumedRecord("monster", 0, offset, None, value, (), 0)])
    assert node.counters()["bus_records_malformed"] == 2
    assert len(node.bus.positions.of(0).begun) == 11


async def test_a_flood_that_cannot_be_delivered_has_one_traceback(
    autojump_clock: MockClock, cluster: WholeCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = await cluster.start("one")

    def broken(record: ConsumedRecord) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(node.bus.inbox, "receive", broken)
    node.bus.on_records([ConsumedRecord("monster", 0, number, None, b"x", (), 0) for number in range(500)])
    assert node.counters()["bus_records_undelivered"] == 500
    assert sum(record.exc_info is not None for record in caplog.records) == 1
    assert node.bus.dead_letters.letters[Reason.UNDELIVERED] == 1
    monkeypatch.undo()
