"""mosquitto_pub and mosquitto_sub against the broker over TCP, as far as their options reach."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.interop.broker_process import BrokerProcess
from tests.interop.mosquitto import END, MARK, Received, Subscriber, publish, publish_lines
from tests.interop.paho_support import wait_until_expired
from tests.lines import LineProcess, require_tool

pytestmark = pytest.mark.interop

versions = pytest.mark.parametrize("version", ["mqttv31", "mqttv311", "mqttv5"])
qualities = pytest.mark.parametrize("qos", [0, 1, 2])
ANY_BYTES = bytes(range(256)) * 4


@versions
@qualities
@pytest.mark.parametrize("payload", [b"21.5", None, ANY_BYTES], ids=["text", "empty", "binary"])
def test_message_arrives_once(broker: BrokerProcess, topic: str, version: str, qos: int, payload: bytes | None) -> None:
    with Subscriber(broker.port, topic, version=version) as subscriber:
        publish(broker.port, topic, payload, version=version, qos=qos)
        publish(broker.port, topic, END, version=version, qos=2)
        assert subscriber.received(2) == [Received(topic, payload or b"", qos), Received(topic, END.encode(), 2)]


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
@pytest.mark.parametrize("granted", [0, 1, 2])
def test_delivery_at_the_lower_qos(broker: BrokerProcess, topic: str, version: str, granted: int) -> None:
    with Subscriber(broker.port, topic, version=version, qos=granted) as subscriber:
        for qos in (0, 1, 2):
            publish(broker.port, topic, f"sent at {qos}", version=version, qos=qos)
        assert [message.qos for message in subscriber.received(3)] == [min(qos, granted) for qos in (0, 1, 2)]


@pytest.mark.parametrize("publisher, subscriber", [("mqttv31", "mqttv5"), ("mqttv5", "mqttv31")])
@qualities
def test_versions_meet(broker: BrokerProcess, topic: str, publisher: str, subscriber: str, qos: int) -> None:
    with Subscriber(broker.port, topic, version=subscriber) as receiver:
        publish(broker.port, topic, "across", version=publisher, qos=qos)
        assert receiver.received(1) == [Received(topic, b"across", qos)]


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
@qualities
def test_order_of_one_publisher(broker: BrokerProcess, topic: str, version: str, qos: int, tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(500)]
    # mosquitto_sub 2.0.11 miscounts its own Receive Maximum of 20 at QoS 2 and gives up, whoever the broker is.
    window = ["-D", "connect", "receive-maximum", "1000"] if version == "mqttv5" else []
    with Subscriber(broker.port, topic, version=version, options=window) as subscriber:
        publish_lines(broker.port, topic, lines, version=version, qos=qos, folder=tmp_path)
        publish(broker.port, topic, END, version=version, qos=2)
        messages = subscriber.received(501)
    assert [message.payload.decode() for message in messages] == [*lines, END]


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
@qualities
def test_large_message(broker: BrokerProcess, topic: str, version: str, qos: int) -> None:
    payload = ANY_BYTES * 1000
    with Subscriber(broker.port, topic, version=version) as subscriber:
        publish(broker.port, topic, payload, version=version, qos=qos)
        assert subscriber.received(1) == [Received(topic, payload, qos)]


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
def test_wildcards(broker: BrokerProcess, topic: str, version: str) -> None:
    filters = (f"{topic}/+/temperature", f"{topic}/hall/#")
    names = ["kitchen/temperature", "kitchen/humidity", "hall", "hall/door/left", "kitchen/oven/temperature"]
    with Subscriber(broker.port, *filters, version=version) as subscriber:
        subscriber.wait_for(r"Subscribed \(mid: \d+\): 2, 2")
        for name in names:
            publish(broker.port, f"{topic}/{name}", name, version=version, qos=1)
        publish(broker.port, f"{topic}/hall", END, version=version, qos=1)
        heard = [message.payload.decode() for message in subscriber.received(4)]
    assert heard == ["kitchen/temperature", "hall", "hall/door/left", END]


@versions
@qualities
def test_retained_message(broker: BrokerProcess, topic: str, version: str, qos: int) -> None:
    with Subscriber(broker.port, topic, version=version) as early:
        publish(broker.port, topic, "kept", version=version, qos=qos, options=["-r"])
        assert early.received(1) == [Received(topic, b"kept", qos, retain=False)]
    with Subscriber(broker.port, topic, version=version) as late:
        assert late.received(1) == [Received(topic, b"kept", qos, retain=True)]
    publish(broker.port, topic, None, version=version, qos=qos, options=["-r"])
    with Subscriber(broker.port, topic, version=version) as after:
        publish(broker.port, topic, END, version=version, qos=1)
        assert after.received(1) == [Received(topic, END.encode(), 1, retain=False)]


@versions
@qualities
def test_will_of_a_killed_client(broker: BrokerProcess, topic: str, version: str, qos: int) -> None:
    will = ["--will-topic", f"{topic}/will", "--will-payload", "gone", "--will-qos", str(qos)]
    with Subscriber(broker.port, f"{topic}/will", version=version) as watcher:
        with Subscriber(broker.port, topic, version=version, options=will) as dying:
            dying.kill()
        assert watcher.received(1) == [Received(f"{topic}/will", b"gone", qos)]


@versions
def test_no_will_after_disconnect(broker: BrokerProcess, topic: str, version: str) -> None:
    will = ["--will-topic", topic, "--will-payload", "gone", "--will-qos", "2"]
    with Subscriber(broker.port, topic, version=version) as watcher:
        with Subscriber(broker.port, f"{topic}/other", version=version, options=[*will, "-C", "1"]) as leaving:
            publish(broker.port, f"{topic}/other", "you may go", version=version)
            assert leaving.wait() == 0
        publish(broker.port, topic, END, version=version, qos=2)
        assert watcher.received(1) == [Received(topic, END.encode(), 2)]


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
def test_retained_will(broker: BrokerProcess, topic: str, version: str) -> None:
    will = ["--will-topic", f"{topic}/will", "--will-payload", "gone", "--will-qos", "1", "--will-retain"]
    with (
        Subscriber(broker.port, f"{topic}/will", version=version) as watcher,
        Subscriber(broker.port, topic, version=version, options=will) as dying,
    ):
        dying.kill()
        watcher.received(1)
    with Subscriber(broker.port, f"{topic}/will", version=version) as late:
        assert late.received(1) == [Received(f"{topic}/will", b"gone", 1, retain=True)]


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
@pytest.mark.parametrize("qos", [1, 2])
def test_session_keeps_messages_for_an_absent_client(broker: BrokerProcess, topic: str, version: str, qos: int) -> None:
    session = ["-c", "-i", topic.replace("/", "-"), *(["-x", "600"] if version == "mqttv5" else [])]
    with Subscriber(broker.port, topic, version=version, options=session) as first:
        publish(broker.port, topic, "present", version=version, qos=1)
        first.received(1)
        first.terminate()
    for number in range(10):
        publish(broker.port, topic, f"absent {number}", version=version, qos=qos)
    with Subscriber(broker.port, topic, version=version, options=session) as second:
        messages = second.received(10)
    assert messages == [Received(topic, f"absent {number}".encode(), qos) for number in range(10)]


@qualities
def test_properties(broker: BrokerProcess, topic: str, qos: int) -> None:
    properties = ["content-type text/plain", "response-topic reply/to", "correlation-data 4711", "user-property k one"]
    properties += ["user-property k two", "payload-format-indicator 1", "message-expiry-interval 600"]
    options = [word for text in properties for word in ("-D", "publish", *text.split(" "))]
    shape = ["-F", "message %C|%R|%D|%P|%F|%E|%p"]
    with Subscriber(broker.port, topic, version="mqttv5", options=shape) as subscriber:
        publish(broker.port, topic, "21.5", version="mqttv5", qos=qos, options=options)
        line = subscriber.wait_for(r"^message (.*)$")[1]
    content, response, correlation, user, utf8, expiry, payload = line.split("|")
    assert (content, response, correlation, utf8, payload) == ("text/plain", "reply/to", "4711", "1", "21.5")
    assert user.split() == ["k:one", "k:two"]
    assert 598 <= int(expiry) <= 600


def test_request_and_response(broker: BrokerProcess, topic: str) -> None:
    """mosquitto_rr asks; what answers sees its Response Topic and Correlation Data and uses both."""
    show = ["-F", "asked %R %D %p"]
    with Subscriber(broker.port, f"{topic}/ask", version="mqttv5", options=show) as responder:
        command = [require_tool("mosquitto_rr"), "-h", "127.0.0.1", "-p", str(broker.port), "-V", "mqttv5", "-q", "1"]
        command += ["-t", f"{topic}/ask", "-e", f"{topic}/answer", "-m", "ping", "-W", "20"]
        command += ["-D", "publish", "correlation-data", "c-1", "-F", "%D %p"]
        with LineProcess(command) as asking:
            asked = responder.wait_for(r"^asked (\S+) (\S+) (.*)")
            assert asked.groups() == (f"{topic}/answer", "c-1", "ping")
            options = ["-D", "publish", "correlation-data", asked[2]]
            publish(broker.port, asked[1], "pong", version="mqttv5", qos=1, options=options)
            asking.wait_for(r"^c-1 pong$")
            assert asking.wait() == 0


def test_expiry_of_a_retained_message(broker: BrokerProcess, topic: str) -> None:
    """What is left of the Message Expiry Interval reaches the subscriber of a retained message."""
    options = ["-D", "publish", "message-expiry-interval", "300", "-r"]
    publish(broker.port, topic, "kept", version="mqttv5", qos=1, options=options)
    with Subscriber(broker.port, topic, version="mqttv5", options=["-F", "%p expires in %E"]) as subscriber:
        found = subscriber.wait_for(r"^kept expires in (\d+)")
        assert 250 < int(found[1]) <= 300


@pytest.mark.spec("MQTT5-3.3.2-5", "MQTT5-3.3.2-6")
def test_expiry_in_the_queue(broker: BrokerProcess, topic: str) -> None:
    session = ["-c", "-i", topic.replace("/", "-"), "-x", "600", "-F", "%p expires in %E"]
    with Subscriber(broker.port, f"{topic}/+", version="mqttv5", options=session) as first:
        first.terminate()
    for name, seconds, more in (("lasting", "300", []), ("short", "1", ["-r"])):
        options = ["-D", "publish", "message-expiry-interval", seconds, *more]
        publish(broker.port, f"{topic}/{name}", name, version="mqttv5", qos=1, options=options)
    wait_until_expired(broker, f"{topic}/short")
    with Subscriber(broker.port, f"{topic}/+", version="mqttv5", options=session) as second:
        publish(broker.port, f"{topic}/end", END, version="mqttv5", qos=1)
        second.wait_for(END)
        [queued] = second.matches(r"^(lasting|short) expires in (\d+)")
    assert queued[1] == "lasting"
    assert 250 < int(queued[2]) < 300


def test_delayed_will(broker: BrokerProcess, topic: str) -> None:
    will = ["--will-topic", f"{topic}/will", "--will-payload", "gone", "--will-qos", "1", "-x", "600"]
    will += ["-D", "will", "will-delay-interval", "1"]
    with (
        Subscriber(broker.port, f"{topic}/will", version="mqttv5") as watcher,
        Subscriber(broker.port, topic, version="mqttv5", options=will) as dying,
    ):
        begin = time.monotonic()
        dying.kill()
        assert watcher.received(1) == [Received(f"{topic}/will", b"gone", 1)]
        assert time.monotonic() - begin >= 1


@qualities
def test_topic_alias(broker: BrokerProcess, topic: str, qos: int) -> None:
    """mosquitto_pub sends the Topic Name once; mosquitto_sub has not learnt to look an alias up."""
    command = [require_tool("mosquitto_pub"), "-d", "-h", "127.0.0.1", "-p", str(broker.port), "-V", "mqttv5"]
    command += ["-q", str(qos), "-t", topic, "-m", "again", "--repeat", "3", "-D", "publish", "topic-alias", "16"]
    with Subscriber(broker.port, topic, version="mqttv5") as subscriber:
        with LineProcess(command) as publisher:
            assert publisher.wait() == 0
        assert len(publisher.matches(r"sending PUBLISH .* '\(null\)'")) == 2
        assert subscriber.received(3) == [Received(topic, b"again", qos)] * 3


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
@qualities
def test_shared_subscription(broker: BrokerProcess, topic: str, version: str, qos: int, tmp_path: Path) -> None:
    lines = [f"{number}" for number in range(30)]
    filters = (f"$share/group/{topic}/work", f"{topic}/end")
    with (
        Subscriber(broker.port, *filters, version=version, qos=qos) as one,
        Subscriber(broker.port, *filters, version=version, qos=qos) as two,
    ):
        publish_lines(broker.port, f"{topic}/work", lines, version=version, qos=qos, folder=tmp_path)
        publish(broker.port, f"{topic}/end", END, version=version, qos=qos)
        heard = []
        for member in (one, two):
            member.wait_for(f"^{MARK}.*{topic}/end")
            *work, _ = member.so_far()
            assert work
            assert work == sorted(work, key=lambda message: int(message.payload))
            heard += work
    assert sorted(heard, key=lambda message: int(message.payload)) == [
        Received(f"{topic}/work", line.encode(), qos) for line in lines
    ]
