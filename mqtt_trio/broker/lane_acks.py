"""The fast lane's part for PUBACK, PUBREC, PUBREL and PUBCOMP of two bytes: success, without properties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mqtt_trio.broker.journal import RELEASED as RELEASED_FLAG
from mqtt_trio.broker.session import RELEASED, Released, number_of, qos_of
from mqtt_trio.protocol.wire import PACKET_IDS

if TYPE_CHECKING:
    from mqtt_trio.broker.fast_lane import FastLane

PUBACK: Final = b"\x40\x02"
PUBREC: Final = b"\x50\x02"
PUBREL: Final = b"\x62\x02"
PUBCOMP: Final = b"\x70\x02"


def take_acks(lane: FastLane, data: bytes, pos: int, end: int) -> int:
    """Handle acknowledgements that lie side by side; return where the first one begins that is not the lane's.

    Those are the ones with an id that is unknown or in another state, and those that free a slot for which something
    waits.
    """
    session = lane.session
    inflight, received, kept = session.inflight, session.received, session.received_kept
    journal = lane.broker.journal
    waiting = session.waiting
    start = pos
    replies: list[bytes] = []
    waits: list[bytes] = []
    while end - pos >= 4 and data[pos + 1] == 2:
        first = data[pos]
        packet_id = data[pos + 2] << 8 | data[pos + 3]
        if first == 0x40:  # PUBACK
            entry = inflight.get(packet_id)
            if waiting or entry is None or (entry[0][0] != 0x32 if type(entry) is tuple else qos_of(entry) != 1):
                break
            del inflight[packet_id]
            if number := number_of(entry):
                journal.done(number)
        elif first == 0x50:  # PUBREC
            entry = inflight.get(packet_id)
            if entry is None or session.resending or qos_of(entry) != 2:
                break
            if number := number_of(entry):
                inflight[packet_id] = Released(number)
                journal.move(number, session.number, packet_id, 2 | RELEASED_FLAG)
                waits.append(PUBREL + PACKET_IDS[packet_id])
            else:
                inflight[packet_id] = RELEASED
                replies += (PUBREL, PACKET_IDS[packet_id])
        elif first == 0x62:  # PUBREL
            if packet_id not in received:
                break
            received.remove(packet_id)
            if session.carried:
                session.carried.discard(packet_id)
            if packet_id in kept:
                lane.broker.keeper.freed(session, packet_id)
                waits.append(PUBCOMP + PACKET_IDS[packet_id])
            else:
                replies += (PUBCOMP, PACKET_IDS[packet_id])
        elif first == 0x70:  # PUBCOMP
            entry = inflight.get(packet_id)
            if waiting or not isinstance(entry, Released):
                break
            del inflight[packet_id]
            if entry.number:
                journal.done(entry.number)
        else:
            break
        pos += 4
    metrics = lane.broker.metrics
    metrics.packets_received += (pos - start) >> 2
    if waits:
        journal.hold(lane.outbox).frames += waits
    if replies:
        lane.outbox.put(b"".join(replies))
        metrics.packets_sent += len(replies) >> 1
    return pos
