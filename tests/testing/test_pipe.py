"""The pipe alone: it is a Trio stream by Trio's own tests, and each fault does what it says."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from mqtt_trio.testing import Pipe, PipeOptions, PipeStream


async def receive_exactly(stream: PipeStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more, f"the stream ended behind {data!r}"
        data += more
    return data


@pytest.mark.parametrize(
    "options", [PipeOptions(), PipeOptions(capacity=1000), PipeOptions(capacity=3000, delay=0.001)]
)
async def test_it_is_a_stream_as_trio_understands_it(
    options: PipeOptions, autojump_clock: trio.testing.MockClock
) -> None:
    async def make() -> tuple[PipeStream, PipeStream]:
        pipe = Pipe(options)
        return pipe.client, pipe.broker

    async def make_clogged() -> tuple[PipeStream, PipeStream]:
        pipe = Pipe(options)
        await pipe.client.send_all(bytes(options.capacity))
        await pipe.broker.send_all(bytes(options.capacity))
        return pipe.client, pipe.broker

    await trio.testing.check_half_closeable_stream(make, make_clogged)


async def test_a_full_direction_stops_its_sender_and_not_the_other_one() -> None:
    pipe = Pipe(PipeOptions(capacity=10))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipe.client.send_all, bytes(range(25)))
        await trio.testing.wait_all_tasks_blocked()
        assert pipe.to_broker.waiting_size == 10
        assert pipe.to_broker.sent_size == 10
        await pipe.broker.send_all(b"free")
        assert await pipe.client.receive_some() == b"free"
        assert await receive_exactly(pipe.broker, 25) == bytes(range(25))
    assert pipe.to_broker.sent_size == 25
    assert pipe.to_broker.waiting_size == 0


async def test_more_capacity_lets_a_waiting_sender_go_on() -> None:
    pipe = Pipe(PipeOptions(capacity=1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipe.client.send_all, b"abc")
        await trio.testing.wait_all_tasks_blocked()
        pipe.to_broker.capacity = 3
    assert await pipe.broker.receive_some() == b"abc"


async def test_a_delay_is_kept_to_the_second_and_in_order(autojump_clock: trio.testing.MockClock) -> None:
    pipe = Pipe(PipeOptions(delay=5))
    start = trio.current_time()
    await pipe.client.send_all(b"first")
    pipe.to_broker.delay = 1  # does not overtake
    await pipe.client.send_all(b"second")
    await pipe.client.send_eof()
    assert await receive_exactly(pipe.broker, 11) == b"firstsecond"
    assert await pipe.broker.receive_some() == b""
    assert trio.current_time() - start == 5
    await pipe.client.aclose()
    await pipe.broker.send_all(b"not known yet")
    await trio.sleep(1)
    with pytest.raises(trio.BrokenResourceError):
        await pipe.broker.send_all(b"x")


async def test_frozen_nothing_arrives_and_thawed_everything_does(autojump_clock: trio.testing.MockClock) -> None:
    pipe = Pipe(PipeOptions(capacity=4, delay=1))
    pipe.freeze()
    assert pipe.to_broker.frozen
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipe.client.send_all, b"abcdef")
        with trio.move_on_after(3600) as silence:
            await pipe.broker.receive_some()
        assert silence.cancelled_caught
        assert pipe.to_broker.waiting_size == 4
        thawed_at = trio.current_time()
        pipe.thaw()
        assert await receive_exactly(pipe.broker, 4) == b"abcd"
        assert trio.current_time() == thawed_at  # due long ago
        assert await receive_exactly(pipe.broker, 2) == b"ef"
        assert trio.current_time() == thawed_at + 1


async def test_a_freeze_hides_that_the_other_end_has_closed() -> None:
    pipe = Pipe()
    pipe.freeze()
    await pipe.client.aclose()
    await pipe.broker.send_all(b"nobody reads this")
    assert pipe.to_client.waiting_size == 17
    pipe.thaw()
    assert await pipe.broker.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await pipe.broker.send_all(b"x")


async def test_what_was_sent_before_a_close_is_received_before_a_write_fails() -> None:
    pipe = Pipe()
    await pipe.client.send_all(b"last words")
    await pipe.client.aclose()
    await pipe.broker.send_all(b"too late")
    assert await pipe.broker.receive_some(5) == b"last "
    await pipe.broker.send_all(b"too late")
    assert await pipe.broker.receive_some(5) == b"words"
    with pytest.raises(trio.BrokenResourceError):
        await pipe.broker.send_all(b"too late")
    assert await pipe.broker.receive_some() == b""


async def test_a_waiting_sender_learns_that_the_other_end_has_closed(autojump_clock: trio.testing.MockClock) -> None:
    pipe = Pipe(PipeOptions(capacity=4, delay=1))
    await pipe.client.send_all(b"last")

    async def blocked() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await pipe.broker.send_all(bytes(5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(blocked)
        await trio.testing.wait_all_tasks_blocked()
        pipe.to_broker.delay = 3
        await pipe.client.aclose()
    assert trio.current_time() == 3
    assert await pipe.broker.receive_some() == b"last"


async def test_a_cut_loses_what_is_on_its_way_and_wakes_both_ends() -> None:
    pipe = Pipe(PipeOptions(capacity=4))
    await pipe.client.send_all(b"lost")
    pipe.freeze()
    broken: list[str] = []

    async def fails(name: str, stream: PipeStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        broken.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails, "client", pipe.client)
        nursery.start_soon(fails, "broker", pipe.broker)
        await trio.testing.wait_all_tasks_blocked()
        pipe.cut()
    assert sorted(broken) == ["broker", "client"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", range(7))
async def test_a_torn_write_arrives_up_to_the_border(
    size: int, frozen: bool, autojump_clock: trio.testing.MockClock
) -> None:
    pipe = Pipe(PipeOptions(delay=1))
    await pipe.client.send_all(b"in front")
    await pipe.broker.send_all(b"lost")
    if frozen:
        pipe.to_broker.freeze()
    pipe.to_broker.cut_after(size)
    if size:
        await pipe.client.send_all(b"abcdef")  # the writer does not know yet
    with pytest.raises(trio.BrokenResourceError):
        await pipe.client.send_all(b"g")
    with pytest.raises(trio.BrokenResourceError):
        await pipe.client.receive_some()
    pipe.to_broker.thaw()
    assert await receive_exactly(pipe.broker, 8 + size) == b"in front" + b"abcdef"[:size]
    with pytest.raises(trio.BrokenResourceError):
        await pipe.broker.receive_some()
    assert pipe.to_broker.sent_size == 8 + size


async def test_a_tear_further_on_lets_whole_writes_pass() -> None:
    pipe = Pipe()
    pipe.to_client.cut_after(5)
    await pipe.broker.send_all(b"abc")
    assert await pipe.client.receive_some() == b"abc"
    await pipe.client.send_all(b"still there")
    assert await pipe.broker.receive_some() == b"still there"
    await pipe.broker.send_all(b"def")
    assert await pipe.client.receive_some() == b"de"
    with pytest.raises(trio.BrokenResourceError):
        await pipe.client.receive_some()


async def pieces(seed: int | None) -> list[int]:
    pipe = Pipe()
    pipe.to_broker.chop(3, seed=seed)
    await pipe.client.send_all(bytes(30))
    await pipe.client.send_eof()
    sizes = []
    while data := await pipe.broker.receive_some():
        sizes.append(len(data))
    assert sum(sizes) == 30
    return sizes


async def test_pieces_are_as_large_as_asked_for_and_the_same_for_a_seed() -> None:
    assert await pieces(None) == [3] * 10
    drawn = await pieces(7)
    assert drawn == await pieces(7)
    assert drawn != await pieces(8)
    assert set(drawn) <= {1, 2, 3}
    assert len(set(drawn)) > 1


def test_impossible_faults_are_refused() -> None:
    pipe = Pipe()
    with pytest.raises(ValueError, match="1 byte or more, not 0"):
        pipe.to_broker.capacity = 0
    with pytest.raises(ValueError, match="1 byte or more, not 0"):
        pipe.to_broker.chop(0)
    with pytest.raises(ValueError, match="0 bytes or more, not -1"):
        pipe.to_broker.cut_after(-1)
    with pytest.raises(ValueError, match="'capacity' must be >= 1"):
        PipeOptions(capacity=0)
