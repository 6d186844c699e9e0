"""Share groups whose members come and go: each message to one of them, and nothing stays behind.

600 seeds run always, a third of them on brokers with a store that are killed; `SEED=7 scripts/test unit
tests/simulation` plays one again, `SEED=1000-9999` others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import trio.testing

from mqtt_trio.broker.session import Delivery, Session
from mqtt_trio.broker.shares import ShareGroup, Shares
from tests.simulation.groups import judge_groups
from tests.simulation.play import LANES, explain, play_shares
from tests.simulation.seeds import seeds

REACHED = {
    "messages": 50,
    "deliveries": 30,
    "came twice": 1,
    "queued": 3,
    "fast lane": 20,
    "kills": 0.4,
    "sessions ended": 1,
    "unsubscribed": 0.3,
    "DUP": 1,
}
"""How often a seed does what the simulation is for, on average, at least."""


def lane_of(seed: int) -> str:
    return "off" if seed % 2 else "on"


@pytest.mark.spec("MQTT5-4.8.2-3", "MQTT5-4.8.2-4", "MQTT5-4.8.2-5", "MQTT5-4.8.2-6", "MQTT5-4.3.3-10")
@pytest.mark.parametrize("block", seeds("0-599"), ids=lambda block: f"{block.start}-{block.stop - 1}")
async def test_each_message_goes_to_one_member(block: range, mock_clock: trio.testing.MockClock) -> None:
    for seed in block:
        if play_shares(mock_clock, seed, LANES[lane_of(seed)]).violations:
            pytest.fail(explain(mock_clock, seed, lane_of(seed), play_shares), pytrace=False)


async def test_the_seeds_reach_what_they_are_for(mock_clock: trio.testing.MockClock) -> None:
    counts: Counter[str] = Counter()
    for seed in range(30):
        outcome = play_shares(mock_clock, seed)
        counts.update(outcome.counts)
        interests = outcome.history.interests.values()
        counts["sessions ended"] += sum(interest.sessions_ended for interest in interests)
        counts["unsubscribed"] += sum(interest.left for interest in interests)
    assert {name: counts[name] / 30 for name, least in REACHED.items() if counts[name] < least * 30} == {}


# That it bites


def lose_what_was_left(patch: pytest.MonkeyPatch) -> None:
    """What a member had not acknowledged is lost when it leaves."""
    real = Shares._give_back

    def give_back(self: Shares, session: Session, group: ShareGroup) -> None:
        for packet_id, entry in list(session.inflight.items()):
            if isinstance(entry, Delivery) and entry.group is group and entry.qos == 1:
                del session.inflight[packet_id]
                session.resending.pop(packet_id, None)
        real(self, session, group)

    patch.setattr(Shares, "_give_back", give_back)


def send_twice(patch: pytest.MonkeyPatch) -> None:
    """Two members get a message where two can take it."""
    real = Shares.deliver

    def deliver(self: Shares, group: ShareGroup, message: Any, encodings: Any, now: float) -> None:
        real(self, group, message, encodings, now)
        if message.qos and len(group.members) > 1 and not group.queue:
            real(self, group, message, encodings, now)

    patch.setattr(Shares, "deliver", deliver)


def hand_on_what_has_begun(patch: pytest.MonkeyPatch) -> None:
    """A QoS 2 delivery that has begun goes to another member, too."""
    real = Shares.left

    def left(self: Shares, session: Session, now: float) -> None:
        for entry in session.inflight.values():
            if isinstance(entry, Delivery) and entry.group is not None and entry.qos == 2:
                self.deliver(entry.group, entry.message, {}, now)
        real(self, session, now)

    patch.setattr(Shares, "left", left)


def forget_the_queue(patch: pytest.MonkeyPatch) -> None:
    """Nobody is told that something waits for the group."""
    patch.setattr(Shares, "pull", lambda self, session, now: None)
    real = Shares.__init__

    def init(self: Shares, broker: Any) -> None:
        real(self, broker)
        broker.sender.pull = self.pull

    patch.setattr(Shares, "__init__", init)


def drop_at_the_end_of_a_session(patch: pytest.MonkeyPatch) -> None:
    """A session that ends takes with it what it had of its groups."""

    def ended(self: Shares, session: Session, now: float) -> None:
        for group in list(session.shares.values()):
            self.leave(session, group.name)

    patch.setattr(Shares, "ended", ended)


BROKEN: dict[Callable[[pytest.MonkeyPatch], None], set[str]] = {
    lose_what_was_left: {"lost"},
    send_twice: {"duplicate", "twice"},
    hand_on_what_has_begun: {"duplicate"},
    forget_the_queue: {"lost", "left over"},
    drop_at_the_end_of_a_session: {"lost"},
}
"""What is planted, and the kinds of violation, one of which is to be reported."""
SEEDS = 300
FOUND = 3
"""Seeds of them that are to find it; then no more are played."""


@pytest.mark.parametrize("plant", BROKEN, ids=lambda plant: plant.__name__)
async def test_the_seeds_find_a_broken_group(
    plant: Callable[[pytest.MonkeyPatch], None], mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found: list[int] = []
    for seed in range(SEEDS):
        if BROKEN[plant] & {violation.kind for violation in play_shares(mock_clock, seed).violations}:
            found.append(seed)
        if len(found) == FOUND:
            return
    pytest.fail(f"{found} of {SEEDS} seeds found it")


@pytest.mark.parametrize("kind", ["lost", "duplicate"])
async def test_the_oracle_reports_a_spoiled_group(kind: str, mock_clock: trio.testing.MockClock) -> None:
    """A QoS 2 message that is taken from who got it, or that another member got as well."""
    for seed in range(0, 60, 3):
        history = play_shares(mock_clock, seed).history
        assert judge_groups(history) == []
        interests = [interest for interest in history.interests.values() if interest.shared]
        for one in interests:
            others = [other for other in interests if other is not one and other.filters.keys() == one.filters.keys()]
            delivery = next((d for d in one.deliveries if d.qos == 2), None)
            if delivery is None or not others:
                continue
            if kind == "duplicate":
                others[0].deliveries.append(delivery)
            else:
                one.deliveries.remove(delivery)
            if kind in {violation.kind for violation in judge_groups(history)}:
                return
    pytest.fail("nothing was found")
