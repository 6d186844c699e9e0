"""What the broker refuses, it explains in a Reason String: to 5.0 clients that want one and have room for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest

from mqtt_trio.broker.access import Principal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import FrameRun, Hold, Refused
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import (
    Disconnect,
    Packet,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    Subscription,
)
from mqtt_trio.testing import MemoryBroker, TestClient, open_memory_broker
from tests.wire import V5, V311, ack, join, packet, publish, subscribe, text

NO_PUBLISH = "this client may not publish to this Topic Name"
NO_SUBSCRIBE = "this client may not subscribe to this Topic Filter"
UNKNOWN = "no message that is under way has this Packet Identifier"
LEVELS = "a Topic Name has 3 levels at most"
NO_ROOM = "there is no room for the message at present"
LIMITS = Limits(topic_levels=3, subscriptions_per_client=2, maximum_packet_size=1024)


class Rules:
    """Authorizer: nothing under `secret`."""

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        return not topic_name.startswith("secret")

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        return not topic_filter.startswith("secret")

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return True


class Full:
    """A tap, and the only route of it, that has no room: it says so at once, or of a Hold when it is released."""

    def __init__(self, *, late: bool = False) -> None:
        self.late = late
        self.holds: list[Hold] = []

    def route(self, topic_name: str) -> Full | None:
        return self if topic_name == "full" else None

    def take(self, message: Message) -> Hold | Refused | None:
        return self._answer(message.qos)

    def take_run(self, run: FrameRun) -> Hold | Refused | None:
        return self._answer(run.qos)

    def _answer(self, qos: int) -> Hold | Refused | None:
        if qos == 0:
            return None
        if not self.late:
            return Refused(ReasonCode.QUOTA_EXCEEDED)
        self.holds.append(Hold())
        return self.holds[-1]


@asynccontextmanager
async def strict_broker() -> AsyncIterator[MemoryBroker]:
    async with open_memory_broker(LIMITS, authorizer=Rules()) as memory:
        memory.broker.add_tap(Full())
        yield memory


def subscribing(*topic_filters: str) -> Subscribe:
    return Subscribe(9, tuple(Subscription(each, QoS(1)) for each in topic_filters))


N = ReasonCode
REFUSALS: list[tuple[Packet, Packet]] = [
    (Publish("secret", b"", QoS(1), packet_id=9), PubAck(9, N.NOT_AUTHORIZED, NO_PUBLISH)),
    (Publish("secret", b"", QoS(2), packet_id=9), PubRec(9, N.NOT_AUTHORIZED, NO_PUBLISH)),
    (Publish("$SYS/x", b"", QoS(1), packet_id=9), PubAck(9, N.NOT_AUTHORIZED, NO_PUBLISH)),
    (Publish("a/b/c/d", b"", QoS(1), packet_id=9), PubAck(9, N.TOPIC_NAME_INVALID, LEVELS)),
    (Publish("a/b/c/d", b"", QoS(2), packet_id=9), PubRec(9, N.TOPIC_NAME_INVALID, LEVELS)),
    (Publish("full", b"", QoS(1), packet_id=9), PubAck(9, N.QUOTA_EXCEEDED, NO_ROOM)),
    (Publish("full", b"", QoS(2), packet_id=9), PubRec(9, N.QUOTA_EXCEEDED, NO_ROOM)),
    (PubRel(9), PubComp(9, N.PACKET_IDENTIFIER_NOT_FOUND, UNKNOWN)),
    (PubRec(9), PubRel(9, N.PACKET_IDENTIFIER_NOT_FOUND, UNKNOWN)),
    (subscribing("secret/#"), SubAck(9, (N.NOT_AUTHORIZED,), NO_SUBSCRIBE)),
    (subscribing("+/+/+/#"), SubAck(9, (N.TOPIC_FILTER_INVALID,), "a Topic Filter has 3 levels at most")),
    (
        subscribing("a", "b", "c", "secret", "a", "d"),
        SubAck(
            9,
            (N.GRANTED_QOS_1, N.GRANTED_QOS_1, N.QUOTA_EXCEEDED, N.QUOTA_EXCEEDED, N.GRANTED_QOS_1, N.QUOTA_EXCEEDED),
            "a client has 2 subscriptions at most, the server 10000000",
        ),
    ),
    (
        subscribing("secret", "a", "a/b/c/d", "secret/2"),
        SubAck(
            9,
            (N.NOT_AUTHORIZED, N.GRANTED_QOS_1, N.TOPIC_FILTER_INVALID, N.NOT_AUTHORIZED),
            f"{NO_SUBSCRIBE}; a Topic Filter has 3 levels at most",
        ),
    ),
    (subscribing("a", "b"), SubAck(9, (N.GRANTED_QOS_1, N.GRANTED_QOS_1))),
]  # fmt: skip
"""What a client sends, and the answer to it in full."""

each_refusal = pytest.mark.parametrize(
    "sent, answer", REFUSALS, ids=[f"{type(sent).__name__}-{number}" for number, (sent, _) in enumerate(REFUSALS)]
)


async def answer_to(client: TestClient, sent: Packet) -> Packet:
    await client.send(sent)
    answer = await client.next_packet()
    assert await client.nothing_waits(), "one answer, and the connection goes on"
    return answer


def unexplained(answer: Packet) -> Packet:
    """The same answer without its Reason String."""
    assert isinstance(answer, PubAck | PubRec | PubRel | PubComp | SubAck)
    return attrs.evolve(answer, reason_string=None)


@each_refusal
@pytest.mark.parametrize("wanted", [None, 1])
async def test_a_refusal_is_explained(sent: Packet, answer: Packet, wanted: int | None) -> None:
    async with strict_broker() as memory:
        client = await memory.connect("c", request_problem_information=wanted)
        assert await answer_to(client, sent) == answer
        assert await answer_to(client, sent) == answer, "again, where the fast lane may come in"


@pytest.mark.spec("MQTT5-3.1.2-29")
@each_refusal
async def test_who_wants_no_explanation_gets_none(sent: Packet, answer: Packet) -> None:
    async with strict_broker() as memory:
        client = await memory.connect("c", request_problem_information=0)
        assert await answer_to(client, sent) == unexplained(answer)


@pytest.mark.spec("MQTT5-3.1.2-24", "MQTT5-3.4.2-2", "MQTT5-3.5.2-2", "MQTT5-3.6.2-2", "MQTT5-3.7.2-2", "MQTT5-3.9.2-1")
@each_refusal
async def test_an_explanation_gives_way_where_there_is_no_room(sent: Packet, answer: Packet) -> None:
    async with strict_broker() as memory:
        client = await memory.connect("c", maximum_packet_size=30)
        assert await answer_to(client, sent) == unexplained(answer)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("wanted", [0, 1])
async def test_a_refusal_that_waits_its_turn(wanted: int, late: bool) -> None:
    """Behind an acknowledgement that is held, or decided only when its own Hold is released."""
    async with open_memory_broker(authorizer=Rules()) as memory:
        memory.broker.add_tap(tap := Full(late=True))
        client = await memory.connect("c", request_problem_information=wanted)
        await client.send(Publish("full", b"", QoS(1), packet_id=1))
        await client.send(Publish("full" if late else "secret", b"", QoS(2), packet_id=2))
        assert await client.nothing_waits()
        for hold in tap.holds:
            hold.release(ReasonCode.QUOTA_EXCEEDED if hold is not tap.holds[0] else None)
        memory.broker.flush()
        assert await client.next_packet() == PubAck(1)
        refused = await client.next_packet()
        assert isinstance(refused, PubRec)
        assert refused.reason_code == (ReasonCode.QUOTA_EXCEEDED if late else ReasonCode.NOT_AUTHORIZED)
        told = NO_ROOM if late else NO_PUBLISH
        assert refused.reason_string == (told if wanted else None)


async def test_no_refusal_says_which_rule_it_was() -> None:
    """What no rule allows, what `$SYS` is closed for and what exists or not look the same."""
    async with strict_broker() as memory:
        client = await memory.connect("c", user_name="u")
        told = set()
        for topic_name in ("secret", "secret/key", "$SYS/broker/uptime"):
            answer = await answer_to(client, Publish(topic_name, b"", QoS(1), packet_id=9))
            assert isinstance(answer, PubAck)
            told.add(answer.reason_string)
        assert told == {NO_PUBLISH}


@pytest.mark.spec("MQTT3-3.9.3-2", "MQTT3-3.8.4-5")
async def test_3_1_1_has_no_such_text() -> None:
    async with strict_broker() as memory:
        wire = await join(memory, V311)
        await wire.send(subscribe(V311, 9, ("secret", 1), ("a", 1), ("a/b/c/d", 1)))
        await wire.send(publish(V311, "secret", flags=2, packet_id=9), ack(0x62, 9), ack(0x50, 9))
        expected = [packet(0x90, b"\0\x09", b"\x80\1\x80"), ack(0x40, 9), ack(0x70, 9), ack(0x62, 9)]
        assert await wire.until_pong() == expected


# DISCONNECT, which may explain itself in any case

FAREWELLS: dict[str, tuple[bytes, ReasonCode, str]] = {
    "a filter": (subscribe(V5, 1, ("a/#/b", 0)), N.TOPIC_FILTER_INVALID, "#"),
    "a name": (publish(V5, "a/+"), N.TOPIC_NAME_INVALID, "wildcard"),
    "levels at QoS 0": (publish(V5, "a/b/c/d"), N.TOPIC_NAME_INVALID, "more than 3 levels"),
    "size": (publish(V5, "t", bytes(1100)), N.PACKET_TOO_LARGE, "the maximum is 1024"),
    "alias": (publish(V5, "t", properties=b"\x23\0\x63"), N.TOPIC_ALIAS_INVALID, "the maximum is 16"),
    "flags": (b"\xc1\0", N.MALFORMED_PACKET, "reserved flags of PINGREQ"),
    "state": (packet(0x20, b"\0\0\0"), N.PROTOCOL_ERROR, "CONNACK while CONNECTED"),
}
"""What a client sends -> reason code, and words that the Reason String has."""


@pytest.mark.parametrize("wanted", [None, 0])
@pytest.mark.parametrize("sent, code, words", FAREWELLS.values(), ids=FAREWELLS)
async def test_a_farewell_names_the_mistake(wanted: int | None, sent: bytes, code: ReasonCode, words: str) -> None:
    async with strict_broker() as memory:
        client = await memory.connect("c", request_problem_information=wanted)
        await client.stream.send_all(sent)
        farewell = await client.closed()
        assert isinstance(farewell, Disconnect)
        assert farewell.reason_code == code
        assert farewell.reason_string is not None
        assert words in farewell.reason_string


@pytest.mark.spec("MQTT5-3.14.2-3", "MQTT5-3.1.2-24")
@pytest.mark.parametrize("sent, code, words", FAREWELLS.values(), ids=FAREWELLS)
async def test_a_farewell_gives_way_where_there_is_no_room(sent: bytes, code: ReasonCode, words: str) -> None:
    async with strict_broker() as memory:
        wire = await join(memory, V5, properties=b"\x27\0\0\0\x18")
        await wire.send(sent)
        assert await wire.until_closed() == [bytes([0xE0, 1, code])]


@pytest.mark.spec("MQTT5-3.2.2-19")
@pytest.mark.parametrize("room", [True, False])
async def test_a_refusing_connack(memory_broker: MemoryBroker, room: bool) -> None:
    properties = b"\x15" + text("unknown") + b"\x27\0\0\0" + bytes([100 if room else 20])
    stream = await memory_broker.open_stream()
    head = text("MQTT") + b"\5\2\0\0" + bytes([len(properties)]) + properties
    await stream.send_all(packet(0x10, head, text("c")))
    answer = bytes(await stream.receive_some(1000))
    told = b"\x1f" + text("the Authentication Method is not known") if room else b""
    assert answer == packet(0x20, b"\0\x8c", bytes([len(told)]), told)
    assert await stream.receive_some(1000) == b""


@pytest.mark.parametrize("version", list(ProtocolVersion))
async def test_what_is_granted_is_not_explained(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    client = await memory_broker.connect("c", version=version)
    await client.send(subscribing("t"))
    assert await client.next_packet() == SubAck(9, (N.GRANTED_QOS_1,))
    for qos, answer in ((1, PubAck(9)), (2, PubRec(9))):
        await client.send(Publish("u", b"", QoS(qos), packet_id=9))
        assert await client.next_packet() == answer
