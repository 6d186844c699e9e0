"""sub [F3]: what is printed and acknowledged, every end, lost connections."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mqtt_trio.commands.client import Client, Session, converse
from mqtt_trio.commands.failures import CommandError, DisconnectedError, RefusedError
from mqtt_trio.commands.output import formatted, plain, verbose
from mqtt_trio.commands.sub import SubOptions, Subscriber
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.packets import Packet, PubAck, Publish, Subscription, Will
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.command_support import CONNACK, FakeTerminal, Server, session_with
from tests.wire import DISCONNECT, V5, Wire, ack, packet
from tests.wire import publish as publish_bytes

Serve = Callable[[Wire], Awaitable[None]]
SUBACK = b"\x90\x04\x00\x01\x00\x02"


@pytest.fixture
async def scripted(nursery: trio.Nursery) -> AsyncIterator[Callable[[Serve], Server]]:
    """Makes servers; whatever they still do ends with the test."""
    yield lambda serve: Server(nursery, serve)
    nursery.cancel_scope.cancel()


class Running:
    """A subscriber in the background."""

    def __init__(self, nursery: trio.Nursery, session: Session, options: SubOptions) -> None:
        self.terminal = FakeTerminal()
        self.code: int | None = None
        self.failure: CommandError | None = None
        self.ended = trio.Event()
        self.subscriber = Subscriber(options, self.terminal, session)
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        try:
            self.code = await self.subscriber.run()
        except CommandError as exc:
            self.failure = exc
        self.ended.set()

    async def exit_code(self) -> int:
        await self.ended.wait()
        assert self.failure is None, self.failure
        assert self.code is not None
        return self.code


def options_for(*filters: str, qos: int = 2, **options: Any) -> SubOptions:
    options.setdefault("printer", verbose(b"\n"))
    return SubOptions(subscriptions=tuple(Subscription(each, QoS(qos)) for each in filters), **options)


async def start(nursery: trio.Nursery, session: Session, *filters: str, **options: Any) -> Running:
    """Start and let the subscription be made."""
    running = Running(nursery, session, options_for(*filters, **options))
    await trio.testing.wait_all_tasks_blocked()
    return running


@pytest.mark.parametrize("version", list(ProtocolVersion))
async def test_messages_of_every_quality(
    memory_broker: MemoryBroker, nursery: trio.Nursery, version: ProtocolVersion
) -> None:
    running = await start(
        nursery, session_with(memory_broker, protocol_version=version), "a/#",
        printer=formatted("%t %p %q %r", b"\n"), count=3,
    )  # fmt: skip
    sender = await memory_broker.connect("sender")
    for qos in (0, 1, 2):
        await sender.publish(f"a/{qos}", b"x", qos=qos)
    assert await running.exit_code() == 0
    assert running.terminal.written == b"a/0 x 0 0\na/1 x 1 0\na/2 x 2 0\n"
    assert running.terminal.said == []


async def test_only_what_was_printed_is_acknowledged(memory_broker: MemoryBroker, nursery: trio.Nursery) -> None:
    session = session_with(memory_broker, clean_start=False, session_expiry_interval=60)
    first = await start(nursery, session, "a", count=2)
    sender = await memory_broker.connect("sender")
    for number in range(5):
        await sender.send(Publish("a", b"%d" % number, QoS.AT_LEAST_ONCE, packet_id=number + 1))
    assert await first.exit_code() == 0
    second = await start(nursery, session, "a", count=3)
    assert await second.exit_code() == 0
    assert first.terminal.written + second.terminal.written == b"a 0\na 1\na 2\na 3\na 4\n"


@pytest.mark.spec("MQTT5-3.2.2-5", "MQTT5-4.3.3-10")
@pytest.mark.parametrize("session_present", [True, False])
async def test_a_message_that_comes_again_is_printed_once(
    scripted: Callable[[Serve], Server], nursery: trio.Nursery, autojump_clock: MockClock, session_present: bool
) -> None:
    """In one session: where the server has none any more, the Packet Identifier means nothing to us either."""
    message = publish_bytes(V5, "a", b"x", flags=4, packet_id=9)
    again = publish_bytes(V5, "a", b"x", flags=12, packet_id=9)
    connections = 0

    async def serve(wire: Wire) -> None:
        nonlocal connections
        connections += 1
        await wire.read()
        await wire.send(CONNACK if connections == 1 else bytes([0x20, 3, session_present, 0, 0]))
        await wire.read()
        await wire.send(SUBACK, message if connections == 1 else again)
        assert await wire.read() == ack(0x50, 9)
        if connections > 1:
            if session_present:
                await wire.send(ack(0x62, 9))
                assert await wire.read() == ack(0x70, 9)
                await wire.send(publish_bytes(V5, "a", b"y", flags=4, packet_id=9))
                await wire.read()
            assert await wire.read() == DISCONNECT
        await trio.aclose_forcefully(wire.stream)

    running = await start(nursery, scripted(serve).session(clean_start=False), "a", count=2)
    assert await running.exit_code() == 0
    assert running.terminal.written == (b"a x\na y\n" if session_present else b"a x\na x\n")
    assert running.terminal.said == ["Error: The connection was lost. Connecting again."]
    assert connections == 2


# What is printed


async def test_filters_and_retained_messages(memory_broker: MemoryBroker, nursery: trio.Nursery) -> None:
    sender = await memory_broker.connect("sender")
    await sender.publish("a/old", b"old", qos=1, retain=True)
    all_ = await start(nursery, session_with(memory_broker, "1"), "a/#", count=3)
    live = await start(nursery, session_with(memory_broker, "2"), "a/#", skip_retained=True, count=2)
    some = await start(nursery, session_with(memory_broker, "3"), "a/#", filters_out=("a/+/x", "a/old"), count=1)
    kept = await start(nursery, session_with(memory_broker, "4"), "a/#", retained_only=True)
    await sender.publish("a/b/x", b"1")
    await sender.publish("a/b", b"2")
    for running in (all_, live, some, kept):
        assert await running.exit_code() == 0
    assert all_.terminal.written == b"a/old old\na/b/x 1\na/b 2\n"
    assert live.terminal.written == b"a/b/x 1\na/b 2\n"
    assert some.terminal.written == b"a/b 2\n"
    assert kept.terminal.written == b"a/old old\n"


async def test_retained_messages_are_removed(memory_broker: MemoryBroker, nursery: trio.Nursery) -> None:
    sender = await memory_broker.connect("sender")
    for name in ("a/1", "a/2", "b"):
        await sender.publish(name, b"x", qos=1, retain=True)
    running = await start(nursery, session_with(memory_broker), "#", remove_retained=True, filters_out=("b",), count=2)
    assert await running.exit_code() == 0
    late = await memory_broker.connect("late")
    await late.subscribe("#")
    assert (await late.next_message()).topic_name == "b"
    assert await late.nothing_waits()


async def test_a_payload_that_is_no_json_is_reported(memory_broker: MemoryBroker, nursery: trio.Nursery) -> None:
    running = await start(nursery, session_with(memory_broker), "a", printer=formatted("%J", b"\n"), count=2)
    sender = await memory_broker.connect("sender")
    await sender.publish("a", b"{")
    await sender.publish("a", b"{}")
    assert await running.exit_code() == 0
    assert running.terminal.said == ["Error: Message payload is not valid JSON on topic a."]
    assert running.terminal.written.endswith(b'"payload":{}}\n')


async def test_a_share_of_the_messages(
    memory_broker: MemoryBroker, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter([0.1, 0.6, 0.5, 0.4])
    monkeypatch.setattr("mqtt_trio.commands.sub.random.random", lambda: next(numbers))
    running = await start(nursery, session_with(memory_broker), "a", share_printed=0.5, count=4, printer=plain(b""))
    sender = await memory_broker.connect("sender")
    for number in range(4):
        await sender.publish("a", b"%d" % number)
    assert await running.exit_code() == 0
    assert running.terminal.written == b"03"


# Ends


async def test_exit_after_subscribing_keeps_the_session(memory_broker: MemoryBroker, nursery: trio.Nursery) -> None:
    session = session_with(memory_broker, clean_start=False, session_expiry_interval=60)
    running = await start(nursery, session, "a", "b", exit_after_subscribe=True)
    assert await running.exit_code() == 0
    sender = await memory_broker.connect("sender")
    await sender.publish("a", b"kept", qos=1)
    again = Running(nursery, session, options_for(unsubscriptions=("a", "b"), count=1))
    assert await again.exit_code() == 0
    assert again.terminal.written == b"a kept\n"
    last = Running(nursery, session, options_for(unsubscriptions=("a",), exit_after_subscribe=True))
    assert await last.exit_code() == 0


@pytest.mark.parametrize("frozen", [False, True])
async def test_a_time_limit(
    memory_broker: MemoryBroker,
    scripted: Callable[[Serve], Server],
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    frozen: bool,
) -> None:
    async def serve(_wire: Wire) -> None:
        await trio.sleep_forever()

    session = scripted(serve).session() if frozen else session_with(memory_broker)
    running = await start(nursery, session, "a", timeout=5)
    assert await running.exit_code() == 27
    assert running.terminal.said == ["Timed out"]
    assert trio.current_time() == 5


@pytest.mark.parametrize("version", [4, 5])
async def test_a_signal_says_goodbye(memory_broker: MemoryBroker, nursery: trio.Nursery, version: int) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    will = Will(topic_name="gone", payload=b"!")
    session = session_with(memory_broker, will=will, protocol_version=ProtocolVersion(version))
    running = await start(nursery, session, "a")
    running.terminal.stopping.set()
    assert await running.exit_code() == 0
    # As with mosquitto_sub, 5.0 publishes the Will of a client that was interrupted; 3.x cannot.
    assert len(watcher.waiting) == 0
    assert await watcher.nothing_waits() is (version == 4)


@pytest.mark.parametrize(
    "error, code, said",
    [(BrokenPipeError(), 0, []), (OSError(errno.ENOSPC, "No space left on device"), 1, ["No space left on device"])],
)
async def test_standard_output_that_takes_nothing(
    memory_broker: MemoryBroker, nursery: trio.Nursery, error: OSError, code: int, said: list[str]
) -> None:
    session = session_with(memory_broker, clean_start=False, session_expiry_interval=60)
    running = await start(nursery, session, "a")
    running.terminal.broken = error
    sender = await memory_broker.connect("sender")
    await sender.publish("a", b"x", qos=1)
    assert await running.exit_code() == code
    assert [line.removeprefix("Error: standard output: ") for line in running.terminal.said] == said
    again = await start(nursery, session, "a", count=1)
    assert await again.exit_code() == 0
    assert again.terminal.written == b"a x\n"


# Refusals


class Reader:
    """Authorizer: `b` cannot be read."""

    def may_publish(self, *_who_what: object) -> bool:
        return True

    def may_subscribe(self, _principal: object, topic_filter: str) -> bool:
        return topic_filter != "b"

    def may_receive(self, *_who_what: object) -> bool:
        return True


@pytest.mark.parametrize("version", [4, 5])
async def test_refused_subscriptions(nursery: trio.Nursery, version: int) -> None:
    told = "Not authorized: this client may not subscribe to this Topic Filter"
    why = told if version == 5 else "Unspecified error"
    async with open_memory_broker(authorizer=Reader()) as memory:
        session = session_with(memory, protocol_version=ProtocolVersion(version))
        some = await start(nursery, session, "a", "b")
        assert some.terminal.said == [f"Warning: b is refused: {why}"]
        assert not some.ended.is_set()
        none = await start(nursery, session_with(memory, "2", protocol_version=ProtocolVersion(version)), "b")
        assert await none.exit_code() == 1
        assert none.terminal.said == [f"Warning: b is refused: {why}", "All subscription requests were denied."]
        some.terminal.stopping.set()
        await some.ended.wait()


async def test_a_refused_connect(scripted: Callable[[Serve], Server], nursery: trio.Nursery) -> None:
    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(packet(0x20, b"\0\x87\0"))

    running = await start(nursery, scripted(serve).session(), "a")
    assert isinstance(running.failure, RefusedError)
    assert running.failure.exit_code == 0x87


# Lost connections


async def test_it_connects_again_every_second(
    scripted: Callable[[Serve], Server], nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    times: list[float] = []

    async def serve(wire: Wire) -> None:
        times.append(trio.current_time())
        if len(times) in (1, 5):
            await wire.read()
            await wire.send(CONNACK)
            assert (await wire.read())[0] == 0x82
            await wire.send(SUBACK)
        if len(times) == 5:
            await wire.send(publish_bytes(V5, "a", b"back"))
            assert await wire.read() == DISCONNECT
        await trio.aclose_forcefully(wire.stream)

    running = await start(nursery, scripted(serve).session(), "a", count=1)
    assert await running.exit_code() == 0
    assert times == [0, 1, 2, 3, 4]
    assert running.terminal.written == b"a back\n"
    assert running.terminal.said == ["Error: The connection was lost. Connecting again."]


async def test_the_first_connection_is_tried_once(
    scripted: Callable[[Serve], Server], nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def serve(wire: Wire) -> None:
        await trio.aclose_forcefully(wire.stream)

    server = scripted(serve)
    running = await start(nursery, server.session(), "a")
    await running.ended.wait()
    assert running.failure is not None
    assert running.failure.exit_code == 1
    assert server.connections == 1


async def test_a_signal_between_two_connections(
    scripted: Callable[[Serve], Server], nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(CONNACK)
        await wire.read()
        await trio.aclose_forcefully(wire.stream)

    running = Running(nursery, scripted(serve).session(), options_for("a"))
    await trio.sleep(0.5)
    running.terminal.stopping.set()
    assert await running.exit_code() == 0
    assert trio.current_time() == 0.5


async def test_a_session_that_was_taken_over_is_not_taken_back(
    memory_broker: MemoryBroker, nursery: trio.Nursery
) -> None:
    first = await start(nursery, session_with(memory_broker), "a")
    second = await start(nursery, session_with(memory_broker), "a", count=1)
    await first.ended.wait()
    assert isinstance(first.failure, DisconnectedError)
    assert str(first.failure) == "Error: the server disconnected: Session taken over"
    sender = await memory_broker.connect("sender")
    await sender.publish("a", b"x")
    assert await second.exit_code() == 0


async def test_a_slow_reader_of_the_output_is_not_a_dead_server(
    memory_broker: MemoryBroker, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    running = await start(nursery, session_with(memory_broker, keep_alive=10), "a", count=2)

    async def write_slowly(data: bytes) -> None:
        await trio.sleep(100)
        running.terminal.written += data

    running.terminal.write = write_slowly  # type: ignore[method-assign]
    sender = await memory_broker.connect("sender")
    await sender.publish("a", b"1", qos=1)
    await trio.testing.wait_all_tasks_blocked()
    await sender.publish("a", b"2", qos=1)
    assert await running.exit_code() == 0
    assert running.terminal.said == []
    assert running.terminal.written == b"a 1\na 2\n"


@pytest.mark.spec("MQTT5-3.14.4-1")
async def test_nothing_is_sent_behind_disconnect(scripted: Callable[[Serve], Server]) -> None:
    """Also when a message crosses it and is answered: that is no failure."""
    sent: list[bytes] = []
    handled: list[Packet] = []

    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(CONNACK)
        assert await wire.read() == DISCONNECT
        await wire.send(publish_bytes(V5, "a", b"crosses it", flags=2, packet_id=2))
        await wire.stream.send_eof()  # type: ignore[attr-defined]
        sent.extend(await wire.until_closed())

    async def handle(client: Client, packets: list[Packet]) -> None:
        handled.extend(packets)
        await client.send(PubAck(2))

    async def work(client: Client) -> None:
        """Nothing to do: goodbye."""

    await converse(scripted(serve).session(), handle, work)
    assert len(handled) == 1
    assert sent == []
