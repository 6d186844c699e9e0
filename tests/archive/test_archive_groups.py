"""Archive groups: what they want, their window, held acknowledgements, shipping and stopping."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mqtt_trio.archive.groups import ArchiveGroup, ArchiveGroupOptions, build_groups
from mqtt_trio.archive.shipping import BATCH, LINGER
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import FrameRun, Hold
from mqtt_trio.errors import ConfigError, StoreError
from mqtt_trio.protocol.codes import ProtocolVersion
from tests.archive_support import FakeHost, FakeStore, held, run_of, running


def make_group(window_messages: int = 100_000, window_bytes: int = 1 << 26) -> tuple[ArchiveGroup, FakeStore, FakeHost]:
    options = ArchiveGroupOptions(name="G", window_messages=window_messages, window_bytes=window_bytes)
    store, host = FakeStore(), FakeHost()
    return ArchiveGroup(options, store, host), store, host


def test_route_is_one_object_for_what_any_filter_matches() -> None:
    group = ArchiveGroup(ArchiveGroupOptions(name="G", filter=("a/+", "b/#")), FakeStore(), FakeHost())
    assert group.route("a/1") is group.route("a/2") is group.route("b") is group.route("b/c/d") is group
    assert group.route("a") is None
    assert group.route("a/1/2") is None


def test_sys_topics_are_never_wanted() -> None:
    group = ArchiveGroup(ArchiveGroupOptions(name="G", filter=("#", "+/x", "$SYSTEM/#")), FakeStore(), FakeHost())
    assert group.route("$SYS/broker/uptime") is None
    assert group.route("$SYS") is None
    assert group.route("$SYSTEM/a") is group
    assert group.route("plain") is group


async def test_runs_and_messages_are_shipped_in_order_and_once(autojump_clock: MockClock) -> None:
    group, store, host = make_group()
    async with running(group):
        group.take_run(run_of(b"1", b"2"))
        group.take(Message("t", b"3"))
        group.take_run(run_of(b"4", qos=1, version=ProtocolVersion.MQTT_3_1_1))
        assert store.batches == []
        await trio.sleep(2 * LINGER)
        assert [len(batch) for batch in store.batches] == [4], "a burst is one batch"
        assert store.payloads == [b"1", b"2", b"3", b"4"]
        first = store.batches[0][0]
        assert (first.topic_name, first.qos, first.client_id, first.published_at) == ("t", 0, "c", 5.0)
        group.take(Message("t", b"5"))
        await trio.sleep(2 * LINGER)
        assert store.payloads[4:] == [b"5"]
        store.finish(2)
        assert {name: value for name, value in group.counters().items() if value} == {"stored": 5}
    assert host.calls == []


async def test_long_bursts_are_cut_into_batches(autojump_clock: MockClock) -> None:
    group, store, _ = make_group()
    async with running(group):
        payloads = [b"%d" % n for n in range(2 * BATCH + 500)]
        group.take_run(run_of(*payloads))
        group.take(Message("t", b"last"))
        await trio.sleep(2 * LINGER)
        assert [len(batch) for batch in store.batches] == [BATCH, BATCH, 500, 1]
        assert store.payloads == [*payloads, b"last"]
        store.finish(4)
        assert (group.waiting_messages, group.waiting_bytes) == (0, 0)


def test_full_window_drops_qos_0_and_counts_whole_runs() -> None:
    group, _, _ = make_group(window_messages=5)
    assert group.take_run(run_of(*[b"x"] * 4)) is None
    assert group.take_run(run_of(*[b"y"] * 3)) is None
    assert group.dropped_qos0 == 3
    assert group.take(Message("t")) is None
    assert group.waiting_messages == 5
    assert group.take(Message("t")) is None
    assert group.dropped_qos0 == 4
    assert group.waiting_messages == 5


def test_run_larger_than_the_window_passes_an_empty_one() -> None:
    group, _, _ = make_group(window_messages=5)
    assert group.take_run(run_of(*[b"x"] * 9)) is None
    assert (group.waiting_messages, group.dropped_qos0) == (9, 0)


def test_bytes_bound_the_window_as_well() -> None:
    group, _, _ = make_group(window_bytes=65_536)
    group.take(Message("t", bytes(60_000)))
    assert group.take(Message("t", bytes(6_000))) is None
    assert group.dropped_qos0 == 1
    assert isinstance(group.take(Message("t", bytes(6_000), 1)), Hold)
    assert group.waiting_bytes == 66_258


async def test_held_acknowledgements_go_out_in_order_as_room_comes(autojump_clock: MockClock) -> None:
    group, store, host = make_group(window_messages=2)
    released: list[int] = []
    async with running(group):
        assert group.take(Message("t", b"0", 1)) is None
        assert group.take_run(run_of(b"1", qos=1)) is None
        await trio.sleep(2 * LINGER)
        answers = [group.take(Message("t", b"2", 2)), group.take_run(run_of(b"3", qos=1))]
        await trio.sleep(2 * LINGER)
        answers.append(group.take_run(run_of(b"4", qos=2)))
        for number, answer in enumerate(answers, 2):
            held(answer).when_released(lambda number=number: released.append(number))  # type: ignore[misc]
        await trio.sleep(2 * LINGER)
        assert (released, host.calls, group.held) == ([], [], 3)
        assert store.payloads == [b"0", b"1", b"2", b"3", b"4"], "held messages are taken all the same"
        store.finish()  # 0 and 1 are stored: 2 and 3 are inside the window now
        await wait_all_tasks_blocked()
        assert (released, host.calls) == ([2, 3], ["flush"]), "one flush for the burst"
        store.finish(2)
        await wait_all_tasks_blocked()
        assert (released, host.calls) == ([2, 3, 4], ["flush", "flush"])
        assert all(held(answer).refused is None for answer in answers)


async def test_hard_bound_stops_publishers_until_the_window_has_room(autojump_clock: MockClock) -> None:
    group, store, host = make_group(window_bytes=65_536)
    async with running(group):
        for _ in range(8):  # 20,129 bytes each: full after 3, hard bound after 6
            group.take(Message("t", bytes(20_000), 1))
            await trio.sleep(2 * LINGER)
        assert host.calls == ["stop"]
        store.finish(4)
        await wait_all_tasks_blocked()
        assert host.calls == ["stop", "flush"], "still fuller than the window"
        store.finish()
        await wait_all_tasks_blocked()
        assert host.calls == ["stop", "flush", "resume", "flush"]
        for _ in range(4):
            group.take(Message("t", bytes(20_000), 1))
        assert host.calls[4:] == ["stop"], "and again"


async def test_held_message_larger_than_the_window_is_released_when_it_is_next(autojump_clock: MockClock) -> None:
    group, store, _ = make_group(window_bytes=65_536)
    async with running(group):
        group.take(Message("t", b"small", 1))
        await trio.sleep(2 * LINGER)
        hold = held(group.take(Message("t", bytes(100_000), 1)))
        store.finish()
        await wait_all_tasks_blocked()
        assert hold.released


async def test_failures_are_counted_and_logged_with_the_first_reason(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    group, store, _ = make_group()
    async with running(group):
        for payload in (b"1", b"2"):
            group.take_run(run_of(payload, payload, payload))
            await trio.sleep(2 * LINGER)
        store.finish(outcome={0: StoreError("too large"), 2: StoreError("other")})
        store.finish(outcome={1: StoreError("third")})
        await wait_all_tasks_blocked()
        assert (group.shipper.stored, group.shipper.failed, group.waiting_messages) == (3, 3, 0)
    assert [record.getMessage() for record in caplog.records] == ["archive group G: 3 messages not stored: too large"]


async def test_unreadable_run_costs_itself_only(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    group, store, _ = make_group()
    async with running(group):
        group.take_run(FrameRun(b"\x30\x7f\x00", 2, 0, ProtocolVersion.MQTT_5_0, "c", 0.0))
        group.take_run(run_of(b"good"))
        await trio.sleep(2 * LINGER)
        assert store.payloads == [b"good"]
        store.finish()
        assert (group.shipper.stored, group.shipper.failed) == (1, 2)
        assert (group.waiting_messages, group.waiting_bytes) == (0, 0)
    assert "a run of 2 frames is unreadable" in caplog.text


async def test_stop_ships_and_waits_for_the_store(autojump_clock: MockClock) -> None:
    group, store, host = make_group(window_messages=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: group.run(task_status=task_status))
        group.take(Message("t", b"1", 1))
        hold = held(group.take(Message("t", b"2", 1)))
        nursery.start_soon(group.stop)
        await wait_all_tasks_blocked()
        assert trio.current_time() == 0.0, "nothing lingers at the end"
        assert (store.payloads, store.stopped) == ([b"1", b"2"], False)
        store.finish()
    assert store.stopped
    assert hold.released
    assert host.calls == ["flush"]
    assert group.shipper.stored == 2
    await group.stop()  # a second time: nothing left to do


async def test_cancelled_stop_says_what_is_not_stored(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    group, store, _ = make_group()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: group.run(task_status=task_status))
        group.take_run(run_of(b"1", b"2"))
        with trio.move_on_after(5):
            await group.stop()
    assert trio.current_time() == 5.0
    assert store.payloads == [b"1", b"2"]
    assert "archive group G: stopped with 2 messages not stored" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_store_that_cannot_be_opened_is_one_plain_error() -> None:
    group = ArchiveGroup(ArchiveGroupOptions(name="G"), FakeStore("no room at /x"), FakeHost())
    with pytest.raises(StoreError, match="no room at /x"):
        await group.run()
    await group.stop()


def test_groups_with_one_target_store_a_message_once() -> None:
    options = [
        ArchiveGroupOptions(name="A", store="kafka", filter="a/#", window_messages=10),
        ArchiveGroupOptions(name="B", store="KAFKA", filter=["a/#", "b/#"], kafka_topic="mqtt.archive"),
        ArchiveGroupOptions(name="C", store="KAFKA", kafka_topic="mqtt.sensors"),
        ArchiveGroupOptions(name="D", filter="a/#"),
        ArchiveGroupOptions(name="E", filter="a/#"),
        ArchiveGroupOptions(name="F", enabled=False),
        ArchiveGroupOptions(name="N", store="NONE"),
    ]
    made: list[str] = []

    def make_store(group: ArchiveGroupOptions) -> FakeStore:
        made.append(group.name)
        return FakeStore()

    groups = build_groups(options, make_store, FakeHost())
    assert made == [group.options.name for group in groups] == ["A+B", "C", "D", "E"]
    assert groups[0].options.filter == ("a/#", "b/#")
    assert groups[0].options.window_messages == 100_000
    assert groups[0].describe() == "A+B: a/#, b/# -> a fake"


def test_groups_that_contradict_each_other_are_named() -> None:
    options = [
        ArchiveGroupOptions(name="A", store="KAFKA"),
        ArchiveGroupOptions(name="B", store="KAFKA", timestamp_format="epoch_ms", ack="store"),
        ArchiveGroupOptions(name="A"),
    ]
    with pytest.raises(ConfigError) as caught:
        build_groups(options, lambda group: FakeStore(), FakeHost())
    assert caught.value.problems == (
        "ArchiveGroups[1].TimestampFormat: 'epoch_ms', but group 'A' writes to the same Kafka topic 'mqtt.archive'"
        " with 'iso'",
        "ArchiveGroups[1].Ack: 'store', but group 'A' writes to the same Kafka topic 'mqtt.archive' with 'none'",
        "ArchiveGroups[2].Name: another group is called 'A'",
    )
