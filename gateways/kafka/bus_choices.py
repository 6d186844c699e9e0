"""How bus records speak of share groups [K23]: pure, no I/O.

In a batch a *choice* may stand in front of an item, a run or a message: which node serves which group. Both go by a
hash, the group of its whole name, `$share/NAME/FILTER`, the node of its `Node.Id`::

    TAG_CHOICES u8 | flags u8 | hops u8 | count u16 | count x (group u64, node u64) | the item

The body of a `Kind.GROUPS` tells of which groups a node has members::

    flags u8 | any number of: flags u8 | connected members u32 | since u64 | name length u16 | name
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import attrs

from gateways.kafka.bus_errors import BusRecordError
from mqtt_trio.errors import MqttTrioError
from mqtt_trio.gateway import is_system_topic, split_shared, validate_topic_filter

if TYPE_CHECKING:
    from gateways.kafka.bus_records import Decoded

TAG_CHOICES: Final = 3
HEAD: Final = struct.Struct(">BBBH")
PAIR: Final = struct.Struct(">QQ")
MAX_CHOICES: Final = 65_535
ONLY_GROUPS: Final = 1
"""Flag: the item is for the members of these groups and for no other subscriber, who had it before."""
NOBODY: Final = 0
"""In place of a node: its writer serves the group not, and knows of nobody who does."""

ENTRY: Final = struct.Struct(">BIQH")
WHOLE: Final = 1
"""Flag of a body: forget what this node said before."""
MEMBERS: Final = 1
"""Flag of an entry: the group has members there; without it, it has none any more."""
WAITS: Final = 2
"""Flag of an entry: none is connected, and messages at QoS 1 and 2 wait for them."""
KEPT: Final = 4
"""Flag of an entry: the group is in that node's store, and messages wait for it when the node is away."""
_FLAGS: Final = frozenset((0, MEMBERS, MEMBERS | WAITS, MEMBERS | KEPT, MEMBERS | WAITS | KEPT))


@lru_cache(maxsize=4096)
def hash_of(name: str) -> int:
    """The hash by which a group or a node goes; never NOBODY."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") or 1


@attrs.define
class Chosen:
    """An item behind a choice: one message or run, or the single packets that a run was cut into."""

    choices: dict[int, int]
    """Node by group."""
    only: bool = False
    """See ONLY_GROUPS."""
    hops: int = 0
    """How often nodes that were chosen have passed it on."""
    items: list[Decoded] = attrs.Factory(list)

    @property
    def qos(self) -> int:
        """Of its messages."""
        return self.items[0].qos if self.items else 0


def encode_choices(pairs: Iterable[bytes], *, only: bool = False, hops: int = 0) -> bytes:
    """What stands in front of an item. `pairs`: each out of PAIR, at most MAX_CHOICES."""
    body = b"".join(pairs)
    return HEAD.pack(TAG_CHOICES, ONLY_GROUPS * only, hops, len(body) // PAIR.size) + body


def decode_choices(body: bytes, start: int) -> tuple[Chosen, int]:
    """Read a choice that begins at `start`; return where its item begins.

    Raises:
      BusRecordError: it is none, or nothing stands behind it. struct.error: it is cut.
    """
    _, flags, hops, count = HEAD.unpack_from(body, start)
    first = start + HEAD.size
    stop = first + count * PAIR.size
    if flags & ~ONLY_GROUPS or not count or stop >= len(body) or body[stop] == TAG_CHOICES:
        raise BusRecordError("a choice with unknown flags, without groups, or with no item behind it")
    return Chosen(dict(PAIR.iter_unpack(body[first:stop])), bool(flags & ONLY_GROUPS), hops), stop


def behind_choices(item: bytes) -> int:
    """Where the item behind a choice begins; 0 when none stands in front of it."""
    if item[0] != TAG_CHOICES:
        return 0
    count: int = HEAD.unpack_from(item)[3]
    return HEAD.size + count * PAIR.size


# --- announcements


@attrs.frozen
class GroupNews:
    """What a node says of one group."""

    name: str
    ready: int = 0
    """Its members that are connected there."""
    waits: bool = False
    """None is, and messages at QoS 1 and 2 wait for them."""
    kept: bool = False
    """It is in the store of that node."""
    members: bool = True
    """False: it has none there any more."""
    since: int | None = None
    """Offset at which it was told first in the log; None: in this record."""


def encode_news(news: GroupNews) -> bytes:
    """One entry of a `Kind.GROUPS` body."""
    name = news.name.encode()
    flags = (MEMBERS | WAITS * news.waits | KEPT * news.kept) * news.members
    since = 0 if news.since is None else news.since + 1
    return ENTRY.pack(flags, news.ready, since, len(name)) + name


def decode_news(body: bytes) -> tuple[bool, list[GroupNews]]:
    """Read a `Kind.GROUPS` body; say whether it is WHOLE.

    Raises:
      BusRecordError: it is none; nothing in it counts.
    """
    if not body or body[0] & ~WHOLE:
        raise BusRecordError("an empty record about share groups, or one with unknown flags")
    found: list[GroupNews] = []
    at, end = 1, len(body)
    try:
        while at < end:
            flags, ready, since, size = ENTRY.unpack_from(body, at)
            at += ENTRY.size
            if at + size > end or flags not in _FLAGS or (ready and (flags & WAITS or not flags)):
                raise BusRecordError("a share group that runs past the end of its record, or with flags that cannot be")
            name = body[at : at + size].decode()
            check_group(name)
            waits, kept, members = (bool(flags & bit) for bit in (WAITS, KEPT, MEMBERS))
            found.append(GroupNews(name, ready, waits, kept, members, since - 1 if since else None))
            at += size
    except struct.error:
        raise BusRecordError("a share group that runs past the end of its record") from None
    except UnicodeDecodeError as exc:
        raise BusRecordError(f"a share group with a name that is no UTF-8: {exc.reason}") from None
    return bool(body[0] & WHOLE), found


def check_group(name: str) -> None:
    """Make sure that a group may span nodes.

    Raises:
      BusRecordError: it is no `$share/NAME/FILTER`, or its messages are each node's own.
    """
    try:
        validate_topic_filter(name)
    except MqttTrioError as exc:
        raise BusRecordError(f"the name of a share group is none: {exc}") from None
    share_name, topic_filter = split_shared(name)
    if share_name is None or is_system_topic(topic_filter):
        raise BusRecordError("the name of a share group is none, or below $SYS")
