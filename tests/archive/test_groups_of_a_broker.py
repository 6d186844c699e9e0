"""What clients are told about messages that archive groups take [K7, K9, K10], over a whole broker in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mqtt_trio.archive.groups import ArchiveGroup, ArchiveGroupOptions, build_groups
from mqtt_trio.errors import StoreError
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.testing import ConnectionEndedError, MemoryBroker, TestClient
from tests.archive_support import FakeStore

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


@attrs.define
class Archives:
    """Groups of one broker and their fake stores, by name."""

    groups: dict[str, ArchiveGroup]
    stores: dict[str, FakeStore]

    async def finish(self, name: str) -> None:
        """Let the store of a group confirm what it has."""
        await trio.sleep(0.01)
        self.stores[name].finish_all()
        await wait_all_tasks_blocked()


@asynccontextmanager
async def archived(broker: MemoryBroker, *options: ArchiveGroupOptions) -> AsyncIterator[Archives]:
    stores = {group.name: FakeStore() for group in options}
    groups = build_groups(options, lambda group: stores[group.name], broker.host)
    async with trio.open_nursery() as nursery:
        for group in groups:
            await nursery.start(group.run)
            broker.broker.add_tap(group)
        yield Archives({group.options.name: group for group in groups}, stores)
        nursery.cancel_scope.cancel()


def group(name: str, **options: Any) -> ArchiveGroupOptions:
    return ArchiveGroupOptions(name=name, **options)


@attrs.define
class Attempt:
    """A publish that waits for its answer."""

    code: ReasonCode | None = None
    ended: bool = False

    async def run(self, client: TestClient, topic: str, qos: int) -> None:
        try:
            self.code = await client.publish(topic, b"x", qos=qos)
        except ConnectionEndedError:
            self.ended = True


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("version", [V311, V5])
async def test_a_message_waits_for_every_group_that_wants_it_and_is_in_each_once(
    autojump_clock: MockClock, memory_broker: MemoryBroker, version: ProtocolVersion, qos: int
) -> None:
    async with archived(
        memory_broker,
        group("All"),
        group("A", filter="a/#", ack="store"),
        group("B", filter=["+/b", "a/b"], ack="store", on_outage="reject"),
        group("Other", filter="other", ack="store"),
    ) as archives:
        client = await memory_broker.connect("c", version=version)
        attempt = Attempt()
        memory_broker.nursery.start_soon(attempt.run, client, "a/b", qos)
        await archives.finish("B")
        assert attempt == Attempt()
        await archives.finish("A")
        await wait_all_tasks_blocked()
        assert attempt.code is ReasonCode.SUCCESS
        assert {name: len(store.payloads) for name, store in archives.stores.items()} == {
            "All": 1, "A": 1, "B": 1, "Other": 0,
        }  # fmt: skip


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_wait_that_is_too_long_ends_with_a_reason_or_with_the_connection(
    autojump_clock: MockClock, memory_broker: MemoryBroker, qos: int
) -> None:
    async with archived(memory_broker, group("G", ack="store")) as archives:
        new, old = [await memory_broker.connect(f"c{version}", version=version) for version in (V5, V311)]
        attempts = Attempt(), Attempt()
        for client, attempt in zip((new, old), attempts, strict=True):
            memory_broker.nursery.start_soon(attempt.run, client, "t", qos)
        await trio.sleep(29.9)
        assert attempts == (Attempt(), Attempt())
        await trio.sleep(0.2)
        assert attempts == (Attempt(code=ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR), Attempt(ended=True))
        assert archives.groups["G"].timed_out == 2
        await archives.finish("G")
        attempt = Attempt()
        memory_broker.nursery.start_soon(attempt.run, new, "t", qos)
        await archives.finish("G")
        await wait_all_tasks_blocked()
        assert attempt.code is ReasonCode.SUCCESS, "the identifier is free again"


async def test_what_the_store_refuses_is_told(autojump_clock: MockClock, memory_broker: MemoryBroker) -> None:
    async with archived(memory_broker, group("G", ack="store")) as archives:
        client = await memory_broker.connect("c")
        attempt = Attempt()
        memory_broker.nursery.start_soon(attempt.run, client, "t", 1)
        await trio.sleep(0.01)
        archives.stores["G"].finish(outcome={0: StoreError("too large")})
        await wait_all_tasks_blocked()
        assert attempt.code is ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR


@pytest.mark.parametrize("qos", [1, 2])
async def test_reject_tells_the_publisher_and_no_subscriber(
    autojump_clock: MockClock, memory_broker: MemoryBroker, qos: int
) -> None:
    async with archived(memory_broker, group("G", filter="kept/#", on_outage="reject")) as archives:
        archives.stores["G"].go_away()
        reader = await memory_broker.connect("reader")
        await reader.subscribe("#")
        new, old = [await memory_broker.connect(f"c{version}", version=version) for version in (V5, V311)]
        for _ in range(3):
            assert await new.publish("kept/t", b"x", qos=qos) is ReasonCode.QUOTA_EXCEEDED
        with pytest.raises(ConnectionEndedError):
            await old.publish("kept/t", b"x", qos=qos)
        assert await reader.nothing_waits()
        await new.publish("kept/t", b"QoS 0 goes on")
        assert await new.publish("plain", b"and others", qos=qos) is ReasonCode.SUCCESS
        assert [message.payload for message in await reader.next_messages(2)] == [b"QoS 0 goes on", b"and others"]
        counters = archives.groups["G"].counters()
        assert (counters["rejected"], counters["dropped"]) == (4, 1)
        archives.stores["G"].come_back()
        assert await new.publish("kept/t", b"x", qos=qos) is ReasonCode.SUCCESS


@pytest.mark.parametrize("version", [V311, V5])
async def test_drop_lets_everything_through_and_counts(
    autojump_clock: MockClock, memory_broker: MemoryBroker, version: ProtocolVersion
) -> None:
    async with archived(memory_broker, group("G", on_outage="drop", ack="store")) as archives:
        archives.stores["G"].go_away()
        client = await memory_broker.connect("c", version=version)
        for qos in (0, 1, 2, 1):
            assert await client.publish("t", b"x", qos=qos) is ReasonCode.SUCCESS
        await client.ping()
        assert archives.groups["G"].dropped == 4
        assert archives.stores["G"].payloads == []
