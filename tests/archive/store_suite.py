"""What every archive store must do; `gateways.kafka.archive` is held to it as well."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from mqtt_trio.archive.store import ArchiveStore, Outcome
from mqtt_trio.broker.message import Message
from mqtt_trio.protocol.packets import MessageProperties

MakeStore = Callable[[], tuple[ArchiveStore, Callable[[], Awaitable[Sequence[Message]]]]]
"""Returns a new, empty store, and what reads all of it once it has stopped, in the order of storing."""

LIMIT = 30.0
"""Seconds until a store counts as stuck."""

SAMPLES = (
    Message("a", b"", client_id="", published_at=1_700_000_000.0),
    Message("a/b", bytes(range(256)), 1, True, client_id="dévice", published_at=1_700_000_000.125),
    Message(
        "$other/ü/\U0001f600",
        b"\xff" * 70_000,
        2,
        properties=MessageProperties(
            payload_format_indicator=0,
            message_expiry_interval=4_294_967_295,
            content_type="text/plain; charset=ü",
            response_topic="reply/to",
            correlation_data=b"\x00\xff",
            user_properties=(("b", "1"), ("a", "\U0001f600"), ("b", "")),
        ),
        client_id="c",
        published_at=1_700_000_000.25,
    ),
    Message("a", b"x", properties=MessageProperties(payload_format_indicator=1), published_at=1_700_000_000.5),
)


async def check_archive_store(make: MakeStore) -> None:
    """Run the whole suite; `make` is called once for each check."""
    await _keeps_everything_in_order(make)
    await _stops_empty_and_closes_when_cancelled(make)


async def _keeps_everything_in_order(make: MakeStore) -> None:
    store, read = make()
    assert store.describe()
    batches = [list(SAMPLES), [], *([Message("n", b"%d" % n, published_at=1_700_000_001.0)] for n in range(300))]
    outcomes: list[tuple[int, Outcome]] = []
    first_done = trio.Event()
    home = trio.lowlevel.current_trio_token()

    def done(number: int, outcome: Outcome) -> None:
        assert trio.lowlevel.current_trio_token() is home, "`done` belongs on the Trio thread"
        outcomes.append((number, outcome))
        first_done.set()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            for number, batch in enumerate(batches):
                store.submit(batch, lambda outcome, number=number: done(number, outcome))  # type: ignore[misc]
            await first_done.wait()
            await store.stop()
    assert outcomes == [(number, {}) for number in range(len(batches))], "`done` once for each, in order"
    assert list(await read()) == [message for batch in batches for message in batch]


async def _stops_empty_and_closes_when_cancelled(make: MakeStore) -> None:
    for cancelled in (False, True):
        store, read = make()
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                if cancelled:
                    nursery.cancel_scope.cancel()
                else:
                    await store.stop()
        if not cancelled:
            assert list(await read()) == []
