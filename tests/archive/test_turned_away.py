"""OnOutage = "reject" and "drop" [K10] in virtual time: who is told what, and when, and what is counted."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from mqtt_trio.archive.groups import ArchiveGroup, ArchiveGroupOptions
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import Refused
from mqtt_trio.protocol.codes import ReasonCode
from tests.archive.outage_world import MOMENT, world
from tests.archive_support import FakeHost, FakeStore, held, run_of


async def test_reject_counts_and_tells(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with world(on_outage="reject") as w:
        w.store.at_once = False
        w.publish(0)
        await trio.sleep(MOMENT)
        w.publish(1)
        w.store.go_away("Kafka is gone")
        w.publish(2, 3)
        w.publish(4, qos=2)
        assert w.answers[2] == w.answers[3] == w.answers[4] == Refused(ReasonCode.QUOTA_EXCEEDED)
        w.publish(5, 6, qos=0)
        assert w.group.take_run(run_of(b"7", b"8", b"9")) is None
        await trio.sleep(5)
        assert w.counters() == {"waiting": 2, "rejected": 3, "dropped": 5}
        w.store.come_back()
        w.publish(10)
        w.store.finish_all()
        await trio.sleep(MOMENT)
        w.store.finish_all()
        await trio.sleep(MOMENT)
        assert w.stored == [0, 1, 10], "what was taken before is stored"
        assert w.counters() == {"stored": 3, "rejected": 3, "dropped": 5}
    assert [line.getMessage() for line in caplog.records] == [
        "archive group G: Kafka is gone; messages are refused meanwhile",
        "archive group G: its store is back; 8 messages were turned away",
    ]


async def test_reject_answers_what_waits_at_once(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Answers keep the order of their messages: one that waited for AckTimeout would hold up all refusals behind it."""
    async with world(on_outage="reject", ack="store") as w:
        w.store.at_once = False
        w.publish(0)
        await trio.sleep(MOMENT)
        w.publish(1, 2)
        w.publish(3, qos=2)
        w.publish(4, qos=0)
        await trio.sleep(MOMENT)
        w.store.finish()  # of the first one, which nobody has been told yet
        w.store.go_away("Kafka is gone")
        assert w.acknowledged(0), "what the store has is no refusal"
        assert [held(w.answers[number]).refused for number in (1, 2, 3)] == [ReasonCode.QUOTA_EXCEEDED] * 3
        assert w.host.calls == ["flush", "flush"]
        w.publish(5)
        assert w.answers[5] == Refused(ReasonCode.QUOTA_EXCEEDED)
        await trio.sleep(60)
        assert w.counters() == {"stored": 1, "waiting": 4, "rejected": 4}
        w.store.come_back()
        w.publish(6)
        await trio.sleep(MOMENT)
        w.store.finish_all()
        await trio.sleep(MOMENT)
        assert w.stored == [0, 1, 2, 3, 4, 6], "what was under way is stored although it was refused"
        assert w.acknowledged(6)
        assert w.counters() == {"stored": 6, "rejected": 4}
    assert [line.getMessage() for line in caplog.records] == [
        "archive group G: Kafka is gone; messages are refused meanwhile, and 3 that were on their way, which are "
        "stored when it is back",
        "archive group G: its store is back; 4 messages were turned away",
    ]


@pytest.mark.parametrize("on_outage", ["reject", "drop"])
@pytest.mark.parametrize("ack", ["none", "store"])
async def test_stopped_publishers_hear_at_once_that_nothing_is_taken(
    autojump_clock: MockClock, on_outage: str, ack: str
) -> None:
    async with world(on_outage=on_outage, ack=ack, window_bytes=65_536) as w:
        w.store.at_once = False
        w.publish(*range(8), size=20_000)
        assert w.host.calls == ["stop"]
        w.store.go_away()
        assert w.waiting() == []
        assert w.host.calls[-1] == "resume"
        assert w.acknowledged(7) == (ack == "none" or on_outage == "drop"), "memory has it, and Ack promises no more"
        w.publish(8)
        assert w.acknowledged(8) == (on_outage == "drop")
        w.store.come_back()
        w.store.at_once = True
        await trio.sleep(1)
        assert w.stored == list(range(8))


@pytest.mark.parametrize("ack", ["none", "store"])
async def test_drop_acknowledges_and_counts(
    autojump_clock: MockClock, ack: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(on_outage="drop", ack=ack) as w:
        w.store.at_once = False
        w.publish(0, 1)
        await trio.sleep(MOMENT)
        w.store.go_away()
        assert w.acknowledged(0, 1), "nobody waits for a store that is away"
        w.publish(*range(2, 102))
        w.publish(102, qos=0)
        assert w.acknowledged(*range(103))
        assert w.counters("dropped", "rejected", "waiting") == {"dropped": 101, "rejected": 0, "waiting": 2}
        w.store.come_back()
        w.publish(103)
        await trio.sleep(MOMENT)
        assert w.acknowledged(103) == (ack == "none")
        w.store.finish_all()
        await trio.sleep(MOMENT)
        assert w.acknowledged(103)
        assert w.stored == [0, 1, 103]
        assert w.counters() == {"stored": 3, "dropped": 101}
    assert [line.levelno for line in caplog.records] == [logging.WARNING] * 2


async def test_a_store_that_is_away_at_the_start(autojump_clock: MockClock, tmp_path: Path) -> None:
    store = FakeStore()
    store.go_away()
    group = ArchiveGroup(ArchiveGroupOptions(name="G", on_outage="drop"), store, FakeHost())
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        assert group.take(Message("t", b"", 1)) is None
        assert group.counters()["dropped"] == 1
        nursery.cancel_scope.cancel()
