"""Brokers with a store that are killed at random instants, stopped, and refused by their disk: the same oracle.

1,000 seeds run always, every other one with the fast lane, and some on the real file; `SEED=7 scripts/test unit
tests/simulation` plays one again, `SEED=1000-9999` others.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import trio.testing

from tests.simulation.disks import FileDisk
from tests.simulation.play import LANES, explain, play_durable
from tests.simulation.seeds import seeds

REACHED = {
    "messages": 60,
    "deliveries": 60,
    "kills": 2,
    "commits": 80,
    "outage": 0.3,
    "refused": 1,
    "sessions gone": 0.1,
    "DUP": 5,
    "PUBREL again": 1,
    "QoS 2 again": 3,
    "queued": 10,
    "fast lane": 15,
}
"""How often a seed does what the simulation is for, on average, at least."""
FILE_SEEDS = range(2000, 2040)


def lane_of(seed: int) -> str:
    return "off" if seed % 2 else "on"


@pytest.mark.spec(
    "MQTT5-3.1.2-5", "MQTT5-3.3.1-1", "MQTT5-4.3.2-4", "MQTT5-4.3.3-8", "MQTT5-4.3.3-10", "MQTT5-4.3.3-11",
    "MQTT5-4.1.0-1", "MQTT5-4.4.0-1", "MQTT5-4.5.0-1", "MQTT5-4.6.0-6", "MQTT5-3.3.1-5", "MQTT5-3.3.1-6",
    "MQTT3-3.1.2-4", "MQTT3-4.3.2-2", "MQTT3-4.3.3-2", "MQTT3-4.4.0-1", "MQTT3-4.5.0-1", "MQTT3-4.6.0-6",
)  # fmt: skip
@pytest.mark.parametrize("block", seeds(), ids=lambda block: f"{block.start}-{block.stop - 1}")
async def test_nothing_acknowledged_is_lost_with_the_process(block: range, mock_clock: trio.testing.MockClock) -> None:
    for seed in block:
        if play_durable(mock_clock, seed, LANES[lane_of(seed)]).violations:
            pytest.fail(explain(mock_clock, seed, lane_of(seed), play_durable), pytrace=False)


async def test_the_seeds_reach_what_they_are_for(mock_clock: trio.testing.MockClock) -> None:
    counts: Counter[str] = Counter()
    for seed in range(0, 60, 2):
        counts.update(play_durable(mock_clock, seed).counts)
    assert {name: counts[name] / 30 for name, least in REACHED.items() if counts[name] < least * 30} == {}


@pytest.mark.parametrize("seed", range(4))
async def test_a_seed_is_the_same_story_every_time(seed: int, mock_clock: trio.testing.MockClock) -> None:
    stories = [
        [str(note) for note in play_durable(mock_clock, seed, LANES[lane], traced=True).history.trace or []]
        for lane in ("on", "on", "off")
    ]
    assert len(stories[0]) > 300
    assert stories[0] == stories[1] == stories[2]


async def test_the_same_holds_on_the_real_file(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    torn = 0
    for seed in FILE_SEEDS:
        disk = FileDisk(tmp_path / str(seed))
        outcome = play_durable(mock_clock, seed, LANES[lane_of(seed)], disk=disk)
        assert [str(violation) for violation in outcome.violations] == [], f"seed {seed}"
        torn += disk.torn
    assert torn > 5
