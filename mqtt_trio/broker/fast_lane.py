"""The fast lane: PUBLISH at QoS 0 and 1 and PUBACK, handled on their bytes.

It takes whole packets from the start of what was read as long as it recognises them at a glance and hands over to
the full path at the first one that it does not. What it does is what the full path would have done, byte for byte
(tests/broker/test_fast_lane.py feeds both the same streams). One loop, kept apart from the usual limits on length:
a call per packet would cost as much as the packet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mqtt_trio.broker.audience import Audience
from mqtt_trio.broker.session import Session
from mqtt_trio.broker.tap import FrameRun, Hold, Refused
from mqtt_trio.protocol.codes import ProtocolVersion

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker
    from mqtt_trio.broker.outbox import Outbox

PACKET_IDS: Final = tuple(number.to_bytes(2, "big") for number in range(65_536))
ROUTES_PER_CLIENT: Final = 4096
"""Topics in one client's route cache; a client with more starts its cache again."""


class FastLane:
    """The fast lane of one connected client."""

    __slots__ = ("broker", "generation", "maximum_packet_size", "outbox", "routes", "session", "v5", "version")

    def __init__(self, broker: Broker, session: Session, outbox: Outbox) -> None:
        self.broker = broker
        self.session = session
        self.outbox = outbox
        self.v5 = outbox.protocol_version == 5
        self.version = ProtocolVersion.MQTT_5_0 if self.v5 else ProtocolVersion.MQTT_3_1_1
        self.maximum_packet_size = broker.limits.maximum_packet_size
        self.routes: dict[bytes, Audience] = {}
        self.generation = broker.router.generation

    def learn(self, topic_name: str, audience: Audience) -> None:
        """Remember where the full path, after all its checks, delivered a message of this client to."""
        if len(self.routes) >= ROUTES_PER_CLIENT:
            self.routes.clear()
        self.routes[topic_name.encode()] = audience

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
                # Same length, same topic as the frame before: nothing else to look at.
                pos += total
                count += 1
                continue
            first = data[pos]
            if first != 0x30:
                if run is not None:
                    self._close_run(data, run, start, pos, count, now)
                    run = None
                if first == 0x40:
                    stop = self._pubacks(data, pos, end)
                elif first == 0x32:
                    stop = self._publishes(data, pos, end, now)
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
            if at > stop or (v5 and (at == stop or data[at])):
                break
            audience = routes.get(data[body + 2 : at])
            if audience is None or not audience.valid:
                break
            if audience is not run:
                if run is not None:
                    self._close_run(data, run, start, pos, count, now)
                run, start, count = audience, pos, 0
            count += 1
            total = stop - pos
            prefix = data[pos : at + 1] if v5 else data[pos:at]
            pos = stop
        if run is not None:
            self._close_run(data, run, start, pos, count, now)
        return pos

    def _pubacks(self, data: bytes, pos: int, end: int) -> int:
        """Free the slots of QoS 1 deliveries; stop where the full path has more to do than that."""
        session = self.session
        if session.queue:
            return pos
        inflight = session.inflight
        start = pos
        while end - pos >= 4 and data[pos] == 0x40 and data[pos + 1] == 2:
            packet_id = data[pos + 2] << 8 | data[pos + 3]
            if type(inflight.get(packet_id)) is not tuple:
                break
            del inflight[packet_id]
            pos += 4
        self.broker.metrics.packets_received += (pos - start) >> 2
        return pos

    def _publishes(self, data: bytes, pos: int, end: int, now: float) -> int:
        """Deliver and acknowledge QoS 1 PUBLISH packets that lie side by side; stop where the full path must."""
        broker, session, mine, v5 = self.broker, self.session, self.outbox, self.v5
        touched = broker.touched
        head, offset, total, version = b"", 0, 0, 5 if v5 else 4
        audience: Audience | None = None
        count = sent = 0
        while not (broker.stopped or session.acks or session.received):
            if audience is None or pos + total > end or not data.startswith(head, pos):
                found = self._measure(data, pos, end)
                if found is None:
                    break
                offset, total, audience = found
                head = data[pos : pos + offset]
            at, stop = pos + offset, pos + total
            packet_id = data[at : at + 2]
            if packet_id == b"\0\0" or (v5 and data[at + 2]) or not _ready(audience, total):
                break
            answers: list[Hold | Refused] | None = None
            if audience.taps:
                run = FrameRun(data[pos:stop], 1, 1, self.version, session.client_id, now + broker.wall_offset)
                answers = broker.show_run(audience.taps, run)
            pos = stop
            count += 1
            if answers and broker.refused(session, 1, int.from_bytes(packet_id, "big"), answers):
                if mine.session is None:
                    break  # that ended a 3.x client
                continue
            tail = data[at + 2 : stop]
            entry = (head, tail, version)
            for receiver in audience.acknowledged:
                outbound = receiver.next_id
                receiver.next_id = outbound + 1 if outbound < 65_535 else 1
                receiver.inflight[outbound] = entry
                outbox: Outbox = receiver.outbox  # type: ignore[assignment]  # `uniform`: nobody here is offline
                frames = outbox.frames
                if not frames:
                    touched.append(outbox)
                frames += (head, PACKET_IDS[outbound], tail)
                outbox.room -= total
                sent += 1
            if audience.at_most_once:
                self._send_at_most_once(_as_qos0(head, tail), audience.at_most_once)
            if answers:
                broker.acknowledge_later(session, 1, int.from_bytes(packet_id, "big"), answers)
            else:
                mine.put(b"\x40\x02" + packet_id)
                broker.metrics.packets_sent += 1
        metrics = broker.metrics
        metrics.packets_received += count
        metrics.messages_received_qos1 += count
        metrics.fast_lane_messages += count
        metrics.messages_sent_qos1 += sent
        return pos

    def _measure(self, data: bytes, pos: int, end: int) -> tuple[int, int, Audience] | None:
        """Look at one QoS 1 PUBLISH: bytes before its Packet Identifier, bytes of it all, and whom it reaches."""
        if end - pos < 7 or data[pos] != 0x32:
            return None
        body, length = _body_of(data, pos)
        stop = body + length
        # Minimal encodings only [MQTT5-1.5.5-1]; the last byte of a longer one is 0 or 128 and more.
        if stop > end or length < 5 or (body - pos > 2 and not 0 < data[body - 1] < 128):
            return None
        if stop - pos > self.maximum_packet_size:
            return None
        at = body + 2 + (data[body] << 8 | data[body + 1])
        if at + 2 + self.v5 > stop:
            return None
        audience = self.routes.get(data[body + 2 : at])
        if audience is None or not audience.valid or not audience.uniform[self.v5]:
            return None
        return at - pos, stop - pos, audience

    def _send_at_most_once(self, frame: bytes, outboxes: tuple[Outbox, ...]) -> None:
        metrics = self.broker.metrics
        for outbox in outboxes:
            if outbox.offer(frame):
                metrics.messages_sent_qos0 += 1
            else:
                metrics.dropped_outbox_full += 1

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
                self._offer_singly(split_run(frames), outbox)
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
                self._offer_singly(translated, outbox)
        if audience.singly or audience.taps:
            run = FrameRun(frames, count, 0, self.version, self.session.client_id, now + broker.wall_offset)
            if audience.singly:
                broker.deliver_singly(run, audience.singly, now)
            for tap in audience.taps:
                tap.take_run(run)

    def _offer_singly(self, frames: list[bytes], outbox: Outbox) -> None:
        """Offer frames one by one: what does not fit is dropped whole, and counted."""
        metrics = self.broker.metrics
        for frame in frames:
            if outbox.offer(frame):
                metrics.messages_sent_qos0 += 1
            else:
                metrics.dropped_outbox_full += 1


def _ready(audience: Audience, size: int) -> bool:
    """Whether every receiver at QoS 1 can be sent `size` bytes now: no queue, a free slot, a free id, room."""
    for session in audience.acknowledged:
        if (
            session.queue
            or session.resending
            or len(session.inflight) >= session.send_maximum
            or session.next_id in session.inflight
            or session.outbox.room < size  # type: ignore[union-attr]
        ):
            return False
    return True


def _as_qos0(head: bytes, tail: bytes) -> bytes:
    """Write a QoS 1 frame, given without its Packet Identifier, at QoS 0."""
    body, length = _body_of(head, 0)
    return b"".join((_head_qos0(length - 2), head[body:], tail))


def _remaining_length(length: int) -> bytes:
    """Encode a Remaining Length of up to three bytes (the fast lane's largest)."""
    if length < 128:
        return bytes((length,))
    if length < 16_384:
        return bytes((length & 127 | 128, length >> 7))
    return bytes((length & 127 | 128, length >> 7 & 127 | 128, length >> 14))


def _head_qos0(length: int) -> bytes:
    """Fixed header of a QoS 0 PUBLISH with `length` bytes behind it."""
    return b"\x30" + _remaining_length(length)


def first_frame(frames: bytes, pos: int) -> bytes:
    """Return the frame of a run that begins at `pos`."""
    body, length = _body_of(frames, pos)
    return frames[pos : body + length]


def split_run(frames: bytes) -> list[bytes]:
    """Cut a run into its frames."""
    found = []
    pos, end = 0, len(frames)
    while pos < end:
        body, length = _body_of(frames, pos)
        found.append(frames[pos : body + length])
        pos = body + length
    return found


def translate_run(frames: bytes, from_v5: bool) -> list[bytes]:
    """Write QoS 0 frames of one version in the other: only the empty Property Length stands between them."""
    found = []
    pos, end = 0, len(frames)
    while pos < end:
        body, length = _body_of(frames, pos)
        at = body + 2 + (frames[body] << 8 | frames[body + 1])
        stop = body + length
        if from_v5:
            found.append(b"".join((_head_qos0(length - 1), frames[body:at], frames[at + 1 : stop])))
        else:
            found.append(b"".join((_head_qos0(length + 1), frames[body:at], b"\0", frames[at:stop])))
        pos = stop
    return found


def _body_of(frames: bytes, pos: int) -> tuple[int, int]:
    """Return where the body of the frame at `pos` begins and its length (a frame that the lane has measured)."""
    length = frames[pos + 1]
    if length < 128:
        return pos + 2, length
    second = frames[pos + 2]
    if second < 128:
        return pos + 3, (length & 127) | second << 7
    return pos + 4, (length & 127) | (second & 127) << 7 | frames[pos + 3] << 14
