"""Enhanced authentication [MQTT5-4.12]: the AUTH exchange in front of the CONNACK and behind it, SCRAM."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from mqtt_trio.broker.access import (
    AllowAnyone,
    Challenge,
    Credentials,
    Denied,
    Granted,
    Pending,
    Principal,
    Step,
)
from mqtt_trio.broker.scram import NAME, ScramClient, ScramCredential, ScramSha256
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import (
    Auth,
    ConnAck,
    Connect,
    Disconnect,
    PingReq,
    PingResp,
    Publish,
)
from mqtt_trio.testing import MemoryBroker, TestClient, open_memory_broker
from tests.connecting import begin, refusal

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
CONTINUE, AGAIN = ReasonCode.CONTINUE_AUTHENTICATION, ReasonCode.RE_AUTHENTICATE


class Countdown:
    """A method that asks until it hears `0`; `slow` steps wait in `pending`."""

    name = "countdown"

    def __init__(self) -> None:
        self.user = "u"
        self.slow = False
        self.pending: list[Pending] = []
        self.next: Step | None = None

    def start(self, credentials: Credentials, data: bytes | None) -> Step:
        self.credentials = credentials
        return self._step(data)

    def _step(self, data: bytes | None) -> Step:
        answer: Challenge | Granted | Denied
        if data is None:
            answer = Denied(reason="no data")
        elif data == b"0":
            answer = Granted(Principal(self.credentials.client_id, self.user), b"done")
        elif data == b"bug":
            raise RuntimeError("a bug in a method")
        else:
            answer = Challenge(b"?" + data, self._step)
        if not self.slow:
            return answer
        self.pending.append(Pending())
        self.next = answer
        return self.pending[-1]

    def decide(self) -> None:
        assert isinstance(self.next, Challenge | Granted | Denied)
        self.pending[-1].decide(self.next)


@asynccontextmanager
async def counting_broker(**options: Any) -> AsyncIterator[tuple[MemoryBroker, Countdown]]:
    method = Countdown()
    async with open_memory_broker(authentication_methods=[method], **options) as memory:
        yield memory, method


async def counted(memory: MemoryBroker, **fields: Any) -> TestClient:
    """Connect a client whose method is at its end at once."""
    return await memory.connect("c", authentication_method="countdown", authentication_data=b"0", **fields)


@pytest.mark.spec(
    "MQTT5-4.12.0-2", "MQTT5-4.12.0-3", "MQTT5-4.12.0-5", "MQTT5-3.1.2-30", "MQTT5-3.15.2-1", "MQTT5-3.2.0-1"
)
@pytest.mark.parametrize("slow", [False, True])
async def test_an_exchange_in_front_of_the_connack(slow: bool) -> None:
    async with counting_broker() as (memory, method):
        method.slow = slow
        client = await begin(memory, client_id="c", authentication_method="countdown", authentication_data=b"2")
        for data in (b"2", b"1"):
            if slow:
                method.decide()
            assert await client.next_packet() == Auth(CONTINUE, "countdown", b"?" + data)
            assert memory.broker.metrics.sessions == 0
            answer = b"%d" % (int(data) - 1)
            await client.send(Auth(CONTINUE, "countdown", answer))
            await trio.testing.wait_all_tasks_blocked()
        if slow:
            method.decide()
        connack = await client.expect(ConnAck)
        assert (connack.reason_code, connack.authentication_method) == (0, "countdown")
        assert connack.authentication_data == b"done"
        assert memory.broker.connections.sessions["c"].user_name == "u"
        assert await client.nothing_waits()
        assert not memory.broker.handshakes._exchanges


@pytest.mark.spec("MQTT5-4.12.0-1")
async def test_an_unknown_method(memory_broker: MemoryBroker) -> None:
    client = await begin(memory_broker, client_id="c", authentication_method="nobody knows it")
    assert (await refusal(client)).reason_code == ReasonCode.BAD_AUTHENTICATION_METHOD
    assert memory_broker.broker.metrics.sessions == 0


@pytest.mark.spec("MQTT5-4.12.0-4")
async def test_a_refusal_amid_the_exchange() -> None:
    async with counting_broker() as (memory, _):
        client = await begin(memory, client_id="c", authentication_method="countdown", authentication_data=b"1")
        await client.expect(Auth)
        await client.send(Auth(CONTINUE, "countdown"))
        assert await refusal(client) == ConnAck(reason_code=ReasonCode.NOT_AUTHORIZED)


@pytest.mark.spec("MQTT5-3.1.2-30", "MQTT5-4.12.0-3", "MQTT5-4.12.0-5")
@pytest.mark.parametrize(
    "packet",
    [
        Auth(CONTINUE, "another", b"0"),
        Auth(AGAIN, "countdown", b"0"),
        Auth(ReasonCode.SUCCESS, "countdown", b"0"),
        Auth(),
        PingReq(),
        Publish("t"),
        Connect(client_id="c"),
    ],
)
async def test_nothing_else_fits_amid_the_exchange(packet: Any) -> None:
    async with counting_broker() as (memory, _):
        client = await begin(memory, client_id="c", authentication_method="countdown", authentication_data=b"1")
        await client.expect(Auth)
        await client.send(packet)
        connack = await refusal(client)
        assert connack.reason_code == ReasonCode.PROTOCOL_ERROR
        assert memory.broker.metrics.sessions == 0


async def test_a_goodbye_amid_the_exchange() -> None:
    async with counting_broker() as (memory, _):
        client = await begin(memory, client_id="c", authentication_method="countdown", authentication_data=b"1")
        await client.expect(Auth)
        await client.send(Disconnect())
        assert await client.closed() is None
        assert memory.broker.metrics.protocol_errors == 0
        assert not memory.broker.handshakes._exchanges


async def test_an_exchange_cannot_be_stretched(autojump_clock: trio.testing.MockClock) -> None:
    """ConnectTimeout bounds it as a whole, however often the client answers."""
    async with counting_broker() as (memory, _):
        start = trio.current_time()
        client = await begin(memory, client_id="c", authentication_method="countdown", authentication_data=b"9")
        for _ in range(3):
            await client.expect(Auth)
            await trio.sleep(3)
            await client.send(Auth(CONTINUE, "countdown", b"9"))
        assert await client.closed() is None
        assert trio.current_time() - start == 10.0
        assert not memory.broker.handshakes._exchanges


@pytest.mark.spec("MQTT5-4.12.0-6", "MQTT5-4.12.0-7")
async def test_without_a_method_there_is_no_auth() -> None:
    async with counting_broker(authenticator=AllowAnyone()) as (memory, _):
        client = await memory.connect("c")
        assert client.connack is not None
        assert client.connack.authentication_method is None
        await client.send(Auth(AGAIN, "countdown", b"0"))
        farewell = await client.closed()
        assert isinstance(farewell, Disconnect)
        assert farewell.reason_code == ReasonCode.PROTOCOL_ERROR


async def test_methods_alone_leave_no_other_way_in() -> None:
    async with counting_broker() as (memory, _):
        for version in (V31, V311, V5):
            client = await begin(memory, version, client_id="c", user_name="u")
            assert (await refusal(client)).reason_code == ReasonCode.NOT_AUTHORIZED


async def test_an_error_in_a_method_ends_that_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    async with counting_broker() as (memory, _):
        healthy = await memory.connect("h", authentication_method="countdown", authentication_data=b"0")
        client = await begin(memory, client_id="c", authentication_method="countdown", authentication_data=b"bug")
        assert await client.closed() is None
        assert "a bug in a method" in caplog.text
        assert await healthy.nothing_waits()


# Re-authentication


@pytest.mark.spec("MQTT5-4.12.1-1", "MQTT5-4.12.0-5")
@pytest.mark.parametrize("slow", [False, True])
async def test_messages_go_on_during_a_re_authentication(slow: bool) -> None:
    async with counting_broker() as (memory, method):
        client = await counted(memory)
        await client.subscribe("t")
        method.slow = slow
        await client.send(Auth(AGAIN, "countdown", b"1"))
        await client.publish("t", b"meanwhile", qos=1)
        assert (await client.next_message()).payload == b"meanwhile"
        if slow:
            assert await client.nothing_waits()
            method.decide()
        assert await client.next_packet() == Auth(CONTINUE, "countdown", b"?1")
        await client.publish("t", b"again", qos=1)
        assert (await client.next_message()).payload == b"again"
        await client.send(Auth(CONTINUE, "countdown", b"0"))
        await trio.testing.wait_all_tasks_blocked()
        if slow:
            method.decide()
        assert await client.next_packet() == Auth(ReasonCode.SUCCESS, "countdown", b"done")
        assert not memory.broker.handshakes._exchanges
        assert method.credentials == Credentials("c", "u", None, "memory", "memory")


@pytest.mark.spec("MQTT5-4.12.1-2")
@pytest.mark.parametrize("failure", ["denied", "another user"])
async def test_a_failed_re_authentication(failure: str) -> None:
    async with counting_broker() as (memory, method):
        client = await counted(memory, session_expiry_interval=60)
        if failure == "another user":
            method.user = "somebody else"
        await client.send(Auth(AGAIN, "countdown", b"0" if failure == "another user" else None))
        assert await client.closed() == Disconnect(ReasonCode.NOT_AUTHORIZED)
        assert memory.broker.connections.sessions["c"].user_name == "u"
        assert not memory.broker.handshakes._exchanges


@pytest.mark.parametrize(
    "packets",
    [
        [Auth(CONTINUE, "countdown", b"0")],
        [Auth(AGAIN, "countdown", b"1"), Auth(AGAIN, "countdown", b"1")],
        pytest.param([Auth(AGAIN, "another", b"1")], marks=pytest.mark.spec("MQTT5-4.12.1-1")),
        [Auth(ReasonCode.SUCCESS, "countdown", b"1")],
        [Auth(AGAIN, "countdown", b"0"), Auth(CONTINUE, "countdown", b"0")],
    ],
)
async def test_auth_out_of_turn(packets: list[Auth]) -> None:
    async with counting_broker() as (memory, _):
        client = await counted(memory)
        for packet in packets:
            await client.send(packet)
        farewell = await client.closed()
        assert isinstance(farewell, Disconnect)
        assert farewell.reason_code == ReasonCode.PROTOCOL_ERROR
        assert not memory.broker.handshakes._exchanges


async def test_auth_while_the_last_answer_is_waited_for() -> None:
    async with counting_broker() as (memory, method):
        client = await counted(memory)
        method.slow = True
        await client.send(Auth(AGAIN, "countdown", b"1"))
        await client.send(Auth(CONTINUE, "countdown", b"0"))
        farewell = await client.closed()
        assert isinstance(farewell, Disconnect)
        assert farewell.reason_code == ReasonCode.PROTOCOL_ERROR
        assert method.pending[0].abandoned
        method.decide()


async def test_an_error_during_re_authentication_ends_that_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    async with counting_broker() as (memory, method):
        client = await counted(memory)
        method.slow = True
        await client.send(Auth(AGAIN, "countdown", b"1"))
        await trio.testing.wait_all_tasks_blocked()
        method.pending[0].fail(RuntimeError("no database"))
        assert await client.closed() == Disconnect(ReasonCode.UNSPECIFIED_ERROR)
        assert "no database" in caplog.text


async def test_keep_alive_holds_during_a_re_authentication(autojump_clock: trio.testing.MockClock) -> None:
    async with counting_broker() as (memory, _):
        client = await counted(memory, keep_alive=10)
        start = trio.current_time()
        await client.send(Auth(AGAIN, "countdown", b"1"))
        await client.expect(Auth)
        assert await client.closed() == Disconnect(ReasonCode.KEEP_ALIVE_TIMEOUT)
        assert trio.current_time() - start == 15.0


# SCRAM from end to end


class OneUser:
    credential = ScramCredential.derive("pencil", b"salt", 4096)

    def find(self, user_name: str) -> ScramCredential | None:
        return self.credential if user_name == "user" else None


def scram() -> ScramSha256:
    numbers = itertools.count()
    return ScramSha256(OneUser(), nonce=lambda: f"nonce{next(numbers)}", secret=b"s")


@pytest.mark.spec("MQTT5-4.12.0-5", "MQTT5-4.12.1-1")
async def test_scram_connects_and_authenticates_again() -> None:
    async with open_memory_broker(authentication_methods=[scram()]) as memory:
        theirs = ScramClient("user", "pencil", "client")
        client = await begin(memory, client_id="c", authentication_method=NAME, authentication_data=theirs.first())
        asked = await client.expect(Auth)
        await client.send(Auth(CONTINUE, NAME, theirs.final(asked.authentication_data or b"")))
        connack = await client.expect(ConnAck)
        assert theirs.verify(connack.authentication_data)
        theirs = ScramClient("user", "pencil", "again")
        await client.send(Auth(AGAIN, NAME, theirs.first()))
        asked = await client.expect(Auth)
        await client.send(Auth(CONTINUE, NAME, theirs.final(asked.authentication_data or b"")))
        done = await client.expect(Auth)
        assert done.reason_code == ReasonCode.SUCCESS
        assert theirs.verify(done.authentication_data)
        await client.send(PingReq())
        assert await client.next_packet() == PingResp()


@pytest.mark.parametrize("user, password", [("user", "wrong"), ("nobody", "pencil")])
async def test_scram_refuses(user: str, password: str) -> None:
    async with open_memory_broker(authentication_methods=[scram()]) as memory:
        theirs = ScramClient(user, password, "client")
        client = await begin(memory, client_id="c", authentication_method=NAME, authentication_data=theirs.first())
        asked = await client.expect(Auth)
        await client.send(Auth(CONTINUE, NAME, theirs.final(asked.authentication_data or b"")))
        assert await refusal(client) == ConnAck(reason_code=ReasonCode.NOT_AUTHORIZED)
        assert memory.broker.metrics.sessions == 0
