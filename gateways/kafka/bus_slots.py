"""Where messages wait to share a record: a slot for each partition, the TapRoute of all topics that live there [K21].

QoS 0 waits apart from QoS 1 and 2, in records and sequences of its own: these are kept, acknowledged and spooled, and
the order of one publisher's messages holds within a topic and a QoS [MQTT5-4.6.0-6].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from gateways.kafka.bus_records import RUN_OVERHEAD, Item, messages_of
from gateways.kafka.stream_records import OutsideMessage
from mqtt_trio.gateway import Answer, FrameRun, Hold, Message, Refused

if TYPE_CHECKING:
    from gateways.kafka.bus_sender import BusSender

RECORD_SIZE: Final = 128 * 1024
"""Bytes at which a slot leaves without waiting for the linger."""
NOBODY: Final = Hold()
"""In the place of the Hold of an item that nobody waits for."""
SURE: Final = 0x8000
"""Bit of the streams of QoS 1 and 2."""
HANDED: Final = 0x4000
"""Bit of those of them that are passed on, for share groups alone."""


def both(one: Hold | None, other: Hold | None) -> Hold | None:
    """Return what is let go when both are."""
    if one is None or other is None:
        return other if one is None else one
    answer = Hold(kept=one.kept and other.kept)

    def look() -> None:
        if one.released and other.released:
            answer.release(one.refused or other.refused)

    one.when_released(look)
    other.when_released(look)
    return answer


@attrs.define
class Chunk:
    """Messages that make up one record, about RECORD_SIZE of them."""

    items: list[Item] = attrs.Factory(list)
    holds: list[Hold] = attrs.Factory(list)
    messages: int = 0
    size: int = 0


class Slot:
    """The messages of one partition. Hot: `take_run`."""

    __slots__ = ("_sender", "_window", "items", "keeps", "messages", "number", "size", "sure")

    def __init__(self, sender: BusSender, number: int) -> None:
        self._sender = sender
        self._window = sender.window
        self.keeps = sender.outbox.notes
        self.number = number
        self.items: list[Item] = []
        """At QoS 0."""
        self.messages = 0
        self.size = 0
        self.sure = SureItems(sender)
        """At QoS 1 and 2."""

    def take_run(self, run: FrameRun) -> Answer:
        """Take a run of frames from the fast lane."""
        size = len(run.frames) + RUN_OVERHEAD
        return self.sure.take(run, size) if run.qos else self._add(run, run.count, size)

    def _add(self, item: Item, count: int, size: int) -> Answer:
        """Take so many messages at QoS 0, while there is room."""
        window = self._window
        if window.messages >= window.max_messages or window.size >= window.max_size:
            return window.beyond(0, count, size)
        window.messages += count
        window.size += size
        self.items.append(item)
        self.messages += count
        self.size += size
        if self.size >= RECORD_SIZE:
            self._sender.ship(self)
        elif not self._sender.armed:
            self._sender.arm()
        return None

    def take(self, message: Message) -> Answer:
        """Take one message from the full path."""
        item = self._sender.encoded(message)
        return None if item is None else self.put(message, item)

    def put(self, message: Message, item: bytes) -> Answer:
        """Take one message as `item` has it."""
        sender = self._sender
        size = len(item) + RUN_OVERHEAD
        if message.qos:
            waited_for = isinstance(message, OutsideMessage)
            answer = self.sure.take(item, size, waited_for=waited_for)
            if message.retain and not isinstance(answer, Refused):
                answer = both(answer, sender.retain(message, waited_for))
            return answer
        if message.retain:
            sender.retain(message, False)
        return self.take_packed(item, 1, 0)

    def take_packed(self, item: bytes, count: int, qos: int) -> Answer:
        """Take an item of so many messages; one at QoS 1 and 2."""
        size = len(item) + RUN_OVERHEAD
        return self.sure.take(item, size) if qos else self._add(item, count, size)

    def will_take(self, qos: int) -> bool:
        """Say whether other nodes may get a message of this QoS that comes now."""
        return not self._sender.outbox.turns_away if qos else not self._window.full

    def encoded(self, message: Message) -> bytes | None:
        """Pack a message; None, counted, when no record can hold it."""
        return self._sender.encoded(message)

    def empty(self) -> list[Chunk]:
        """Give away what waits at QoS 0."""
        items, messages, size = self.items, self.messages, self.size
        self.items, self.messages, self.size = [], 0, 0
        return cut(items, [], messages, size) if items else []


class SureItems:
    """Messages at QoS 1 and 2 of one partition."""

    __slots__ = ("_outbox", "_sender", "_window", "holds", "items", "size")

    def __init__(self, sender: BusSender) -> None:
        self._sender = sender
        self._outbox = sender.outbox
        self._window = sender.outbox.window
        self.items: list[Item] = []
        self.holds: list[Hold] = []
        """One for each item up to the last that somebody waits for, or none."""
        self.size = 0

    def take(self, item: Item, size: int, *, waited_for: bool = False) -> Answer:
        """Take one message of `size` bytes. `waited_for`: whoever brings it waits for its record in any case."""
        outbox, window = self._outbox, self._window
        if outbox.turns_away:
            return outbox.turn_away()
        answer: Answer = None
        if window.full:
            answer = window.beyond(1, 1, size)
            if not isinstance(answer, Hold):
                return answer
        else:
            window.add(1, size)
        if outbox.gated or waited_for:  # it waits for more than room
            answer = Hold(kept=outbox.notes)
            self.holds += [NOBODY] * (len(self.items) - len(self.holds))
            self.holds.append(answer)
        self.items.append(item)
        self.size += size
        if self.size >= RECORD_SIZE and not outbox.notes:
            self._sender.ship_sure()
        elif not self._sender.armed:
            self._sender.arm()
        return answer

    def empty(self) -> list[Chunk]:
        """Give away what waits."""
        items, holds, size = self.items, self.holds, self.size
        self.items, self.holds, self.size = [], [], 0
        if holds:
            holds += [NOBODY] * (len(items) - len(holds))
        return cut(items, holds, len(items), size) if items else []


def cut(items: list[Item], holds: list[Hold], messages: int, size: int) -> list[Chunk]:
    """Cut what waits into chunks; `holds`: one for each item, or none."""
    if size < 2 * RECORD_SIZE:
        return [Chunk(items, holds, messages, size)]
    chunks = [Chunk()]
    for number, item in enumerate(items):
        chunk = chunks[-1]
        if chunk.size >= RECORD_SIZE:
            chunk = Chunk()
            chunks.append(chunk)
        chunk.items.append(item)
        if holds:
            chunk.holds.append(holds[number])
        chunk.messages += messages_of(item)
        chunk.size += RUN_OVERHEAD + len(item.frames if isinstance(item, FrameRun) else item)
    return chunks
