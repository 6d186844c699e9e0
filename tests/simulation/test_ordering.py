"""50 publishers, subscribers that come and go, a network that breaks: order, at least once, exactly once.

1,000 seeds run always, each with the fast lane and without; `SEED=7 scripts/test unit tests/simulation` plays one
again, `SEED=1000-9999` others.
"""

from __future__ import annotations

from collections import Counter

import pytest
import trio.testing

from tests.simulation.play import LANES, explain, play, play_on_trio
from tests.simulation.seeds import seeds

REACHED = {
    "messages": 180,
    "deliveries": 300,
    "fast lane": 50,
    "cut": 10,
    "cut_at_broker": 5,
    "close": 5,
    "disconnect": 5,
    "go_silent": 5,
    "taken over": 10,
    "silent": 0.2,
    "DUP": 20,
    "PUBREL again": 3,
    "publisher's DUP": 5,
    "queued": 50,
    "QoS 2 again": 2,
}
"""How often a seed does what the simulation is for, on average, at least."""


@pytest.mark.spec(
    "MQTT5-3.1.2-5", "MQTT5-3.3.1-1", "MQTT5-3.3.1-2", "MQTT5-3.3.1-3", "MQTT5-3.3.4-9", "MQTT5-2.2.1-4",
    "MQTT5-4.3.2-1", "MQTT5-4.3.2-2", "MQTT5-4.3.2-3", "MQTT5-4.3.2-4", "MQTT5-4.3.2-5",
    "MQTT5-4.3.3-1", "MQTT5-4.3.3-2", "MQTT5-4.3.3-3", "MQTT5-4.3.3-4", "MQTT5-4.3.3-5", "MQTT5-4.3.3-6",
    "MQTT5-4.3.3-8", "MQTT5-4.3.3-10", "MQTT5-4.3.3-11", "MQTT5-4.3.3-12",
    "MQTT5-4.4.0-1", "MQTT5-4.5.0-1", "MQTT5-4.6.0-5", "MQTT5-4.6.0-6", "MQTT5-4.9.0-2",
    "MQTT3-3.1.2-4", "MQTT3-3.1.2-5", "MQTT3-3.3.1-1", "MQTT3-3.3.1-2", "MQTT3-3.3.1-3",
    "MQTT3-4.3.2-1", "MQTT3-4.3.2-2", "MQTT3-4.3.3-1", "MQTT3-4.3.3-2", "MQTT3-4.4.0-1", "MQTT3-4.5.0-1",
    "MQTT3-4.6.0-1", "MQTT3-4.6.0-2", "MQTT3-4.6.0-3", "MQTT3-4.6.0-4", "MQTT3-4.6.0-5", "MQTT3-4.6.0-6",
)  # fmt: skip
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("block", seeds(), ids=lambda block: f"{block.start}-{block.stop - 1}")
async def test_messages_come_in_order_once_and_all(block: range, lane: str, mock_clock: trio.testing.MockClock) -> None:
    for seed in block:
        if play(mock_clock, seed, LANES[lane]).violations:
            pytest.fail(explain(mock_clock, seed, lane), pytrace=False)


async def test_the_seeds_reach_what_they_are_for(mock_clock: trio.testing.MockClock) -> None:
    counts: Counter[str] = Counter()
    for seed in range(30):
        counts.update(play(mock_clock, seed).counts)
    assert {name: counts[name] / 30 for name, least in REACHED.items() if counts[name] < least * 30} == {}


@pytest.mark.parametrize("seed", range(5))
async def test_a_seed_is_the_same_story_every_time_on_both_ways(seed: int, mock_clock: trio.testing.MockClock) -> None:
    first = play(mock_clock, seed, LANES["on"], traced=True)
    aside = [bytearray(n % 700) for n in range(2000)]  # other addresses: the broker sorts some things by them
    again = play(mock_clock, seed, LANES["on"], traced=True)
    other = play(mock_clock, seed, LANES["off"], traced=True)
    assert len(aside) == 2000
    told = [str(note) for note in first.history.trace or []]
    assert len(told) > 1000
    assert told == [str(note) for note in again.history.trace or []]
    assert told == [str(note) for note in other.history.trace or []]


@pytest.mark.parametrize("seed", range(2000, 2008))
async def test_the_whole_broker_does_the_same_on_trio(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    outcome = await play_on_trio(seed)
    assert [str(violation) for violation in outcome.violations] == []
    assert outcome.counts["deliveries"] > 100
    assert outcome.counts["fast lane"] > 10
