"""Publishers inside the process: what gateways bring from outside, delivered like a read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

import attrs

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.delivery import Encodings
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.lane_frames import first_frame
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.outbox import Outbox
from mqtt_trio.broker.session import Delivery, Session
from mqtt_trio.broker.tap import FrameRun, Hold, Refused, TapRoute, read_run
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.topics import is_system_topic

OF_NETWORK_CLIENTS: Final = (
    "packets_received",
    "packets_sent",
    "messages_received_qos0",
    "messages_received_qos1",
    "messages_received_qos2",
)
"""Counters that the fast lane moves and that are not about publishers inside."""


@attrs.define(eq=False)
class Parcel:
    """A message that must not be lost, on its way from outside through the taps to the subscribers."""

    message: Message
    taken: list[TapRoute] = attrs.Factory(list)
    """Taps that have taken it."""
    holds: list[Hold] = attrs.Factory(list)
    """What these ask to wait for before the message is acknowledged where it came from."""
    brought: bool = False
    """It is published."""


class LocalPublisher:
    """`gateway.LocalClient` over a Broker. `clock` gives monotonic seconds; every method flushes what it touched."""

    def __init__(self, broker: Broker, name: str, clock: Callable[[], float]) -> None:
        self.broker = broker
        self.name = name
        self.clock = clock
        self._lanes = (self._lane(ProtocolVersion.MQTT_3_1_1), self._lane(ProtocolVersion.MQTT_5_0))
        self._want_room: list[tuple[Callable[[], None], bool]] = []
        self._want_kept: deque[tuple[int, Callable[[], None]]] = deque()
        """By the batch that they wait for."""
        broker.inside.append(self._look)

    def _lane(self, version: ProtocolVersion) -> FastLane:
        """A fast lane of a session that nobody else sees; its acknowledgements go nowhere."""
        outbox = Outbox([], self.broker.limits.outbox_bytes)
        outbox.protocol_version = int(version)
        session = outbox.session = Session("")
        return FastLane(self.broker, session, outbox)

    def publish(self, messages: Iterable[Message], *, tapped: bool = False) -> None:
        """Deliver `messages` to the subscribers of this node."""
        now = self.clock()
        for message in messages:
            self.broker.metrics.messages_local += 1
            self.broker.publish(message, now, tapped=tapped)
        self.broker.flush()

    def bring(self, parcels: Sequence[Parcel]) -> int:
        """Publish messages that must not be lost, up to the first one that a tap refuses; return how many."""
        now, broker = self.clock(), self.broker
        count = 0
        for parcel in parcels:
            message = parcel.message
            audience = broker.audience(message.topic_name, message.client_id)
            if not self._all_take(parcel, audience.taps):
                break
            if message.retain:
                broker.inbound.retain(message, waits=True)
            broker.metrics.messages_local += 1
            broker.sender.deliver(message, audience, now)
            parcel.brought = True
            count += 1
        broker.flush()
        return count

    @staticmethod
    def _all_take(parcel: Parcel, taps: Sequence[TapRoute]) -> bool:
        """Show a message to the taps that have not taken it, up to one that refuses."""
        for tap in taps:
            if any(tap is known for known in parcel.taken):
                continue
            answer = tap.take(parcel.message)
            if isinstance(answer, Refused):
                return False
            parcel.taken.append(tap)
            if answer is not None:
                parcel.holds.append(answer)
        return True

    def objection(self, topic_name: str) -> str | None:
        """Why no client may publish to a Topic Name, as `Inbound.publish` has it."""
        if is_system_topic(topic_name):
            return "$SYS is the broker's own"
        levels = self.broker.limits.topic_levels
        return f"a Topic Name of more than {levels} levels" if topic_name.count("/") >= levels else None

    def publish_runs(self, runs: Iterable[FrameRun]) -> None:
        """Deliver runs of frames; no tap sees them."""
        now = self.clock()
        try:
            for run in runs:
                self._publish_run(run, now)
        finally:
            self.broker.flush()

    def _publish_run(self, run: FrameRun, now: float) -> None:
        broker, metrics = self.broker, self.broker.metrics
        lane = self._lanes[run.protocol_version == ProtocolVersion.MQTT_5_0]
        before = [getattr(metrics, name) for name in OF_NETWORK_CLIENTS]
        frames, pos = run.frames, 0
        while (pos := lane.handle(frames, pos, now)) < len(frames):
            # The full path takes one frame; the lane knows its topic from then on.
            frame = first_frame(frames, pos)
            one = FrameRun(frame, 1, run.qos, run.protocol_version, run.client_id, run.published_at)
            message = read_run(one)[0]
            audience = broker.audience(message.topic_name, "", tapped=False)
            broker.sender.deliver(message, audience, now)
            lane.learn(message.topic_name, audience)
            pos += len(frame)
        for name, value in zip(OF_NETWORK_CLIENTS, before, strict=True):
            setattr(metrics, name, value)
        metrics.messages_local += run.count
        lane.session.received.clear()
        lane.outbox.held.clear()
        lane.outbox.held_acks = 0
        lane.outbox.frames.clear()
        lane.outbox.touched.clear()
        lane.outbox.room = lane.outbox.limit

    def publish_missed(self, messages: Iterable[Message]) -> None:
        """Deliver what was published elsewhere while this node was away."""
        broker, now = self.broker, self.clock()
        resumed = broker.journal.resumed
        for message in messages:
            if not message.qos:
                continue
            broker.metrics.messages_local += 1
            audience = broker.audience(message.topic_name, message.client_id, tapped=False)
            encodings: Encodings = {}
            for member in audience.members:
                if member.qos and 0 < member.session.number <= resumed:
                    retain = message.retain and member.retain_as_published
                    qos = min(message.qos, member.qos)
                    delivery = Delivery(message, qos, retain, member.subscription_identifiers)
                    broker.sender.send(member.session, delivery, encodings, now)
            for group in audience.groups:
                if 0 < group.number <= resumed:
                    broker.sender.share(group, message, encodings, now)
        broker.flush()

    def publish_to_groups(self, messages: Iterable[Message], names: Collection[str]) -> None:
        """Deliver to share groups of this node, and to nobody else."""
        broker, now = self.broker, self.clock()
        for message in messages:
            broker.metrics.messages_local += 1
            encodings: Encodings = {}
            for name in names:
                if (group := broker.shares.groups.get(name)) is not None:
                    broker.shares.hand_out(group, message, encodings, now)
        broker.flush()

    def set_retained(self, message: Message) -> None:
        """Replace or remove a retained message; nobody is told."""
        self.broker.inbound.retain(message, waits=True)
        self.broker.flush()

    def has_room(self, *, tapped: bool = False) -> bool:
        """Say whether the journal, and the taps where they are to see it, can take more."""
        return not self.broker.journal.full and not (tapped and self.broker.stopped)

    def when_room(self, callback: Callable[[], None], *, tapped: bool = False) -> None:
        """Call `callback` once, when there is room."""
        if self.has_room(tapped=tapped):
            callback()
        else:
            self.broker.metrics.publishers_paused += 1
            self._want_room.append((callback, tapped))

    def when_kept(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the store has all that was published and retained up to now."""
        journal = self.broker.journal
        number = journal.number if journal.dirty else journal.number - 1
        if number <= journal.done_number:
            callback()
        else:
            self._want_kept.append((number, callback))

    def _look(self) -> None:
        while self._want_kept and self._want_kept[0][0] <= self.broker.journal.done_number:
            self._want_kept.popleft()[1]()
        if self._want_room:
            waiting, self._want_room = self._want_room, []
            while waiting and self.has_room(
                tapped=waiting[0][1]
            ):  # one that fills it queues behind those still waiting
                waiting.pop(0)[0]()
            self._want_room = waiting + self._want_room
