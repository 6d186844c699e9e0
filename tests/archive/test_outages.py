"""Ack and OnOutage of archive groups [K9, K10] in virtual time: who waits, who is told what, what is kept, in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mqtt_trio.archive.groups import ArchiveGroup, ArchiveGroupOptions
from mqtt_trio.archive.spool import Spool
from mqtt_trio.archive.spool_log import SpoolLog
from mqtt_trio.archive.spool_records import SpoolRecord
from mqtt_trio.errors import StoreError
from tests.archive.outage_world import MOMENT, NO, world
from tests.archive_support import FakeHost, FakeStore, held

# --- Ack = "store" [K9] ---


async def test_an_acknowledgement_waits_for_the_store(autojump_clock: MockClock) -> None:
    async with world(ack="store") as w:
        w.store.at_once = False
        w.publish(0, qos=0)
        w.publish(1, 2)
        w.publish(3, qos=2)
        assert w.answers[0] is None
        await trio.sleep(1)
        assert w.waiting() == [1, 2, 3]
        assert w.host.calls == []
        w.publish(4)
        await trio.sleep(1)
        w.store.finish()
        await wait_all_tasks_blocked()
        assert w.acknowledged(1, 2, 3)
        assert w.waiting() == [4]
        assert w.host.calls == ["flush"], "one flush for a burst"
        w.store.finish()
        await wait_all_tasks_blocked()
        assert w.acknowledged(4)
        assert w.counters() == {"stored": 5}


async def test_what_the_store_refuses_is_answered_in_the_negative_and_alone(autojump_clock: MockClock) -> None:
    async with world(ack="store") as w:
        w.store.at_once = False
        w.publish(*range(4))
        w.publish(4, qos=0)
        await trio.sleep(MOMENT)
        w.store.finish(outcome={1: StoreError("too large"), 4: StoreError("too large")})
        await wait_all_tasks_blocked()
        assert w.acknowledged(0, 2, 3)
        assert held(w.answers[1]).refused is NO
        assert w.counters() == {"stored": 3, "failed": 2}


async def test_without_a_spool_the_wait_ends_with_a_negative_answer(autojump_clock: MockClock) -> None:
    async with world(ack="store", ack_timeout=5) as w:
        w.store.at_once = False
        w.publish(1, 2)
        await trio.sleep(3)
        w.publish(3)
        await trio.sleep(1.9)
        assert w.waiting() == [1, 2, 3]
        await trio.sleep(0.2)
        assert w.waiting() == [3]
        assert held(w.answers[1]).refused is held(w.answers[2]).refused is NO
        assert w.host.calls == ["flush"]
        w.store.finish()
        await trio.sleep(10)
        assert held(w.answers[3]).refused is NO
        assert w.counters() == {"stored": 2, "waiting": 1, "timed_out": 3}
        w.store.finish()
        w.publish(4)
        await trio.sleep(MOMENT)
        w.store.finish()
        await trio.sleep(10)
        assert w.acknowledged(4), "the next one has its own time"


async def test_the_window_bounds_what_waits_for_acknowledgement_as_well(autojump_clock: MockClock) -> None:
    async with world(ack="store", window_bytes=65_536) as w:
        w.store.at_once = False
        w.publish(*range(8), size=20_000)
        w.publish(8, qos=0)
        assert w.host.calls == ["stop"]
        assert w.counters("held", "dropped_qos0") == {"held": 5, "dropped_qos0": 1}
        await trio.sleep(MOMENT)
        w.store.finish_all()
        await wait_all_tasks_blocked()
        assert w.host.calls == ["stop", "resume", "flush"]
        assert w.acknowledged(*range(8))


# --- OnOutage = "spool" [K10] ---


@pytest.mark.parametrize("ack", ["none", "store"])
async def test_an_outage_over_the_spool_loses_doubles_and_reorders_nothing(
    autojump_clock: MockClock, tmp_path: Path, ack: str
) -> None:
    async with world(tmp_path, ack=ack) as w:
        w.publish(0)
        await trio.sleep(MOMENT)
        w.store.at_once = False
        w.publish(1)
        await trio.sleep(MOMENT)  # the store has it in hand when it goes away
        w.publish(2)
        w.store.go_away()
        w.publish(3)
        await trio.sleep(MOMENT)
        w.publish(*range(4, 10), qos=2)
        w.publish(10, qos=0)
        await trio.sleep(MOMENT)
        assert w.stored == [0, 1], "nothing more is given to a store that is away"
        assert w.acknowledged(*range(11)), "on disk is enough"
        assert w.counters("spooled", "spool_messages", "waiting") == {"spooled": 9, "spool_messages": 10, "waiting": 1}
        w.store.come_back()
        w.publish(11)
        await trio.sleep(MOMENT)
        w.store.at_once = True
        w.store.finish_all()
        w.publish(12)
        await trio.sleep(1)
        assert w.stored == list(range(13))
        w.publish(13)
        await trio.sleep(MOMENT)
        assert w.stored == list(range(14))
        assert w.acknowledged(*range(14))
        assert w.counters() == {"stored": 14, "spooled": w.group.shipper.spooled}
        assert not w.group.shipper.spooling
    assert not list_segments(tmp_path)


def list_segments(directory: Path) -> list[Path]:
    return list(directory.glob("*.seg"))


async def test_killed_in_an_outage_everything_acknowledged_comes_again_in_order(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    """Twice, with new messages behind what the killed ones left."""
    async with world(tmp_path, ack="store") as w:
        w.store.at_once = False
        w.publish(0, 1)
        await trio.sleep(MOMENT)
        w.store.go_away()
        w.publish(2, 3)
        await trio.sleep(MOMENT)
        assert w.acknowledged(0, 1, 2, 3)
    async with world(tmp_path, ack="store") as w:
        w.store.go_away()
        w.publish(4, 5)
        await trio.sleep(MOMENT)
        assert w.acknowledged(4, 5)
        assert w.stored == []
        w.store.come_back()
        w.store.at_once = False
        await trio.sleep(MOMENT)
        w.store.finish()  # the first record of the spool, no more
        await trio.sleep(MOMENT)
        assert w.stored == [0, 1, 2, 3, 4, 5]
    async with world(tmp_path, ack="store") as w:
        w.publish(6)
        await trio.sleep(MOMENT)
        assert w.stored == [2, 3, 4, 5, 6], "what was confirmed does not come again"
        assert w.acknowledged(6)
        w.publish(7)
        await trio.sleep(MOMENT)
        assert w.stored[-1] == 7
    async with world(tmp_path) as w:
        await trio.sleep(1)
        assert w.stored == []


async def test_outages_follow_each_other_while_the_spool_drains(autojump_clock: MockClock, tmp_path: Path) -> None:
    """The store comes and goes in the middle of everything; each life ends with a kill. Confirmed is never repeated
    within a life, order always holds."""
    confirmed: list[int] = []
    number = 0
    acknowledged: set[int] = set()
    for life in range(6):
        async with world(tmp_path, ack="store") as w:
            w.store.at_once = False
            for step in range(12):
                w.publish(*range(number, number + 5))
                number += 5
                await trio.sleep(MOMENT)
                if (step + life) % 4 == 1:
                    w.store.go_away()
                elif (step + life) % 4 == 3:
                    w.store.come_back()
                await trio.sleep(MOMENT * (step % 3))
                if w.store.trouble() is None:
                    w.store.finish(min(2, len(w.store.waiting)))
            waits = len(w.store.waiting)
            given = [[int(m.payload) for m in batch] for batch in w.store.batches]
            acknowledged |= {n for n in w.answers if w.acknowledged(n)}
            assert w.stored == sorted(set(w.stored)), "in order, nothing twice"
            confirmed += [n for batch in given[: len(given) - waits] for n in batch]
    async with world(tmp_path, ack="store") as w:
        await trio.sleep(1)
        confirmed += w.stored
    assert acknowledged <= set(confirmed) <= set(range(number))
    firsts = list(dict.fromkeys(confirmed))
    assert firsts == sorted(firsts), "first occurrences are in order"
    assert len(acknowledged) > number * 0.8


async def test_a_store_that_is_merely_slow_is_helped_by_the_spool(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path, ack="store", ack_timeout=5) as w:
        w.store.at_once = False
        w.publish(1, 2)
        await trio.sleep(4.9)
        assert w.waiting() == [1, 2]
        await trio.sleep(0.2)
        assert w.acknowledged(1, 2)
        assert w.counters("timed_out", "spool_messages") == {"timed_out": 0, "spool_messages": 2}
        w.store.at_once = True
        w.publish(3)
        w.store.finish_all()
        await trio.sleep(MOMENT)
        assert w.stored == [1, 2, 3]
        assert w.acknowledged(3)
        assert w.counters() == {"stored": 3}


async def test_a_full_spool_slows_publishers_drops_qos_0_and_recovers(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    options = {"ack": "store", "ack_timeout": 60, "window_messages": 10}
    async with world(tmp_path, spool_bytes=1 << 20, **options) as w:
        w.store.go_away()
        sent = 0
        while not w.waiting():
            w.publish(*range(sent, sent + 10), size=1000)
            sent += 10
            await trio.sleep(MOMENT)
        w.publish(*range(sent, sent + 20), size=1000)
        w.publish(sent + 20, qos=0)
        sent += 20
        await trio.sleep(MOMENT)
        assert len(w.waiting()) > 15
        assert w.counters("held", "dropped_qos0") == {"held": 20, "dropped_qos0": 1}
        assert sum(path.stat().st_size for path in list_segments(tmp_path)) <= 1 << 20
        await trio.sleep(30)
        assert len(w.waiting()) > 15
        w.store.come_back()
        await trio.sleep(1)
        assert w.acknowledged(*range(sent))
        assert w.stored == list(range(sent))
        assert w.counters("stored", "timed_out") == {"stored": sent, "timed_out": 0}


async def test_a_spool_that_stays_full_answers_in_the_negative_in_the_end(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(log: SpoolLog, records: list[SpoolRecord]) -> None:
        raise StoreError("no space")

    async with world(tmp_path, ack="store", ack_timeout=10) as w:
        monkeypatch.setattr(SpoolLog, "append", fail)
        w.store.go_away()
        w.publish(1, 2)
        await trio.sleep(9.9)
        assert w.waiting() == [1, 2]
        await trio.sleep(0.2)
        assert held(w.answers[1]).refused is NO
        assert w.counters("timed_out") == {"timed_out": 2}
        w.store.come_back()
        await trio.sleep(1)
        assert w.stored == [1, 2], "they were taken, and reach the store though the disk is broken"
        w.publish(3)
        await trio.sleep(1)
        assert w.acknowledged(3)


async def test_stopped_in_an_outage_everything_is_in_the_spool(
    autojump_clock: MockClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        w.store.at_once = False
        w.publish(0)
        await trio.sleep(MOMENT)
        w.publish(1)
        w.store.go_away()
        w.publish(2)
        before = trio.current_time()
        await w.group.stop()
        assert trio.current_time() - before < 0.1, "it does not wait for the store"
    assert caplog.records == []
    async with world(tmp_path) as w:
        await trio.sleep(MOMENT)
        assert w.stored == [0, 1, 2]


async def test_stopped_while_the_store_is_there_nothing_is_left(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.store.go_away()
        w.publish(*range(10))
        await trio.sleep(MOMENT)
        w.store.come_back()
        await trio.sleep(MOMENT)
        w.publish(10)
        await w.group.stop()
        assert w.stored == list(range(11))
        assert w.store.stopped
    async with world(tmp_path) as w:
        assert w.spool.messages == 0


async def test_what_the_spool_cannot_give_back_is_counted_and_holds_nothing_up(
    autojump_clock: MockClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, ack="store") as w:
        w.store.go_away()
        for number in range(4):
            w.publish(number)
            await trio.sleep(MOMENT)
        (file,) = list_segments(tmp_path)
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] + b"?" + data[len(data) // 2 + 1 :])
        w.store.come_back()
        await trio.sleep(1)
        w.publish(4)
        await trio.sleep(1)
        assert w.stored in ([0, 1, 3, 4], [0, 2, 3, 4])
        assert w.acknowledged(4)
        assert w.counters("stored", "failed", "spool_lost", "spool_messages") == {
            "stored": 4, "failed": 0, "spool_lost": 1, "spool_messages": 0,
        }  # fmt: skip
    assert "1 messages could not be read back" in caplog.text


async def test_a_spool_that_cannot_be_opened_is_one_plain_error(autojump_clock: MockClock, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"")
    spool = Spool(tmp_path / "s", max_bytes=1 << 20)
    group = ArchiveGroup(ArchiveGroupOptions(name="G", on_outage="spool"), FakeStore(), FakeHost(), spool)
    with pytest.raises(StoreError, match="cannot be opened"):
        await group.run()
    await group.stop()
