"""`mqtt-trio sub`: subscribe, print what comes, go on after a lost connection."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Final

import attrs
import trio

from mqtt_trio.commands.arguments import (
    Connection,
    Parser,
    add_connection_flags,
    integer,
    read_connection,
    topic_filter,
)
from mqtt_trio.commands.client import Client, Session, converse
from mqtt_trio.commands.failures import (
    EXIT_FAILURE,
    EXIT_TIMED_OUT,
    ConnectionLostError,
    DisconnectedError,
    UnreachableError,
    UsageError,
    reason_text,
    with_reason,
)
from mqtt_trio.commands.message_json import InvalidPayloadError
from mqtt_trio.commands.output import Arrived, Printer, formatted, plain, verbose
from mqtt_trio.commands.runner import Terminal, report, run_client
from mqtt_trio.errors import MqttTrioError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.packets import (
    Packet,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    Subscription,
    UnsubAck,
    Unsubscribe,
)
from mqtt_trio.protocol.topics import split_shared, topic_matches

RECONNECT_PAUSE: Final = 1.0
"""Seconds between two attempts; mosquitto_sub's."""
SUBSCRIBE_ID: Final = 1
"""Packet Identifier of SUBSCRIBE; those of UNSUBSCRIBE follow."""
STOP_TIMEOUT: Final = 3.0
"""Seconds that the farewell may take."""
RETAIN_HANDLING: Final = {"always": 0, "new": 1, "never": 2}

USAGE: Final = "[-h HOST] [-p PORT] [-q QOS] -t TOPIC [-t TOPIC ...] [-v | -F FORMAT] [OPTION ...]"


@attrs.frozen(kw_only=True)
class SubOptions:
    """What to subscribe to and what to print of it."""

    subscriptions: tuple[Subscription, ...] = ()
    unsubscriptions: tuple[str, ...] = ()
    subscribe: dict[str, object] = attrs.field(factory=dict)
    unsubscribe: dict[str, object] = attrs.field(factory=dict)
    """Properties of the packets."""
    printer: Printer
    filters_out: tuple[str, ...] = ()
    count: int = 0
    """End after so many messages; 0: do not."""
    timeout: int = 0
    """End after so many seconds; 0: do not."""
    exit_after_subscribe: bool = False
    skip_retained: bool = False
    retained_only: bool = False
    """End at the first message that was not retained."""
    remove_retained: bool = False
    share_printed: float = 1.0
    """Share of the messages that is printed, by chance."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    try:
        parsed = _make_parser().read(arguments)
        connection = read_connection(parsed, "sub")
        options = _read_options(parsed, connection)
    except MqttTrioError as exc:
        return report("sub", exc)

    async def command(session: Session, terminal: Terminal) -> int:
        return await Subscriber(options, terminal, session).run()

    return run_client("sub", parsed, connection, command)


def _make_parser() -> Parser:
    parser = Parser("sub", USAGE, "Subscribe and print the messages that come.")
    option, switch = parser.option, parser.switch
    option("-t", "--topic", action="append", default=[], type=topic_filter, help="topic to subscribe to; repeatable")
    option("-T", "--filter-out", action="append", default=[], type=topic_filter, metavar="TOPIC",
           help="topic whose messages are not printed; repeatable")  # fmt: skip
    option("-U", "--unsubscribe", action="append", default=[], type=topic_filter, metavar="TOPIC",
           help="topic to unsubscribe from, with -c; repeatable")  # fmt: skip
    option("-q", "--qos", type=integer(0, 2), default=0, help="highest quality of service (0)")
    switch("-v", "--verbose", help="print the topic in front of the payload")
    option("-F", dest="format", metavar="FORMAT", help="format string, as mosquitto_sub(1) explains: %%t %%p %%j ...")
    switch("--pretty", help="%%j and %%J over several lines")
    switch("-N", dest="no_end", help="print no end of line behind a message")
    option("-C", dest="count", type=integer(1, 2**31), default=0, metavar="NUMBER", help="exit after so many messages")
    option("-W", dest="timeout", type=integer(1, 2**31), default=0, metavar="SECONDS",
           help=f"exit after so many seconds, with code {EXIT_TIMED_OUT}")  # fmt: skip
    switch("-E", dest="exit_after_subscribe", help="exit when the subscriptions are made")
    switch("-R", dest="skip_retained", help="do not print messages that were retained")
    switch("--retained-only", help="print messages that were retained, exit at the first other one")
    switch("--remove-retained", help="clear the retained messages that are printed, on the server")
    switch("--retain-as-published", help="5.0: keep the retain flag of live messages")
    option("--retain-handling", choices=list(RETAIN_HANDLING), help="5.0: when retained messages are sent (always)")
    option("--random-filter", type=_percentage, default=100.0, metavar="PERCENT", help="print so many of the messages")
    add_connection_flags(parser)
    return parser


def _percentage(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected 0.1 to 100, got {text!r}")
    return value


def _read_options(parsed: argparse.Namespace, connection: Connection) -> SubOptions:
    topics = [*parsed.topic, *([topic_filter(connection.topic)] if connection.topic else [])]
    if not topics and not parsed.unsubscribe:
        raise UsageError("the topic is missing: -t TOPIC to subscribe to, or -U TOPIC to unsubscribe from")
    if parsed.skip_retained and parsed.retained_only:
        raise UsageError("-R and --retained-only together would print nothing")
    version5 = connection.connect.protocol_version is ProtocolVersion.MQTT_5_0
    if not version5 and (parsed.retain_as_published or parsed.retain_handling):
        raise UsageError("--retain-as-published and --retain-handling are for MQTT 5.0: say -V 5")
    connection.check_unused("subscribe", "unsubscribe")
    handling = "never" if parsed.skip_retained and version5 else parsed.retain_handling or "always"
    end = b"" if parsed.no_end else b"\n"
    printer = verbose(end) if parsed.verbose else plain(end)
    if parsed.format is not None:
        printer = formatted(parsed.format, end, pretty=parsed.pretty)
    subscriptions = [
        Subscription(
            each,
            QoS(parsed.qos),
            retain_as_published=parsed.retain_as_published,
            retain_handling=RETAIN_HANDLING[handling],
        )
        for each in topics
    ]
    return SubOptions(
        subscriptions=tuple(subscriptions),
        unsubscriptions=tuple(parsed.unsubscribe),
        subscribe=connection.properties["subscribe"],
        unsubscribe=connection.properties["unsubscribe"],
        printer=printer,
        filters_out=tuple(split_shared(each)[1] for each in parsed.filter_out),
        count=parsed.count,
        timeout=parsed.timeout,
        exit_after_subscribe=parsed.exit_after_subscribe,
        skip_retained=parsed.skip_retained,
        retained_only=parsed.retained_only,
        remove_retained=parsed.remove_retained,
        share_printed=parsed.random_filter / 100,
    )


class Subscriber:
    """Prints messages, over as many connections as it takes."""

    def __init__(self, options: SubOptions, terminal: Terminal, session: Session) -> None:
        self._options = options
        self._terminal = terminal
        self._session = session
        self._ending = False
        """Nothing more is printed."""
        self._done = trio.Event()
        """Everything that was printed is acknowledged: time to say goodbye."""
        self._exit_code = 0
        self._connected = False
        self._was_connected = False
        self._left = options.count
        self._unreleased: set[int] = set()
        """QoS 2: Packet Identifiers of messages that were printed and wait for PUBREL."""
        self._unanswered = 0
        """SUBSCRIBE and UNSUBSCRIBE packets without acknowledgement."""

    async def run(self) -> int:
        """Run until a signal, -C, -E, -W or a closed standard output; return the exit code.

        Raises:
          MqttTrioError: the server cannot be reached at first, or ends the session for good.
        """
        failure: MqttTrioError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, nursery.cancel_scope)
            if self._options.timeout:
                nursery.start_soon(self._time_out)
            try:
                await self._stay_connected()
            except MqttTrioError as exc:  # a value, so that no exception group needs unwrapping
                failure = exc
            nursery.cancel_scope.cancel()
        if failure is not None and not self._ending:
            raise failure
        return self._exit_code

    async def _watch(self, everything: trio.CancelScope) -> None:
        await self._terminal.stopping.wait()
        self._finish()
        self._done.set()
        if self._connected:
            await trio.sleep(STOP_TIMEOUT)
        everything.cancel()

    async def _time_out(self) -> None:
        await trio.sleep(self._options.timeout)
        self._terminal.say("Timed out")
        self._finish(EXIT_TIMED_OUT)
        self._terminal.stopping.set()

    def _finish(self, exit_code: int = 0) -> None:
        """Decide the exit code; the first one that does wins."""
        if not self._ending:
            self._exit_code = exit_code
            self._ending = True

    async def _stay_connected(self) -> None:
        told = False
        while not self._ending:
            try:
                await converse(self._session, self.handle, self.work)
            except (ConnectionLostError, DisconnectedError, UnreachableError) as exc:
                if not self._was_connected or (isinstance(exc, DisconnectedError) and exc.final):
                    raise
                told = told and not self._connected
                if not told and not self._ending:
                    self._terminal.say(f"{exc} Connecting again.")
                    told = True
            finally:
                self._connected = False
            if not self._ending:
                await trio.sleep(RECONNECT_PAUSE)

    async def work(self, client: Client) -> None:
        """Subscribe, then leave the rest to `handle` until one of the ends."""
        self._connected = self._was_connected = True
        options = self._options
        if not client.connack.session_present:
            self._unreleased.clear()
        packets: list[Packet] = []
        if options.subscriptions:
            packets.append(Subscribe(SUBSCRIBE_ID, options.subscriptions, **options.subscribe))  # type: ignore[arg-type]
        for number, each in enumerate(options.unsubscriptions, SUBSCRIBE_ID + 1):
            packets.append(Unsubscribe(number, (each,), **options.unsubscribe))  # type: ignore[arg-type]
        self._unanswered = len(packets)
        await client.send(*packets)
        await self._done.wait()
        if self._terminal.stopping.is_set() and client.version is ProtocolVersion.MQTT_5_0:
            # As mosquitto_sub: whoever interrupts it did not mean that the Will is void.
            reason = ReasonCode.DISCONNECT_WITH_WILL_MESSAGE
            client.farewell = attrs.evolve(client.farewell, reason_code=reason)

    async def handle(self, client: Client, packets: list[Packet]) -> None:
        """Print the messages of a read, then acknowledge them: what was not printed comes again."""
        printed: list[bytes] = []
        replies: list[Packet] = []
        for packet in packets:
            if self._ending:
                break  # not acknowledged: a session that is kept still has them
            if isinstance(packet, Publish):
                self._take(packet, printed, replies)
            elif isinstance(packet, PubRel):
                self._unreleased.discard(packet.packet_id)
                replies.append(PubComp(packet.packet_id))
            elif isinstance(packet, SubAck):
                self._subscribed(packet)
            elif isinstance(packet, UnsubAck):
                self._answered()
        if (not printed or await self._print(b"".join(printed))) and replies:
            await client.send(*replies)
        if self._ending:
            self._done.set()

    async def _print(self, data: bytes) -> bool:
        try:
            await self._terminal.write(data)
        except BrokenPipeError:  # `| head`: it has what it wanted
            self._finish()
            return False
        except OSError as exc:
            self._terminal.say(f"Error: standard output: {exc.strerror}")
            self._finish(EXIT_FAILURE)
            return False
        return True

    def _take(self, message: Publish, printed: list[bytes], replies: list[Packet]) -> None:
        packet_id = message.packet_id
        if packet_id is not None and message.qos is QoS.EXACTLY_ONCE:
            replies.append(PubRec(packet_id))
            if packet_id in self._unreleased:
                return  # sent again; it was printed [MQTT5-4.3.3-10]
            self._unreleased.add(packet_id)
        elif packet_id is not None:
            replies.append(PubAck(packet_id))
        options = self._options
        if options.retained_only and not message.retain:
            self._finish()
            return
        if message.retain and options.skip_retained:
            return
        if any(topic_matches(each, message.topic_name) for each in options.filters_out):
            return
        if message.retain and options.remove_retained:
            replies.append(Publish(message.topic_name, retain=True))
        if options.share_printed >= 1 or random.random() < options.share_printed:
            try:
                printed.append(options.printer(Arrived(message, time.time_ns())))
            except InvalidPayloadError as exc:
                self._terminal.say(str(exc))
        self._left -= 1
        if self._left == 0:
            self._finish()

    def _subscribed(self, suback: SubAck) -> None:
        refused = [
            (subscription.topic_filter, code)
            for subscription, code in zip(self._options.subscriptions, suback.reason_codes, strict=False)
            if code >= 0x80
        ]
        if self._session.log is not None:
            granted = ", ".join(f"{code:d}" for code in suback.reason_codes)
            self._session.log(f"Subscribed (mid: {suback.packet_id}): {granted}")
        for each, code in refused:
            self._terminal.say(with_reason(f"Warning: {each} is refused: {reason_text(code)}", suback.reason_string))
        if refused and len(refused) == len(suback.reason_codes):
            self._terminal.say("All subscription requests were denied.")
            self._finish(EXIT_FAILURE)
        self._answered()

    def _answered(self) -> None:
        self._unanswered -= 1
        if self._options.exit_after_subscribe and not self._unanswered:
            self._finish()
