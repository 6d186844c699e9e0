"""What sees every accepted publish and may hold its acknowledgement: archive groups, the bus, gateways.

A tap is asked once for each Topic Name where its messages go (`Tap.route`); the answer is kept in the route caches,
so it must depend on the Topic Name alone and be the same object for the same destination: runs of frames are cut
where it changes. Everything here runs on the Trio thread, inside the hot stretch, and must not block.

A message that a tap refuses reaches nobody: no subscriber of this node, and none of the taps that are asked behind the
one that refuses. So taps are asked by `Rank`: what carries messages away comes last. A tap that was asked before keeps
what it took: it may have a message that another one refused, and has it twice when its publisher sends it again. What
is published inside the process (a Will, what a gateway brings) nobody can refuse: all are asked, and an answer changes
nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol, TypeAlias

import attrs

from mqtt_trio.broker.message import MESSAGE_OVERHEAD, Message
from mqtt_trio.errors import MalformedPacketError
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.decode import decode_publish
from mqtt_trio.protocol.packets import NO_PROPERTIES
from mqtt_trio.protocol.wire import read_header


@attrs.define
class FrameRun:
    """Whole PUBLISH packets of one publisher that lie side by side, as they were received.

    All have the same QoS, RETAIN 0 and DUP 0, a Topic Name and the same route; their properties may differ and hold no
    Topic Alias, Subscription Identifier or Message Expiry Interval. A run at QoS 1 or 2 has one frame, whose Packet
    Identifier is the publisher's and means nothing to anybody else.
    """

    frames: bytes
    count: int
    """How many frames."""
    qos: int
    protocol_version: ProtocolVersion
    """5.0, or 3.1.1 for both 3.x versions: their PUBLISH is the same."""
    client_id: str
    published_at: float
    """UTC seconds since the epoch."""


class Hold:
    """A tap's promise to say later when a message may be acknowledged. `release` it exactly once, on the Trio thread,
    then have the touched clients flushed (`flush` of whoever handed out the broker).

    `kept`: the tap notes the message in the node's store, in the batch of everything else that it leads to, and lets go
    behind that commit; after a crash the message needs not be shown to it again (see `keeps`)."""

    __slots__ = ("_waiter", "kept", "refused", "released")

    def __init__(self, *, kept: bool = False) -> None:
        self.kept = kept
        self._waiter: Callable[[], None] | None = None
        self.released = False
        self.refused: ReasonCode | None = None

    def release(self, refused: ReasonCode | None = None) -> None:
        """Let the acknowledgement go; with `refused`, as a negative one."""
        if self.released:
            return
        self.released = True
        self.refused = refused
        # The waiter knows this Hold: a cycle for each message would keep the garbage collector busy.
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter()

    def when_released(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` at the release (used by the broker)."""
        if self.released:
            waiter()
        else:
            self._waiter = waiter


@attrs.frozen
class Refused:
    """The tap does not take the message: a 5.0 publisher gets `reason_code`, a 3.x publisher is disconnected."""

    reason_code: ReasonCode


Answer: TypeAlias = Hold | Refused | None
"""None: taken, acknowledge at once. For QoS 0 a tap always answers None, and counts what it has to drop."""


class TapRoute(Protocol):
    """Where one tap puts the messages of a topic."""

    def take_run(self, run: FrameRun) -> Answer:
        """Take a run of frames from the fast lane."""

    def take(self, message: Message) -> Answer:
        """Take one message from the full path."""


def keeps(route: TapRoute) -> bool:
    """Whether a route has an attribute `keeps` that is true: it notes what it takes in the node's store, and answers
    with Holds that are `kept`. A QoS 2 message that comes again is not shown to it a second time."""
    return bool(getattr(route, "keeps", False))


class Rank(enum.IntEnum):
    """When a tap is asked: one with an attribute `rank`; the others are asked with `KEEPS`. Taps of one rank are asked
    in the order in which they were added."""

    REFUSES = 0
    """It may turn messages away while others take them, and keeps to itself what it takes."""
    KEEPS = 1
    SHIPS = 2
    """What it takes is out of reach at once: subscribers elsewhere get it."""


def rank_of(tap: Tap) -> int:
    """When a tap is asked."""
    return int(getattr(tap, "rank", Rank.KEEPS))


class Tap(Protocol):
    """Something that wants publishes. Registered with `Broker.add_tap` before the listeners open."""

    def route(self, topic_name: str) -> TapRoute | None:
        """Return where messages of `topic_name` go, or None when this tap does not want them."""


def frames_size(run: FrameRun) -> int:
    """Bytes that the run counts for in windows: its frames, and what each message costs beside them once decoded."""
    return len(run.frames) + MESSAGE_OVERHEAD * run.count


def read_run(run: FrameRun) -> list[Message]:
    """Decode the frames of a run, in order. A frame that repeats topic and properties of the one before is a slice.

    Raises:
      RemoteProtocolError: the frames are not what `FrameRun` promises (they came from outside the broker).
    """
    frames, size, version = run.frames, len(run.frames), run.protocol_version
    qos, client_id, published_at = run.qos, run.client_id, run.published_at
    first, skip = 0x30 | qos << 1, 2 if qos else 0
    messages: list[Message] = []
    topic, topic_name = b"", ""  # of the frame before
    block, properties = b"", NO_PROPERTIES
    at = 0
    while at < size:
        header = read_header(frames, at)
        if header is None or header[1] > size or frames[at] != first:
            raise MalformedPacketError(f"byte {at} of a run of frames does not begin a whole PUBLISH of its QoS")
        body, end = header
        payload = body + len(topic) + skip
        same_topic = topic_name and frames.startswith(topic, body)
        if same_topic and frames.startswith(block, payload) and payload + len(block) <= end:
            payload += len(block)
        else:
            packet = decode_publish(first & 15, frames, body, end, version)
            if not packet.topic_name:
                raise MalformedPacketError("a frame of a run has no Topic Name")
            payload = end - len(packet.payload)
            topic_name, properties = packet.topic_name, packet.properties
            topic_end = body + 2 + (frames[body] << 8 | frames[body + 1])
            topic, block = frames[body:topic_end], frames[topic_end + skip : payload]
        messages.append(Message(topic_name, frames[payload:end], qos, False, properties, client_id, published_at))
        at = end
    if len(messages) != run.count:
        raise MalformedPacketError(f"a run of {run.count} frames holds {len(messages)}")
    return messages
