"""`mqtt-trio pub`: publish what the command line, a file or standard input has, and wait for its acknowledgement."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import trio

from mqtt_trio.commands.arguments import (
    Connection,
    Parser,
    add_connection_flags,
    integer,
    read_connection,
    topic_name,
)
from mqtt_trio.commands.client import Client, Session, converse
from mqtt_trio.commands.failures import (
    EXIT_FAILURE,
    CommandError,
    ConnectionLostError,
    DisconnectedError,
    UsageError,
    printable,
    reason_text,
)
from mqtt_trio.commands.properties import message_properties
from mqtt_trio.commands.runner import Terminal, report, run_client
from mqtt_trio.errors import LocalProtocolError, MqttTrioError
from mqtt_trio.protocol.codes import QoS, ReasonCode
from mqtt_trio.protocol.packets import (
    NO_PROPERTIES,
    MessageProperties,
    Packet,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
)
from mqtt_trio.protocol.wire import MAXIMUM_POSSIBLE_PACKET_SIZE

T = TypeVar("T")
RECEIVE_MAXIMUM: Final = 65_535
"""Of a server that names none [MQTT5-3.2.2.3.3]."""
STOP_TIMEOUT: Final = 2.0
"""Seconds for acknowledgements that are missing when a signal ends the command."""

USAGE: Final = "[-h HOST] [-p PORT] [-q QOS] -t TOPIC {-m TEXT | -f FILE | -l | -n | -s} [OPTION ...]"


@attrs.frozen(kw_only=True)
class PubOptions:
    """What to publish. Exactly one of `payload`, `lines` and `whole_input` says where it comes from."""

    topic_name: str
    payload: bytes | None = None
    lines: bool = False
    """One message per line of standard input."""
    whole_input: bool = False
    """One message with all of standard input."""
    qos: QoS = QoS.AT_MOST_ONCE
    retain: bool = False
    properties: MessageProperties = NO_PROPERTIES
    topic_alias: int | None = None
    max_inflight: int = 20
    repeat: int = 1
    repeat_delay: float = 0.0
    """Seconds from an acknowledgement to the next message."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    try:
        parsed = _make_parser().read(arguments)
        connection = read_connection(parsed, "pub")
        options = _read_options(parsed, connection)
    except MqttTrioError as exc:
        return report("pub", exc)

    async def command(session: Session, terminal: Terminal) -> int:
        return await Publisher(options, terminal).run(session)

    return run_client("pub", parsed, connection, command)


def _make_parser() -> Parser:
    parser = Parser("pub", USAGE, "Publish messages and wait for their acknowledgements.")
    option, switch = parser.option, parser.switch
    option("-t", "--topic", type=topic_name, help="topic to publish to")
    option("-m", "--message", metavar="TEXT", help="the payload")
    option("-f", "--file", metavar="FILE", help="a file is the payload")
    switch("-l", "--stdin-line", help="each line of standard input is a message")
    switch("-n", "--null-message", help="an empty payload")
    switch("-s", "--stdin-file", help="standard input to its end is the payload")
    option("-q", "--qos", type=integer(0, 2), default=0, help="quality of service (0)")
    switch("-r", "--retain", help="retain the message")
    option("-M", dest="max_inflight", type=integer(1, RECEIVE_MAXIMUM), default=20, metavar="NUMBER",
           help="messages without acknowledgement at a time (20), at most the server's Receive Maximum")  # fmt: skip
    option("--repeat", type=integer(1, 2**31), default=1, metavar="TIMES", help="publish -f, -m, -n or -s so often (1)")
    option("--repeat-delay", type=_seconds, default=0.0, metavar="SECONDS", help="pause between them (0)")
    add_connection_flags(parser)
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"expected seconds from 0 on, got {text!r}")
    return value


def _read_options(parsed: argparse.Namespace, connection: Connection) -> PubOptions:
    sources = {
        "-m": parsed.message is not None,
        "-f": parsed.file is not None,
        "-l": parsed.stdin_line,
        "-n": parsed.null_message,
        "-s": parsed.stdin_file,
    }
    chosen = [flag for flag, given in sources.items() if given]
    if len(chosen) != 1:
        found = "none" if not chosen else " and ".join(chosen)
        raise UsageError(f"expected one of -m, -f, -l, -n and -s for the message, found {found}")
    name = parsed.topic or (topic_name(connection.topic) if connection.topic else None)
    if name is None:
        raise UsageError("the topic is missing: -t TOPIC, or a URL with -L")
    if parsed.stdin_line and parsed.repeat > 1:
        raise UsageError("--repeat is for -f, -m, -n and -s: standard input is read once")
    fields = connection.properties["publish"]
    connection.check_unused("publish")
    payload = os.fsencode(parsed.message) if parsed.message is not None else b"" if parsed.null_message else None
    return PubOptions(
        topic_name=name,
        payload=_read_file(parsed.file) if parsed.file is not None else payload,
        lines=parsed.stdin_line,
        whole_input=parsed.stdin_file,
        qos=QoS(parsed.qos),
        retain=parsed.retain,
        properties=message_properties(fields),
        max_inflight=parsed.max_inflight,
        repeat=parsed.repeat,
        repeat_delay=parsed.repeat_delay,
        **fields,  # topic_alias, if it is given
    )


def _read_file(name: str) -> bytes:
    try:
        path = Path(name)
        if path.stat().st_size > MAXIMUM_POSSIBLE_PACKET_SIZE:
            raise CommandError(f"Error: -f {name}: larger than any MQTT packet can be (256 MiB)")
        return path.read_bytes()
    except (OSError, ValueError) as exc:
        raise CommandError(f"Error: -f {name}: {getattr(exc, 'strerror', None) or exc}") from None


class _StoppedError(MqttTrioError):
    """A signal came before everything was acknowledged."""


class Publisher:
    """Publishes within a window of unacknowledged messages."""

    def __init__(self, options: PubOptions, terminal: Terminal) -> None:
        self._options = options
        self._terminal = terminal
        self._waiting: set[int] = set()
        """Packet Identifiers whose flow goes on."""
        self._changed = trio.Event()
        """Set when a flow ends."""
        self._ids = itertools.cycle(range(1, 65_536))
        self._pause = trio.CancelScope()
        """What `_unless_stopped` waits in."""
        self._begun = 0
        self._failed = 0
        self._started = False
        """Whether a CONNACK came."""
        self._complete = False
        """Whether everything was handed to the connection."""

    async def run(self, session: Session) -> int:
        """Publish over a connection of its own; return the exit code.

        Raises:
          MqttTrioError: what kept messages from being acknowledged.
        """
        try:
            with trio.CancelScope() as connecting:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._give_up, connecting)
                    failure = await _outcome(converse(session, self.handle, self.work))
                    nursery.cancel_scope.cancel()
            if connecting.cancelled_caught:
                return EXIT_FAILURE
            if failure is not None:
                raise failure
        except (ConnectionLostError, DisconnectedError) as exc:
            if not self._waiting:
                if self._complete and self._options.qos and isinstance(exc, ConnectionLostError):
                    return self._exit_code  # it closed behind its last acknowledgement
                raise
            count = len(self._waiting)
            missing = "1 message is" if count == 1 else f"{count} messages are"
            raise CommandError(f"{exc} {missing} not acknowledged.") from None
        return self._exit_code

    @property
    def _exit_code(self) -> int:
        nothing_sent = not (self._complete or self._options.lines or self._begun)
        return EXIT_FAILURE if self._failed or self._waiting or nothing_sent else 0

    async def _give_up(self, connecting: trio.CancelScope) -> None:
        """End an attempt to connect at a signal; later on `work` sees it."""
        await self._terminal.stopping.wait()
        if not self._started:
            connecting.cancel()

    async def work(self, client: Client) -> None:
        """Send everything and wait until all of it is acknowledged, or until a signal."""
        self._started = True
        self._check(client)
        failure: MqttTrioError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop, nursery.cancel_scope)
            failure = await _outcome(self._send_all(client))
            nursery.cancel_scope.cancel()
        if failure is None:
            return
        with trio.move_on_after(STOP_TIMEOUT):
            await self._until_fewer_than(1)
        if not isinstance(failure, _StoppedError):
            raise failure
        if self._waiting:
            self._terminal.say(f"Interrupted: {len(self._waiting)} not acknowledged.")

    async def _stop(self, sending: trio.CancelScope) -> None:
        """At a signal, end what `_unless_stopped` waits for; a packet that is being sent has STOP_TIMEOUT more."""
        await self._terminal.stopping.wait()
        self._pause.cancel()
        await trio.sleep(STOP_TIMEOUT)
        sending.cancel()

    async def _unless_stopped(self, wait: Callable[[], Awaitable[T]]) -> T:
        """Wait where a signal may interrupt: between packets.

        Raises:
          _StoppedError: it did.
        """
        with trio.CancelScope() as self._pause:
            if not self._terminal.stopping.is_set():
                return await wait()
        raise _StoppedError

    async def handle(self, client: Client, packets: list[Packet]) -> None:
        """Go on with the QoS flows. Messages for a session that is continued stay with the server."""
        replies: list[Packet] = []
        for packet in packets:
            if isinstance(packet, PubRec):
                if packet.reason_code >= 0x80:
                    self._end(packet)
                else:
                    known = packet.packet_id in self._waiting
                    code = ReasonCode.SUCCESS if known else ReasonCode.PACKET_IDENTIFIER_NOT_FOUND
                    replies.append(PubRel(packet.packet_id, code))
            elif isinstance(packet, PubAck | PubComp):
                self._end(packet)
        if replies:
            await client.send(*replies)

    def _end(self, packet: PubAck | PubRec | PubComp) -> None:
        if packet.packet_id not in self._waiting:
            return
        self._waiting.remove(packet.packet_id)
        if packet.reason_code >= 0x80:
            self._failed += 1
            self._terminal.say(f"Warning: Publish {packet.packet_id} failed: {reason_text(packet.reason_code)}.")
            if packet.reason_string:
                self._terminal.say(printable(packet.reason_string))
        self._changed.set()

    def _check(self, client: Client) -> None:
        """Compare what we are to send with what the server takes [MQTT5-3.2.2-11, 3.2.2-14]."""
        options, connack = self._options, client.connack
        if connack.maximum_qos is not None and options.qos > connack.maximum_qos:
            raise CommandError(
                f"Error: Message QoS not supported on broker, try a lower QoS (its maximum is {connack.maximum_qos})."
            )
        if connack.retain_available == 0 and options.retain:
            raise CommandError("Error: the server does not retain messages; leave -r out.")
        if options.topic_alias is not None and options.topic_alias > (connack.topic_alias_maximum or 0):
            raise CommandError(
                f"Error: topic-alias {options.topic_alias}: the server's maximum is {connack.topic_alias_maximum or 0}."
            )

    async def _send_all(self, client: Client) -> None:
        if self._options.lines:
            await self._send_lines(client)
        else:
            await self._send_one(client)
        self._complete = True
        await self._acknowledged()

    async def _send_one(self, client: Client) -> None:
        options = self._options
        payload = options.payload
        if payload is None:
            payload = await self._whole_input()
        for number in range(options.repeat):
            if number:
                await self._acknowledged()
                await self._unless_stopped(partial(trio.sleep, options.repeat_delay))
            await self._publish(client, payload)

    async def _whole_input(self) -> bytes:
        gathered = bytearray()
        while data := await self._unless_stopped(self._terminal.read):
            gathered += data
            _check_size(len(gathered))
        return bytes(gathered)

    async def _send_lines(self, client: Client) -> None:
        """Publish lines as they come, without their ends; a last line needs none. Read on only when all are sent."""
        rest = bytearray()
        while data := await self._unless_stopped(self._terminal.read):
            begin, *others = data.split(b"\n")
            rest += begin
            _check_size(len(rest))
            if others:
                for line in (bytes(rest), *others[:-1]):
                    await self._publish(client, line)
                rest = bytearray(others[-1])
        if rest:
            await self._publish(client, bytes(rest))

    async def _publish(self, client: Client, payload: bytes) -> None:
        options = self._options
        packet_id = None
        if options.qos:
            window = min(options.max_inflight, client.connack.receive_maximum or RECEIVE_MAXIMUM)
            await self._unless_stopped(partial(self._until_fewer_than, window))
            packet_id = next(number for number in self._ids if number not in self._waiting)
            self._waiting.add(packet_id)
        known_alias = options.topic_alias is not None and self._begun > 0
        packet = Publish(
            "" if known_alias else options.topic_name,
            payload,
            options.qos,
            options.retain,
            packet_id=packet_id,
            properties=options.properties,
            topic_alias=options.topic_alias,
        )
        try:
            await client.send(packet)
        except LocalProtocolError as exc:  # larger than the server's Maximum Packet Size [MQTT5-3.2.2-15]
            if packet_id is not None:
                self._waiting.remove(packet_id)
            which = f"message {self._begun + 1}: " if options.lines else ""
            raise CommandError(f"Error: {which}{exc}") from None
        self._begun += 1

    async def _acknowledged(self) -> None:
        await self._unless_stopped(partial(self._until_fewer_than, 1))

    async def _until_fewer_than(self, count: int) -> None:
        while len(self._waiting) >= count:
            self._changed = trio.Event()
            await self._changed.wait()


async def _outcome(task: Any) -> MqttTrioError | None:
    """Await `task`; return its failure as a value, so that no exception group needs unwrapping."""
    try:
        await task
    except MqttTrioError as exc:
        return exc
    return None


def _check_size(size: int) -> None:
    if size > MAXIMUM_POSSIBLE_PACKET_SIZE:
        raise CommandError("Error: a message on standard input is larger than any MQTT packet can be (256 MiB)")
