"""Shared subscriptions whose members are different clients: each message to one of them, none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from tests.interop.broker_process import BrokerProcess
from tests.interop.browser import Page, open_page
from tests.interop.mosquitto import MARK, Subscriber
from tests.interop.page_client import Conversation, PageClient, Secure
from tests.interop.page_client import secure as secure
from tests.interop.paho_support import V5, V31, V311, Heard, PahoClient, Transport

pytestmark = pytest.mark.interop

END = "end of test"
ALL_VERSIONS = [pytest.param(V31, id="3.1"), pytest.param(V311, id="3.1.1"), pytest.param(V5, id="5.0")]


@pytest.fixture(scope="module")
def page(secure: Secure, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("chromium"), [secure.trust]) as opened:
        yield opened


def assert_shared(parts: list[list[int]], count: int) -> None:
    """Every member got something, in order; together they got each of `count` numbers once."""
    assert all(parts), parts
    assert all(part == sorted(part) for part in parts), parts
    assert sorted(number for part in parts for number in part) == list(range(count))


@pytest.mark.parametrize("version", ALL_VERSIONS)
@pytest.mark.parametrize("transport", ["tcp", "websockets"])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_paho(broker: BrokerProcess, topic: str, version: MQTTProtocolVersion, transport: Transport, qos: int) -> None:
    with (
        PahoClient(broker, version=version, transport=transport) as one,
        PahoClient(broker, version=version, transport=transport) as two,
        PahoClient(broker, version=version) as sender,
    ):
        for member in (one, two):
            member.subscribe(f"$share/group/{topic}/work", f"{topic}/end", qos=qos)
        for number in range(40):
            sender.publish(f"{topic}/work", str(number), qos=qos)
        sender.publish(f"{topic}/end", END, qos=qos)
        heard = [member.until(END.encode()) for member in (one, two)]
    assert {(message.topic, message.qos) for part in heard for message in part} == {(f"{topic}/work", qos)}
    assert_shared([[int(message.payload) for message in part] for part in heard], 40)


@pytest.mark.spec("MQTT5-4.8.2-3")
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_every_client_in_one_group(secure: Secure, page: Page, topic: str, qos: int) -> None:
    """paho (3.1.1, 5.0), mosquitto_sub (3.1.1, 5.0), MQTT.js (3.1.1 over WS, 5.0 over WSS) and Paho JS (WS); each gets
    its messages at the QoS that it was granted."""
    broker, share, end = secure.broker, f"$share/group/{topic}/work", f"{topic}/down/end"
    page_clients = [
        PageClient(broker, 4, filters=(share,), qos=0),
        PageClient(broker, 5, server=secure.server, filters=(share,), qos=1),
        PageClient(broker, 4, "paho", filters=(share,), qos=2),
    ]
    with ExitStack() as stack:
        pahos = [stack.enter_context(PahoClient(broker, version=version)) for version in (V311, V5)]
        for client in pahos:
            client.subscribe(share, end, qos=1)
        mosquittos = [
            stack.enter_context(Subscriber(broker.port, share, end, version=version, qos=2))
            for version in ("mqttv311", "mqttv5")
        ]
        pages = [stack.enter_context(Conversation(page, topic, client)) for client in page_clients]
        with PahoClient(broker) as sender:
            for number in range(70):
                sender.publish(f"{topic}/work", str(number), qos=qos)
            sender.publish(f"{topic}/nobody", "", qos=1)  # acknowledged: what came before it has been handled
        heard = [pages[0].end(), *(conversation.ended() for conversation in pages[1:])]
        heard += [client.until(END.encode()) for client in pahos]
        for subscriber in mosquittos:
            subscriber.wait_for(f"^{MARK}.*{end}")
            heard.append([Heard(m.topic, m.payload, m.qos) for m in subscriber.so_far() if m.topic != end])
    assert_shared([[int(message.payload) for message in part] for part in heard], 70)
    granted = [0, 1, 2, 1, 1, 2, 2]
    assert [{message.qos for message in part} for part in heard] == [{min(qos, limit)} for limit in granted]


@pytest.mark.parametrize("version", ALL_VERSIONS)
@pytest.mark.parametrize("expiry", [pytest.param(0, id="session ends"), pytest.param(600, id="session stays")])
def test_what_a_member_does_not_acknowledge_goes_to_another(
    broker: BrokerProcess, topic: str, version: MQTTProtocolVersion, expiry: int
) -> None:
    share = f"$share/group/{topic}/work"
    leaving: dict[str, Any] = {"client_id": f"s{topic[-20:]}", "clean": not expiry, "session_expiry_interval": expiry}
    with (
        PahoClient(broker, version=version) as good,
        PahoClient(broker, version=version, **leaving) as silent,
        PahoClient(broker) as sender,
    ):
        silent.client.manual_ack_set(True)
        for member in (good, silent):
            member.subscribe(share, qos=1)
        for number in range(20):
            sender.publish(f"{topic}/work", str(number), qos=1)
        assert len(good.received(10)) == len(silent.received(10)) == 10
        silent.cut()
        everything = good.received(20)
        assert sorted(int(message.payload) for message in everything) == list(range(20))
        assert [message.payload for message in everything[10:]] == [message.payload for message in silent.messages]
        good.subscribe(f"{topic}/end", qos=1)
        sender.publish(f"{topic}/end", END, qos=1)
        assert good.until(END.encode()) == everything


@pytest.mark.parametrize("version", [pytest.param(V311, id="3.1.1"), pytest.param(V5, id="5.0")])
@pytest.mark.parametrize("qos", [1, 2])
def test_what_nobody_can_take_waits_for_the_first(
    broker: BrokerProcess, topic: str, version: MQTTProtocolVersion, qos: int
) -> None:
    share, name = f"$share/group/{topic}/work", topic.replace("/", "-")
    with PahoClient(broker, version=version, client_id=name, clean=False, session_expiry_interval=600) as member:
        member.subscribe(share, qos=qos)
    with PahoClient(broker) as sender:
        for number in range(20):
            sender.publish(f"{topic}/work", str(number), qos=qos)
    with Subscriber(broker.port, share, version="mqttv5", qos=qos) as other:
        other_got = [int(message.payload) for message in other.received(20)]
    assert other_got == list(range(20))
    with PahoClient(broker, version=version, client_id=name, clean=False, session_expiry_interval=600) as member:
        member.subscribe(f"{topic}/end", qos=qos)
        member.publish(f"{topic}/end", END, qos=qos)
        assert member.until(END.encode()) == []
