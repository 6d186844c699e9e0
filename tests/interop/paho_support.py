"""paho-mqtt with waiting instead of callbacks."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Literal, Self

import attrs
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from tests.interop.broker_process import BrokerProcess
from tests.lines import LIMIT, wait_until

V31: Final = MQTTProtocolVersion.MQTTv31
V311: Final = MQTTProtocolVersion.MQTTv311
V5: Final = MQTTProtocolVersion.MQTTv5
Transport = Literal["tcp", "websockets"]


@attrs.frozen
class Heard:
    """One message as paho delivered it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool = False
    user_properties: tuple[tuple[str, str], ...] = ()
    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    message_expiry_interval: int | None = attrs.field(default=None, eq=False)
    """Seconds; it counts down on the way, so it is not compared."""
    topic_alias: int | None = attrs.field(default=None, eq=False)
    """Of one connection, so it is not compared. A known alias comes with the empty topic: paho does not look it up."""


def heard(message: MQTTMessage) -> Heard:
    """Take from a paho message what tests compare."""
    properties = message.properties
    return Heard(
        message.topic,
        bytes(message.payload),
        message.qos,
        bool(message.retain),
        tuple(tuple(pair) for pair in getattr(properties, "UserProperty", ())),
        getattr(properties, "ContentType", None),
        getattr(properties, "ResponseTopic", None),
        getattr(properties, "CorrelationData", None),
        getattr(properties, "MessageExpiryInterval", None),
        getattr(properties, "TopicAlias", None),
    )


def publish_properties(message: Heard, *, will: bool = False, **more: object) -> Properties:
    """Make the properties of a PUBLISH (or of a Will) that carries what `message` has; `more` by paho's names."""
    made = Properties(PacketTypes.WILLMESSAGE if will else PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    values = {
        "UserProperty": list(message.user_properties) or None,
        "ContentType": message.content_type,
        "ResponseTopic": message.response_topic,
        "CorrelationData": message.correlation_data,
        "MessageExpiryInterval": message.message_expiry_interval,
        "TopicAlias": message.topic_alias,
        **more,
    }
    for name, value in values.items():
        if value is not None:
            setattr(made, name, value)
    return made


class PahoClient:
    """A connected paho client; `heard` collects what it receives."""

    def __init__(
        self,
        broker: BrokerProcess,
        *,
        version: MQTTProtocolVersion = V5,
        transport: Transport = "tcp",
        path: str = "/mqtt",
        client_id: str = "",
        clean: bool = True,
        session_expiry_interval: int = 0,
        will: Heard | None = None,
        will_delay: int | None = None,
        inflight: int = 20,
        topic_alias_maximum: int = 0,
    ) -> None:
        self.messages: list[Heard] = []
        self._queue: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._connected = threading.Event()
        self._subscribed: dict[int, threading.Event] = {}
        self._lock = threading.Lock()
        self.ended = threading.Event()
        self.reason: ReasonCode | None = None
        self.flags: ConnectFlags | None = None
        self.client = Client(
            CallbackAPIVersion.VERSION2,
            client_id or f"paho-{os.urandom(4).hex()}",
            clean_session=None if version == V5 else clean,
            protocol=version,
            transport=transport,
            reconnect_on_failure=False,
        )
        self.client.max_inflight_messages_set(inflight)
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = self._on_disconnect
        self.client.on_message = self._on_message
        self.client.on_subscribe = self._on_subscribe
        self._v5 = version == V5
        if transport == "websockets":
            self.client.ws_set_options(path=path)
        if will is not None:
            properties = publish_properties(will, will=True, WillDelayInterval=will_delay) if self._v5 else None
            self.client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = session_expiry_interval
        properties.TopicAliasMaximum = topic_alias_maximum
        self._connect(broker.ws_port if transport == "websockets" else broker.port, clean, properties)

    def _connect(self, port: int, clean: bool, properties: Properties) -> None:
        if self._v5:
            self.client.connect("127.0.0.1", port, keepalive=60, clean_start=clean, properties=properties)
        else:
            self.client.connect("127.0.0.1", port, keepalive=60)
        self.client.loop_start()
        if not self._connected.wait(LIMIT) or self.reason is None or self.reason.is_failure:
            self.close()
            raise AssertionError(f"no successful CONNACK within {LIMIT} s: {self.reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _on_connect(
        self, client: Client, userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self.flags, self.reason = flags, reason
        self._connected.set()

    def _on_disconnect(
        self, client: Client, userdata: Any, flags: DisconnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self.reason = reason
        self._connected.set()
        self.ended.set()

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        self._queue.put(heard(message))

    def _on_subscribe(
        self, client: Client, userdata: Any, mid: int, reasons: Sequence[ReasonCode], properties: Properties | None
    ) -> None:
        self.granted = [reason.value for reason in reasons]
        self._subscription(mid).set()

    def _subscription(self, mid: int) -> threading.Event:
        with self._lock:
            return self._subscribed.setdefault(mid, threading.Event())

    def subscribe(self, *filters: str, qos: int = 2) -> None:
        """Subscribe and wait for the SUBACK; every filter must be granted at `qos`."""
        wanted: list[Any] = [(name, SubscribeOptions(qos=qos) if self._v5 else qos) for name in filters]
        result, mid = self.client.subscribe(wanted)
        assert result == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert mid is not None
        assert self._subscription(mid).wait(LIMIT), f"no SUBACK for {filters} within {LIMIT} s"
        assert self.granted == [qos] * len(filters)

    def publish(self, topic: str, payload: bytes | str | None, *, qos: int = 0, retain: bool = False) -> None:
        """Publish and wait until paho calls it done: sent at QoS 0, PUBACK or PUBCOMP above."""
        self.publish_message(
            Heard(topic, payload.encode() if isinstance(payload, str) else payload or b"", qos, retain)
        )

    def publish_message(self, message: Heard) -> None:
        """Publish `message` with its properties and wait until it is done."""
        properties = publish_properties(message) if self._v5 else None
        info = self.client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        info.wait_for_publish(LIMIT)
        assert info.is_published(), f"{message} was not acknowledged within {LIMIT} s"

    def received(self, count: int, limit: float = LIMIT) -> list[Heard]:
        """Return the first `count` messages since the beginning, waiting up to `limit` seconds for them."""
        self._fetch(count, limit)
        return self.messages[:count]

    def _fetch(self, count: int, limit: float) -> None:
        end = time.monotonic() + limit
        while len(self.messages) < count:
            try:
                self.messages.append(self._queue.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                last = self.messages[-20:]
                text = f"{len(self.messages)} of {count} messages in {limit} s, the last ones: {last}"
                raise AssertionError(text) from None

    def stream(self, limit: float = LIMIT) -> Iterator[Heard]:
        """Give all messages since the beginning, waiting up to `limit` seconds for each."""
        for position in itertools.count():
            self._fetch(position + 1, limit)
            yield self.messages[position]

    def until(self, payload: bytes, limit: float = LIMIT) -> list[Heard]:
        """Return all messages up to the first one with `payload`, without that one, waiting for it."""
        return list(itertools.takewhile(lambda message: message.payload != payload, self.stream(limit)))

    def heard_so_far(self) -> list[Heard]:
        """Return all messages that are there already."""
        with suppress(queue.Empty):
            while True:
                self.messages.append(self._queue.get_nowait())
        return self.messages

    def cut(self) -> None:
        """Cut the network connection as a broken cable would: no DISCONNECT, no close frame."""
        connection = self.client.socket()
        assert connection is not None
        with socket.socket(fileno=os.dup(connection.fileno())) as copy:
            copy.shutdown(socket.SHUT_RDWR)
        assert self.ended.wait(LIMIT)

    def close(self) -> None:
        """Send DISCONNECT if there is a connection, end the thread."""
        self.client.disconnect()
        with suppress(AttributeError):  # paho looks twice at a thread that ends by itself meanwhile
            self.client.loop_stop()
        self.client._reset_sockets()  # it keeps a pair of them until it is collected, in an order that nobody knows


def wait_until_expired(broker: BrokerProcess, topic: str) -> None:
    """Return once the retained message of `topic` is gone; whatever was published before it with the same Message
    Expiry Interval has expired as well."""
    wait_until(lambda: retained_at(broker, topic) is None, f"{topic} still has a retained message")


def retained_at(broker: BrokerProcess, topic: str) -> Heard | None:
    """Return the retained message that a new subscription to `topic` gets, None when it gets none."""
    with PahoClient(broker) as client:
        client.subscribe(topic)
        client.subscribe(f"{topic}/probe")
        client.publish(f"{topic}/probe", "probe", qos=1)
        found = client.until(b"probe")
        return next((message for message in found if message.topic == topic and message.retain), None)
