"""Guards around the way in which kafka-python reads batches of records: none may stop a consumer or fill the memory.

Kafka looks at what producers send, but not at everything. Where kafka-python meets a batch that it cannot read, its
consumer raises, for ever at the same offset; a batch of a megabyte may unpack to gigabytes. Here such a batch yields
what can be read of it, then one record that says that the rest cannot (`Unreadable`), and reading goes on behind it.

`install` puts this in the place of kafka-python's reader, for all consumers of the process.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import lz4.frame
import snappy
import zstandard
from kafka.consumer import fetcher
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.record.memory_records import MemoryRecords
from kafka.record.util import decode_varint

MAGIC: Final = 2
"""Of the batches that are guarded: all since Kafka 0.11."""
MAX_BATCH: Final = 64 * 1024 * 1024
"""Bytes of a batch once it is unpacked: the largest record and whatever else a producer may put beside it. Outcome: the
batch cannot be read."""
MAX_HEADERS: Final = 10_000
"""Headers of one record. Outcome: the rest of the batch cannot be read."""
MANY: Final = 1024 * 1024
"""Bytes of a batch, unpacked, up to which its headers cannot be too many."""
MAX_WINDOW: Final = 32 * 1024 * 1024
"""Bytes of memory that a zstd frame may ask for beside its content."""
PIECE: Final = 256 * 1024
MAX_SEEN: Final = 100
"""Batches with a wrong checksum that are remembered."""
BLOCK_SIZE: Final = struct.Struct(">i")
XERIAL: Final = b"\x82SNAPPY\x00"
XERIAL_HEADER: Final = 16
"""Bytes in front of the first block in the framing of Java's snappy."""

_seen: dict[tuple[int, int], None] = {}


class Unreadable(bytes):
    """The value of a record that stands for the rest of a batch: the batch as it came, or nothing of it."""

    reason: str


class BatchError(ValueError):
    """A batch that cannot be unpacked."""


class GuardedBatch(DefaultRecordBatch):  # type: ignore[misc]  # kafka-python has no types
    """A batch that ends in a record with an `Unreadable` value where it cannot be read on."""

    _buffer: Any
    _pos: int
    _decompressed: bool

    def __init__(self, raw: memoryview) -> None:
        super().__init__(raw)
        self._raw = raw
        self._defect: str | None = None

    def validate_crc(self) -> bool:
        """Return whether the checksum is right. A wrong one raises in the consumer, and another one fetches the batch
        again: what was damaged on its way is whole then. What is wrong twice is wrong in Kafka."""
        if super().validate_crc():
            return True
        key = (self.base_offset, self.crc)
        if key not in _seen:
            if len(_seen) >= MAX_SEEN:
                del _seen[next(iter(_seen))]
            _seen[key] = None
            return False
        self._defect = "a wrong checksum"
        return True

    def __iter__(self) -> Iterator[Any]:
        read, number = DefaultRecordBatch.__next__, 0
        try:
            if self._defect is not None:
                raise BatchError(self._defect)  # noqa: TRY301  one way out for all of them
            self._maybe_uncompress()
            while True:
                try:
                    record = read(self)
                except StopIteration:
                    return
                number += 1
                yield record
        except GeneratorExit:
            raise
        except Exception as exc:
            yield self._rest(exc, number)

    def _rest(self, exc: Exception, number: int) -> Any:
        """Return the record that stands for what is behind the first `number` records."""
        value = Unreadable(self._raw if not number else b"")
        place = f"offsets {self.base_offset} to {self.last_offset}" + (f", behind {number} records" if number else "")
        value.reason = f"a batch that cannot be read, {place}: {exc}"
        return DefaultRecord(0, self.last_offset, self.max_timestamp, self.timestamp_type, None, value, [])

    def _maybe_uncompress(self) -> None:
        if self._decompressed:
            return
        if self.compression_type != self.CODEC_NONE:
            self._assert_has_codec(self.compression_type)
            packed = memoryview(self._buffer)[self._pos :]
            self._buffer = UNPACK[self.compression_type](packed, MAX_BATCH)
            self._pos = 0
        self._decompressed = True

    def _read_msg(self) -> Any:
        if len(self._buffer) > MANY:
            self._count_headers()
        return super()._read_msg()

    def _count_headers(self) -> None:
        buffer = self._buffer
        _, at = decode_varint(buffer, self._pos)
        for _ in range(3):  # attributes, timestamp, offset
            _, at = decode_varint(buffer, at)
        for _ in range(2):  # key, value
            size, at = decode_varint(buffer, at)
            at += max(size, 0)
        count, _ = decode_varint(buffer, at)
        if count > MAX_HEADERS:
            raise BatchError(f"a record with {count} headers")


class GuardedRecords(MemoryRecords):  # type: ignore[misc]  # kafka-python has no types
    """The batches of one answer, each guarded."""

    __slots__ = ()

    def next_batch(self, *_arguments: int) -> Any:
        """Return the next batch, or None."""
        raw = self._next_slice
        if raw is None or len(raw) < DefaultRecordBatch.HEADER_STRUCT.size or raw[self.MAGIC_OFFSET] != MAGIC:
            return super().next_batch()
        self._cache_next()
        return GuardedBatch(raw)


def install() -> None:
    """Let all consumers of this process read with `GuardedRecords`. Idempotent."""
    fetcher.MemoryRecords = GuardedRecords


# --- unpacking within a bound


def unpack_gzip(packed: memoryview, limit: int) -> bytearray:
    """Unpack gzip, also of several members.

    Raises:
      BatchError: it is none, or larger than `limit`.
    """
    unpacked, rest = bytearray(), bytes(packed)
    try:
        while rest:
            member = zlib.decompressobj(wbits=31)
            while not member.eof:
                piece = member.decompress(rest, PIECE)
                unpacked += piece
                _check(unpacked, limit)
                if not (rest := member.unconsumed_tail) and not piece and not member.eof:
                    raise BatchError("gzip data that end too early")
            rest = member.unused_data
    except zlib.error as exc:
        raise BatchError(f"no gzip data: {exc}") from None
    return unpacked


def unpack_lz4(packed: memoryview, limit: int) -> bytearray:
    """Unpack one LZ4 frame; raises as `unpack_gzip`."""
    unpacked, frame, rest = bytearray(), lz4.frame.LZ4FrameDecompressor(), bytes(packed)
    try:
        while not frame.eof:
            piece = frame.decompress(rest, max_length=PIECE)
            rest = b""
            unpacked += piece
            _check(unpacked, limit)
            if not piece and frame.needs_input:
                raise BatchError("LZ4 data that end too early")
    except (RuntimeError, EOFError, MemoryError) as exc:
        raise BatchError(f"no LZ4 data: {exc}") from None
    return unpacked


def unpack_zstd(packed: memoryview, limit: int) -> bytearray:
    """Unpack zstd, also of several frames; raises as `unpack_gzip`."""
    unpacked = bytearray()
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        with decompressor.stream_reader(io.BytesIO(packed), read_across_frames=True) as reader:
            while piece := reader.read(PIECE):
                unpacked += piece
                _check(unpacked, limit)
    except zstandard.ZstdError as exc:
        raise BatchError(f"no zstd data: {exc}") from None
    return unpacked


def unpack_snappy(packed: memoryview, limit: int) -> bytearray:
    """Unpack snappy, bare or in the framing of Java's library; raises as `unpack_gzip`."""
    unpacked, data = bytearray(), bytes(packed)
    if not (len(data) > XERIAL_HEADER and data.startswith(XERIAL)):
        return _snappy_block(unpacked, data, limit)
    at = XERIAL_HEADER
    while at < len(data):
        if at + BLOCK_SIZE.size > len(data):
            raise BatchError("snappy data that end too early")
        (size,) = BLOCK_SIZE.unpack_from(data, at)
        at += BLOCK_SIZE.size
        if not 0 < size <= len(data) - at:
            raise BatchError(f"a snappy block of {size} bytes")
        _snappy_block(unpacked, data[at : at + size], limit)
        at += size
    return unpacked


def _snappy_block(unpacked: bytearray, block: bytes, limit: int) -> bytearray:
    """Unpack one block behind `unpacked`, whose length stands in front of it: nothing is made for one that lies."""
    size = shift = 0
    for byte in block[:5]:
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:  # else more bytes follow
            break
    if len(unpacked) + size > limit:
        raise BatchError(f"a batch that unpacks to more than {limit} bytes")
    try:
        unpacked += snappy.decompress(block)
    except Exception as exc:  # the library has errors of its own, by version
        raise BatchError(f"no snappy data: {exc}") from None
    return unpacked


def _check(unpacked: bytearray, limit: int) -> None:
    if len(unpacked) > limit:
        raise BatchError(f"a batch that unpacks to more than {limit} bytes")


UNPACK: Final[Mapping[int, Callable[[memoryview, int], bytearray]]] = {
    DefaultRecordBatch.CODEC_GZIP: unpack_gzip,
    DefaultRecordBatch.CODEC_SNAPPY: unpack_snappy,
    DefaultRecordBatch.CODEC_LZ4: unpack_lz4,
    DefaultRecordBatch.CODEC_ZSTD: unpack_zstd,
}
