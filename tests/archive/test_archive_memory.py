"""The archive store in memory: bounds in bytes and time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio
from trio.testing import MockClock

from mqtt_trio.archive.memory import MemoryStore
from mqtt_trio.archive.store import ArchiveStore, Outcome
from mqtt_trio.broker.message import Message
from tests.archive.store_suite import check_archive_store


async def test_memory_store_passes_the_suite() -> None:
    def make() -> tuple[ArchiveStore, Callable[[], Awaitable[Sequence[Message]]]]:
        store = MemoryStore()

        async def read() -> list[Message]:
            return store.messages()

        return store, read

    await check_archive_store(make)


def test_oldest_messages_make_room() -> None:
    store, outcomes = MemoryStore(max_size=1000), list[Outcome]()
    messages = [Message("t", bytes(171)) for _ in range(5)]  # 300 bytes each
    store.submit(messages[:2], outcomes.append)
    store.submit(messages[2:], outcomes.append)
    assert outcomes == [{}, {}]
    assert [id(message) for message in store.messages()] == [id(message) for message in messages[2:]]
    assert store.size == 900


def test_message_larger_than_the_store_fails_alone() -> None:
    store, outcomes = MemoryStore(max_size=1000), list[Outcome]()
    store.submit([Message("t", b"1"), Message("t", bytes(1000)), Message("t", b"3")], outcomes.append)
    assert [message.payload for message in store.messages()] == [b"1", b"3"]
    assert list(outcomes[0]) == [1]
    assert "1129 bytes" in str(outcomes[0][1])


async def test_retention_lets_go_to_the_second(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    store = MemoryStore(retention=60, clock=trio.current_time)
    await nursery.start(store.run)
    for instant in (0.0, 30.0, 100.0):
        await trio.sleep_until(instant)
        store.submit([Message("t", published_at=instant)], lambda outcome: None)
        if instant == 30.0:
            await trio.sleep_until(59.0)
            assert [message.published_at for message in store.messages()] == [0.0, 30.0]
            await trio.sleep_until(61.0)
            assert store.size == Message("t").size
    await trio.sleep_until(161.0)
    assert store.size == 0
    await store.stop()
