"""Links on real sockets: the poller, frozen readers, crashes that stay with one client, paused publishers."""

from __future__ import annotations

import random
import socket
from functools import partial

import pytest
import trio

from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.outbox import ClientLink
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, Refused, TapRoute, read_run
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import (
    Disconnect,
    MessageProperties,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    Publish,
)
from mqtt_trio.server.poller import Poller
from tests.server import socket_support
from tests.server.socket_support import serve

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


@pytest.fixture(autouse=True, params=[False, True], ids=["alone", "beside threads"])
def either_socket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_support, "Poller", partial(Poller, beside_threads=request.param))


class HoldingTap:
    """Holds or refuses every QoS 1 and 2 message."""

    def __init__(self) -> None:
        self.holds: list[Hold] = []
        self.refuse: ReasonCode | None = None

    def route(self, topic_name: str) -> TapRoute | None:
        return self

    def take_run(self, run: FrameRun) -> Answer:
        return self.take(read_run(run)[0])

    def take(self, message: Message) -> Answer:
        if not message.qos:
            return None
        if self.refuse is not None:
            return Refused(self.refuse)
        self.holds.append(Hold())
        return self.holds[-1]


async def wait_for_holds(tap: HoldingTap, count: int) -> None:
    while len(tap.holds) < count:
        await trio.lowlevel.checkpoint()


@pytest.mark.spec("MQTT3-7.1.1-1", "MQTT3-7.1.2-1", "MQTT5-4.2.0-1")
@pytest.mark.parametrize("version", [V311, V5])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_messages_pass(version: ProtocolVersion, qos: int) -> None:
    async with serve() as served:
        sender, receiver = await served.connect("s", version), await served.connect("r", V311)
        await receiver.subscribe("t/#", qos=qos)
        payloads = [random.Random(number).randbytes(number * 70_000) for number in range(5)]
        for number, payload in enumerate(payloads):
            await sender.publish(f"t/{number}", payload, qos=qos)
        for number, payload in enumerate(payloads):
            message = await receiver.next_message()
            assert (message.topic_name, message.qos) == (f"t/{number}", qos)
            assert message.payload == payload, "every byte, in order"


async def test_a_frozen_reader_delays_nobody_and_loses_only_its_own() -> None:
    async with serve(Limits(outbox_bytes=65_536, maximum_packet_size=32_768)) as served:
        frozen, healthy, sender = [await served.connect(name) for name in ("frozen", "healthy", "sender")]
        await frozen.subscribe("t", qos=0)
        await healthy.subscribe("t", qos=0)
        frame = encode(Publish("t", b"x" * 10_000), V5)
        for _ in range(2000):
            await sender.stream.send_all(frame)
            assert (await healthy.next_message()).topic_name == "t"
        metrics = served.broker.metrics
        assert metrics.dropped_outbox_full > 500
        assert metrics.messages_sent_qos0 + metrics.dropped_outbox_full == 4000
        link = next(link for link in served.clients.links if link.session and link.session.client_id == "frozen")
        assert len(link.backlog or b"") <= 65_536  # type: ignore[attr-defined]
        received = 0
        with trio.move_on_after(2):
            while received + metrics.dropped_outbox_full < 2000:
                assert len((await frozen.next_message()).payload) == 10_000  # no frame is cut
                received += 1
        assert received + metrics.dropped_outbox_full == 2000


async def test_qos1_waits_for_a_slow_reader() -> None:
    async with serve(Limits(outbox_bytes=65_536, maximum_packet_size=32_768, inflight_messages=1000)) as served:
        slow, sender = await served.connect("slow"), await served.connect("sender")
        await slow.subscribe("t", qos=1)
        for number in range(900):
            await sender.publish("t", number.to_bytes(2, "big") + b"x" * 10_000, qos=1)
        for number in range(900):
            assert (await slow.next_message()).payload[:2] == number.to_bytes(2, "big")
        assert served.broker.metrics.dropped_queue_full == 0


@pytest.mark.spec("MQTT3-4.8.0-2")
@pytest.mark.parametrize("version", [V311, V5])
async def test_one_crash_leaves_the_others_alive(
    version: ProtocolVersion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as served:
        healthy, victim = await served.connect("healthy"), await served.connect("victim", version)
        handle = served.broker.handle

        def broken(link: ClientLink, packet: Packet, now: float) -> bool:
            if link.session is not None and link.session.client_id == "victim":
                raise RuntimeError("a bug")
            return handle(link, packet, now)

        monkeypatch.setattr(served.broker, "handle", broken)
        await victim.send(PingReq())
        assert await victim.closed() == (Disconnect(ReasonCode.UNSPECIFIED_ERROR) if version is V5 else None)
        await healthy.send(PingReq())
        assert await healthy.next_packet() == PingResp()
        assert served.broker.metrics.client_failures == 1
        assert "'victim'" in caplog.text
        assert "a bug" in caplog.text


async def test_a_reset_connection_is_noticed() -> None:
    async with serve() as served:
        client = await served.connect("c")
        client.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # type: ignore[attr-defined]
        await client.stream.aclose()
        while served.clients.links:
            await trio.lowlevel.checkpoint()
        assert served.broker.metrics.clients_connected == 0


async def test_acknowledgements_wait_for_their_hold_and_keep_their_order() -> None:
    async with serve() as served:
        tap = HoldingTap()
        served.broker.add_tap(tap)
        client = await served.connect("c")
        for packet_id in (1, 2, 3):
            await client.send(Publish("t", b"", QoS(1), packet_id=packet_id))
        await wait_for_holds(tap, 3)
        for hold in reversed(tap.holds[1:]):
            hold.release()
        served.broker.flush()
        assert await client.nothing_waits()
        tap.holds[0].release()
        served.broker.flush()
        assert [await client.next_packet() for _ in range(3)] == [PubAck(1), PubAck(2), PubAck(3)]


async def test_a_refused_message() -> None:
    async with serve() as served:
        tap = HoldingTap()
        tap.refuse = ReasonCode.QUOTA_EXCEEDED
        served.broker.add_tap(tap)
        receiver = await served.connect("r")
        await receiver.subscribe("t")
        client = await served.connect("c")
        for _ in range(3):
            assert await client.publish("t", qos=1) == ReasonCode.QUOTA_EXCEEDED
        old = await served.connect("old", V311)
        await old.send(Publish("t", b"", QoS(1), packet_id=1))
        assert await old.closed() is None
        assert await receiver.nothing_waits()
        assert served.broker.metrics.dropped_by_tap == 4


async def test_a_311_publisher_beyond_the_bound_is_not_read_from() -> None:
    async with serve(Limits(receive_maximum=3)) as served:
        tap = HoldingTap()
        served.broker.add_tap(tap)
        client = await served.connect("c", V311, keep_alive=1)
        for packet_id in range(1, 11):
            await client.send(Publish("t", b"", QoS(1), packet_id=packet_id))
        await wait_for_holds(tap, 3)
        assert served.broker.metrics.publishers_paused == 1
        for number in range(10):
            assert len(tap.holds) == min(10, number + 3)
            tap.holds[number].release()
            served.broker.flush()
            assert await client.next_packet() == PubAck(number + 1)


async def test_a_5_publisher_beyond_receive_maximum() -> None:
    async with serve(Limits(receive_maximum=3)) as served:
        served.broker.add_tap(HoldingTap())
        client = await served.connect("c")
        assert client.connack is not None
        assert client.connack.receive_maximum == 3
        for packet_id in range(1, 5):
            await client.send(Publish("t", b"", QoS(1), packet_id=packet_id))
        assert await client.closed() == Disconnect(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED)


async def test_stopped_publishers_go_on_in_order() -> None:
    async with serve() as served:
        receiver = await served.connect("r")
        await receiver.subscribe("t", qos=1)
        client = await served.connect("c", keep_alive=1)
        assert await client.publish("t", b"0", qos=1) == ReasonCode.SUCCESS
        served.broker.stop_publishers(served)
        await client.send(Publish("t", b"1", QoS(1), packet_id=11))
        await client.send(Publish("t", b"2"))
        await client.send(Publish("t", b"3", QoS(2), packet_id=13))
        while not served.broker.metrics.publishers_paused:
            await trio.lowlevel.checkpoint()
        assert (await receiver.next_message()).payload == b"0"
        assert await receiver.nothing_waits()
        served.broker.resume_publishers(served)
        served.broker.flush()
        assert [(await receiver.next_message()).payload for _ in range(3)] == [b"1", b"2", b"3"]


async def test_a_client_that_never_reads_its_answers_is_ended() -> None:
    async with serve(Limits(outbox_bytes=65_536, maximum_packet_size=32_768)) as served:
        client = await served.connect("c")
        pings = encode(PingReq(), V5) * 10_000

        async def ask_for_ever() -> None:
            while True:
                await client.stream.send_all(pings)

        with pytest.raises(trio.BrokenResourceError):
            await ask_for_ever()
        while served.clients.links:
            await trio.lowlevel.checkpoint()
        assert served.broker.metrics.answers_unread == 1
        assert served.broker.metrics.clients_connected == 0


async def test_a_flood_of_small_packets_leaves_the_others_their_turn() -> None:
    async with serve(Limits(outbox_bytes=1 << 24)) as served:
        flooder, other = await served.connect("flooder"), await served.connect("other")
        count = 60_000
        turns: list[int] = []
        handle = served.broker.handle

        def note(link: ClientLink, packet: Packet, now: float) -> bool:
            if link.session is not None and link.session.client_id == "other":
                turns.append(served.broker.metrics.packets_received)
            return handle(link, packet, now)

        served.broker.handle = note  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flooder.stream.send_all, encode(PingReq(), V5) * count)
            for _ in range(20):
                await other.send(PingReq())
                assert await other.next_packet() == PingResp()
            for _ in range(count):
                assert await flooder.next_packet() == PingResp()
        assert len(turns) == 20
        assert turns[1] - turns[0] < 20_000, "one read of the flood would be handled in one go"


async def test_everything_in_front_of_a_disconnect_counts_however_much() -> None:
    async with serve() as served:
        receiver = await served.connect("r")
        await receiver.subscribe("t")
        sender = await served.connect("s")
        messages = b"".join(
            encode(Publish("t", number.to_bytes(2, "big"), properties=MessageProperties(content_type="x")), V5)
            for number in range(3000)
        )
        await sender.stream.send_all(messages + encode(Disconnect(), V5))
        for number in range(3000):
            assert (await receiver.next_message()).payload == number.to_bytes(2, "big")
        assert await sender.closed() is None
