"""Topics whose newest retained message Kafka may not have: marks in the node's session store [K22, K23].

A mark holds that message (or that there is none any more) and is written in the commit of the retained message itself,
so behind a kill at any instant the node knows what it still owes mqtt.retained. It goes in a commit behind Kafka's
confirmation. There is one for each MQTT topic, and what a mark holds counts in the window of the bus until then.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import attrs

from gateways.kafka.bus_records import BusRecordError, decode_items, encode_message
from mqtt_trio.gateway import GatewayHost, Hold, LocalClient, Message

log = logging.getLogger("gateways.kafka.retained")

MARKS: Final = "kafka.retained/"
"""In front of the MQTT topic."""
VERSION: Final = 1
HEAD: Final = struct.Struct(">BQ")
"""In front of the message: version, offset of the first record that had not been read when the message was taken."""


@attrs.frozen
class Owed:
    """What a mark says."""

    message: Message
    seen: int
    """Offsets of the topic's partition below this one were read before the message was taken."""


class RetainedMarks:
    """The marks of one node. Trio thread only.

    Attributes:
      keeps: there is a session store; without one nothing is marked, and what is owed ends with the process.
      fresh: messages that are to be marked in the next commit, by topic.
    """

    def __init__(
        self, host: GatewayHost, local: LocalClient, marked: Callable[[Mapping[bytes, Message]], None]
    ) -> None:
        """`marked` is told which messages the store knows now."""
        self.keeps = host.marks is not None
        self.fresh: dict[bytes, Message] = {}
        self.lost = 0
        self._local = local
        self._marked = marked
        self._seen: dict[bytes, int] = {}
        self._holds: list[Hold] = []
        """Of who waits until what is fresh is in the store."""
        self._gone: dict[str, bytes | None] = {}
        self._committing = 0
        self._found = dict(host.marks or {})
        if self.keeps:
            host.note(self._changes)

    def read(self) -> dict[bytes, Owed]:
        """Return what the last process owed; once."""
        found, self._found = self._found, {}
        owed: dict[bytes, Owed] = {}
        for name, mark in found.items():
            if not name.startswith(MARKS):
                continue
            try:
                owed[name.removeprefix(MARKS).encode()] = _decode(name.removeprefix(MARKS), mark)
            except BusRecordError as exc:
                self.lost += 1
                self._gone[name] = None
                log.error("what was retained last may not reach the other nodes: %s", exc)  # noqa: TRY400
        return owed

    def add(self, key: bytes, message: Message, seen: int, hold: Hold | None = None) -> None:
        """Mark a topic in the next commit, and let `hold` go behind it."""
        self.fresh[key] = message
        self._seen[key] = seen
        if hold is not None:
            self._holds.append(hold)

    def forget(self, key: bytes) -> None:
        """Kafka has the newest message of a topic, or never will."""
        if self.keeps:
            self._gone[MARKS + key.decode()] = None

    @property
    def is_settled(self) -> bool:
        """The store has all marks."""
        return not self.fresh and not self._committing

    def _changes(self) -> Mapping[str, bytes | None]:
        """Return what is new, for the store (`GatewayHost.note`)."""
        changed, self._gone = self._gone, {}
        fresh, self.fresh = self.fresh, {}
        seen, self._seen = self._seen, {}
        holds, self._holds = self._holds, []
        for key, message in fresh.items():
            try:
                changed[MARKS + key.decode()] = HEAD.pack(VERSION, seen[key]) + encode_message(message)
            except BusRecordError:
                changed[MARKS + key.decode()] = None  # no record can hold it either: whoever ships it says so
        if fresh:
            self._committing += 1
            self._local.when_kept(partial(self._committed, fresh, holds))
        return changed

    def _committed(self, fresh: Mapping[bytes, Message], holds: Sequence[Hold]) -> None:
        self._committing -= 1
        self._marked(fresh)
        for hold in holds:
            hold.release()


def _decode(topic: str, mark: bytes) -> Owed:
    if len(mark) <= HEAD.size or mark[0] != VERSION:
        raise BusRecordError(f"the mark of topic {topic!r} in the session store is of no version that is known")
    seen: int = HEAD.unpack_from(mark)[1]
    items = decode_items(mark, HEAD.size)
    if len(items) != 1 or not isinstance(message := items[0], Message) or message.topic_name != topic:
        raise BusRecordError(f"the mark of topic {topic!r} in the session store holds no message of it")
    return Owed(message, seen)
