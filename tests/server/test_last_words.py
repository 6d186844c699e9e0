"""What a client sent before it closed is handled although a write to it fails first, whatever drives its link."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock, memory_stream_pair

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.message import Message
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import (
    ConnAck,
    Connect,
    Disconnect,
    MessageProperties,
    PubAck,
    Publish,
    Subscribe,
    Subscription,
    Will,
)
from mqtt_trio.server.link import CLOSE_GRACE
from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.tls import TlsServer
from mqtt_trio.testing import MemoryBroker, TestClient
from tests.certificates import Certificates
from tests.server.socket_support import Served, serve

V5 = ProtocolVersion.MQTT_5_0
WILL = Will(topic_name="state", payload=b"lost")
LAST_WORDS = encode(Publish("last", b"words", qos=QoS.AT_LEAST_ONCE, packet_id=7), V5) + encode(Disconnect(), V5)


def send_to(broker: Broker, topic_name: str, payload: bytes) -> None:
    """Write to whoever subscribed."""
    broker.publish(Message(topic_name, payload), trio.current_time(), tapped=False)
    broker.flush()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.lowlevel.checkpoint()


def assert_heard(broker: Broker) -> None:
    assert broker.metrics.messages_received_qos1 == 1, "its last message counts"
    assert broker.metrics.wills_published == 0, "it said DISCONNECT"
    assert broker.metrics.client_failures == 0


async def with_will(served: Served) -> socket.socket:
    """Connect a client with a Will that has subscribed and reads nothing more; return its socket."""
    client = TestClient(await served.open(), V5)
    await client.send(Connect(client_id="c", protocol_version=V5, will=WILL))
    await client.expect(ConnAck)
    await client.subscribe("to/c", qos=1)
    assert isinstance(client.stream, trio.SocketStream)
    return socket.socket(fileno=client.stream.socket.detach())


async def test_a_write_that_fails_at_once() -> None:
    async with serve() as served:
        sock = await with_will(served)
        send_to(served.broker, "to/c", b"never read")  # so that closing resets the connection
        sock.send(LAST_WORDS)
        sock.close()
        send_to(served.broker, "to/c", b"fails")  # before the poller has looked
        (link,) = served.clients.links
        assert link.broken
        await until(lambda: not served.clients.links)
        assert_heard(served.broker)
        assert link.end_text == "DISCONNECT by the client"


async def test_a_backlog_that_cannot_be_written() -> None:
    async with serve() as served:
        sock = await with_will(served)
        (link,) = served.clients.links
        while link.outbox.room == link.outbox.limit:
            send_to(served.broker, "to/c", b"x" * 100_000)
        sock.send(LAST_WORDS)
        sock.close()
        await until(lambda: not served.clients.links)
        assert_heard(served.broker)


async def test_a_socket_whose_last_packets_need_many_turns() -> None:
    async with serve() as served:
        sock = await with_will(served)
        properties = MessageProperties(message_expiry_interval=60)  # the fast lane leaves those to the full path
        send_to(served.broker, "to/c", b"never read")
        flood = encode(Publish("last", b"words", properties=properties), V5) * 2500 + LAST_WORDS
        assert sock.send(flood) == len(flood)
        sock.close()
        send_to(served.broker, "to/c", b"fails")
        await until(lambda: not served.clients.links)
        assert served.broker.metrics.messages_received_qos0 == 2500
        assert_heard(served.broker)


async def test_a_stopped_publisher_that_leaves_with_a_reset() -> None:
    async with serve() as served:
        sock = await with_will(served)
        send_to(served.broker, "to/c", b"never read")
        served.broker.stop_publishers(served)
        sock.send(encode(Publish("last", b"words", qos=QoS.AT_LEAST_ONCE, packet_id=7), V5))
        (link,) = served.clients.links
        await until(lambda: link.paused)
        sock.send(encode(Disconnect(), V5))
        sock.close()
        await until(lambda: link.broken is not None)
        assert not link.ended
        served.broker.resume_publishers(served)
        await until(lambda: not served.clients.links)
        assert_heard(served.broker)


async def test_nothing_to_be_read_ends_the_client_as_before() -> None:
    async with serve() as served:
        sock = await with_will(served)
        send_to(served.broker, "to/c", b"never read")
        sock.close()
        send_to(served.broker, "to/c", b"fails")
        await until(lambda: not served.clients.links)
        assert served.broker.metrics.wills_published == 1


async def test_whoever_resumes_a_client_wakes_the_poller() -> None:
    """A task other than the poller lets a client go on, which then has more to do than fits one turn."""
    async with serve() as served:
        client = await served.connect("c")
        (link,) = served.clients.links
        served.broker.stop_publishers(served)
        properties = MessageProperties(message_expiry_interval=60)
        flood = encode(Publish("t", qos=QoS.AT_LEAST_ONCE, packet_id=1), V5)
        flood += encode(Publish("t", properties=properties), V5) * 2500
        await client.stream.send_all(flood)
        await until(lambda: link.paused)
        assert len(link.connection.buffer) == len(flood), "all of it was read"
        await trio.testing.wait_all_tasks_blocked(0.01)
        served.broker.resume_publishers(served)
        await until(lambda: served.broker.metrics.messages_received_qos0 == 2500)


class TornStream(trio.abc.Stream):
    """Hands out nothing from `hold` on until a write has failed, as when both happen in one instant."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.breaks = False
        self.open = trio.Event()
        self.open.set()

    def hold(self) -> None:
        self.open = trio.Event()
        self.breaks = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.stream.receive_some(max_bytes)
        await self.open.wait()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.breaks:
            await trio.lowlevel.checkpoint()
            self.open.set()
            raise trio.BrokenResourceError("planned")
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self.open.set()
        await self.stream.aclose()


@pytest.mark.parametrize("secure", [False, True])
async def test_a_stream_whose_write_fails(
    memory_broker: MemoryBroker, tmp_path: Path, autojump_clock: MockClock, secure: bool
) -> None:
    ours, theirs = memory_stream_pair()
    torn = TornStream(theirs)
    tls = None
    stream: trio.abc.SendStream = ours
    if secure:
        certificates = Certificates(tmp_path)
        tls = TlsServer(certificates.tls_options(), "Listeners[0].Tls", ("mqtt",))
        stream = trio.SSLStream(ours, certificates.client_context(), server_hostname="localhost")
    memory_broker.nursery.start_soon(memory_broker.clients.serve, torn, ListenerOptions(port=0), "memory", tls)
    subscribe = Subscribe(1, (Subscription("to/c", QoS.AT_LEAST_ONCE),))
    await stream.send_all(encode(Connect(client_id="c", protocol_version=V5, will=WILL), V5) + encode(subscribe, V5))
    broker = memory_broker.broker
    await until(lambda: broker.metrics.subscriptions == 1)
    await trio.testing.wait_all_tasks_blocked()
    torn.hold()
    await stream.send_all(LAST_WORDS)
    await ours.aclose()
    send_to(broker, "to/c", b"fails")
    await until(lambda: not memory_broker.clients.links)
    assert_heard(broker)


async def test_the_last_acknowledgement_counts(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    torn = TornStream(theirs)
    memory_broker.nursery.start_soon(memory_broker.clients.serve, torn, ListenerOptions(port=0), "memory")
    client = TestClient(ours, V5)
    await client.send(Connect(client_id="c", protocol_version=V5, session_expiry_interval=60))
    await client.expect(ConnAck)
    await client.subscribe("to/c", qos=1)
    other = await memory_broker.connect("other")
    await other.publish("to/c", b"1", qos=1)
    message = await client.expect(Publish)
    torn.hold()
    await client.send(PubAck(message.packet_id or 0))
    await ours.aclose()
    await other.publish("to/c", b"2", qos=1)
    await until(lambda: len(memory_broker.clients.links) == 1)
    session = memory_broker.broker.connections.sessions["c"]
    assert len(session.inflight) == 1, "the first one is acknowledged, only the second comes again"


async def test_a_paused_client_with_a_broken_connection_is_not_kept_for_long(
    memory_broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    ours, theirs = memory_stream_pair()
    torn = TornStream(theirs)
    memory_broker.nursery.start_soon(memory_broker.clients.serve, torn, ListenerOptions(port=0), "memory")
    client = TestClient(ours, V5)
    await client.send(Connect(client_id="c", protocol_version=V5, will=WILL))
    await client.expect(ConnAck)
    await client.subscribe("to/c", qos=1)
    memory_broker.broker.stop_publishers(torn)
    await client.send(Publish("last", b"words", qos=QoS.AT_LEAST_ONCE, packet_id=7))
    await trio.testing.wait_all_tasks_blocked()
    torn.hold()
    send_to(memory_broker.broker, "to/c", b"fails")
    await trio.sleep(CLOSE_GRACE - 0.1)
    assert memory_broker.clients.links
    await trio.sleep(0.2)
    assert not memory_broker.clients.links
    assert memory_broker.broker.metrics.wills_published == 1
