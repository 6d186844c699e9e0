"""Sessions over many connections: flows that go on, bounds that hold, and failures that stay with one client."""

from __future__ import annotations

import gc
import weakref

import pytest
import trio
import trio.testing

from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.local import LocalPublisher
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.outbox import ClientLink
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, Refused, TapRoute, read_run
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import (
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    Subscribe,
    Subscription,
    Will,
)
from mqtt_trio.testing import MemoryBroker, open_memory_broker

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


class ScriptedTap:
    """Answers QoS 1 and 2 messages as it is told."""

    def __init__(self, answer: Answer = None) -> None:
        self.answer = answer
        self.fails = False
        self.seen: list[bytes] = []

    def route(self, topic_name: str) -> TapRoute | None:
        return self

    def take_run(self, run: FrameRun) -> Answer:
        answer: Answer = None
        for message in read_run(run):
            answer = self.take(message)
        return answer

    def take(self, message: Message) -> Answer:
        self.seen.append(message.payload)
        if self.fails:
            raise RuntimeError("a bug in a tap")
        return self.answer if message.qos else None


# Failures stay with one client


async def test_a_client_that_takes_no_packet_is_ended_quietly(memory_broker: MemoryBroker) -> None:
    for size in (1, 2, 5):
        stream = await memory_broker.open_stream()
        await stream.send_all(encode(Connect(client_id="tiny", maximum_packet_size=size), V5))
        assert await stream.receive_some(10) == b""
    metrics = memory_broker.broker.metrics
    assert (metrics.client_failures, metrics.clients_connected, metrics.sessions) == (0, 0, 0)


async def test_an_answer_larger_than_the_client_takes_ends_it(memory_broker: MemoryBroker) -> None:
    client = await memory_broker.connect("c", maximum_packet_size=40)
    await client.send(Subscribe(1, tuple(Subscription(f"t/{number}") for number in range(60))))
    assert await client.closed() == Disconnect(ReasonCode.PACKET_TOO_LARGE)
    assert memory_broker.broker.metrics.client_failures == 0


async def test_a_will_that_fails_ends_its_own_client_only(
    memory_broker: MemoryBroker, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    tap = ScriptedTap()
    memory_broker.broker.add_tap(tap)
    healthy = await memory_broker.connect("healthy")
    device = await memory_broker.connect("device", will=Will(topic_name="gone"))
    tap.fails = True
    await device.cut()
    assert not any(link.session and link.session.client_id == "device" for link in memory_broker.clients.links)
    delayed = Will(topic_name="gone", will_delay_interval=5)
    device = await memory_broker.connect("delayed", will=delayed, session_expiry_interval=9)
    await device.cut()
    await trio.sleep(6)
    assert memory_broker.broker.connections.sessions["delayed"].will is None
    await trio.sleep(4)
    assert "delayed" not in memory_broker.broker.connections.sessions
    assert caplog.text.count("RuntimeError: a bug in a tap") == 2
    await healthy.send(PingReq())
    assert await healthy.next_packet() == PingResp()


async def test_a_failure_behind_a_pause_stays_with_the_paused_client(
    memory_broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker = memory_broker.broker
    clients = [await memory_broker.connect(name) for name in ("victim", "healthy")]
    broker.stop_publishers(memory_broker)
    for client in clients:
        await client.send(Publish("t", b"", QoS(1), packet_id=1))
    await trio.testing.wait_all_tasks_blocked()
    handle = broker.handle

    def broken(link: ClientLink, packet: Packet, now: float) -> bool:
        if link.session is not None and link.session.client_id == "victim":
            raise RuntimeError("a bug")
        return handle(link, packet, now)

    monkeypatch.setattr(broker, "handle", broken)
    broker.resume_publishers(memory_broker)
    broker.flush()
    assert await clients[0].closed() == Disconnect(ReasonCode.UNSPECIFIED_ERROR)
    assert await clients[1].next_packet() == PubAck(1)
    assert "a bug" in caplog.text


async def test_bytes_behind_a_refusal_of_a_311_client_are_ignored(memory_broker: MemoryBroker) -> None:
    tap = ScriptedTap()
    memory_broker.broker.add_tap(tap)
    client = await memory_broker.connect("c", version=V311)
    assert await client.publish("t", b"first", qos=1) == ReasonCode.SUCCESS
    tap.answer = Refused(ReasonCode.QUOTA_EXCEEDED)
    frames = [encode(Publish("t", name, QoS(1), packet_id=9), V311) for name in (b"refused", b"behind")]
    await client.stream.send_all(b"".join(frames) + encode(Publish("t", b"last"), V311))
    assert await client.closed() is None
    assert tap.seen == [b"first", b"refused"]
    assert memory_broker.broker.metrics.client_failures == 0


# Nothing grows with the number of connections


async def test_ended_sessions_leave_nothing_behind(memory_broker: MemoryBroker) -> None:
    broker = memory_broker.broker
    stays, sender = await memory_broker.connect("stays"), await memory_broker.connect("sender")
    await stays.subscribe("t", qos=1)
    gone = []
    for number in range(20):
        guest = await memory_broker.connect(f"guest-{number}")
        await guest.subscribe("t", qos=1)
        await sender.publish("t", qos=1)
        gone.append(weakref.ref(broker.connections.sessions[f"guest-{number}"].audiences.copy().pop()))
        await guest.disconnect()
    await sender.publish("t", qos=1)
    assert len(broker.connections.sessions["stays"].audiences) <= 2
    assert len(broker._audiences) <= 2
    gc.collect()
    assert [ref() for ref in gone] == [None] * 20


async def test_a_session_that_comes_and_goes_leaves_one_deadline(memory_broker: MemoryBroker) -> None:
    away = await memory_broker.connect("away", session_expiry_interval=60)
    await away.disconnect()
    for _ in range(200):
        device = await memory_broker.connect("device", clean_start=False, session_expiry_interval=3600)
        await device.disconnect()
    assert len(memory_broker.broker.connections._deadlines) < 80
    deadline = memory_broker.broker.next_deadline()
    assert deadline == memory_broker.broker.connections.sessions["away"].deadline


async def test_runs_from_outside_leave_nothing_behind(memory_broker: MemoryBroker) -> None:
    receiver = await memory_broker.connect("r")
    await receiver.subscribe("t", qos=1)
    local = LocalPublisher(memory_broker.broker, "bus", trio.current_time)
    frame = encode(Publish("t", b"x", QoS(1), packet_id=1), V5)
    for _ in range(50):
        local.publish_runs([FrameRun(frame, 1, 1, V5, "far", 0.0)])
        assert (await receiver.next_message()).payload == b"x"
    for lane in local._lanes:
        assert len(lane.outbox.touched) + len(lane.outbox.frames) + len(lane.session.inflight) == 0


# Wills


@pytest.mark.spec("MQTT5-3.1.2-8")
@pytest.mark.parametrize("code", [ReasonCode.UNSPECIFIED_ERROR, ReasonCode.DISCONNECT_WITH_WILL_MESSAGE])
async def test_a_goodbye_with_an_error_publishes_the_will(memory_broker: MemoryBroker, code: ReasonCode) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    device = await memory_broker.connect("device", will=Will(topic_name="gone", payload=b"!"))
    await device.disconnect(reason_code=code)
    assert (await watcher.next_message()).payload == b"!"


# Messages again after a reconnect


@pytest.mark.spec("MQTT5-4.4.0-1", "MQTT5-3.3.1-1", "MQTT5-4.3.2-3", "MQTT5-4.3.3-3")
@pytest.mark.spec("MQTT3-4.4.0-1", "MQTT3-3.3.1-1", "MQTT3-4.6.0-1", "MQTT3-2.3.1-4")
@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("before, after", [(V5, V5), (V311, V311), (V5, V311), (V311, V5)])
async def test_unacknowledged_messages_come_again(
    memory_broker: MemoryBroker, qos: int, before: ProtocolVersion, after: ProtocolVersion
) -> None:
    device = await memory_broker.connect("device", version=before, clean_start=False, session_expiry_interval=60)
    await device.subscribe("t", qos=qos)
    sender = await memory_broker.connect("sender", version=before)
    for number in range(9):
        await sender.publish("t", b"%d" % number, qos=qos)
    first = [await device.next_message(acknowledge=False) for _ in range(9)]
    assert memory_broker.broker.metrics.fast_lane_messages > 5
    await device.cut()
    await sender.publish("t", b"queued", qos=qos)
    device = await memory_broker.connect("device", version=after, clean_start=False, session_expiry_interval=60)
    again = [await device.next_message(acknowledge=False) for _ in range(10)]
    assert [m.payload for m in again] == [b"%d" % number for number in range(9)] + [b"queued"]
    assert [m.packet_id for m in again[:9]] == [m.packet_id for m in first]
    assert [m.dup for m in again] == [True] * 9 + [False]
    assert not any(m.dup for m in first)


@pytest.mark.spec("MQTT5-3.3.4-9")
@pytest.mark.parametrize("qos", [1, 2])
async def test_repeats_keep_to_the_receive_maximum_of_the_new_connection(memory_broker: MemoryBroker, qos: int) -> None:
    device = await memory_broker.connect("device", session_expiry_interval=60)
    await device.subscribe("t", qos=qos)
    sender = await memory_broker.connect("sender")
    for number in range(6):
        await sender.publish("t", b"%d" % number, qos=qos)
    await device.next_message(acknowledge=False)
    await device.cut()
    device = await memory_broker.connect("device", clean_start=False, receive_maximum=2, session_expiry_interval=60)
    await sender.publish("t", b"6", qos=qos)
    assert [(await device.next_message(acknowledge=False)).payload for _ in range(2)] == [b"0", b"1"]
    assert await device.nothing_waits()
    for packet_id in (1, 2):
        await device.send(PubAck(packet_id) if qos == 1 else PubRec(packet_id))
        if qos == 2:
            await device.send(PubComp((await device.expect(PubRel)).packet_id))
    assert [(await device.next_message()).payload for _ in range(5)] == [b"2", b"3", b"4", b"5", b"6"]
    assert await device.nothing_waits()
    assert not memory_broker.broker.connections.sessions["device"].inflight


async def test_a_large_window_can_be_repeated(autojump_clock: trio.testing.MockClock) -> None:
    async with open_memory_broker(Limits(outbox_bytes=128_000, maximum_packet_size=120_000)) as memory:
        device = await memory.connect("device", session_expiry_interval=60)
        await device.subscribe("t", qos=1)
        sender = await memory.connect("sender")
        for _ in range(60):
            await sender.publish("t", b"x" * 100_000, qos=1)
            await device.next_message(acknowledge=False)
        await device.cut()
        device = await memory.connect("device", clean_start=False, session_expiry_interval=60)
        assert [(await device.next_message()).packet_id for _ in range(60)] == list(range(1, 61))


async def test_messages_of_the_largest_size_are_delivered(autojump_clock: trio.testing.MockClock) -> None:
    async with open_memory_broker(Limits(outbox_bytes=128_000, maximum_packet_size=120_000)) as memory:
        device, sender = await memory.connect("device"), await memory.connect("sender")
        await device.subscribe("t", qos=1)
        for qos in (0, 1, 1, 1):
            await sender.publish("t", b"x" * 119_990, qos=qos)
        assert [len((await device.next_message()).payload) for _ in range(4)] == [119_990] * 4


async def test_a_begun_delivery_does_not_expire(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    device = await memory_broker.connect("device", session_expiry_interval=60)
    await device.subscribe("t", qos=2)
    sender = await memory_broker.connect("sender")
    await sender.publish("t", b"begun", qos=2, message_expiry_interval=5)
    await device.next_message(acknowledge=False)
    await device.cut()
    await trio.sleep(10)
    device = await memory_broker.connect("device", clean_start=False, session_expiry_interval=60)
    message = await device.next_message()
    assert (message.payload, message.packet_id, message.properties.message_expiry_interval) == (b"begun", 1, 0)


@pytest.mark.spec("MQTT5-4.3.3-4", "MQTT5-4.3.3-5", "MQTT5-4.3.3-6")
async def test_pubrel_comes_again(memory_broker: MemoryBroker) -> None:
    device = await memory_broker.connect("device", session_expiry_interval=60)
    await device.subscribe("t", qos=2)
    sender = await memory_broker.connect("sender")
    await sender.publish("t", qos=2)
    await device.next_message(acknowledge=False)
    await device.send(PubRec(1))
    assert await device.next_packet() == PubRel(1)
    await device.cut()
    device = await memory_broker.connect("device", clean_start=False, session_expiry_interval=60)
    assert await device.next_packet() == PubRel(1)
    await device.send(PubComp(1))
    assert await device.nothing_waits()
    assert not memory_broker.broker.connections.sessions["device"].inflight


# Bounds


async def test_refused_messages_behind_a_hold_count(memory_broker: MemoryBroker) -> None:
    tap = ScriptedTap(Hold())
    memory_broker.broker.add_tap(tap)
    client = await memory_broker.connect("c")
    await client.send(Publish("t", b"held", QoS(1), packet_id=1))
    await trio.testing.wait_all_tasks_blocked()
    tap.answer = Refused(ReasonCode.QUOTA_EXCEEDED)
    for packet_id in range(2, 1026):
        await client.send(Publish("t", b"", QoS(2), packet_id=packet_id))
    assert await client.closed() == Disconnect(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED)


@pytest.mark.parametrize("policy, kept", [("drop-new", b"012"), ("drop-oldest", b"234")])
async def test_a_full_queue(policy: str, kept: bytes) -> None:
    async with open_memory_broker(Limits(queue_messages=3, queue_overflow=policy)) as memory:
        device = await memory.connect("device", session_expiry_interval=60)
        await device.subscribe("t", qos=1)
        await device.cut()
        sender = await memory.connect("sender")
        for number in range(5):
            await sender.publish("t", b"%d" % number, qos=1)
        assert memory.broker.metrics.dropped_queue_full == 2
        assert memory.broker.metrics.messages_queued == 3
        device = await memory.connect("device", clean_start=False, session_expiry_interval=60)
        assert b"".join([(await device.next_message()).payload for _ in range(3)]) == kept
        assert await device.nothing_waits()


async def test_queue_bytes(memory_broker: MemoryBroker) -> None:
    async with open_memory_broker(Limits(queue_bytes=2500, queue_overflow="drop-oldest")) as memory:
        device = await memory.connect("device", session_expiry_interval=60)
        await device.subscribe("t", qos=1)
        await device.cut()
        sender = await memory.connect("sender")
        for payload in (b"1" * 1000, b"2" * 1000, b"3" * 1000, b"4" * 5000):
            await sender.publish("t", payload, qos=1)
        device = await memory.connect("device", clean_start=False, session_expiry_interval=60)
        assert [(await device.next_message()).payload[:1] for _ in range(2)] == [b"2", b"3"]
        assert await device.nothing_waits()


@pytest.mark.spec("MQTT5-3.3.4-9")
async def test_receive_maximum_of_the_client(memory_broker: MemoryBroker) -> None:
    device, sender = await memory_broker.connect("device", receive_maximum=2), await memory_broker.connect("sender")
    await device.subscribe("t")
    for number in range(4):
        await sender.publish("t", b"%d" % number, qos=1 + number % 2)
    await sender.publish("t", b"at most once")
    seen = [(await device.next_message(acknowledge=False)).payload for _ in range(3)]
    assert seen == [b"0", b"1", b"at most once"]
    await device.send(PubRec(2, ReasonCode.UNSPECIFIED_ERROR))  # frees its slot at once [MQTT5-4.3.3-4]
    assert (await device.next_message(acknowledge=False)).payload == b"2"
    await device.send(PubAck(1))
    assert (await device.next_message()).payload == b"3"


@pytest.mark.spec("MQTT5-3.1.2-24", "MQTT5-3.1.2-25")
@pytest.mark.parametrize("qos", [0, 1])
async def test_maximum_packet_size_of_the_receiver(qos: int) -> None:
    async with open_memory_broker(Limits(maximum_packet_size=2048)) as memory:
        device = await memory.connect("device", maximum_packet_size=2048)
        await device.subscribe("t", qos=1)
        sender = await memory.connect("sender", version=V311)
        for size in (2042 - 2 * qos, 10) * 3:  # in 5.0 the first is a byte too large
            await sender.publish("t", b"x" * size, qos=qos)
            if size == 10:
                assert len((await device.next_message()).payload) == size
        assert await device.nothing_waits()
        assert memory.broker.metrics.dropped_too_large == 3


# Publish and subscribe


@pytest.mark.spec("MQTT5-3.3.1-5", "MQTT5-3.3.1-6", "MQTT5-3.3.1-8", "MQTT3-3.3.1-10")
@pytest.mark.parametrize("version", [V311, V5])
async def test_retained_messages(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    client = await memory_broker.connect("c", version=version)
    for payload in (b"old", b"new"):
        await client.publish("a/b", payload, qos=1, retain=True)
    await client.subscribe("a/+", qos=2)
    message = await client.next_message()
    assert (message.payload, message.retain, message.qos) == (b"new", True, 1)
    await client.publish("a/b", b"live", qos=0, retain=True)
    assert (await client.next_message()).retain is False  # [MQTT5-3.3.1-12]
    await client.publish("a/b", b"", retain=True)
    assert (await client.next_message()).payload == b""
    await client.subscribe("a/#")
    assert await client.nothing_waits()
    assert len(memory_broker.broker.retained) == 0


@pytest.mark.spec("MQTT5-3.3.1-9", "MQTT5-3.3.1-10", "MQTT5-3.3.1-11")
async def test_retain_handling(memory_broker: MemoryBroker) -> None:
    client = await memory_broker.connect("c")
    await client.publish("t", b"kept", retain=True)
    for handling, times in ((0, 2), (1, 1), (2, 0)):
        for _ in range(2):
            await client.subscribe("t", retain_handling=handling)
        for _ in range(times):
            assert (await client.next_message()).payload == b"kept"
        assert await client.nothing_waits()
        await client.unsubscribe("t")


@pytest.mark.spec("MQTT5-3.3.1-13", "MQTT5-3.8.3-3")
async def test_retain_as_published_and_no_local(memory_broker: MemoryBroker) -> None:
    client, other = await memory_broker.connect("c"), await memory_broker.connect("other")
    await client.subscribe("t", retain_as_published=True, no_local=True)
    for _ in range(3):
        await client.publish("t", b"mine")
    await other.publish("t", b"retained", retain=True)
    await other.publish("t", b"plain")
    messages = [await client.next_message() for _ in range(2)]
    assert [(m.payload, m.retain) for m in messages] == [(b"retained", True), (b"plain", False)]
    assert await client.nothing_waits()


@pytest.mark.spec("MQTT5-3.3.4-2", "MQTT5-3.3.4-3", "MQTT5-3.8.4-3")
async def test_overlapping_subscriptions_and_their_identifiers(memory_broker: MemoryBroker) -> None:
    client, sender = await memory_broker.connect("c"), await memory_broker.connect("s")
    await client.subscribe("a/#", qos=0, subscription_identifier=1)
    await client.subscribe("a/+", qos=1, subscription_identifier=2)
    await client.subscribe("a/b", qos=0)
    for _ in range(3):
        await sender.publish("a/b", qos=2)
        message = await client.next_message()
        assert (message.qos, sorted(message.subscription_identifiers)) == (1, [1, 2])
    await client.subscribe("a/+", qos=0, subscription_identifier=3)
    await sender.publish("a/b", qos=2)
    message = await client.next_message()
    assert (message.qos, sorted(message.subscription_identifiers)) == (0, [1, 3])
    assert await client.nothing_waits()


@pytest.mark.spec("MQTT5-3.10.4-1", "MQTT5-4.7.2-1")
async def test_unsubscribe_and_system_topics(memory_broker: MemoryBroker) -> None:
    client = await memory_broker.connect("c")
    await client.subscribe("#", "+/t", "$odd/t")
    await client.publish("$odd/t", b"1")
    assert (await client.next_message()).payload == b"1"
    codes = await client.unsubscribe("$odd/t", "$odd/t", "#")
    assert codes == (ReasonCode.SUCCESS, ReasonCode.NO_SUBSCRIPTION_EXISTED, ReasonCode.SUCCESS)
    for topic_name in ("$odd/t", "a", "a/t"):
        await client.publish(topic_name, topic_name.encode())
    assert (await client.next_message()).payload == b"a/t"
    assert await client.nothing_waits()


@pytest.mark.spec("MQTT5-4.3.3-10", "MQTT5-4.3.3-11")
@pytest.mark.parametrize("version", [V311, V5])
async def test_qos2_is_delivered_once(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    client = await memory_broker.connect("c", version=version, clean_start=False, session_expiry_interval=60)
    watcher = await memory_broker.connect("w")
    await watcher.subscribe("t")
    publish = Publish("t", b"once", QoS(2), packet_id=5)
    await client.send(publish)
    assert await client.next_packet() == PubRec(5)
    await client.cut()
    client = await memory_broker.connect("c", version=version, clean_start=False, session_expiry_interval=60)
    publish.dup = True
    await client.send(publish)
    assert await client.next_packet() == PubRec(5)
    unknown = ReasonCode.PACKET_IDENTIFIER_NOT_FOUND if version == V5 else ReasonCode.SUCCESS
    for code in (ReasonCode.SUCCESS, unknown):
        await client.send(PubRel(5))
        completed = await client.next_packet()
        assert isinstance(completed, PubComp)
        assert (completed.packet_id, completed.reason_code) == (5, code)
    await client.send(Publish("t", b"again", QoS(2), packet_id=5))
    assert [(await watcher.next_message()).payload for _ in range(2)] == [b"once", b"again"]


@pytest.mark.spec("MQTT5-3.1.2-4", "MQTT3-3.1.2-6")
@pytest.mark.parametrize("version", [V311, V5])
async def test_clean_start_drops_the_old_session(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    device = await memory_broker.connect("device", version=version, clean_start=False, session_expiry_interval=60)
    await device.subscribe("t")
    sender = await memory_broker.connect("sender")
    await sender.publish("t", b"in flight", qos=1)
    await device.next_message(acknowledge=False)
    await device.cut()
    await sender.publish("t", b"queued", qos=1)
    device = await memory_broker.connect("device", version=version)
    await sender.publish("t", b"unheard", qos=1)
    assert device.connack is not None
    assert not device.connack.session_present
    assert await device.nothing_waits()
    metrics = memory_broker.broker.metrics
    assert (metrics.sessions, metrics.subscriptions, metrics.dropped_session_ended) == (2, 0, 1)
