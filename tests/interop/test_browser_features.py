"""What MQTT.js and Paho JS in Chromium do beyond publishing and subscribing, over WS and over WSS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from tests.interop.browser import Page, open_page
from tests.interop.page_client import Conversation, PageClient, Secure, connect_in_tab, exchange
from tests.interop.page_client import secure as secure
from tests.interop.paho_support import Heard, PahoClient, retained_at, wait_until_expired

pytestmark = pytest.mark.interop

END = b"end of test"
ALIASES = 16
"""Topic Alias Maximum of the broker, which nobody has configured."""

all_clients = pytest.mark.parametrize(
    "library, version",
    [
        pytest.param("mqtt.js", 4, id="MQTT.js-3.1.1"),
        pytest.param("mqtt.js", 5, id="MQTT.js-5.0"),
        pytest.param("paho", 4, id="Paho JS-3.1.1"),
    ],
)


@pytest.fixture(scope="module")
def page(secure: Secure, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("chromium"), [secure.trust]) as opened:
        yield opened


@pytest.fixture(params=["ws", "wss"])
def base(request: pytest.FixtureRequest, secure: Secure) -> PageClient:
    """A client of the listener with that scheme; tests say the rest."""
    return PageClient(secure.broker, 5, server=secure.server if request.param == "wss" else "")


@all_clients
@pytest.mark.spec("MQTT3-3.1.2-8", "MQTT3-3.1.2-17")
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_will_of_a_closed_tab(base: PageClient, page: Page, topic: str, library: Any, version: int, qos: int) -> None:
    will = Heard(topic, "gone, 世界".encode(), qos, retain=True)
    with PahoClient(base.broker) as watcher:
        watcher.subscribe(topic)
        connect_in_tab(page, topic, attrs.evolve(base, library=library, version=version, will=will))
        assert watcher.received(1) == [attrs.evolve(will, retain=False)]
    assert retained_at(base.broker, topic) == will


@all_clients
def test_no_will_after_disconnect(base: PageClient, page: Page, topic: str, library: Any, version: int) -> None:
    client = attrs.evolve(base, library=library, version=version, will=Heard(topic, b"gone", 1))
    with PahoClient(base.broker) as watcher:
        watcher.subscribe(topic)
        exchange(page, topic, client, [], [])
        # The session ended with the connection: where it is new, the DISCONNECT before it has been handled.
        exchange(page, topic, attrs.evolve(client, will=None), [], [])
        watcher.publish(topic, END, qos=1)
        assert watcher.received(1) == [Heard(topic, END, 1)]


def test_delayed_will_with_properties(base: PageClient, page: Page, topic: str) -> None:
    will = Heard(topic, b"gone", 1, user_properties=(("unit", "K"), ("unit", "°C")), content_type="text/plain")
    client = attrs.evolve(base, will=will, will_delay=1, clean=False, session_expiry_interval=600)
    with PahoClient(base.broker) as watcher:
        watcher.subscribe(topic)
        begin = time.monotonic()
        connect_in_tab(page, topic, client)
        assert watcher.received(1) == [will]
        assert time.monotonic() - begin >= 1


@pytest.mark.spec("MQTT5-3.1.3-9")
def test_delayed_will_is_not_sent_to_who_returns_in_time(base: PageClient, page: Page, topic: str) -> None:
    session = attrs.evolve(base, clean=False, session_expiry_interval=600)
    with PahoClient(base.broker) as watcher:
        watcher.subscribe(topic)
        connect_in_tab(page, topic, attrs.evolve(session, will=Heard(topic, b"gone", 1), will_delay=300))
        exchange(page, topic, session, [], [])
        watcher.publish(topic, END, qos=1)
        assert watcher.received(1) == [Heard(topic, END, 1)]


@all_clients
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_retained_and_cleared(base: PageClient, page: Page, topic: str, library: Any, version: int, qos: int) -> None:
    client = attrs.evolve(base, library=library, version=version)
    kept = Heard(f"{topic}/down/state", b"from the page", qos, retain=True)
    behind = Heard(f"{topic}/up/behind", b"", 1)
    live = attrs.evolve(kept, retain=False)
    assert exchange(page, topic, client, [kept, behind], []) == ([behind], [live])
    assert retained_at(base.broker, kept.topic) == kept
    cleared = attrs.evolve(kept, payload=b"")
    assert exchange(page, topic, client, [cleared, behind], []) == ([behind], [kept, attrs.evolve(live, payload=b"")])
    assert retained_at(base.broker, kept.topic) is None
    assert exchange(page, topic, client, [], []) == ([], [])


@all_clients
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_shared_subscription(base: PageClient, page: Page, topic: str, library: Any, version: int, qos: int) -> None:
    """The page and a TCP client are one group: each message reaches one of them, in order for each."""
    client = attrs.evolve(base, library=library, version=version, filters=(f"$share/group/{topic}/work",))
    work = [Heard(f"{topic}/work", b"%d" % number, qos) for number in range(40)]
    with Conversation(page, topic, client) as conversation, PahoClient(base.broker) as member:
        member.subscribe(f"$share/group/{topic}/work", f"{topic}/member")
        for message in work:
            conversation.device.publish_message(message)
        conversation.device.publish(f"{topic}/member", END, qos=qos)
        by_page, by_member = conversation.end(), member.until(END)
    assert by_page == [message for message in work if message not in by_member]
    assert by_member == [message for message in work if message not in by_page]
    assert by_page
    assert by_member


@pytest.mark.spec("MQTT5-3.3.2-12")
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_topic_aliases_of_the_page(base: PageClient, page: Page, topic: str, qos: int) -> None:
    """More topics than aliases: MQTT.js gives the oldest alias to a new topic."""
    up = [Heard(f"{topic}/up/{number % (ALIASES + 2)}", b"%d" % number, qos) for number in range(40)]
    up += [Heard(f"{topic}/up/last", b"again", qos) for _ in range(3)]
    with Conversation(page, topic, attrs.evolve(base, assign_aliases=True), up) as conversation:
        assert conversation.let_page_publish() == up
        assert conversation.end() == []
    assert {alias for _, alias in conversation.sent} == set(range(1, ALIASES + 1))
    assert [name for name, _ in conversation.sent[-3:]] == [f"{topic}/up/last", "", ""]


@pytest.mark.spec("MQTT5-3.1.2-26", "MQTT5-3.3.2-11")
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_topic_aliases_towards_the_page(base: PageClient, page: Page, topic: str, qos: int) -> None:
    down = [Heard(f"{topic}/down/{number % 3}", b"%d" % number, qos) for number in range(12)]
    with Conversation(page, topic, attrs.evolve(base, topic_alias_maximum=2)) as conversation:
        for message in down:
            conversation.device.publish_message(message)
        heard = conversation.end()
    # What MQTT.js 5.16 delivers at QoS 2 has the Topic Name of the packet: none, where the alias stands for it.
    names = {message.topic_alias: message.topic for message in heard[:2]}
    assert [attrs.evolve(message, topic=message.topic or names[message.topic_alias]) for message in heard] == down
    assert [message.topic_alias for message in heard] == [1, 2, None] * 4
    assert conversation.shortened == [False] * 3 + [True, True, False] * 3


@pytest.mark.spec("MQTT5-3.3.2-5", "MQTT5-3.3.2-6")
def test_expiry_in_the_queue(base: PageClient, page: Page, topic: str) -> None:
    """Another client of the page publishes to its session while nobody is connected to it."""
    session = attrs.evolve(base, clean=False, session_expiry_interval=600, filters=(f"{topic}/queued/+",))
    assert exchange(page, topic, session, [], []) == ([], [])
    lasting = Heard(f"{topic}/queued/lasting", b"lasting", 1, message_expiry_interval=300)
    short = Heard(f"{topic}/queued/short", b"short", 1, retain=True, message_expiry_interval=1)
    seen = attrs.evolve(lasting, topic=f"{topic}/other/up/lasting")
    publisher = attrs.evolve(base, client_id=f"o{topic[-20:]}")
    heard, _ = exchange(page, f"{topic}/other", publisher, [lasting, short, seen], [])
    assert [message.message_expiry_interval for message in heard] == [300]
    wait_until_expired(base.broker, short.topic)
    _, queued = exchange(page, topic, session, [], [])
    assert queued == [lasting]
    assert 250 < (queued[0].message_expiry_interval or 0) < 300


@pytest.mark.spec("MQTT5-3.3.2-15", "MQTT5-3.3.2-16")
def test_page_asks(base: PageClient, page: Page, topic: str) -> None:
    ask = Heard(f"{topic}/up/ask", b"ping", 1, response_topic=f"{topic}/down/answer", correlation_data=b"\x00\xff 1")
    with Conversation(page, topic, base, [ask]) as conversation:
        [asked] = conversation.let_page_publish()
        assert asked == ask
        assert asked.response_topic is not None
        answer = Heard(asked.response_topic, b"pong", 1, correlation_data=asked.correlation_data)
        conversation.device.publish_message(answer)
        assert conversation.end() == [answer]


@pytest.mark.spec("MQTT5-3.3.2-15", "MQTT5-3.3.2-16")
def test_page_answers(base: PageClient, page: Page, topic: str) -> None:
    with Conversation(page, topic, attrs.evolve(base, answers=True)) as conversation:
        for number in range(3):
            ask = Heard(f"{topic}/down/ask", b"ping %d" % number, 1)
            reply_to, data = f"{topic}/up/{number}", b"\xff%d" % number
            conversation.device.publish_message(attrs.evolve(ask, response_topic=reply_to, correlation_data=data))
            answer = conversation.device.received(number + 1)[-1]
            assert answer == Heard(reply_to, b"PING %d" % number, 1, correlation_data=data)
        assert len(conversation.end()) == 3
