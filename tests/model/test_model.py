"""The broker against the model of tests/model/specification.py: random scripts, the same outcome.

10,000 scripts run always; `SEED=7 python -m pytest tests/model` plays one again, `SEED=10000-60000` others.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import trio.testing

from tests.model.play import Game, explain, failure
from tests.model.scripts import write_script

BLOCK = 500


def seeds() -> list[range]:
    """What to play: blocks of the default seeds, or what the environment variable SEED says."""
    first, _, last = os.environ.get("SEED", "0-9999").partition("-")
    whole = range(int(first), int(last or first) + 1)
    return [whole[at : at + BLOCK] for at in range(0, len(whole), BLOCK)]


@pytest.mark.parametrize("block", seeds(), ids=lambda block: f"{block.start}-{block.stop - 1}")
async def test_the_broker_does_what_the_model_says(block: range, mock_clock: trio.testing.MockClock) -> None:
    for seed in block:
        script = write_script(seed)
        if failure(mock_clock, script) is not None:
            pytest.fail(explain(mock_clock, seed, script), pytrace=False)


async def test_the_scripts_reach_what_they_are_for(mock_clock: trio.testing.MockClock) -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        game = Game(mock_clock, write_script(seed))
        game.play()
        seen.update(game.world.broker.metrics.snapshot())
        seen.update(game.seen)
    assert seen["fast_lane_messages"] > 100
    rare = ("dropped_expired", "wills_published", "sessions_taken_over", "sessions_expired", "protocol_errors")
    kinds = ("dup", "retain", "PUBREL", "RECEIVE_MAXIMUM_EXCEEDED", "SESSION_TAKEN_OVER")
    assert [name for name in (*rare, *kinds) if seen[name] < 3] == []
