"""What the core tells the store, and what waits for the store's word.

The core notes every change of what must outlive the process in the current `Batch`. Whoever owns the store takes that
batch (`take`), has it committed in a thread, and says `committed` or `failed`; changes that come meanwhile fill the
next one. So commits are as large as they take long, and nothing waits for a commit of its own.

Frames that promise durability wait here for their batch (`Held`): acknowledgements of messages that must not be lost,
and every step of a QoS 2 flow of a session that is kept. A PUBREC that is sent before its message is on disk, a PUBREL
before the PUBREC, a PUBCOMP before the freed identifier, a PUBLISH before its identifier: after a crash each of them
would lose a message or deliver it twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import Batch, Number, Owner
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.encode import EncodedPublish
from mqtt_trio.protocol.wire import PACKET_IDS

if TYPE_CHECKING:
    from mqtt_trio.broker.outbox import Outbox
    from mqtt_trio.broker.session import Delivery, Session
    from mqtt_trio.broker.shares import ShareGroup

V5: Final = ProtocolVersion.MQTT_5_0
ROW_SIZE: Final = 200
"""Bytes that a row of a batch counts for, beside its frame."""
DONE_SIZE: Final = 50
"""Bytes that a number of what is to be removed counts for."""
SHARED_SIZE: Final = 200
"""Bytes of a frame from where on several deliveries of it share one copy in the store."""
RETAIN: Final = 4
RELEASED: Final = 8
"""Flags of a delivery row beside its QoS: RETAIN; its PUBREC has come."""
Tail: TypeAlias = tuple[int, bytes | None, int, float, int, bytes | None]
"""A DeliveryRow behind its first three values."""
_ANSWERS: Final = {1: b"\x40\x02", 2: b"\x50\x02"}
"""PUBACK and PUBREC up to their Packet Identifiers, by the QoS of what they answer."""


Kept: TypeAlias = tuple[Number, Number]
"""Which deliveries a publish led to: those behind the first number, up to the second one. Or TURN, or AGAIN."""
Gated: TypeAlias = tuple["Session | ShareGroup", "Delivery", int]
"""Whose delivery, which one, its Packet Identifier (0: it waits in the queue)."""
TURN: Final = (1, 0)
"""Of a publish that needs no store: its answer waits for those in front of it."""
AGAIN: Final = (2, 0)
"""Of a QoS 2 publish that came again: what it led to is that of its first one."""
Answer: TypeAlias = tuple[int, int, Number, Number] | bytes
"""Answer to a publish: its QoS, its Packet Identifier, and its `Kept`: these deliveries are withdrawn when the answer
becomes negative. Or a frame that was negative from the start."""


class Freeing(bytes):
    """A negative PUBREC that frees a Packet Identifier which the store has. It waits until the store knows, however
    long that takes: after a kill the next message under it would be taken for a repetition."""


@attrs.define(eq=False)
class Held:
    """Frames to one connection that wait for one batch."""

    number: int
    """Of the batch."""
    session: Session | None
    """Whose connection it is, or was: what becomes of its publishes concerns the session also when that is gone."""
    acks: list[Answer] = attrs.Factory(list)
    """Answers to publishes, in order. When the batch fails, they become negative."""
    publishes: dict[int, bytes] = attrs.Factory(dict)
    """PUBLISH at QoS 2 by Packet Identifier; taken out when the delivery is withdrawn."""
    frames: list[bytes] = attrs.Factory(list)
    """PUBREL and PUBCOMP. They wait as long as it takes."""
    replies: list[bytes] = attrs.Factory(list)
    """SUBACK and UNSUBACK. When the batch fails they go all the same: the subscription holds, and the store gets it
    when it takes changes again."""

    def release(self) -> bytes:
        """Return all of it, ready to be sent."""
        acks = [a if isinstance(a, bytes) else _ANSWERS[a[0]] + PACKET_IDS[a[1]] for a in self.acks]
        return b"".join((*acks, *self.publishes.values(), *self.frames, *self.replies))


def positive(qos: int, packet_id: int) -> bytes:
    """Write the PUBACK or PUBREC of success."""
    return _ANSWERS[qos] + PACKET_IDS[packet_id]


class Journal:
    """The changes of one node."""

    def __init__(self, *, keeps: bool = True, limit: int = 64 * 1024 * 1024) -> None:
        self.keeps = keeps
        """False: there is no store, so nothing is noted and nothing waits."""
        self.limit = limit
        """Bytes [Persistence.JournalBytes] of changes that wait to be committed. Outcome: QoS 1 and 2 publishers
        wait; while the store takes nothing, see `overfull`."""
        self.batch = Batch()
        self.number = 1
        """Of the batch that is being filled."""
        self.done_number = 0
        """Of the last batch that was committed."""
        self.size = 0
        """Bytes of `batch`, about."""
        self.out_size = 0
        """Bytes of the batch that is out, about."""
        self.dirty = False
        """Whether the batch holds changes, or somebody waits for it."""
        self.last_owner = 0
        self.last_number = 0
        """No owner, no delivery up to these was not there before; a store that was loaded says where to go on."""
        self.failing: str | None = None
        """Why the store takes nothing, while it does not: publishes that need it are refused."""
        self.renumbered: dict[Number, Number] = {}
        """Old and new number of deliveries that went from a share group to a member, whose own ones they are to follow;
        until the store has the old one, its publisher's answer names it. Negative new ones stand in `gated`."""
        self.safe = 0
        """What has a number up to this one is on disk, or needs no store any more."""
        self.gated: dict[Number, Gated] = {}
        """Deliveries at QoS 2 that the store does not get, but that leave only once it has what else their publish led
        to. They have numbers of the same sequence, which stand negative in them."""
        self._taken = 0
        """The last number of the batch that is out."""
        self._doubtful = 0
        """Rows up to this number in the batch come from one that failed. A disk that reports an error may have kept it
        all the same, so what is at its end is removed there, too."""
        self.sources: list[Callable[[], Mapping[str, bytes | None]]] = []
        """Asked at each `take` for the marks that have changed: what they say is committed with everything that was
        noted before, and with nothing that comes later."""
        self.resumed = 0
        """Owners up to this number are of earlier lives of the node: they were there while it was not."""
        self.marks: dict[str, bytes] = {}
        """What the store held at the start."""
        self.changed: Callable[[], None] = lambda: None
        """Called behind a hot stretch that changed something; wakes whoever owns the store."""
        self._waiting: deque[tuple[int, list[Outbox]]] = deque()
        """By batch: connections with frames that wait for it."""
        self._contents: dict[Number, int] = {}
        """Key of the content of a delivery that shares it."""
        self._references: dict[int, int] = {}
        """Deliveries that name a content, by its key."""
        self._last: tuple[Message | None, Number, bytes] = (None, 0, b"")
        """The message that was written last, the delivery with its frame, and the frame."""

    @property
    def full(self) -> bool:
        """Whether publishers inside the process must wait. Nobody can refuse what they bring, so while the store fails
        the batch that is tried again counts with what has come since."""
        return self.size + (self.out_size if self.failing is not None else 0) > self.limit

    @property
    def overfull(self) -> bool:
        """Whether the store takes nothing and the limit is reached. Outcome: no session that is to be kept begins, kept
        ones get no new subscriptions, retained messages are not changed: whatever brings rows under new keys. Rows
        under those that are there come to an end by themselves."""
        return self.failing is not None and self.full

    # Deliveries

    def add(self, owner: Owner, delivery: Delivery, packet_id: int) -> None:
        """A delivery has come to be: it waits in its owner's queue, or was sent under `packet_id`."""
        self.dirty = True
        message = delivery.message
        self.last_number = number = self.last_number + 1
        delivery.number = number
        content, frame = 0, self._frame(message, number)
        if frame is None:
            content = self._contents[number]
        else:
            self.size += len(frame)
        self.size += ROW_SIZE
        identifiers = None
        if delivery.subscription_identifiers:
            identifiers = b"".join([number.to_bytes(4) for number in delivery.subscription_identifiers])
        flags = delivery.qos | RETAIN * delivery.retain
        tail = (flags, identifiers, 5, message.published_at, content, frame)
        self.batch.deliveries[number] = (number, owner, packet_id, *tail)

    def _frame(self, message: Message, number: Number) -> bytes | None:
        """Write a message, or None when the delivery shares the content of the one before."""
        last, first, frame = self._last
        if last is not message:
            frame = frame_of(message)
            self._last = (message, number, frame)
            return frame
        if len(frame) <= SHARED_SIZE:
            return frame
        key = self._contents.get(first)
        if key is None:
            row = self.batch.deliveries.get(first)
            if row is None:  # it is gone, or committed
                self._last = (message, number, frame)
                return frame
            key = self.share(frame)
            self._name(first, key)
            self.batch.deliveries[first] = (*row[:7], key, None)
        self._name(number, key)
        return None

    def _name(self, number: Number, key: int) -> None:
        self._contents[number] = key
        self._references[key] += 1

    def share(self, frame: bytes) -> int:
        """Keep a frame that deliveries are going to name; return its key."""
        self.last_number = key = self.last_number + 1
        self.batch.contents[key] = frame
        self._references[key] = 0
        self.size += len(frame) + ROW_SIZE
        return key

    def append(self, owner: Owner, packet_id: int, tail: Tail) -> Number:
        """The same as `add` for the fast lane, which has the frame at hand, or the key of one that it shared."""
        self.dirty = True
        self.last_number = number = self.last_number + 1
        self.batch.deliveries[number] = (number, owner, packet_id, *tail)
        self.size += ROW_SIZE
        if tail[4]:
            self._name(number, tail[4])
        return number

    def move(self, number: Number, owner: Owner, packet_id: int, flags: int) -> None:
        """A delivery has another owner, another Packet Identifier (0: it waits) or other flags."""
        if number < 0:
            return
        self.dirty = True
        row = self.batch.deliveries.get(number)
        if row is None:
            self.batch.moves[number] = (owner, packet_id, flags)
            self.size += ROW_SIZE
        else:
            self.batch.deliveries[number] = (number, owner, packet_id, flags, *row[4:])

    def done(self, number: Number) -> None:
        """A delivery is at its end."""
        if number < 0:
            self.gated.pop(-number, None)
            return
        self.dirty = True
        batch = self.batch
        if batch.deliveries.pop(number, None) is None or number <= self._doubtful:
            batch.done.append(number)
            self.size += DONE_SIZE
            if batch.moves:
                batch.moves.pop(number, None)
        if self._contents and (key := self._contents.pop(number, 0)):
            self._references[key] -= 1
            if not self._references[key]:
                del self._references[key]
                if batch.contents.pop(key, None) is None or key <= self._doubtful:
                    batch.contents_done.append(key)

    def gate(self, owner: Session | ShareGroup, delivery: Delivery, packet_id: int) -> None:
        """A delivery at QoS 2 to a session that is not kept, or in the queue of a group that is not, is of a message
        that the store must have first: its publisher may be told that it is not kept, and sends it again as a new one.
        """
        if delivery.number < 0:  # it waited for the group
            self.gated[-delivery.number] = (owner, delivery, packet_id)
            return
        self.last_number = number = self.last_number + 1
        if delivery.number:
            self.renumbered[delivery.number] = -number
        delivery.number = -number
        self.gated[number] = (owner, delivery, packet_id)

    def take_number(self) -> Number:
        """Return a number for a change that an answer waits for and that is no delivery."""
        self.last_number += 1
        return self.last_number

    def restore_content(self, number: Number, key: int) -> None:
        """A delivery that was loaded names a content."""
        self._references.setdefault(key, 0)
        self._name(number, key)

    def drop_contents(self, keys: Iterable[int]) -> None:
        """Of the contents that were loaded, remove those that no delivery names."""
        unnamed = [key for key in keys if key not in self._references]
        self.batch.contents_done += unnamed
        self.dirty = self.dirty or bool(unnamed)

    # Frames that wait

    def hold(self, outbox: Outbox) -> Held:
        """Return where frames of a connection wait for the batch that is being filled."""
        self.dirty = True
        held = outbox.held
        if held and held[-1].number == self.number:
            return held[-1]
        new = Held(self.number, outbox.session)
        held.append(new)
        if not self._waiting or self._waiting[-1][0] != self.number:
            self._waiting.append((self.number, []))
        self._waiting[-1][1].append(outbox)
        return new

    def new_owner(self) -> Owner:
        """Return a number for a session or a share group."""
        self.last_owner += 1
        return self.last_owner

    # The owner of the store

    def take(self) -> Batch:
        """Return the current batch and begin the next one. One batch is out at a time; while the store fails, the same
        one comes back with what has been added."""
        for source in self.sources:
            self.batch.marks.update(source())
        batch, self.batch = self.batch, Batch()
        self.out_size, self.size = self.size, 0
        self.dirty = False
        self.number += 1
        self._taken = self.last_number
        self._last = (None, 0, b"")
        return batch

    def committed(self) -> list[Outbox]:
        """The batch that is out is on disk. Returns the connections whose frames may go."""
        self.failing = None
        self.done_number = self.number - 1
        self.out_size = 0
        self.safe = taken = self._taken
        if self.renumbered:
            self.renumbered = {old: new for old, new in self.renumbered.items() if old > taken}
        if self.gated:
            for number in [number for number in self.gated if number <= taken]:
                self.gated.pop(number)[1].number = 0
        ready: list[Outbox] = []
        while self._waiting and self._waiting[0][0] <= self.done_number:
            ready += self._waiting.popleft()[1]
        return ready

    def failed(self, batch: Batch, reason: str) -> list[Outbox]:
        """The batch that is out could not be kept: it is part of the current one again. Returns the connections that
        have frames waiting for it."""
        self.failing = reason
        self.dirty = True
        self._doubtful = max(self._doubtful, 0, *batch.deliveries, *batch.contents)
        merge(batch, self.batch)
        self.batch = batch
        self.out_size = 0
        self.size = size_of(batch)
        return [outbox for _, outboxes in self._waiting for outbox in outboxes]


def frame_of(message: Message) -> bytes:
    """Write a message as a 5.0 PUBLISH; a Packet Identifier in it means nothing."""
    encoded = EncodedPublish(
        message.topic_name,
        message.payload,
        message.properties,
        version=V5,
        qos=QoS(message.qos),
        retain=message.retain,
        message_expiry_interval=message.properties.message_expiry_interval,
    )
    return encoded.frame(1)


def size_of(batch: Batch) -> int:
    """Bytes of a batch, about."""
    rows = len(batch.sessions) + len(batch.groups) + len(batch.subscriptions) + len(batch.received)
    rows += len(batch.retained) + len(batch.deliveries) + len(batch.moves) + len(batch.contents) + len(batch.marks)
    size = ROW_SIZE * rows + DONE_SIZE * (len(batch.done) + len(batch.contents_done))
    size += sum(len(row[8] or b"") for row in batch.deliveries.values())
    size += sum(map(len, batch.contents.values()))
    size += sum(len(value or b"") for value in batch.marks.values())
    size += sum(len(row[1]) for row in batch.retained.values() if row is not None)
    size += sum(len(row[5] or b"") for row in batch.sessions.values() if row is not None)
    return size + sum(len(topic_filter) for _, topic_filter in batch.subscriptions)


def merge(batch: Batch, later: Batch) -> None:
    """Add to `batch`, whose commit failed, what came after it. The store may have the batch all the same, so what was
    removed later is removed there as well."""
    for owner, row in later.sessions.items():
        if row is None:
            _forget_session(batch, owner)
    batch.sessions.update(later.sessions)
    batch.groups.update(later.groups)
    batch.subscriptions.update(later.subscriptions)
    batch.received.update(later.received)
    batch.retained.update(later.retained)
    batch.marks.update(later.marks)
    batch.contents.update(later.contents)
    for number, (owner, packet_id, flags) in later.moves.items():
        delivery = batch.deliveries.get(number)
        if delivery is None:
            batch.moves[number] = (owner, packet_id, flags)
        else:
            batch.deliveries[number] = (number, owner, packet_id, flags, *delivery[4:])
    for number in later.done:
        batch.moves.pop(number, None)
        batch.deliveries.pop(number, None)
        batch.done.append(number)
    batch.deliveries.update(later.deliveries)
    for key in later.contents_done:
        batch.contents.pop(key, None)
        batch.contents_done.append(key)


def _forget_session(batch: Batch, owner: Owner) -> None:
    """Leave out what was to be written for a session that has ended meanwhile; its deliveries are in `done`."""
    for key in [key for key in batch.subscriptions if key[0] == owner]:
        del batch.subscriptions[key]
    for entry in [entry for entry in batch.received if entry[0] == owner]:
        del batch.received[entry]
