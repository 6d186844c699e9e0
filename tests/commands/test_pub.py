"""pub [F3]: messages, flow control, refusals, servers that do not answer, signals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mqtt_trio.broker.access import Denied
from mqtt_trio.commands.client import Session
from mqtt_trio.commands.failures import CommandError, RefusedError, UnreachableError
from mqtt_trio.commands.pub import Publisher, PubOptions
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import MessageProperties, Will
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.command_support import CONNACK, FakeTerminal, Server, session_with
from tests.wire import DISCONNECT, PINGREQ, PINGRESP, V5, Wire, ack, number, packet, packet_ids

versions = pytest.mark.parametrize("version", list(ProtocolVersion))
qualities = pytest.mark.parametrize("qos", list(QoS))
Serve = Callable[[Wire], Awaitable[None]]


@pytest.fixture
async def scripted(nursery: trio.Nursery) -> AsyncIterator[Callable[[Serve], Server]]:
    """Makes servers; whatever they still do ends with the test."""
    yield lambda serve: Server(nursery, serve)
    nursery.cancel_scope.cancel()


def connack(properties: bytes = b"", code: int = 0) -> bytes:
    return packet(0x20, b"\0", bytes([code]), number(len(properties)), properties)


async def publish(session: Session, terminal: FakeTerminal | None = None, **options: Any) -> int:
    if not options.keys() & {"lines", "whole_input"}:
        options.setdefault("payload", b"hello")
    made = PubOptions(topic_name="a", **{**options, "qos": QoS(options.get("qos", 0))})
    return await Publisher(made, terminal or FakeTerminal()).run(session)


@versions
@qualities
async def test_a_message(memory_broker: MemoryBroker, version: ProtocolVersion, qos: QoS) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("a")
    properties = MessageProperties(content_type="t")
    session = session_with(memory_broker, protocol_version=version)
    assert await publish(session, qos=qos, retain=True, properties=properties) == 0
    message = await watcher.next_message()
    assert (message.payload, message.qos) == (b"hello", qos)
    assert message.properties.content_type == ("t" if version == V5 else None)
    late = await memory_broker.connect("late")
    await late.subscribe("a")
    assert (await late.next_message()).retain


async def test_goodbye_is_said(memory_broker: MemoryBroker) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("#")
    will = Will(topic_name="gone", payload=b"!")
    assert await publish(session_with(memory_broker, will=will)) == 0
    assert (await watcher.next_message()).topic_name == "a"
    assert await watcher.nothing_waits()


async def test_lines_stream_as_they_come(memory_broker: MemoryBroker, nursery: trio.Nursery) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("a")
    terminal, codes = FakeTerminal(), []

    async def run() -> None:
        codes.append(await publish(session_with(memory_broker), terminal, lines=True, qos=1))

    nursery.start_soon(run)
    await terminal.give(b"one\n\ntwo\nth")
    assert [(await watcher.next_message()).payload for _ in range(3)] == [b"one", b"", b"two"]
    await terminal.give(b"ree\r\nla")
    assert (await watcher.next_message()).payload == b"three\r"
    await terminal.give(b"st")
    terminal.end()
    assert (await watcher.next_message()).payload == b"last"
    await trio.testing.wait_all_tasks_blocked()
    assert codes == [0]


@pytest.mark.parametrize("chunks", [[], [b"one\n", b"two"], [b"x" * 100_000] * 3])
async def test_whole_input(memory_broker: MemoryBroker, nursery: trio.Nursery, chunks: list[bytes]) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("a")
    terminal = FakeTerminal()

    async def give() -> None:
        for chunk in chunks:
            await terminal.give(chunk)
        terminal.end()

    nursery.start_soon(give)
    assert await publish(session_with(memory_broker), terminal, whole_input=True) == 0
    assert (await watcher.next_message()).payload == b"".join(chunks)


async def test_repeat_waits_between_messages(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("a")
    start = trio.current_time()
    assert await publish(session_with(memory_broker), repeat=3, repeat_delay=2.0, qos=2) == 0
    assert trio.current_time() - start == 4
    assert [(await watcher.next_message()).payload for _ in range(3)] == [b"hello"] * 3


async def test_a_topic_alias_saves_the_topic(memory_broker: MemoryBroker) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("a")
    assert await publish(session_with(memory_broker), repeat=2, topic_alias=1) == 0
    assert [(await watcher.next_message()).topic_name for _ in range(2)] == ["a", "a"]


@pytest.mark.parametrize("own, servers, window", [(20, None, 20), (20, 3, 3), (2, 3, 2), (65_535, 65_535, 300)])
@pytest.mark.parametrize("qos", [1, 2])
async def test_unacknowledged_messages_are_bounded(
    scripted: Callable[[Serve], Server],
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    own: int,
    servers: int | None,
    window: int,
    qos: int,
) -> None:
    seen: list[list[int]] = []
    total = 300
    goodbye = trio.Event()

    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(connack(b"" if servers is None else b"\x21" + servers.to_bytes(2, "big")))
        while sum(map(len, seen)) < total:
            published = await until_pause(wire)
            ids = [int.from_bytes(each[5:7], "big") for each in published]
            seen.append(ids)
            if qos == 1:
                await wire.send(*[ack(0x40, each) for each in ids])
                continue
            await wire.send(*[ack(0x50, each) for each in ids])
            assert packet_ids([await wire.read() for _ in ids]) == ids
            await wire.send(*[ack(0x70, each) for each in ids])
        assert await wire.read() == DISCONNECT
        goodbye.set()
        await trio.aclose_forcefully(wire.stream)

    terminal = FakeTerminal()

    async def give() -> None:
        await terminal.give(b"x\n" * total)
        terminal.end()

    nursery.start_soon(give)
    assert await publish(scripted(serve).session(), terminal, lines=True, qos=qos, max_inflight=own) == 0
    assert goodbye.is_set()
    assert max(map(len, seen)) == window


async def until_pause(wire: Wire) -> list[bytes]:
    """Packets until the other side waits: virtual time passes only then."""
    packets = [await wire.read()]
    with trio.move_on_after(1):
        while True:
            packets.append(await wire.read())
    return packets


# Refusals


@pytest.mark.parametrize(
    "version, code, text, exit_code",
    [
        (5, 0x87, "Connection error: Not authorized", 0x87),
        (5, 0x86, "Connection error: Bad username or password", 0x86),
        (5, 0x84, "Connection error: Unsupported protocol version. Try -V 311", 0x84),
        (4, 5, "Connection error: Connection Refused: not authorised.", 5),
        (4, 4, "Connection error: Connection Refused: bad user name or password.", 4),
        (3, 2, "Connection error: Connection Refused: identifier rejected.", 2),
    ],
)
async def test_a_refused_connect(
    scripted: Callable[[Serve], Server], version: int, code: int, text: str, exit_code: int
) -> None:
    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(connack(code=code) if version == 5 else bytes([0x20, 2, 0, code]))

    with pytest.raises(RefusedError) as caught:
        await publish(scripted(serve).session(protocol_version=ProtocolVersion(version)))
    assert (str(caught.value), caught.value.exit_code) == (text, exit_code)


async def test_a_broker_that_denies(memory_broker: MemoryBroker) -> None:
    class Nobody:
        def authenticate(self, _credentials: object) -> Denied:
            return Denied(ReasonCode.NOT_AUTHORIZED, "for the log")

    async with open_memory_broker(authenticator=Nobody()) as memory:
        with pytest.raises(RefusedError, match="Connection error: Not authorized"):
            await publish(session_with(memory))


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_refused_message_is_reported(scripted: Callable[[Serve], Server], qos: int) -> None:
    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(CONNACK)
        await wire.read()
        reason = b"\x1f\x00\x06no\x1b no"
        await wire.send(packet(0x40 if qos == 1 else 0x50, b"\0\x01\x87", number(len(reason)), reason))
        assert await wire.read() == DISCONNECT
        await trio.aclose_forcefully(wire.stream)

    terminal = FakeTerminal()
    assert await publish(scripted(serve).session(), terminal, qos=qos) == 1
    assert terminal.said == ["Warning: Publish 1 failed: Not authorized.", "no? no"]


@pytest.mark.parametrize(
    "properties, options, words",
    [
        (b"\x24\x01", {"qos": 2}, "try a lower QoS (its maximum is 1)"),
        (b"\x25\x00", {"retain": True}, "does not retain"),
        (b"\x27\x00\x00\x00\x10", {"payload": b"x" * 20}, "a Publish of 26 bytes; the peer takes 16"),
        (b"\x22\x00\x02", {"topic_alias": 3}, "topic-alias 3: the server's maximum is 2"),
        (b"", {"topic_alias": 1}, "the server's maximum is 0"),
    ],
)
async def test_what_the_server_does_not_take_is_not_sent(
    scripted: Callable[[Serve], Server], properties: bytes, options: dict[str, Any], words: str
) -> None:
    heard: list[bytes] = []

    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(connack(properties))
        heard.extend([await wire.read()])
        await trio.aclose_forcefully(wire.stream)

    with pytest.raises(CommandError) as caught:
        await publish(scripted(serve).session(), **options)
    assert words in str(caught.value)
    assert heard == [DISCONNECT]


async def test_a_line_that_is_too_large_ends_after_the_ones_before(memory_broker: MemoryBroker) -> None:
    limits = attrs.evolve(memory_broker.broker.limits, maximum_packet_size=1024)
    async with open_memory_broker(limits) as memory, trio.open_nursery() as nursery:
        watcher = await memory.connect("watcher")
        await watcher.subscribe("a")
        terminal = FakeTerminal()
        nursery.start_soon(terminal.give, b"one\ntwo\n" + b"x" * 2000 + b"\nfour\n")
        with pytest.raises(CommandError, match="message 3: a Publish of"):
            await publish(session_with(memory), terminal, lines=True, qos=1)
        assert [(await watcher.next_message()).payload for _ in range(2)] == [b"one", b"two"]
        assert await watcher.nothing_waits()


# Servers that do not do their part


async def test_a_server_that_does_not_answer_connect(
    scripted: Callable[[Serve], Server], autojump_clock: MockClock
) -> None:
    async def serve(wire: Wire) -> None:
        await wire.read()
        await trio.sleep_forever()

    start = trio.current_time()
    with pytest.raises(UnreachableError, match=r"Error: script did not answer CONNECT within 10 s\."):
        await publish(scripted(serve).session())
    assert trio.current_time() - start == 10


@pytest.mark.spec("MQTT5-3.1.2-20")
async def test_a_server_that_acknowledges_nothing_and_answers_no_ping(
    scripted: Callable[[Serve], Server], autojump_clock: MockClock
) -> None:
    pings: list[float] = []

    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(CONNACK)
        await wire.read()
        assert await wire.read() == PINGREQ
        pings.append(trio.current_time())
        await wire.send(PINGRESP)
        assert await wire.read() == PINGREQ
        pings.append(trio.current_time())
        await trio.sleep_forever()

    with pytest.raises(CommandError) as caught:
        await publish(scripted(serve).session(keep_alive=10), qos=1)
    assert str(caught.value) == ("Error: the server did not answer PINGREQ for 10 s. 1 message is not acknowledged.")
    assert pings == [10, 20]
    assert trio.current_time() == 30


@pytest.mark.spec("MQTT5-3.1.2-21", "MQTT5-3.2.2-21", "MQTT5-3.1.2-20")
async def test_the_server_sets_keep_alive(scripted: Callable[[Serve], Server], autojump_clock: MockClock) -> None:
    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(connack(b"\x13\x00\x03"))
        await wire.read()
        assert await wire.read() == PINGREQ
        assert trio.current_time() == 3
        await wire.send(ack(0x40, 1))
        await trio.aclose_forcefully(wire.stream)

    # It closed behind the last acknowledgement and did not wait for DISCONNECT: nothing is missing.
    assert await publish(scripted(serve).session(keep_alive=60), qos=1) == 0


@pytest.mark.parametrize(
    "answer, words",
    [
        (b"", "The connection was lost. There was no CONNACK"),
        (b"HTTP/1.1 400 Bad Request\r\n", "the server breaks the protocol"),
        (b"\xf0\x00", "enhanced authentication"),
        (CONNACK, "Error: The connection was lost. 1 message is not acknowledged."),
        (CONNACK + b"\xe0\x01\x8b", "Error: the server disconnected: Server shutting down 1 message is"),
        (CONNACK + b"\x00\x00", "Error: the server breaks the protocol (packet type 0 is reserved)."),
    ],
)
async def test_servers_that_end_early(scripted: Callable[[Serve], Server], answer: bytes, words: str) -> None:
    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(answer)
        if answer.startswith(CONNACK):
            await wire.read()
        await wire.stream.send_eof()  # type: ignore[attr-defined]
        await trio.sleep_forever()

    with pytest.raises(CommandError) as caught:
        await publish(scripted(serve).session(), qos=1)
    assert words in str(caught.value)
    assert caught.value.exit_code == 1


# Signals


async def test_a_signal_ends_line_mode_with_everything_acknowledged(
    memory_broker: MemoryBroker, nursery: trio.Nursery
) -> None:
    terminal, codes = FakeTerminal(), []

    async def run() -> None:
        codes.append(await publish(session_with(memory_broker), terminal, lines=True, qos=2))

    nursery.start_soon(run)
    await terminal.give(b"one\n")
    terminal.stopping.set()
    await trio.testing.wait_all_tasks_blocked()
    assert codes == [0]
    assert terminal.said == []


async def test_a_signal_while_the_acknowledgement_is_missing(
    scripted: Callable[[Serve], Server], autojump_clock: MockClock
) -> None:
    terminal = FakeTerminal()

    async def serve(wire: Wire) -> None:
        await wire.read()
        await wire.send(CONNACK)
        await wire.read()
        terminal.stopping.set()
        assert await wire.read() == DISCONNECT
        await trio.aclose_forcefully(wire.stream)

    assert await publish(scripted(serve).session(), terminal, qos=1) == 1
    assert terminal.said == ["Interrupted: 1 not acknowledged."]
    assert trio.current_time() == 2


async def test_a_signal_while_connecting(scripted: Callable[[Serve], Server], autojump_clock: MockClock) -> None:
    terminal = FakeTerminal()

    async def serve(wire: Wire) -> None:
        await wire.read()
        terminal.stopping.set()
        await trio.sleep_forever()

    assert await publish(scripted(serve).session(), terminal) == 1
    assert trio.current_time() == 0


# -d


async def test_debug_lines_show_no_password(memory_broker: MemoryBroker) -> None:
    lines: list[str] = []
    session = session_with(memory_broker, user_name="bob", password=b"secret")
    session = attrs.evolve(session, log=lines.append)
    assert await publish(session, qos=2, payload=b"private") == 0
    assert lines == [
        "Client cli sending CONNECT",
        "Client cli received CONNACK (0)",
        "Client cli sending PUBLISH (d0, q2, r0, m1, 'a', ... (7 bytes))",
        "Client cli received PUBREC (Mid: 1)",
        "Client cli sending PUBREL (Mid: 1)",
        "Client cli received PUBCOMP (Mid: 1)",
        "Client cli sending DISCONNECT",
    ]
