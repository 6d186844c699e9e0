"""The fast lane's part for PUBLISH at QoS 1 and 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from mqtt_trio.broker.audience import Audience, Fan, Member
from mqtt_trio.broker.journal import SHARED_SIZE, Tail
from mqtt_trio.broker.lane_acks import PUBACK, PUBREC
from mqtt_trio.broker.lane_frames import body_of, head_at
from mqtt_trio.broker.outbox import Outbox
from mqtt_trio.broker.session import FastDelivery, Session
from mqtt_trio.broker.tap import FrameRun, Hold, Refused
from mqtt_trio.protocol.wire import PACKET_IDS

if TYPE_CHECKING:
    from mqtt_trio.broker.fast_lane import FastLane

NOBODY: Final = Fan((), (), (), ())

Copy: TypeAlias = tuple[int, bytes, bytes, int, bytes, tuple[Session, ...]]
"""A frame written anew for some: QoS, what stands before the Packet Identifier, what takes the place of the first bytes
behind it, how many these are, what stands before the Packet Identifier in the publisher's version, for whom."""


def take_publishes(lane: FastLane, data: bytes, pos: int, end: int, now: float) -> int:
    """Deliver and acknowledge PUBLISH packets of one QoS that lie side by side; return where the first one begins that
    is left to the full path. Per packet it does what `Inbound.publish` and `Sender.deliver` do, in their order."""
    broker, session, mine, v5 = lane.broker, lane.session, lane.outbox, lane.v5
    touched, received, acks, journal = broker.touched, session.received, session.acks, broker.journal
    limit = broker.limits.receive_maximum
    if journal.failing is not None:
        return pos  # who gets a negative answer is for the full path to say
    first = data[pos]
    qos = first >> 1 & 3
    answer = PUBACK if qos == 1 else PUBREC
    kind = qos * 2 - 2 + v5
    head, block, offset, total, version = b"", b"", 0, 0, 5 if v5 else 4
    audience: Audience | None = None
    fan = NOBODY
    copies: list[Copy] | None = None
    count = sent = replied = 0
    # Where this sum reaches Receive Maximum, the full path counts more exactly and knows what follows.
    while end - pos >= 7 and not broker.stopped and len(received) + len(acks) + mine.held_acks < limit:
        if audience is None or pos + total > end or not data.startswith(head, pos):
            found = _measure(lane, data, pos, end, first)
            if found is None:
                break
            offset, total, audience = found
            head = data[pos : pos + offset]
            fan = audience.fans[kind] or audience.fan(kind)
            block, copies = b"", None
        at, stop = pos + offset, pos + total
        number = data[at] << 8 | data[at + 1]
        if not number or (qos == 2 and number in received):
            break
        at += 2
        if v5:
            if data[at]:
                if not (block and data.startswith(block, at)):
                    behind = lane.behind_block(data, at, stop)
                    if not behind:
                        break
                    block, copies = data[at:behind], None
            elif block:
                block, copies = b"", None
        run: FrameRun | None = None
        answers: list[Hold | Refused] | None = None
        if audience.taps:
            run = FrameRun(data[pos:stop], 1, qos, lane.version, session.client_id, now + broker.wall_offset)
            answers = broker.show_run(audience.taps, run)
        start, pos = pos, stop
        count += 1
        if answers and broker.refused(session, qos, number, answers):
            if mine.session is None:
                break  # that ended a 3.x client
            continue
        if qos == 2:
            received.add(number)  # [MQTT5-4.3.3-10]
        tail = data[at:stop]
        entry = (head, tail, version, 0)
        before = journal.last_number
        late: list[Member] | None = None
        for receiver in fan.same:
            outbound, inflight = receiver.next_id, receiver.inflight
            outbox: Outbox = receiver.outbox  # type: ignore[assignment]  # nobody in `same` is offline
            if (
                receiver.queue
                or receiver.resending
                or receiver.bursts
                or len(inflight) >= receiver.send_maximum
                or outbound in inflight
                or outbox.room < total
                or outbox.held_size  # frames wait that count, too
            ):
                late = late or []
                late.append(Member(receiver, qos, False, ()))
                continue
            receiver.next_id = outbound + 1 if outbound < 65_535 else 1
            inflight[outbound] = entry
            frames = outbox.frames
            if not frames:
                touched.append(outbox)
            frames += (head, PACKET_IDS[outbound], tail)
            outbox.room -= total
            sent += 1
        if fan.kept:
            late, out = _send_kept(lane, fan.kept, entry, data[start:stop], late, now)
            sent += out
        if fan.rest:
            if copies is None:
                copies = _copies(fan, head, block, v5)
            late = _send_copies(lane, copies, tail, late, now)
        if late or fan.apart or audience.groups:
            if run is None:
                run = FrameRun(data[start:stop], 1, qos, lane.version, session.client_id, now + broker.wall_offset)
            broker.sender.deliver_singly(run, (*(late or ()), *fan.apart), audience.groups, now, gated=fan.gated)
        if journal.last_number != before:
            if not answers and not acks:
                if qos == 2 and session.number:
                    broker.keeper.received(session, number)
                journal.hold(mine).acks.append((qos, number, before, journal.last_number))
                mine.held_acks += qos == 1
                continue
            broker.acknowledge_later(session, qos, number, answers or (), (before, journal.last_number))
            if mine.session is None:
                break
            continue
        if answers or acks or (mine.held and mine.answers_wait):
            broker.acknowledge_later(session, qos, number, answers or (), None)
            if mine.session is None:
                break  # a Hold that was released as refused before we came ended a 3.x client
            continue
        frames = mine.frames
        if not frames:
            touched.append(mine)
        frames += (answer, PACKET_IDS[number])
        mine.room -= 4
        replied += 1
    metrics = broker.metrics
    metrics.packets_received += count
    metrics.packets_sent += replied
    metrics.fast_lane_messages += count
    if qos == 1:
        metrics.messages_received_qos1 += count
        metrics.messages_sent_qos1 += sent
    else:
        metrics.messages_received_qos2 += count
        metrics.messages_sent_qos2 += sent
    return pos


def _send_kept(
    lane: FastLane,
    sessions: tuple[Session, ...],
    entry: FastDelivery,
    frame: bytes,
    late: list[Member] | None,
    now: float,
) -> tuple[list[Member] | None, int]:
    """Send a message to sessions that the store has, at QoS 2 once it has the delivery; add whoever must wait to `late`
    and return it with how many it went to."""
    journal = lane.broker.journal
    head, behind, version, _ = entry
    qos, size = head[0] >> 1 & 3, len(frame)
    row: Tail | None = None
    sent = 0
    for receiver in sessions:
        outbound, inflight = receiver.next_id, receiver.inflight
        outbox: Outbox = receiver.outbox  # type: ignore[assignment]  # nobody here is offline
        if (
            receiver.queue
            or receiver.resending
            or receiver.bursts
            or len(inflight) >= receiver.send_maximum
            or outbound in inflight
            or outbox.room - outbox.held_size < size
        ):
            late = late or []
            late.append(Member(receiver, qos, False, ()))
            continue
        if row is None:
            content = journal.share(frame) if len(sessions) > 1 and size > SHARED_SIZE else 0
            row = (qos, None, version, now + lane.broker.wall_offset, content, None if content else frame)
        receiver.next_id = outbound + 1 if outbound < 65_535 else 1
        inflight[outbound] = (head, behind, version, journal.append(receiver.number, outbound, row))
        if qos == 2:
            journal.hold(outbox).publishes[outbound] = b"".join((head, PACKET_IDS[outbound], behind))
            outbox.held_size += size
        else:
            if not outbox.frames:
                lane.broker.touched.append(outbox)
            outbox.frames += (head, PACKET_IDS[outbound], behind)
            outbox.room -= size
        sent += 1
    return late, sent


def _measure(lane: FastLane, data: bytes, pos: int, end: int, first: int) -> tuple[int, int, Audience] | None:
    """Look at one PUBLISH that begins with `first`, given its first seven bytes at least: bytes before its Packet
    Identifier, bytes of it all, and whom it reaches."""
    if data[pos] != first:
        return None
    body, length = body_of(data, pos)
    stop = body + length
    # Minimal encodings only [MQTT5-1.5.5-1]; the last byte of a longer one is 0 or 128 and more.
    if stop > end or length < 5 or (body - pos > 2 and not 0 < data[body - 1] < 128):
        return None
    if stop - pos > lane.maximum_packet_size:
        return None
    at = body + 2 + (data[body] << 8 | data[body + 1])
    if at + 2 + lane.v5 > stop:
        return None
    audience = lane.routes.get(data[body + 2 : at])
    if audience is None or not audience.valid:
        return None
    return at - pos, stop - pos, audience


def _copies(fan: Fan, head: bytes, block: bytes, v5: bool) -> list[Copy]:
    """Prepare the copies that differ from the frame: 3.x has no property block, in 5.0 an empty one takes its place."""
    copies = []
    for to_v5, qos, sessions in fan.rest:
        put, cut = (b"", 0) if to_v5 == v5 else (b"\0", 0) if to_v5 else (b"", len(block) or 1)
        copies.append((qos, head_at(head, qos, len(put) - cut), put, cut, head_at(head, qos, 0), sessions))
    return copies


def _send_copies(
    lane: FastLane, copies: list[Copy], tail: bytes, late: list[Member] | None, now: float
) -> list[Member] | None:
    """Send prepared copies of one message; add whoever must wait for its copy to `late`."""
    metrics, version = lane.broker.metrics, 5 if lane.v5 else 4
    for qos, head, put, cut, kept, sessions in copies:
        behind = put + tail[cut:]
        entry = (kept, tail, version, 0)  # with all properties: the next connection may be of another version
        frame = b"" if qos else head + behind
        size = len(head) + 2 + len(behind)
        sent = 0
        for receiver in sessions:
            outbox: Outbox = receiver.outbox  # type: ignore[assignment]  # nobody here is offline
            outbound, inflight = receiver.next_id, receiver.inflight
            if not qos:
                if outbox.offer(frame):
                    sent += 1
                else:
                    lane.dropped((frame,), outbox, now)
            elif (
                receiver.queue
                or receiver.resending
                or receiver.bursts
                or len(inflight) >= receiver.send_maximum
                or outbound in inflight
                or outbox.room < size
                or outbox.held_size
            ):
                late = late or []
                late.append(Member(receiver, qos, False, ()))
            else:
                receiver.next_id = outbound + 1 if outbound < 65_535 else 1
                inflight[outbound] = entry
                outbox.put(b"".join((head, PACKET_IDS[outbound], behind)))
                sent += 1
        if qos == 0:
            metrics.messages_sent_qos0 += sent
        elif qos == 1:
            metrics.messages_sent_qos1 += sent
        else:
            metrics.messages_sent_qos2 += sent
    return late
