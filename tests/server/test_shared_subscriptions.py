"""Shared Subscriptions [MQTT5-4.8.2]: who gets a message, what waits for whom, what goes to somebody else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import trio.testing

from mqtt_trio.broker.access import AllowEverything, Principal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.store import MemoryStore
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import (
    Disconnect,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    Subscribe,
    Subscription,
    Will,
)
from mqtt_trio.testing import MemoryBroker, TestClient, open_memory_broker
from tests.wire import both_versions

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
SHARE = "$share/g/t/#"


async def members(memory: MemoryBroker, count: int, qos: int = 2, **fields: Any) -> list[TestClient]:
    """Members `m0`, `m1`, ... of the group SHARE, with sessions that last."""
    joined = []
    for number in range(count):
        client = await memory.connect(f"m{number}", session_expiry_interval=1000, **fields)
        assert await client.subscribe(SHARE, qos=qos) == (ReasonCode(qos),)
        joined.append(client)
    return joined


async def waiting(client: TestClient) -> list[Publish]:
    """The messages that a client has been sent and not looked at."""
    await client.nothing_waits()
    found = [packet for packet in client.waiting if isinstance(packet, Publish)]
    client.waiting.clear()
    return found


async def payloads(client: TestClient) -> list[bytes]:
    return [message.payload for message in await waiting(client)]


async def publish(sender: TestClient, first: int, last: int, qos: int) -> None:
    for number in range(first, last + 1):
        await sender.publish("t/x", b"%d" % number, qos=qos)


@both_versions
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_each_message_goes_to_one_member_in_turn(
    memory_broker: MemoryBroker, version: ProtocolVersion, qos: int
) -> None:
    sender = await memory_broker.connect("sender", version=version)
    group = await members(memory_broker, 3, keep_alive=0)
    other_name = await memory_broker.connect("other")
    await other_name.subscribe("$share/h/t/#")
    single = await memory_broker.connect("single")
    await single.subscribe("t/x")
    await publish(sender, 1, 9, qos)
    got = [await payloads(member) for member in group]
    assert got == [[b"1", b"4", b"7"], [b"2", b"5", b"8"], [b"3", b"6", b"9"]]
    everything = [b"%d" % number for number in range(1, 10)]
    assert await payloads(other_name) == everything
    assert await payloads(single) == everything
    assert memory_broker.broker.metrics.shared_subscriptions == 4


async def test_a_member_of_both_kinds_gets_both_copies(memory_broker: MemoryBroker) -> None:
    client = await memory_broker.connect("c")
    await client.subscribe("t/#", subscription_identifier=1)
    await client.subscribe(SHARE, subscription_identifier=2)
    sender = await memory_broker.connect("sender")
    for _ in range(2):  # the full path, then the fast lane
        await sender.publish("t/x", b"1")
        assert sorted(message.subscription_identifiers for message in await waiting(client)) == [(1,), (2,)]


@pytest.mark.spec("MQTT5-4.8.2-3")
async def test_the_qos_is_the_one_granted_to_who_gets_it(memory_broker: MemoryBroker) -> None:
    sender = await memory_broker.connect("sender")
    for qos in range(3):
        client = await memory_broker.connect(f"m{qos}")
        await client.subscribe(SHARE, qos=qos)
        for number in range(3):
            await sender.publish("t/x", b"%d" % number, qos=number)
        assert [message.qos for message in await waiting(client)] == [min(number, qos) for number in range(3)]
        await client.unsubscribe(SHARE)


@pytest.mark.parametrize("handling", [0, 1])
async def test_nobody_gets_retained_messages(memory_broker: MemoryBroker, handling: int) -> None:
    sender = await memory_broker.connect("sender")
    await sender.publish("t/x", b"kept", retain=True)
    client = await memory_broker.connect("c")
    await client.subscribe(SHARE, retain_handling=handling)
    assert await client.nothing_waits()


@pytest.mark.spec("MQTT5-3.8.3-4")
async def test_no_local_is_a_protocol_error(memory_broker: MemoryBroker) -> None:
    client = await memory_broker.connect("c")
    await client.send(Subscribe(1, (Subscription(SHARE, QoS(0), no_local=True),)))
    end = await client.closed()
    assert isinstance(end, Disconnect)
    assert end.reason_code == ReasonCode.PROTOCOL_ERROR


async def test_what_waits_goes_to_whoever_can_take_it(memory_broker: MemoryBroker) -> None:
    """A full member is passed over; when all are full, the group waits, not one of them."""
    sender = await memory_broker.connect("sender")
    slow, quick = await members(memory_broker, 2, qos=1, receive_maximum=2)
    await publish(sender, 1, 4, 1)
    first = await waiting(quick)
    assert [message.payload for message in first] == [b"2", b"4"]
    await publish(sender, 5, 8, 1)
    assert memory_broker.broker.metrics.messages_queued == 4
    assert await payloads(quick) == []
    for message in first:
        await quick.send(PubAck(message.packet_id or 0))
    second = await waiting(quick)
    assert [message.payload for message in second] == [b"5", b"6"]
    for message in second:
        await quick.send(PubAck(message.packet_id or 0))
    assert await payloads(quick) == [b"7", b"8"]
    assert await payloads(slow) == [b"1", b"3"]
    assert memory_broker.broker.metrics.messages_queued == 0


@pytest.mark.parametrize("how", ["cut", "disconnect", "expiry", "clean start"])
async def test_unacknowledged_messages_go_to_another_member(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, how: str
) -> None:
    sender = await memory_broker.connect("sender")
    leaver, stayer = await members(memory_broker, 2, qos=1)
    await publish(sender, 1, 6, 1)
    mine = await waiting(stayer)
    assert [message.payload for message in mine] == [b"2", b"4", b"6"]
    if how == "expiry":  # of a session whose group has nobody else at that time
        await stayer.disconnect(session_expiry_interval=2000)
        await leaver.cut()
        await trio.sleep(1001)
        assert memory_broker.broker.metrics.messages_queued == 6
        stayer = await memory_broker.connect("m1", clean_start=False)
    elif how == "disconnect":
        await leaver.disconnect(session_expiry_interval=0)
    else:
        await leaver.cut()
        if how == "clean start":
            await memory_broker.connect("m0", clean_start=True)
    again = await waiting(stayer)
    assert [message.payload for message in again] == [
        b"1",
        b"3",
        b"5",
        *([b"2", b"4", b"6"] if how == "expiry" else []),
    ]
    assert not any(message.dup for message in again)  # to whoever gets them they are new


async def test_a_member_that_comes_takes_over_from_those_that_are_away(memory_broker: MemoryBroker) -> None:
    sender = await memory_broker.connect("sender")
    (first,) = await members(memory_broker, 1, qos=1)
    await publish(sender, 1, 2, 1)
    await first.cut()
    await publish(sender, 3, 4, 1)
    late = await memory_broker.connect("late")
    await late.subscribe(SHARE, qos=1)
    assert await payloads(late) == [b"1", b"2", b"3", b"4"]
    again = await memory_broker.connect("m0", clean_start=False)
    assert await payloads(again) == []


async def test_alone_a_member_finds_its_own_again(memory_broker: MemoryBroker) -> None:
    sender = await memory_broker.connect("sender")
    (member,) = await members(memory_broker, 1, qos=1)
    await publish(sender, 1, 2, 1)
    await member.cut()
    await publish(sender, 3, 3, 1)
    again = await memory_broker.connect("m0", clean_start=False)
    assert [(message.payload, message.dup) for message in await waiting(again)] == [
        (b"1", True),
        (b"2", True),
        (b"3", False),
    ]


@pytest.mark.spec("MQTT5-4.8.2-4", "MQTT5-4.8.2-5")
async def test_a_qos_2_delivery_stays_with_its_member(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    sender = await memory_broker.connect("sender")
    first, second = await members(memory_broker, 2)
    await publish(sender, 1, 2, 2)
    (message,) = await waiting(first)
    await first.send(PubRec(message.packet_id or 0))
    await first.expect(PubRel)
    await publish(sender, 3, 4, 2)
    await first.cut()
    assert await payloads(second) == [b"2", b"4"]
    first = await memory_broker.connect("m0", clean_start=False, session_expiry_interval=10)
    assert (await first.expect(PubRel)).packet_id == message.packet_id
    repeated = await first.expect(Publish)
    assert (repeated.payload, repeated.dup) == (b"3", True)
    await first.cut()
    await trio.sleep(11)  # its session is over, and what it had begun with it
    assert await payloads(second) == []
    assert memory_broker.broker.metrics.messages_queued == 0


@pytest.mark.spec("MQTT5-4.8.2-6")
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_refusal_discards_the_message_for_all(memory_broker: MemoryBroker, qos: int) -> None:
    sender = await memory_broker.connect("sender")
    first, second = await members(memory_broker, 2, qos=qos)
    await publish(sender, 1, 1, qos)
    (message,) = await waiting(first)
    refusal = PubAck if qos == 1 else PubRec
    await first.send(refusal(message.packet_id or 0, ReasonCode.UNSPECIFIED_ERROR))
    await first.nothing_waits()
    await first.cut()
    assert await payloads(second) == []
    first = await memory_broker.connect("m0", clean_start=False)
    assert await payloads(first) == []


async def test_who_left_a_group_completes_what_it_was_sent(memory_broker: MemoryBroker) -> None:
    sender = await memory_broker.connect("sender")
    first, second = await members(memory_broker, 2, qos=2)
    await publish(sender, 1, 2, 2)
    assert await first.unsubscribe(SHARE) == (ReasonCode.SUCCESS,)
    await publish(sender, 3, 4, 2)
    (message,) = await waiting(first)
    await first.send(PubRec(message.packet_id or 0))
    await first.expect(PubRel)
    await first.send(PubComp(message.packet_id or 0))
    assert await payloads(first) == []
    assert await payloads(second) == [b"2", b"3", b"4"]


async def test_a_group_ends_with_its_last_member(memory_broker: MemoryBroker) -> None:
    broker = memory_broker.broker
    sender = await memory_broker.connect("sender")
    first, second = await members(memory_broker, 2, qos=1, receive_maximum=1)
    await publish(sender, 1, 4, 1)
    assert broker.metrics.messages_queued == 2
    await first.unsubscribe(SHARE)
    assert len(broker.shares.groups) == 1
    await second.unsubscribe(SHARE)
    assert not broker.shares.groups
    assert broker.metrics.messages_queued == 0
    assert broker.metrics.dropped_session_ended == 2
    assert broker.metrics.shared_subscriptions == broker.metrics.subscriptions == 0
    assert broker.router.count == 0
    await publish(sender, 5, 5, 1)
    assert await payloads(first) == [b"1"]


async def test_nothing_is_kept_for_members_at_qos_0(memory_broker: MemoryBroker) -> None:
    sender = await memory_broker.connect("sender")
    (member,) = await members(memory_broker, 1, qos=0)
    await member.cut()
    await publish(sender, 1, 3, 2)
    assert memory_broker.broker.metrics.messages_queued == 0
    again = await memory_broker.connect("m0", clean_start=False)
    assert await payloads(again) == []


async def test_the_queue_of_a_group_is_bounded() -> None:
    async with open_memory_broker(Limits(queue_messages=3, queue_overflow="drop-oldest")) as memory:
        sender = await memory.connect("sender")
        (member,) = await members(memory, 1, qos=1)
        await member.cut()
        await publish(sender, 1, 5, 1)
        assert memory.broker.metrics.dropped_queue_full == 2
        again = await memory.connect("m0", clean_start=False)
        assert await payloads(again) == [b"3", b"4", b"5"]


async def test_a_message_goes_to_a_member_that_takes_its_size(memory_broker: MemoryBroker) -> None:
    sender = await memory_broker.connect("sender")
    small = await memory_broker.connect("small", maximum_packet_size=100)
    await small.subscribe(SHARE)
    large = await memory_broker.connect("large")
    await large.subscribe(SHARE)
    for _ in range(4):
        await sender.publish("t/x", b"x" * 200)
    assert len(await waiting(large)) == 4
    await large.disconnect()
    await sender.publish("t/x", b"x" * 200, qos=1)
    assert memory_broker.broker.metrics.dropped_too_large == 1
    assert await waiting(small) == []


class Rights(AllowEverything):
    """Of the group, only `m1` may have `t/x`, as long as `open` says so; share names mean nothing to the rules."""

    def __init__(self) -> None:
        self.open = True
        self.asked: list[str] = []

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        self.asked.append(topic_filter)
        return topic_filter != "forbidden"

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return topic_name != "t/x" or (self.open and principal.client_id == "m1")


async def test_rights_are_those_of_each_member() -> None:
    rights = Rights()
    async with open_memory_broker(authorizer=rights) as memory:
        first, second = await members(memory, 2, qos=1)
        assert await first.subscribe("$share/g/forbidden") == (ReasonCode.NOT_AUTHORIZED,)
        assert set(rights.asked) == {"t/#", "forbidden"}
        sender = await memory.connect("sender")
        for number in range(3):
            await sender.publish("t/x", b"%d" % number, qos=number)
        assert await payloads(second) == [b"0", b"1", b"2"]
        assert await payloads(first) == []
        await second.cut()
        await sender.publish("t/x", b"queued", qos=1)
        rights.open = False
        memory.broker.rights_changed()
        await memory.connect("m1", clean_start=False)
        await sender.publish("t/x", b"nobody", qos=1)
        assert memory.broker.metrics.messages_queued == 0
        assert memory.broker.metrics.dropped_not_authorized >= 2
        assert await payloads(first) == []


async def test_a_will_is_shared_too(memory_broker: MemoryBroker) -> None:
    group = await members(memory_broker, 2)
    for _ in range(2):
        device = await memory_broker.connect("device", will=Will(topic_name="t/gone", payload=b"!"))
        await device.cut()
    assert [await payloads(member) for member in group] == [[b"!"], [b"!"]]


async def test_subscribing_again_replaces_the_options(memory_broker: MemoryBroker) -> None:
    (member,) = await members(memory_broker, 1, qos=0)
    await member.subscribe(SHARE, qos=1, retain_as_published=True, subscription_identifier=7)
    sender = await memory_broker.connect("sender")
    await sender.publish("t/x", b"1", qos=1, retain=True)
    (message,) = await waiting(member)
    assert (message.qos, message.retain, message.subscription_identifiers) == (1, True, (7,))
    assert memory_broker.broker.metrics.shared_subscriptions == 1


async def test_many_members_share_evenly(memory_broker: MemoryBroker) -> None:
    sender = await memory_broker.connect("sender")
    group = await members(memory_broker, 50, qos=1)
    await publish(sender, 1, 500, 1)
    shares = Counter([len(await waiting(member)) for member in group])
    assert shares == {10: 50}


async def unequal_members(memory: MemoryBroker, how: str) -> TestClient:
    """A member that takes small messages only, beside one that would take all and is `away`, or has a full window."""
    small = await memory.connect("small", maximum_packet_size=200)
    large = await memory.connect("large", session_expiry_interval=10_000, receive_maximum=1)
    for member in (small, large):
        await member.subscribe(SHARE, qos=1)
    sender = await memory.connect("sender")
    if how == "away":
        await large.cut()
    else:
        await sender.publish("t/x", bytes(500), qos=1)
    return small


@pytest.mark.parametrize("how", ["away", "full"])
async def test_what_waits_for_one_member_holds_back_nobody_else(memory_broker: MemoryBroker, how: str) -> None:
    small = await unequal_members(memory_broker, how)
    sender = await memory_broker.connect("sender")
    await sender.publish("t/x", bytes(500), qos=1)
    await publish(sender, 1, 5, 1)
    assert await payloads(small) == [b"1", b"2", b"3", b"4", b"5"]
    assert memory_broker.broker.metrics.messages_queued == 1


async def test_a_member_that_returns_takes_what_is_for_it(memory_broker: MemoryBroker) -> None:
    small = await unequal_members(memory_broker, "away")
    sender = await memory_broker.connect("sender")
    await small.cut()
    for payload in (bytes(500), b"1", bytes(501), b"2"):
        await sender.publish("t/x", payload, qos=1)
    small = await memory_broker.connect("small", maximum_packet_size=200)
    await small.subscribe(SHARE, qos=1)
    assert await payloads(small) == [b"1", b"2"]
    large = await memory_broker.connect("large", clean_start=False)
    assert await payloads(large) == [bytes(500), bytes(501)]


async def test_the_size_is_that_of_the_whole_packet(memory_broker: MemoryBroker) -> None:
    small = await memory_broker.connect("small", maximum_packet_size=200)
    large = await memory_broker.connect("large")
    for member in (small, large):
        await member.subscribe(SHARE)
    sender = await memory_broker.connect("sender")
    for _ in range(4):
        await sender.publish("t/x", b"x", user_properties=(("key", "v" * 250),))
    assert len(await waiting(large)) == 4
    assert memory_broker.broker.metrics.dropped_too_large == 0


async def test_a_delivery_outside_its_group_leaves_nothing_in_the_store() -> None:
    store = MemoryStore()
    async with open_memory_broker(store=store) as memory:
        kept = await memory.connect("kept", session_expiry_interval=100)
        passing = await memory.connect("passing")
        for member in (kept, passing):
            await member.subscribe(SHARE, qos=1)
        sender = await memory.connect("sender")
        await publish(sender, 1, 2, 1)
        await passing.unsubscribe(SHARE)
        (message,) = await waiting(passing)
        await passing.send(PubAck(message.packet_id or 0))
        await passing.nothing_waits()
        (message,) = await waiting(kept)
        await kept.send(PubAck(message.packet_id or 0))
        await kept.nothing_waits()
        await trio.testing.wait_all_tasks_blocked()
        assert not store.state.deliveries
