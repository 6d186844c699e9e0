"""The store's thread dies, cannot be started, or never comes back: that is a commit that failed, or one that lasts."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import attrs
import pytest
import trio
from trio.testing import MockClock

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.store import MemoryStore, Store, StoredState
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import ConnAck, Connect, PubAck, Publish
from mqtt_trio.server.clients import Clients
from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.storage import RETRY_LAST, SLOW_AFTER, DiedError, InThread, RunSync, Storage
from mqtt_trio.testing import ConnectionEndedError, Pipe, TestClient, open_memory_broker
from mqtt_trio.testing.stores import Fault, FaultyStore

T = TypeVar("T")
V5 = ProtocolVersion.MQTT_5_0
LIMIT = 30
DEATHS = [RuntimeError("planned: a bug"), MemoryError(), SystemExit(3), GeneratorExit(), KeyError("frame")]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("fault", [Fault.DIES, Fault.DIES_AFTER])
@pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)
async def test_a_commit_that_dies_is_one_that_failed(
    fault: Fault, death: BaseException, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    disk = MemoryStore()
    store = FaultyStore(disk, dies_of=death)
    async with open_memory_broker(store=store) as memory:
        kept = await memory.connect("kept", session_expiry_interval=3600)
        await kept.subscribe("kept/#", qos=2)
        await kept.cut()
        publisher = await memory.connect("publisher")
        old = await memory.connect("old", version=ProtocolVersion.MQTT_3_1_1)
        assert await publisher.publish("kept/1", b"before", qos=1) is ReasonCode.SUCCESS

        for qos in (1, 2):
            store.faults.append(fault)
            assert await publisher.publish(f"kept/{qos}", b"refused", qos=qos) is ReasonCode.QUOTA_EXCEEDED
            await trio.sleep(RETRY_LAST)
            assert memory.broker.journal.failing is None, "the same was offered again"
        store.faults.append(fault)
        with pytest.raises(ConnectionEndedError):
            await old.publish("kept/1", b"refused", qos=1)
        await trio.sleep(RETRY_LAST)

        assert await publisher.publish("kept/2", b"behind", qos=2) is ReasonCode.SUCCESS
        assert memory.broker.metrics.store_failures == 3
    assert errors(caplog)[0].startswith("session store (memory, with faults) failed unexpectedly: ")
    assert type(death).__name__ in errors(caplog)[0]
    assert "refused until it takes them again" in errors(caplog)[0]
    assert caplog.records[0].exc_info is not None, "where it was is what matters of a bug"
    async with open_memory_broker(store=disk) as memory:
        again = await memory.reconnect(kept)
        assert [message.payload for message in await again.next_messages(2)] == [b"before", b"behind"]
        assert await again.nothing_waits()


async def test_a_store_that_always_dies_is_told_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaultyStore(MemoryStore())
    async with open_memory_broker(store=store) as memory:
        kept = await memory.connect("kept", session_expiry_interval=3600)
        await kept.subscribe("kept/#", qos=1)
        await kept.cut()
        store.faults.extend([Fault.DIES] * 10_000)
        publisher = await memory.connect("publisher")
        for _ in range(50):
            assert await publisher.publish("kept/1", b"x", qos=1) is ReasonCode.QUOTA_EXCEEDED
            await trio.sleep(1)
        assert memory.broker.metrics.store_failures < 25, "tries become rare"
        assert len(errors(caplog)) == 1
        await publisher.subscribe("plain")
        assert await publisher.publish("plain", b"x", qos=2) is ReasonCode.SUCCESS, "nobody has to keep it"
        assert (await publisher.next_message()).payload == b"x"


class Unloadable(MemoryStore):
    def load(self) -> StoredState:
        raise KeyError("sessions")


class Unclosable(MemoryStore):
    def close(self) -> None:
        raise MemoryError


async def test_a_load_that_dies_ends_the_start_with_a_reason(autojump_clock: MockClock) -> None:
    with pytest.raises(DiedError, match=r"session store \(memory\) failed unexpectedly: KeyError: 'sessions'"):
        await Storage(Broker(Limits(), random_id=lambda: "x", journal=Journal()), Unloadable()).load()


async def test_a_close_that_dies_is_told(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with open_memory_broker(store=Unclosable()) as memory:
        await memory.stop()
    (error,) = errors(caplog)
    assert (
        error == "session store (memory) failed unexpectedly: MemoryError while it was closed; what was committed stays"
    )


# --- with a way of asking of its own ---


@attrs.define
class Served:
    """A broker whose store is asked in some way of the test's."""

    clients: Clients
    storage: Storage
    nursery: trio.Nursery

    async def connect(self, client_id: str, *, kept: bool = False) -> TestClient:
        pipe = Pipe()
        self.nursery.start_soon(self.clients.serve, pipe.broker, ListenerOptions(port=0), "memory")
        client = TestClient(pipe.client, V5, pipe=pipe)
        expiry = 3600 if kept else None
        await client.send(Connect(client_id=client_id, protocol_version=V5, session_expiry_interval=expiry))
        client.connack = await client.expect(ConnAck)
        return client


@asynccontextmanager
async def served(store: Store, run_sync: RunSync) -> AsyncIterator[Served]:
    broker = Broker(Limits(), random_id=lambda: "x", journal=Journal())
    storage = Storage(broker, store, run_sync)
    await storage.load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.run)
        yield Served(Clients(broker), storage, nursery)
        nursery.cancel_scope.cancel()


async def leave_kept_session(node: Served) -> None:
    kept = await node.connect("kept", kept=True)
    await kept.subscribe("kept")
    await kept.cut()


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)
async def test_the_thread_dies(death: BaseException) -> None:
    store = FaultyStore(MemoryStore(), dies_of=death)
    with trio.fail_after(LIMIT):
        async with served(store, InThread()) as node:
            await leave_kept_session(node)
            publisher = await node.connect("publisher")
            store.faults.append(Fault.DIES)
            assert await publisher.publish("kept", b"1", qos=1) is ReasonCode.QUOTA_EXCEEDED
            while await publisher.publish("kept", b"2", qos=1) is not ReasonCode.SUCCESS:
                pass  # until it is tried again
            await node.storage.stop()
    assert len(store.load().deliveries) == 1


async def test_no_thread_can_be_started(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    can_start = True

    async def run_sync(function: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint()
        if not can_start:
            raise RuntimeError("can't start new thread")
        return function()

    async with served(MemoryStore(), run_sync) as node:
        await leave_kept_session(node)
        publisher = await node.connect("publisher")
        can_start = False
        assert await publisher.publish("kept", b"1", qos=1) is ReasonCode.QUOTA_EXCEEDED
        can_start = True
        await trio.sleep(RETRY_LAST)
        assert await publisher.publish("kept", b"2", qos=1) is ReasonCode.SUCCESS
    (error,) = errors(caplog)
    assert error.startswith("session store (memory) cannot be asked: RuntimeError: can't start new thread; QoS 1 and 2")


async def test_a_commit_that_lasts_holds_its_messages_back_and_is_told(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    answers = trio.Event()
    answers.set()

    async def run_sync(function: Callable[[], T]) -> T:
        await answers.wait()
        await trio.lowlevel.checkpoint()
        return function()

    async with served(MemoryStore(), run_sync) as node:
        await leave_kept_session(node)
        publisher = await node.connect("publisher")
        answers = trio.Event()
        for number in (1, 2):
            await publisher.send(Publish("kept", b"x", QoS.AT_LEAST_ONCE, packet_id=number))
        await trio.sleep(SLOW_AFTER - 1)
        assert caplog.records == []
        await trio.sleep(1000)
        (warning,) = [record.getMessage() for record in caplog.records]
        assert warning.startswith(f"session store (memory) has not answered for {SLOW_AFTER:g} s")
        assert await publisher.nothing_waits(), "nothing is acknowledged, and everything else goes on"
        answers.set()
        assert [(await publisher.expect(PubAck)).packet_id for _ in range(2)] == [1, 2]
        assert [record.getMessage() for record in caplog.records][1:] == ["session store: it has answered after 1009 s"]
        for _ in range(3):
            assert await publisher.publish("kept", b"x", qos=1) is ReasonCode.SUCCESS
            await trio.sleep(2 * SLOW_AFTER)
        assert len(caplog.records) == 2, "only a commit that is out is slow"


async def test_the_thread_hangs_and_the_end_comes_all_the_same() -> None:
    store = FaultyStore(MemoryStore())
    try:
        with trio.fail_after(LIMIT):
            async with served(store, InThread()) as node:
                await leave_kept_session(node)
                publisher = await node.connect("publisher")
                store.faults.append(Fault.HANGS)
                await publisher.send(Publish("kept", b"x", QoS.AT_LEAST_ONCE, packet_id=1))
                assert await publisher.nothing_waits()
                with trio.move_on_after(0.1) as scope:
                    await node.storage.stop()
                assert scope.cancelled_caught
        assert store.load().deliveries == []
    finally:
        store.go_on.set()
