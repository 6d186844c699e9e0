"""That the simulation of restarts bites: brokers that promise too early, and ones that forget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import attrs
import pytest
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.journal import RELEASED, Held, positive
from mqtt_trio.broker.outbox import Outbox
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.broker.store import StoredState
from tests.simulation.history import History, Message
from tests.simulation.oracle import judge, judge_retained
from tests.simulation.play import play_durable

Plant = Callable[[pytest.MonkeyPatch], None]


def send_early(take: Callable[[Outbox, Held], Iterator[bytes]], patch: pytest.MonkeyPatch) -> None:
    """What `take` takes out of the frames that wait for the store is sent at once."""
    real = Broker.flush

    def flush(self: Broker) -> None:
        for _, outboxes in self.journal._waiting:
            for outbox in outboxes:
                for held in outbox.held if outbox.session is not None else ():
                    for frame in take(outbox, held):
                        outbox.put(frame)
        real(self)

    patch.setattr(Broker, "flush", flush)


def take_acks(outbox: Outbox, held: Held) -> Iterator[bytes]:
    for answer in held.acks:
        if isinstance(answer, bytes):
            yield answer
        else:
            outbox.held_acks -= answer[0] == 1
            yield positive(answer[0], answer[1])
    held.acks.clear()


def take_publishes(outbox: Outbox, held: Held) -> Iterator[bytes]:
    outbox.held_size -= sum(map(len, held.publishes.values()))
    yield from held.publishes.values()
    held.publishes.clear()


def take_frames(first: int, outbox: Outbox, held: Held) -> Iterator[bytes]:
    yield from [frame for frame in held.frames if frame[0] == first]
    held.frames[:] = [frame for frame in held.frames if frame[0] != first]


def take_replies(outbox: Outbox, held: Held) -> Iterator[bytes]:
    yield from held.replies
    held.replies.clear()


def forget(change: Callable[[StoredState], StoredState], patch: pytest.MonkeyPatch) -> None:
    """A broker that begins again does not know all that its store does."""
    real = Recovery.run

    def run(self: Recovery) -> None:
        self.state = change(self.state)
        real(self)

    patch.setattr(Recovery, "run", run)


def no_received(state: StoredState) -> StoredState:
    return attrs.evolve(state, received=[])


def no_released(state: StoredState) -> StoredState:
    return attrs.evolve(state, deliveries=[row for row in state.deliveries if not row[3] & RELEASED])


def released_again(state: StoredState) -> StoredState:
    deliveries = [(*row[:3], row[3] & ~RELEASED, *row[4:]) for row in state.deliveries]
    return attrs.evolve(state, deliveries=deliveries)


def no_identifiers(state: StoredState) -> StoredState:
    deliveries = [(*row[:2], row[2] if row[3] & RELEASED else 0, *row[3:]) for row in state.deliveries]
    return attrs.evolve(state, deliveries=deliveries)


def no_retained(state: StoredState) -> StoredState:
    return attrs.evolve(state, retained=state.retained[1:])


def backwards(state: StoredState) -> StoredState:
    return attrs.evolve(state, deliveries=state.deliveries[::-1])


BROKEN: dict[str, tuple[Plant, set[str]]] = {
    "PUBACK and PUBREC before the commit": (partial(send_early, take_acks), {"lost"}),
    "QoS 2 PUBLISH before the commit": (partial(send_early, take_publishes), {"duplicate"}),
    "PUBREL before the commit": (partial(send_early, partial(take_frames, 0x62)), {"duplicate"}),
    "PUBCOMP before the commit": (partial(send_early, partial(take_frames, 0x70)), {"lost", "left over"}),
    "SUBACK before the commit": (partial(send_early, take_replies), {"lost", "unwanted", "wire"}),
    "received identifiers are forgotten": (partial(forget, no_received), {"duplicate"}),
    "released deliveries are forgotten": (partial(forget, no_released), {"wire", "left over", "lost"}),
    "released deliveries are sent again": (partial(forget, released_again), {"wire", "duplicate"}),
    "Packet Identifiers of deliveries are forgotten": (partial(forget, no_identifiers), {"wire", "duplicate"}),
    "a retained message is forgotten": (partial(forget, no_retained), {"retained"}),
    "deliveries come back in another order": (partial(forget, backwards), {"order"}),
}
"""What is planted, and the kinds of violation, one of which is to be reported."""
SEEDS = 120
FOUND = 3
"""Seeds of them that are to find it; then no more are played."""


@pytest.mark.parametrize("name", BROKEN)
async def test_the_seeds_find_a_broken_broker(
    name: str, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, kinds = BROKEN[name]
    plant(monkeypatch)
    found: list[int] = []
    for seed in range(SEEDS):
        if kinds & {violation.kind for violation in play_durable(mock_clock, seed).violations}:
            found.append(seed)
        if len(found) == FOUND:
            return
    pytest.fail(f"{found} of {SEEDS} seeds found it")


async def test_the_oracle_reports_a_refused_message_that_came_at_qos_2(mock_clock: trio.testing.MockClock) -> None:
    history: History = play_durable(mock_clock, 8).history
    assert judge(history) == []
    deliveries = [delivery for interest in history.interests.values() for delivery in interest.deliveries]
    delivery = next(delivery for delivery in deliveries if delivery.qos == 2)
    history.by_payload[delivery.payload].refused_at = 5.0
    assert "refused" in {violation.kind for violation in judge(history)}


@pytest.mark.parametrize(
    "taken, kept, sound",
    [
        ((1, 1, 1), b"2", True),
        ((1, 1, 1), b"1", False),
        ((1, 1, 1), None, False),
        ((1, 1, 0), b"1", True),
        ((1, 1, 0), b"2", False),
        ((1, 1, 0), b"0", False),
        ((0, 0, 0), None, True),
    ],
)
def test_the_oracle_knows_what_is_retained(taken: tuple[int, ...], kept: bytes | None, sound: bool) -> None:
    """Three messages, some of them acknowledged, the others refused."""
    messages = [Message("p", "$kept/0", number, 1, b"%d" % number, retain=True) for number in range(3)]
    for message, acknowledged in zip(messages, taken, strict=True):
        if acknowledged:
            message.taken_at = 1.0
        else:
            message.refused_at = 1.0
    retained = {} if kept is None else {"$kept/0": kept}
    assert (not list(judge_retained(messages, retained))) is sound
