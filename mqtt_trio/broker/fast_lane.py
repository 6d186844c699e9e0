"""The fast lane: PUBLISH and its acknowledgements, handled on their bytes. QoS 0 is here, the rest in `lane_*`.

It takes whole packets from the start of what was read as long as it recognises them at a glance and hands over to
the full path at the first one that it does not. What it does is what the full path would have done, byte for byte
(tests/broker/test_fast_lane.py feeds both the same streams). One loop, kept apart from the usual limits on length:
a call per packet would cost as much as the packet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from mqtt_trio.broker.audience import Audience
from mqtt_trio.broker.events import MessageDropped
from mqtt_trio.broker.lane_acks import take_acks
from mqtt_trio.broker.lane_frames import split_run, topic_of, translate_run
from mqtt_trio.broker.lane_properties import BLOCK_SIZE, BLOCKS, FAILURES, is_forwardable
from mqtt_trio.broker.lane_publish import take_publishes
from mqtt_trio.broker.session import Session
from mqtt_trio.broker.tap import FrameRun
from mqtt_trio.protocol.codes import ProtocolVersion

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker
    from mqtt_trio.broker.outbox import Outbox

ROUTES_PER_CLIENT: Final = 4096
"""Topics in one client's route cache; a client with more starts its cache again."""
ROUTE_SIZE: Final = 512
"""Bytes of the longest Topic Name that is put there; longer ones always go the full path."""


class FastLane:
    """The fast lane of one connected client."""

    __slots__ = (
        "broker",
        "failures",
        "generation",
        "maximum_packet_size",
        "outbox",
        "routes",
        "session",
        "v5",
        "version",
    )

    def __init__(self, broker: Broker, session: Session, outbox: Outbox) -> None:
        self.broker = broker
        self.session = session
        self.outbox = outbox
        self.v5 = outbox.protocol_version == 5
        self.version = ProtocolVersion.MQTT_5_0 if self.v5 else ProtocolVersion.MQTT_3_1_1
        self.maximum_packet_size = broker.limits.maximum_packet_size
        self.routes: dict[bytes, Audience] = {}
        self.generation = broker.router.generation
        self.failures = 0
        """Property blocks in a row that the lane could not take."""

    def learn(self, topic_name: str, audience: Audience) -> None:
        """Remember where the full path, after all its checks, delivered a message of this client to."""
        name = topic_name.encode()
        if len(name) > ROUTE_SIZE:
            return
        if len(self.routes) >= ROUTES_PER_CLIENT:
            self.routes.clear()
        self.routes[name] = audience

    def handle(self, data: bytes, pos: int, now: float) -> int:
        """Handle packets of `data` from `pos` on; return where the first one begins that is left to the full path."""
        broker = self.broker
        routes = self.routes
        if self.generation != broker.router.generation:
            self.generation = broker.router.generation
            routes.clear()
        v5 = self.v5
        end = len(data)
        run: Audience | None = None
        start = count = total = 0
        prefix = b""
        while end - pos >= 4:
            if run is not None and data.startswith(prefix, pos) and pos + total <= end:
                # Same length, topic and properties as the frame before: nothing else to look at.
                pos += total
                count += 1
                continue
            first = data[pos]
            if first != 0x30:
                if run is not None:
                    self._close_run(data, run, start, pos, count, now)
                    run = None
                if first == 0x32 or first == 0x34:
                    stop = take_publishes(self, data, pos, end, now)
                elif first == 0x40 or first == 0x50 or first == 0x62 or first == 0x70:
                    stop = take_acks(self, data, pos, end)
                else:
                    break
                if stop == pos:
                    break
                pos = stop
                if self.outbox.session is None:
                    break  # a refusal ended the client: bytes behind an end are ignored
                continue
            length = data[pos + 1]
            body = pos + 2
            if length > 127:
                # Two or three bytes cover what a read can hold; minimal encodings only [MQTT5-1.5.5-1].
                second = data[pos + 2]
                if second < 128:
                    if not second:
                        break
                    length = (length & 127) | second << 7
                    body = pos + 3
                else:
                    third = data[pos + 3]
                    if third > 127 or not third:
                        break
                    length = (length & 127) | (second & 127) << 7 | third << 14
                    body = pos + 4
                if length + body - pos > self.maximum_packet_size:
                    break
            stop = body + length
            if stop > end or length < 2:
                break
            at = body + 2 + (data[body] << 8 | data[body + 1])
            if at + v5 > stop:
                break
            audience = routes.get(data[body + 2 : at])
            if audience is None or not audience.valid:
                break
            behind = at
            if v5:
                behind = at + 1 if not data[at] else self.behind_block(data, at, stop)
                if not behind:
                    break
            if audience is not run:
                if run is not None:
                    self._close_run(data, run, start, pos, count, now)
                run, start, count = audience, pos, 0
                if audience.groups:  # a group chooses for each message, behind the copies of the others
                    run = None
                    self._close_run(data, audience, pos, stop, 1, now)
                    pos = stop
                    continue
            count += 1
            total = stop - pos
            prefix = data[pos:behind]
            pos = stop
        if run is not None:
            self._close_run(data, run, start, pos, count, now)
        return pos

    def behind_block(self, data: bytes, at: int, stop: int) -> int:
        """Where a property block of one byte or more, at `at` of a frame that ends at `stop`, ends itself; 0 when it
        is not to be forwarded as it is."""
        size = data[at]
        behind = at + 1 + size
        if size > 127:
            if at + 1 >= stop or not 0 < data[at + 1] < 128:
                return 0
            behind = at + 2 + (size & 127 | data[at + 1] << 7)
        if behind > stop:
            return 0
        block = data[at:behind]
        known = self.broker.property_blocks
        if block in known:
            return behind
        if self.failures >= FAILURES and self.failures % 64:
            self.failures += 1  # a client that uses Topic Aliases or expiry uses them every time
            return 0
        if not is_forwardable(block):
            self.failures += 1
            return 0
        self.failures = 0
        if len(block) <= BLOCK_SIZE:
            if len(known) >= BLOCKS:
                known.clear()
            known.add(block)
        return behind

    def _close_run(self, data: bytes, audience: Audience, start: int, stop: int, count: int, now: float) -> None:
        """Deliver `count` QoS 0 frames that lie side by side and go to the same audience."""
        frames = data if start == 0 and stop == len(data) else data[start:stop]
        size = stop - start
        broker = self.broker
        metrics = broker.metrics
        touched = broker.touched
        metrics.packets_received += count
        metrics.messages_received_qos0 += count
        metrics.fast_lane_messages += count
        sent = 0
        for outbox in audience.slices[self.v5]:
            if outbox.room < size:
                self._offer(split_run(frames), outbox, now)
                continue
            if not outbox.frames:
                touched.append(outbox)
            outbox.frames.append(frames)
            outbox.room -= size
            sent += count
        metrics.messages_sent_qos0 += sent
        others = audience.slices[not self.v5]
        if others:
            translated = translate_run(frames, self.v5)
            for outbox in others:
                self._offer(translated, outbox, now)
        if audience.singly or audience.taps or audience.groups:
            run = FrameRun(frames, count, 0, self.version, self.session.client_id, now + broker.wall_offset)
            for tap in audience.taps:  # first: one of them may know on which node a group gets it
                tap.take_run(run)
            if audience.singly or audience.groups:
                broker.sender.deliver_singly(run, audience.singly, audience.groups, now)

    def _offer(self, frames: Iterable[bytes], outbox: Outbox, now: float) -> None:
        """Offer QoS 0 frames one by one: what does not fit is dropped whole, and counted."""
        refused = []
        sent = 0
        for frame in frames:
            if outbox.offer(frame):
                sent += 1
            else:
                refused.append(frame)
        self.broker.metrics.messages_sent_qos0 += sent
        if refused:
            self.dropped(refused, outbox, now)

    def dropped(self, frames: Sequence[bytes], outbox: Outbox, now: float) -> None:
        """Count QoS 0 frames that an outbox had no room for; one event stands for all of them."""
        broker = self.broker
        broker.metrics.dropped_outbox_full += len(frames)
        broker.emit(
            MessageDropped(
                at=now + broker.wall_offset,
                reason="outbox_full",
                topic_name=topic_of(frames[0]),
                client_id=outbox.session.client_id if outbox.session is not None else "",
                count=len(frames),
            )
        )
