"""`ArchiveConsumer` on a group in memory: what is stored when, who gets what, and how it ends [K14]."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from gateways.kafka import ArchiveConsumer, ArchivedMessage, member
from gateways.kafka.lag import Behind
from gateways.kafka.records import ConsumedRecord
from mqtt_trio.errors import GatewayError
from tests.gateway_support import LIMIT
from tests.gateways.memory_group import TOPIC, DeniedError, MemoryGroup, RejoinError

NOTHING = Behind(0, 0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "ATTEND_INTERVAL", 0.02)


@pytest.fixture
async def limit() -> AsyncIterator[None]:
    with trio.fail_after(LIMIT):
        yield


pytestmark = pytest.mark.usefixtures("limit")


def consumer(group: MemoryGroup, **options: object) -> ArchiveConsumer:
    return ArchiveConsumer(group="g", open_consumer=group.open, refusals=group, **options)  # type: ignore[arg-type]


async def take(source: ArchiveConsumer, count: int) -> list[str]:
    return [(await anext(source)).payload.decode() for _ in range(count)]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  it happens in a thread
        await trio.sleep(0.002)


async def test_each_message_is_stored_before_the_next_one_comes() -> None:
    group = MemoryGroup()
    for number in range(3):
        group.write(str(number))
    async with consumer(group) as source:
        assert await take(source, 1) == ["0"]
        assert group.stored == {}
        assert await take(source, 1) == ["1"]
        assert group.stored == {(TOPIC, 0): 1}
        assert await take(source, 1) == ["2"]
        assert group.stored == {(TOPIC, 0): 2}
    assert group.stored == {(TOPIC, 0): 3}  # left in order: the last one counts as processed
    assert group.consumers == []


async def test_what_is_in_hand_when_something_goes_wrong_comes_again() -> None:
    group = MemoryGroup()
    group.write("a")
    group.write("b")

    async def fail_at_b() -> None:
        async with consumer(group) as source:
            async for message in source:
                if message.payload == b"b":
                    raise KeyError

    with pytest.raises(KeyError):
        await fail_at_b()
    assert group.stored == {(TOPIC, 0): 1}
    with trio.CancelScope() as scope:
        async with consumer(group) as source:
            assert await take(source, 1) == ["b"]
            scope.cancel()
            await trio.sleep_forever()
    assert group.stored == {(TOPIC, 0): 1}
    async with consumer(group) as source:
        assert await take(source, 1) == ["b"]


async def test_cancelled_waits_lose_nothing() -> None:
    group = MemoryGroup()
    found: list[str] = []
    cancelled = 0
    async with consumer(group) as source:
        for number in range(20):
            group.write(str(number))
            with trio.move_on_after(number % 4 * 0.0005) as scope:
                found += await take(source, 1)
            cancelled += scope.cancelled_caught
        found += await take(source, 20 - len(found))
    assert found == [str(number) for number in range(20)]
    assert cancelled >= 5
    assert group.stored == {(TOPIC, 0): 20}


async def test_batches_are_stored_at_once() -> None:
    group = MemoryGroup()
    for number in range(7):
        group.write(str(number))
    sizes = []
    async with consumer(group) as source:
        async for batch in source.batches(3):
            sizes.append(len(batch))
            if sum(sizes) == 7:
                break
    assert sizes == [3, 3, 1]
    assert [offsets[TOPIC, 0] for offsets in group.history] == [3, 6, 7]


async def test_with_an_interval_nothing_waits_and_the_end_is_stored() -> None:
    group = MemoryGroup()
    for number in range(50):
        group.write(str(number))
    async with consumer(group, commit_interval=3600.0) as source:
        assert len(await take(source, 50)) == 50
        assert len(group.history) <= 1
    assert group.stored == {(TOPIC, 0): 50}


async def test_malformed_records_stall_nobody(caplog: pytest.LogCaptureFixture) -> None:
    group = MemoryGroup()
    for value in (b"\xff", "good", b"[]", b'{"topic": "a/#", "payload": ""}', b""):
        group.write(value)
    async with consumer(group) as source:
        assert await take(source, 1) == ["good"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, source, 1)
            await until(lambda: group.stored == {(TOPIC, 0): 5})  # without a message behind them
            nursery.cancel_scope.cancel()
        assert source.malformed == 4
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert lines[0].startswith(f"Kafka record {TOPIC}-0@0 holds no MQTT message and is skipped: not JSON")
    assert len(lines) == 4


async def test_a_callback_gets_malformed_records_and_may_insist() -> None:
    group = MemoryGroup()
    group.write(b"garbage")
    group.write("good")
    told: list[tuple[int, str]] = []
    fails = [RuntimeError("no disk")]

    async def note(record: ConsumedRecord, error: GatewayError) -> None:
        if fails:
            raise fails.pop()
        told.append((record.offset, str(error)))

    async with consumer(group, on_malformed=note) as source:
        with pytest.raises(RuntimeError, match="no disk"):
            await anext(source)
        assert group.stored == {}
        assert await take(source, 1) == ["good"]
    assert [offset for offset, _ in told] == [0]
    assert group.stored == {(TOPIC, 0): 2}


async def test_a_batch_ends_in_front_of_a_malformed_record() -> None:
    group = MemoryGroup()
    for value in ("a", b"garbage", "b"):
        group.write(value)
    found: list[list[bytes]] = []

    async def never_at_first(record: ConsumedRecord, error: GatewayError) -> None:
        assert found == [[b"a"]]  # what was given out before is stored by now
        assert group.stored == {(TOPIC, 0): 1}

    async with consumer(group, on_malformed=never_at_first) as source:
        async for batch in source.batches():
            found.append([message.payload for message in batch])
            if len(found) == 2:
                break
    assert found == [[b"a"], [b"b"]]


async def test_partitions_are_shared_and_nothing_comes_twice() -> None:
    group = MemoryGroup(partitions=4)
    for number in range(40):
        group.write(str(number), number % 4)
    found: dict[str, list[ArchivedMessage]] = {"one": [], "two": []}
    everything = {str(number).encode() for number in range(80)}

    def complete() -> bool:
        return {m.payload for messages in found.values() for m in messages} == everything

    async def read(name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with consumer(group) as source:
            async for message in source:
                found[name].append(message)
                if len(found[name]) == 5:
                    task_status.started()
                await trio.sleep(0.002)

    async with trio.open_nursery() as nursery:
        await nursery.start(read, "one")
        await nursery.start(read, "two")
        for number in range(40, 80):
            group.write(str(number), number % 4)
        await until(complete)
        await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert {m.kafka.partition for m in found["two"]} == {1, 3}
    total = len(found["one"]) + len(found["two"])
    assert 80 <= total <= 84, "at most the one message in hand of each partition that moved comes twice"
    for messages in found.values():
        for partition in range(4):
            offsets = [m.kafka.offset for m in messages if m.kafka.partition == partition]
            assert offsets == sorted(offsets)


async def test_nothing_is_stored_of_lost_partitions() -> None:
    group = MemoryGroup()
    for number in range(4):
        group.write(str(number))
    async with consumer(group, commit_interval=3600.0) as source:
        assert await take(source, 3) == ["0", "1", "2"]
        await until(lambda: bool(group.stored))  # once, and then not for an hour: of one record or of two
        stored = dict(group.stored)
        group.lose = True
        await until(lambda: not group.lose)
        assert await take(source, 1) == [str(stored[TOPIC, 0])]  # again, as the group knows of no more
        assert group.stored == stored
        assert source.outdated == 1


async def test_a_commit_is_repeated_after_a_rebalance() -> None:
    group = MemoryGroup()
    group.write("a")
    group.write("b")
    group.commit_errors = [RejoinError(), OSError("cut"), RejoinError()]
    async with consumer(group) as source:
        assert await take(source, 2) == ["a", "b"]
        assert group.commit_errors == []
        assert group.stored == {(TOPIC, 0): 1}


async def test_what_was_processed_last_is_stored_once_the_group_has_settled() -> None:
    group = MemoryGroup()
    group.write("a")
    async with consumer(group) as source:
        assert await take(source, 1) == ["a"]
        group.commit_errors = [RejoinError(), RejoinError()]
    assert group.commit_errors == []
    assert group.stored == {(TOPIC, 0): 1}


async def test_what_another_member_has_by_now_is_not_stored_at_the_end() -> None:
    group = MemoryGroup()
    group.write("a")
    async with consumer(group) as source:
        assert await take(source, 1) == ["a"]
        group.lose = True  # noticed by the poll behind the commit, or by an earlier one
        group.commit_errors = [RejoinError()]
    assert group.stored == {}


async def test_a_group_that_cannot_be_joined_again_keeps_nobody_at_the_end() -> None:
    group = MemoryGroup()
    group.write("a")
    async with consumer(group) as source:
        assert await take(source, 1) == ["a"]
        group.poll_errors = [OSError("broken")]
        group.commit_errors = [OSError("never asked"), RejoinError()]
    assert len(group.commit_errors) == 1
    assert group.stored == {}


async def test_kafka_and_topics_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    group = MemoryGroup()
    group.exists = False
    group.away = 2
    group.poll_errors = [OSError("broken")]
    async with consumer(group) as source:
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                assert await take(source, 1) == ["late"]

            nursery.start_soon(read)
            await until(lambda: "waits for topics that do not exist" in caplog.text)
            assert source.trouble == "OSError: nobody answers" or source.trouble is None
            group.exists = True
            group.write("late")
        assert source.trouble is None
    assert caplog.text.count("waits for topics") == 1


async def test_a_group_may_begin_at_the_end() -> None:
    group = MemoryGroup()
    group.write("old")
    async with consumer(group, start="latest") as source:
        await until(lambda: group.consumers)
        group.write("new")
        assert await take(source, 1) == ["new"]
    group.write("newer")
    async with consumer(group, start="latest") as source:  # it has an offset by now
        assert await take(source, 1) == ["newer"]


async def test_a_refusal_ends_the_loop() -> None:
    group = MemoryGroup()
    group.poll_errors = [DeniedError("topic mqtt.archive")]
    async with consumer(group) as source:
        with pytest.raises(GatewayError, match=r"consumer g is refused: DeniedError: topic mqtt.archive"):
            await anext(source)
        with pytest.raises(GatewayError):
            await anext(source)


async def test_leaving_is_bounded_while_the_thread_hangs(caplog: pytest.LogCaptureFixture) -> None:
    group = MemoryGroup()
    source = consumer(group, close_timeout=0.01)
    try:
        async with source:
            await until(lambda: group.consumers)
            group.hang.clear()
            await trio.sleep(0.25)  # into a poll
            began = trio.current_time()
        assert trio.current_time() - began < 5
        assert "its thread is left behind" in caplog.text
    finally:
        group.hang.set()
    await until(lambda: group.consumers == [])


async def test_an_error_of_ours_in_the_thread_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise AssertionError("a slip")

    monkeypatch.setattr(member.Member, "run", fail)
    async with consumer(MemoryGroup()) as source:
        with pytest.raises(GatewayError, match="thread failed: a slip"):
            await anext(source)
    assert "a slip" in caplog.text


async def test_it_is_used_once_and_inside() -> None:
    group = MemoryGroup()
    source = consumer(group)
    with pytest.raises(RuntimeError, match="async with"):
        await anext(source)
    async with source:
        pass
    with pytest.raises(RuntimeError, match="once"):
        async with source:
            pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": ""},
        {"topics": "a b"},
        {"topics": []},
        {"start": "now"},
        {"commit_interval": -1},
        {"close_timeout": -1},
    ],
)
async def test_options_that_are_none(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|expected|match"):
        ArchiveConsumer(**({"group": "g"} | wrong))  # type: ignore[arg-type]


async def test_lag_grows_while_the_program_works_on_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "LOOK_INTERVAL", 0.02)
    monkeypatch.setattr("gateways.kafka.reader_figures.LOOK_INTERVAL", 0.02)
    group = MemoryGroup()
    for number in range(5):
        group.write(str(number))
    async with consumer(group, commit_interval=60.0) as source:
        assert await take(source, 1) == ["0"]
        await until(lambda: source.lag().get((TOPIC, 0), NOTHING).records == 5)  # that in hand is not processed
        assert source.lag()[TOPIC, 0].seconds > 1e9, "the records say that they are of 1970"
        group.write("5")
        await until(lambda: source.lag()[TOPIC, 0].records == 6)
        assert await take(source, 2) == ["1", "2"]
        await until(lambda: source.lag()[TOPIC, 0].records == 4)
        assert await take(source, 3) == ["3", "4", "5"]
        group.write("6")
        assert await take(source, 1) == ["6"]
        await until(lambda: source.lag()[TOPIC, 0].records == 1)
        assert source.failed_fetch_rate == 0.0
    assert consumer(group).lag() == {}
