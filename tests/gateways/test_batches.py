"""Batches of records that nobody can read stop no consumer and fill no memory."""

from __future__ import annotations

import gzip
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import codec
from kafka.consumer.fetcher import ConsumerRecord
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.util import encode_varint

from gateways.kafka import batches
from gateways.kafka.batches import BatchError, GuardedRecords, Unreadable
from gateways.kafka.workers import consumed

NONE, GZIP, SNAPPY, LZ4, ZSTD = range(5)
PACK: dict[int, Callable[[bytes], bytes]] = {
    GZIP: codec.gzip_encode,
    SNAPPY: codec.snappy_encode,
    LZ4: codec.lz4_encode,
    ZSTD: codec.zstd_encode,
}
CRC_AT, ATTRIBUTES_AT, HEADER_SIZE = 17, 21, 61
MiB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    batches._seen.clear()


def batch(values: Sequence[bytes | None], compression: int = NONE, base: int = 100) -> bytearray:
    builder = DefaultRecordBatchBuilder(2, compression, False, -1, -1, -1, 16 * MiB)
    for number, value in enumerate(values):
        builder.append(number, 1000 + number, b"key", value, [("name", b"content")])
    built = bytearray(builder.build())
    built[:8] = struct.pack(">q", base)
    return sealed(built)


def sealed(built: bytearray) -> bytearray:
    """Give a batch that was changed its length and its checksum, as a hostile client can."""
    built[8:12] = struct.pack(">i", len(built) - 12)
    built[CRC_AT:ATTRIBUTES_AT] = struct.pack(">I", crc32c.crc32c(bytes(built[ATTRIBUTES_AT:])))
    return built


def of_body(body: bytes, records: int, compression: int = NONE, packed: bytes | None = None) -> bytearray:
    """Return a batch with `body` as its records."""
    built = batch([b"x"] * records)[:HEADER_SIZE]
    built[ATTRIBUTES_AT : ATTRIBUTES_AT + 2] = struct.pack(">h", compression)
    return sealed(built + (packed if packed is not None else body))


def record(key: bytes = b"k", value: bytes = b"v", headers: bytes = b"\x00", offset: int = 0) -> bytes:
    fields = b"\x00" + varint(0) + varint(offset) + varint(len(key)) + key + varint(len(value)) + value + headers
    return varint(len(fields)) + fields


def varint(number: int) -> bytes:
    written = bytearray()
    encode_varint(number, written.append)
    return bytes(written)


def read(*built: bytes | bytearray) -> list[Any]:
    """Read as kafka-python's consumer does."""
    found: list[Any] = []
    records = GuardedRecords(b"".join(built))
    while (one := records.next_batch()) is not None:
        assert one.validate_crc()
        found += list(one)
    return found


def defects(records: list[Any]) -> list[str]:
    return [one.value.reason for one in records if type(one.value) is Unreadable]


@pytest.mark.parametrize("compression", [NONE, GZIP, SNAPPY, LZ4, ZSTD])
def test_good_batches_are_read_as_before(compression: int) -> None:
    values = [b"", None, b"one", bytes(100_000), random.Random(5).randbytes(70_000)]
    records = read(batch(values, compression), batch([b"behind"], compression, base=500))
    assert [one.value for one in records] == [*values, b"behind"]
    assert [one.offset for one in records] == [100, 101, 102, 103, 104, 500]
    assert records[2].headers == [("name", b"content")]
    assert records[2].timestamp == 1002


BAD = {
    "a header whose name is no UTF-8": of_body(
        record() + record(headers=varint(1) + varint(2) + b"\xff\xfe" + varint(0), offset=1), 2
    ),
    "a header of negative size": of_body(record(headers=varint(1) + varint(-5)), 1),
    "a number of headers that lies": of_body(record(headers=varint(2**31 - 1)), 1),
    "a negative number of headers": of_body(record(headers=varint(-1)), 1),
    "a length that lies": of_body(varint(5) + record()[1:], 1),
    "fewer records than it says": of_body(record(), 9),
    "more bytes than records": of_body(record() + b"rest", 1),
    "nothing": of_body(b"", 1),
    "a codec of the future": of_body(record(), 1, compression=7),
    "gzip that is none": of_body(b"", 1, GZIP, b"garbage"),
    "snappy that is none": of_body(b"", 1, SNAPPY, b"garbage"),
    "lz4 that is none": of_body(b"", 1, LZ4, b"garbage"),
    "zstd that is none": of_body(b"", 1, ZSTD, b"garbage"),
    "snappy blocks that go nowhere": of_body(b"", 1, SNAPPY, b"\x82SNAPPY\0\0\0\0\1\0\0\0\1" + struct.pack(">i", -4)),
    "a snappy block that lies about its size": of_body(b"", 1, SNAPPY, b"\xff\xff\xff\xff\x0f" + b"x"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_what_cannot_be_read_is_told_and_what_follows_is_read(bad: bytearray) -> None:
    bad = bytearray(bad)
    bad[:8] = struct.pack(">q", 300)
    records = read(batch([b"before"]), bad, batch([b"behind"], base=700))
    assert [one.value for one in (records[0], records[-1])] == [b"before", b"behind"]
    (defect,) = defects(records)
    assert defect.startswith("a batch that cannot be read, offsets 300 to ")
    unreadable = records[-2]
    assert type(unreadable.value) is Unreadable
    assert unreadable.value in (b"", bytes(bad))
    assert 300 <= unreadable.offset < 700


def test_what_is_in_front_of_a_bad_record_is_read() -> None:
    records = read(BAD["a header whose name is no UTF-8"])
    assert [one.value for one in records] == [b"v", b""]
    assert records[1].offset == 101
    assert ", behind 1 records: " in defects(records)[0]


@pytest.mark.parametrize("compression", PACK)
def test_a_bomb_is_refused_before_it_fills_the_memory(compression: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH", 4 * MiB)
    bomb = of_body(b"", 1, compression, PACK[compression](bytes(50 * MiB)))
    tracemalloc.start()
    records = read(bomb, batch([b"behind"], base=500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one.value for one in records] == [bytes(bomb), b"behind"]
    assert "unpacks to more than 4194304 bytes" in defects(records)[0]
    assert peak < 12 * MiB + 2 * len(bomb)


def test_a_window_that_zstd_asks_for_is_bounded() -> None:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    data = zstandard.ZstdCompressor(compression_params=parameters).compressobj().compress(b"x" * 500_000)
    with pytest.raises(BatchError, match="no zstd data"):
        batches.unpack_zstd(memoryview(data), 64 * MiB)


def test_a_flood_of_headers_is_refused_before_it_fills_the_memory() -> None:
    count = 1_500_000
    flood = record(headers=varint(count) + b"\x00\x01" * count)  # no name, no content
    tracemalloc.start()
    records = read(of_body(record() + flood, 2), batch([b"behind"], base=500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one.value for one in records] == [b"v", b"", b"behind"]
    assert f"a record with {count} headers" in defects(records)[0]
    assert peak < 12 * len(flood)


def test_members_and_frames_side_by_side() -> None:
    assert batches.unpack_gzip(memoryview(gzip.compress(b"one") + gzip.compress(b"two")), 100) == b"onetwo"
    assert batches.unpack_zstd(memoryview(PACK[ZSTD](b"one") + PACK[ZSTD](b"two")), 100) == b"onetwo"
    assert batches.unpack_snappy(memoryview(codec.snappy_encode(b"bare", xerial_compatible=False)), 100) == b"bare"


@pytest.mark.parametrize("library", ["lz4", "snappy", "zstandard"])
def test_a_codec_that_is_not_installed_is_told_at_the_start(library: str) -> None:
    program = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "import gateways.kafka, mqtt_trio.errors\n"
        "try: gateways.kafka.build(None)\n"
        "except mqtt_trio.errors.ConfigError as exc: print(exc)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout.startswith(f"Kafka: {library}")
    assert "is not installed" in done.stdout


@given(st.sampled_from(sorted(PACK)), st.binary(max_size=300), st.integers(0, 400), st.integers(0, 255))
def test_damaged_data_are_unpacked_or_refused(compression: int, content: bytes, place: int, byte: int) -> None:
    packed = bytearray(PACK[compression](content))
    packed[place % len(packed)] = byte
    for data in (packed, packed[: place % len(packed)]):
        try:
            found = batches.UNPACK[compression](memoryview(data), 1000)
        except BatchError:
            continue
        assert len(found) <= 1000


@given(
    st.sampled_from([NONE, *PACK]), st.lists(st.tuples(st.integers(HEADER_SIZE, 600), st.integers(0, 255)), max_size=5)
)
def test_a_damaged_batch_never_raises(compression: int, changes: list[tuple[int, int]]) -> None:
    built = batch([b"value %d" % number for number in range(10)], compression)
    for place, byte in changes:
        built[HEADER_SIZE + place % (len(built) - HEADER_SIZE)] = byte
    records = read(sealed(built), batch([b"behind"], base=500))
    assert records[-1].value == b"behind"
    assert len(defects(records)) <= 1


def test_a_header_that_is_null_becomes_an_empty_one() -> None:
    (found,) = read(of_body(record(headers=varint(1) + varint(1) + b"x" + varint(-1)), 1))
    assert found.headers == [("x", None)]
    ours = consumed(ConsumerRecord("t", 0, 1, 2, 3, 0, b"k", b"v", found.headers, None, 1, 1, 1))
    assert list(ours.headers) == [("x", b"")]
    assert (ours.topic, ours.partition, ours.offset, ours.timestamp_ms, ours.defect) == ("t", 0, 2, 3, None)


def test_a_wrong_checksum_is_fetched_again_once() -> None:
    damaged = batch([b"one", b"two"])
    damaged[-1] ^= 1
    first = GuardedRecords(bytes(damaged)).next_batch()
    assert not first.validate_crc()  # the consumer raises, and the next one fetches it again
    records = read(bytes(damaged), batch([b"behind"], base=500))
    assert [one.offset for one in records] == [101, 500]
    assert "a wrong checksum" in defects(records)[0]


def test_batches_with_a_wrong_checksum_that_are_remembered_are_bounded() -> None:
    for number in range(2 * batches.MAX_SEEN):
        damaged = batch([b"one"], base=number)
        damaged[-1] ^= 1
        assert not GuardedRecords(bytes(damaged)).next_batch().validate_crc()
    assert len(batches._seen) == batches.MAX_SEEN
