"""Sessions that end with their connections beside sessions that are kept, subscribers of retained messages, a broker
that is killed and whose store now and then takes nothing: the same oracle, and one for what new subscriptions get.

500 seeds run always, every other one with the fast lane; `SEED=7 scripts/test unit tests/simulation` plays one again,
`SEED=1000-9999` others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import trio.testing

from mqtt_trio.broker.bursts import Bursts
from mqtt_trio.broker.delivery import Sender
from mqtt_trio.broker.message import Message as Kept
from mqtt_trio.broker.retained import RetainedMessages
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import Session
from tests.simulation.history import NEVER, Delivery, History, Interest, Message, Span
from tests.simulation.keepsakes import judge_keepsakes
from tests.simulation.play import LANES, explain, play_mixed
from tests.simulation.seeds import seeds

REACHED = {
    "messages": 45,
    "deliveries": 80,
    "kills": 1.5,
    "outage": 0.3,
    "refused": 0.5,
    "DUP": 2,
    "QoS 2 again": 3,
    "queued": 8,
    "fast lane": 6,
    "keepsakes": 7,
    "keepsakes owed": 1,
    "sessions ended": 1,
    "QoS 2 to sessions that end": 5,
}
"""How often a seed does what the simulation is for, on average, at least."""


def lane_of(seed: int) -> str:
    return "off" if seed % 2 else "on"


@pytest.mark.spec(
    "MQTT5-3.3.1-5", "MQTT5-3.3.1-6", "MQTT5-3.3.1-9", "MQTT5-4.3.3-10", "MQTT5-4.5.0-1", "MQTT5-4.6.0-6",
    "MQTT3-3.3.1-6", "MQTT3-4.3.3-2", "MQTT3-4.5.0-1", "MQTT3-4.6.0-6",
)  # fmt: skip
@pytest.mark.parametrize("block", seeds("0-499"), ids=lambda block: f"{block.start}-{block.stop - 1}")
async def test_nobody_is_the_worse_for_the_sessions_of_others(block: range, mock_clock: trio.testing.MockClock) -> None:
    for seed in block:
        if play_mixed(mock_clock, seed, LANES[lane_of(seed)]).violations:
            pytest.fail(explain(mock_clock, seed, lane_of(seed), play_mixed), pytrace=False)


@pytest.mark.parametrize("seed", [403, 662, 691, 1066, 1159, 1846, 2065, 2641, 3033])
async def test_a_seed_that_once_found_something(seed: int, mock_clock: trio.testing.MockClock) -> None:
    """An order that a commit changed, a removal that came again, what had been sent last before a restart; and what the
    oracle had to learn."""
    assert [str(violation) for violation in play_mixed(mock_clock, seed, LANES[lane_of(seed)]).violations] == []


async def test_the_seeds_reach_what_they_are_for(mock_clock: trio.testing.MockClock) -> None:
    counts: Counter[str] = Counter()
    for seed in range(30):
        outcome = play_mixed(mock_clock, seed)
        counts.update(outcome.counts)
        for interest in outcome.history.interests.values():
            counts["sessions ended"] += interest.sessions_ended
            if not interest.lasts:
                counts["QoS 2 to sessions that end"] += sum(delivery.qos == 2 for delivery in interest.deliveries)
    assert {name: counts[name] / 30 for name, least in REACHED.items() if counts[name] < least * 30} == {}


# That it bites


def let_go_at_once(patch: pytest.MonkeyPatch) -> None:
    """Whoever's session ends with the connection does not wait for the store that others need."""
    patch.setattr(Sender, "_waits_for_others", lambda self, delivery: False)


def keep_nothing_back(patch: pytest.MonkeyPatch) -> None:
    """A new subscription brings nothing."""
    patch.setattr(Bursts, "begin", staticmethod(lambda session, options: None))


def bring_it_twice(patch: pytest.MonkeyPatch) -> None:
    """A new subscription brings everything twice."""
    real = Bursts.begin

    def begin(session: Session, options: SubscriptionOptions) -> None:
        real(session, options)
        real(session, options)

    patch.setattr(Bursts, "begin", staticmethod(begin))


def replace_nothing(patch: pytest.MonkeyPatch) -> None:
    """The first retained message of a topic stays until it is removed."""
    real = RetainedMessages.set

    def keep(self: RetainedMessages, message: Kept) -> bool:
        return True if message.payload and self.get(message.topic_name) is not None else real(self, message)

    patch.setattr(RetainedMessages, "set", keep)


BROKEN: dict[Callable[[pytest.MonkeyPatch], None], set[str]] = {
    let_go_at_once: {"refused", "duplicate"},
    keep_nothing_back: {"keepsake"},
    bring_it_twice: {"keepsake"},
    replace_nothing: {"keepsake"},
}
"""What is planted, and the kinds of violation, one of which is to be reported."""
SEEDS = 200
FOUND = 3
"""Seeds of them that are to find it; then no more are played."""


@pytest.mark.parametrize("plant", BROKEN, ids=lambda plant: plant.__name__)
async def test_the_seeds_find_a_broken_broker(
    plant: Callable[[pytest.MonkeyPatch], None], mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found: list[int] = []
    for seed in range(SEEDS):
        if BROKEN[plant] & {violation.kind for violation in play_mixed(mock_clock, seed).violations}:
            found.append(seed)
        if len(found) == FOUND:
            return
    pytest.fail(f"{found} of {SEEDS} seeds found it")


def came(payload: bytes, at: float, *, retained: bool = True, qos: int = 2) -> Delivery:
    return Delivery("$kept/0", payload, qos, b"", at, retained)


@pytest.mark.parametrize(
    "deliveries, text",
    [
        ([came(b"1", 5.2)], None),
        ([came(b"1", 5.2), came(b"2", 8.0, retained=False)], None),
        ([came(b"2", 8.0, retained=False)], None),
        ([], "did not get message 1"),
        ([came(b"0", 5.2), came(b"1", 5.3)], "got message 0 of p to $kept/0 at QoS 2 as retained, message 1"),
        ([came(b"1", 5.2), came(b"1", 5.3)], "got b'1' as retained 2 times, and asked 1 times"),
        ([came(b"2", 8.0, retained=False), came(b"1", 8.2)], "as retained behind message 2"),
        ([came(b"1", 5.2), came(b"", 5.3)], "an empty retained message"),
    ],
)
def test_the_oracle_knows_what_a_subscription_brings(deliveries: list[Delivery], text: str | None) -> None:
    """Messages 0 and 1 were there when somebody subscribed, between 5 and 5.1 s; message 2 was published at 7 s."""
    messages = [Message("p", "$kept/0", number, 2, b"%d" % number, retain=True, attempts=1) for number in range(3)]
    for message, sent_at in zip(messages, (1.0, 2.0, 7.0), strict=True):
        message.sent_at, message.taken_at = sent_at, sent_at + 0.1
    interest = Interest({"$kept/#": 2}, v5=True, lasts=False, deliveries=deliveries)
    interest.spans["$kept/#"] = [Span(5.0, 5.1, NEVER, NEVER)]
    interest.asked["$kept/#"] = 1
    found = judge_keepsakes(History(messages, {"s": interest}))
    assert bool(found) is (text is not None), found
    assert text is None or text in found[0].text
