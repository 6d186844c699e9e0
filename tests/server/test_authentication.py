"""Authentication that takes time, refusals, and sessions that belong to their user."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from mqtt_trio.broker.access import (
    Credentials,
    Decision,
    Denied,
    Granted,
    Pending,
    Principal,
)
from mqtt_trio.broker.events import ClientRefused
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import (
    ConnAck,
    Disconnect,
    Publish,
    Subscribe,
    Subscription,
    Will,
)
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.connecting import begin, refusal

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


class SlowAuthenticator:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Credentials, Pending]] = []

    def authenticate(self, credentials: Credentials) -> Decision:
        pending = Pending()
        self.asked.append((credentials, pending))
        return pending

    def grant(self, index: int = -1) -> None:
        credentials, pending = self.asked[index]
        pending.decide(Granted(Principal(credentials.client_id, credentials.user_name)))


class Passwords:
    """Knows users by their passwords, at once."""

    def authenticate(self, credentials: Credentials) -> Decision:
        if credentials.password == (credentials.user_name or "").encode() * 2:
            return Granted(Principal(credentials.client_id, credentials.user_name))
        return Denied(ReasonCode.BAD_USER_NAME_OR_PASSWORD, "a secret reason")


@asynccontextmanager
async def slow_broker() -> AsyncIterator[tuple[MemoryBroker, SlowAuthenticator]]:
    authenticator = SlowAuthenticator()
    async with open_memory_broker(authenticator=authenticator) as memory:
        yield memory, authenticator


# An answer that has to be waited for


@pytest.mark.spec("MQTT5-3.2.0-1", "MQTT5-3.1.4-5", "MQTT3-3.2.0-1", "MQTT3-3.1.4-4")
@pytest.mark.parametrize("version", [V311, V5])
async def test_packets_behind_connect_wait_for_the_answer(
    autojump_clock: trio.testing.MockClock, version: ProtocolVersion
) -> None:
    async with slow_broker() as (memory, authenticator):
        client = await begin(memory, version, client_id="c", user_name="u", password=b"p")
        await client.send(Subscribe(1, (Subscription("t"),)))
        await client.send(Publish("t", b"x", QoS(1), packet_id=2))
        await trio.testing.wait_all_tasks_blocked()
        metrics = memory.broker.metrics
        assert (metrics.packets_received, metrics.sessions, metrics.packets_sent) == (0, 0, 0)
        authenticator.grant()
        kinds = [type(await client.next_packet()).__name__ for _ in range(4)]
        assert kinds == ["ConnAck", "SubAck", "Publish", "PubAck"]
        assert metrics.packets_received == 3
        assert authenticator.asked[0][0].user_name == "u"


async def test_an_answer_that_is_there_already() -> None:
    class Ready(SlowAuthenticator):
        def authenticate(self, credentials: Credentials) -> Decision:
            decision = super().authenticate(credentials)
            self.grant()
            return decision

    async with open_memory_broker(authenticator=Ready()) as memory:
        client = await memory.connect("c")
        assert client.connack is not None
        assert client.connack.reason_code == ReasonCode.SUCCESS
        assert await client.nothing_waits()


@pytest.mark.parametrize("version, code", [(V5, 0x8A), (V311, 0x87)])
async def test_a_late_refusal(version: ProtocolVersion, code: int) -> None:
    async with slow_broker() as (memory, authenticator):
        client = await begin(memory, version, client_id="c")
        authenticator.asked[0][1].decide(Denied(ReasonCode.BANNED, "why is for the log"))
        connack = await refusal(client)
        assert connack == ConnAck(reason_code=ReasonCode(code))
        assert memory.broker.metrics.sessions == 0
        assert [event.reason for event in memory.events if isinstance(event, ClientRefused)] == ["why is for the log"]


async def test_the_connect_timeout_holds_while_waiting(autojump_clock: trio.testing.MockClock) -> None:
    async with slow_broker() as (memory, authenticator):
        start = trio.current_time()
        client = await begin(memory, client_id="c", keep_alive=1)
        assert await client.closed() is None
        assert trio.current_time() - start == 10.0
        assert authenticator.asked[0][1].abandoned
        authenticator.grant()
        assert memory.broker.metrics.sessions == 0
        assert memory.broker.metrics.connections_timed_out == 1


async def test_the_time_of_thinking_is_not_the_clients_silence(autojump_clock: trio.testing.MockClock) -> None:
    async with slow_broker() as (memory, authenticator):
        client = await begin(memory, client_id="c", keep_alive=4)
        await trio.sleep(8)
        authenticator.grant()
        start = trio.current_time()
        assert await client.closed() == Disconnect(ReasonCode.KEEP_ALIVE_TIMEOUT)
        assert trio.current_time() - start == 6.0


async def test_a_client_that_is_gone_before_the_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with slow_broker() as (memory, authenticator):
        client = await begin(memory, client_id="c", will=Will(topic_name="gone"))
        await client.cut()
        await trio.sleep(11)
        authenticator.grant()
        assert authenticator.asked[0][1].abandoned
        assert (memory.broker.metrics.sessions, memory.broker.metrics.wills_published) == (0, 0)
        assert not memory.clients.links


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_two_connects_with_one_id_wait_at_once(
    autojump_clock: trio.testing.MockClock, order: tuple[int, int]
) -> None:
    """Who is let in last has the session: until then neither has touched it."""
    async with slow_broker() as (memory, authenticator):
        clients = [await begin(memory, client_id="c"), await begin(memory, client_id="c")]
        authenticator.grant(order[0])
        assert (await clients[order[0]].expect(ConnAck)).reason_code == ReasonCode.SUCCESS
        authenticator.grant(order[1])
        assert await clients[order[0]].closed() == Disconnect(ReasonCode.SESSION_TAKEN_OVER)
        await clients[order[1]].expect(ConnAck)
        assert await clients[order[1]].nothing_waits()
        assert memory.broker.metrics.sessions == memory.broker.metrics.clients_connected == 1


async def test_a_waiting_connect_does_not_disturb_the_connected_client(autojump_clock: trio.testing.MockClock) -> None:
    async with slow_broker() as (memory, authenticator):
        first = await begin(memory, client_id="c")
        authenticator.grant()
        await first.expect(ConnAck)
        second = await begin(memory, client_id="c")
        assert await first.nothing_waits()
        authenticator.asked[1][1].decide(Denied())
        await refusal(second)
        assert await first.nothing_waits()


@pytest.mark.parametrize("late", [False, True])
async def test_an_error_of_the_authenticator_ends_that_connection_only(
    caplog: pytest.LogCaptureFixture, late: bool
) -> None:
    class Broken(SlowAuthenticator):
        def authenticate(self, credentials: Credentials) -> Decision:
            if credentials.client_id == "broken" and not late:
                raise RuntimeError("no database")
            return super().authenticate(credentials)

    authenticator = Broken()
    async with open_memory_broker(authenticator=authenticator) as memory:
        healthy = await begin(memory, client_id="healthy")
        authenticator.grant()
        await healthy.expect(ConnAck)
        broken = await begin(memory, client_id="broken")
        if late:
            authenticator.asked[-1][1].fail(RuntimeError("no database"))
        assert await broken.closed() is None
        assert "no database" in caplog.text
        assert memory.broker.metrics.client_failures == memory.broker.metrics.sessions == 1
        assert await healthy.nothing_waits()


async def test_only_the_first_answer_counts() -> None:
    pending = Pending()
    pending.decide(Denied())
    pending.decide(Granted(Principal("c")))
    pending.fail(RuntimeError())
    assert (pending.decision, pending.error) == (Denied(), None)


# Sessions belong to their user


async def test_nobody_gets_the_session_of_another_user() -> None:
    async with open_memory_broker(authenticator=Passwords()) as memory:
        alice: dict[str, Any] = {"user_name": "alice", "password": b"alicealice"}
        owner = await memory.connect("device", session_expiry_interval=60, **alice)
        await owner.subscribe("t", qos=1)
        thief = await begin(memory, client_id="device", clean_start=False, user_name="bob", password=b"bobbob")
        assert await refusal(thief) == ConnAck(reason_code=ReasonCode.NOT_AUTHORIZED)
        assert await owner.nothing_waits()
        await owner.disconnect()
        thief = await begin(memory, client_id="device", user_name="bob", password=b"bobbob")
        assert await refusal(thief) == ConnAck(reason_code=ReasonCode.NOT_AUTHORIZED)
        back = await memory.connect("device", clean_start=False, session_expiry_interval=60, **alice)
        assert back.connack is not None
        assert back.connack.session_present


async def test_user_names_that_nobody_checks_bind_nothing(memory_broker: MemoryBroker) -> None:
    await (await memory_broker.connect("device", session_expiry_interval=60, user_name="a")).disconnect()
    back = await memory_broker.connect("device", clean_start=False, user_name="b")
    assert back.connack is not None
    assert back.connack.session_present


@pytest.mark.spec("MQTT5-3.1.4-2", "MQTT5-3.2.2-7")
@pytest.mark.parametrize("version", [V31, V311, V5])
async def test_a_wrong_password(version: ProtocolVersion) -> None:
    async with open_memory_broker(authenticator=Passwords()) as memory:
        client = await begin(memory, version, client_id="c", user_name="u", password=b"wrong")
        assert await refusal(client) == ConnAck(reason_code=ReasonCode.BAD_USER_NAME_OR_PASSWORD)
        assert memory.broker.metrics.connections_refused == 1


@pytest.mark.parametrize("code", [ReasonCode.USE_ANOTHER_SERVER, ReasonCode.SERVER_MOVED])
async def test_a_refusal_may_name_another_server(code: ReasonCode) -> None:
    async with slow_broker() as (memory, authenticator):
        for version in (V5, V311):
            client = await begin(memory, version, client_id="c")
            authenticator.asked[-1][1].decide(Denied(code, server_reference="other.example:1883"))
            connack = await refusal(client)
            expected = ConnAck(reason_code=code, server_reference="other.example:1883")
            assert connack == (expected if version == V5 else ConnAck(reason_code=ReasonCode.SERVER_UNAVAILABLE))


async def test_a_code_that_3_cannot_say_closes() -> None:
    async with slow_broker() as (memory, authenticator):
        client = await begin(memory, V311, client_id="c")
        authenticator.asked[-1][1].decide(Denied(ReasonCode.PACKET_TOO_LARGE))
        assert await client.closed() is None
        assert memory.broker.metrics.client_failures == 0
