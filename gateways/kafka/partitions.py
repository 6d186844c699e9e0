"""The partition of a key as Java's clients choose it, so that all clients agree where a topic lives."""

from __future__ import annotations

from functools import lru_cache

SEED = 0x9747B28C
MULTIPLIER = 0x5BD1E995
MASK = 0xFFFFFFFF
CACHED_KEYS = 65_536


def murmur2(data: bytes) -> int:
    """Return MurmurHash2 of `data` as an unsigned 32-bit number, as org.apache.kafka.common.utils.Utils does."""
    length = len(data)
    h = SEED ^ length
    whole = length & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * MULTIPLIER & MASK
        k = (k ^ k >> 24) * MULTIPLIER & MASK
        h = h * MULTIPLIER & MASK ^ k
    if tail := data[whole:]:
        h = (h ^ int.from_bytes(tail, "little")) * MULTIPLIER & MASK
    h = (h ^ h >> 13) * MULTIPLIER & MASK
    return h ^ h >> 15


@lru_cache(maxsize=CACHED_KEYS)
def partition_for(topic: bytes, n: int) -> int:
    """Return the partition, of `n`, that records with the key `topic` go to."""
    return (murmur2(topic) & 0x7FFFFFFF) % n
