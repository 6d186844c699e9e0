"""That the simulation bites: histories that were spoiled, and brokers that were."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio.testing

from mqtt_trio.broker.connections import Connections
from mqtt_trio.broker.delivery import Sender
from mqtt_trio.broker.inbound import Inbound
from mqtt_trio.broker.session import RELEASED, Delivery, Session
from tests.simulation.history import Delivery as Handed
from tests.simulation.history import History, Interest
from tests.simulation.oracle import effective_qos, judge
from tests.simulation.play import explain, play, play_on_trio

# Histories


def sound(clock: trio.testing.MockClock) -> History:
    """Return a history with nothing wrong in it."""
    history = play(clock, 4).history
    assert judge(history) == []
    return history


def flow_of(history: History, qos: int) -> tuple[Interest, list[Handed]]:
    """Return deliveries of one publisher to one topic at a QoS, each message once, and who got them."""
    for interest in history.interests.values():
        flows: dict[object, dict[bytes, Handed]] = {}
        for delivery in interest.deliveries:
            message = history.by_payload[delivery.payload]
            if delivery.qos == qos and effective_qos(message, interest) == qos:
                flows.setdefault(message.flow, {}).setdefault(delivery.payload, delivery)
        for flow in flows.values():
            if len(flow) > 3:
                return interest, list(flow.values())
    raise AssertionError("this seed has no such flow; take another one")


def index(interest: Interest, delivery: Handed) -> int:
    """Where a delivery is, which may have an equal one."""
    return next(n for n, other in enumerate(interest.deliveries) if other is delivery)


def lose(interest: Interest, flow: list[Handed]) -> None:
    interest.deliveries[:] = [d for d in interest.deliveries if d.payload != flow[1].payload]


def double(interest: Interest, flow: list[Handed]) -> None:
    interest.deliveries.append(flow[1])


def swap(interest: Interest, flow: list[Handed]) -> None:
    first, second = index(interest, flow[1]), index(interest, flow[2])
    deliveries = interest.deliveries
    deliveries[first], deliveries[second] = deliveries[second], deliveries[first]


def forge(interest: Interest, flow: list[Handed]) -> None:
    interest.deliveries.append(attrs.evolve(flow[1], payload=flow[1].payload + b"?"))


def come_early(interest: Interest, flow: list[Handed]) -> None:
    interest.deliveries[index(interest, flow[1])] = attrs.evolve(flow[1], at=-1.0)


def misdirect(interest: Interest, flow: list[Handed]) -> None:
    interest.deliveries[index(interest, flow[1])] = attrs.evolve(flow[1], topic_name="t/elsewhere")


def lower(interest: Interest, flow: list[Handed]) -> None:
    interest.deliveries[index(interest, flow[1])] = attrs.evolve(flow[1], qos=0)


def leave(interest: Interest, flow: list[Handed]) -> None:
    for spans in interest.spans.values():
        for span in spans:
            span.must_until = span.may_until = 0.0


def repeat(interest: Interest, flow: list[Handed]) -> None:
    interest.first_sent[flow[1].payload] += 50


SPOILED: dict[str, tuple[Callable[[Interest, list[Handed]], None], str]] = {
    "lost": (lose, "lost"),
    "doubled": (double, "duplicate"),
    "swapped": (swap, "order"),
    "forged": (forge, "forged"),
    "before it was sent": (come_early, "forged"),
    "on another topic": (misdirect, "altered"),
    "at a lower QoS": (lower, "altered"),
    "without a subscription": (leave, "unwanted"),
    "sent as new too often": (repeat, "repeated"),
}


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("name", SPOILED)
async def test_the_oracle_reports_a_spoiled_history(name: str, qos: int, mock_clock: trio.testing.MockClock) -> None:
    spoil, kind = SPOILED[name]
    history = sound(mock_clock)
    interest, flow = flow_of(history, qos)
    spoil(interest, flow)
    kinds = {violation.kind for violation in judge(history)}
    if name == "doubled" and qos == 1:
        assert kinds == set()  # at least once
    else:
        assert kind in kinds


async def test_the_oracle_reports_what_a_publisher_waits_for(mock_clock: trio.testing.MockClock) -> None:
    history = sound(mock_clock)
    message = next(message for message in history.messages if message.qos)
    message.taken_at = float("inf")
    assert [str(violation) for violation in judge(history)] == [f"unacknowledged: {message.publisher}: {message}"]


# Brokers


def drop_on_resume(patch: pytest.MonkeyPatch) -> None:
    """The first message in flight is forgotten when a session is resumed."""
    real = Sender.resend

    def resend(self: Sender, session: Session, now: float) -> None:
        for packet_id, entry in list(session.inflight.items())[:1]:
            if entry is not RELEASED:
                del session.inflight[packet_id]
        real(self, session, now)

    patch.setattr(Sender, "resend", resend)


def resend_out_of_order(patch: pytest.MonkeyPatch) -> None:
    real = Sender.pump

    def pump(self: Sender, session: Session, now: float) -> None:
        session.resending = OrderedDict(reversed(session.resending.items()))
        real(self, session, now)

    patch.setattr(Sender, "pump", pump)


def resend_as_new(patch: pytest.MonkeyPatch) -> None:
    """What is repeated has no DUP."""
    real = Sender._frame

    def frame(self: Sender, *args: Any, dup: bool = False) -> bytes | None:
        return real(self, *args)

    patch.setattr(Sender, "_frame", frame)


def forget_released(patch: pytest.MonkeyPatch) -> None:
    """PUBREL is not sent again."""
    real = Sender.resend

    def resend(self: Sender, session: Session, now: float) -> None:
        for packet_id in [i for i, entry in session.inflight.items() if entry is RELEASED]:
            del session.inflight[packet_id]
        real(self, session, now)

    patch.setattr(Sender, "resend", resend)


def forget_received(patch: pytest.MonkeyPatch) -> None:
    """A connection's QoS 2 Packet Identifiers end with it."""
    real = Connections.lost

    def lost(self: Connections, link: Any, now: float, **rest: Any) -> None:
        if link.session is not None:
            link.session.received.clear()
        real(self, link, now, **rest)

    patch.setattr(Connections, "lost", lost)


def overtake_the_queue(patch: pytest.MonkeyPatch) -> None:
    """What comes while others wait for the outbox is sent at once."""
    real = Sender.send

    def send(self: Sender, session: Session, delivery: Delivery, encodings: Any, now: float) -> None:
        outbox = session.outbox
        free = len(session.inflight) < session.send_maximum and not session.resending
        if delivery.qos and outbox is not None and session.queue and free:
            self._send_acknowledged(session, outbox, delivery, encodings, now)
        else:
            real(self, session, delivery, encodings, now)

    patch.setattr(Sender, "send", send)


def lose_the_queue(patch: pytest.MonkeyPatch) -> None:
    """The oldest message of a session's queue is lost when its connection is."""
    real = Connections.lost

    def lost(self: Connections, link: Any, now: float, **rest: Any) -> None:
        if link.session is not None and link.session.queue:
            link.session.queue.popleft()
            self.broker.metrics.messages_queued -= 1
        real(self, link, now, **rest)

    patch.setattr(Connections, "lost", lost)


def exceed_receive_maximum(patch: pytest.MonkeyPatch) -> None:
    real = Connections._attach

    def attach(self: Connections, link: Any, session: Session, packet: Any, now: float) -> None:
        real(self, link, session, packet, now)
        session.send_maximum += 1

    patch.setattr(Connections, "_attach", attach)


def answer_repeats_by_delivering(patch: pytest.MonkeyPatch) -> None:
    """A QoS 2 message that comes again is taken for a new one."""
    real = Inbound.publish

    def publish(self: Inbound, link: Any, session: Session, packet: Any, now: float) -> bool:
        if packet.dup:
            session.received.discard(packet.packet_id)
        return real(self, link, session, packet, now)

    patch.setattr(Inbound, "publish", publish)


BROKEN: dict[Callable[[pytest.MonkeyPatch], None], set[str]] = {
    drop_on_resume: {"lost"},
    resend_out_of_order: {"wire", "order"},
    resend_as_new: {"wire", "repeated"},
    forget_released: {"wire", "lost", "left over"},
    forget_received: {"duplicate", "repeated"},
    answer_repeats_by_delivering: {"duplicate", "repeated"},
    overtake_the_queue: {"order"},
    lose_the_queue: {"lost"},
    exceed_receive_maximum: {"wire"},
}
"""What is planted -> the kinds of violation, one of which is to be reported."""
SEEDS = 20


@pytest.mark.parametrize("plant", BROKEN, ids=lambda plant: plant.__name__)
async def test_the_seeds_find_a_broken_broker(
    plant: Callable[[pytest.MonkeyPatch], None], mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = 0
    for seed in range(SEEDS):
        kinds = {violation.kind for violation in play(mock_clock, seed).violations}
        found += bool(kinds & BROKEN[plant])
    assert found >= 3, f"{found} of {SEEDS} seeds found it"


async def test_a_failing_seed_tells_its_story(
    mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_on_resume(monkeypatch)
    seed = next(seed for seed in range(SEEDS) if play(mock_clock, seed).violations)
    text = explain(mock_clock, seed, "on")
    assert text.startswith(f"seed {seed}, fast lane on: ")
    assert "  lost: s5" in text
    assert "PUBLISH" in text
    assert text.endswith(f"again: SEED={seed} scripts/test unit tests/simulation")
    assert len(text.splitlines()) < 100


@pytest.mark.parametrize("plant", [drop_on_resume, forget_received], ids=lambda plant: plant.__name__)
async def test_the_seeds_find_it_on_trio(
    plant: Callable[[pytest.MonkeyPatch], None],
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    kinds = {violation.kind for seed in range(3) for violation in (await play_on_trio(seed)).violations}
    assert kinds & BROKEN[plant]
