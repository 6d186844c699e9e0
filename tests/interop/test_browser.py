"""A page with MQTT.js or Paho JS in a real Chromium exchanges messages with a TCP client, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from tests.interop.broker_process import BrokerProcess
from tests.interop.browser import Page, open_page
from tests.interop.paho_support import V5, V311, Heard, PahoClient

pytestmark = pytest.mark.interop

GO = "now you"
END = "end of test"
PAYLOADS = (b"21.5", b"", bytes(range(256)), "Grüße, 世界".encode(), bytes(1000) * 200)

paths = pytest.mark.parametrize("path", ["/mqtt", "/"])
versions = pytest.mark.parametrize("version", [pytest.param(4, id="3.1.1"), pytest.param(5, id="5.0")])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests of the module."""
    with open_page(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def for_page(message: Heard) -> dict[str, Any]:
    """Put a message in the words of the page."""
    facts = attrs.asdict(message)
    facts["payload"] = message.payload.hex()
    facts["correlation_data"] = None if message.correlation_data is None else message.correlation_data.hex()
    return facts


def from_page(facts: dict[str, Any]) -> Heard:
    """Read a message in the words of the page."""
    data = facts["correlation_data"]
    return Heard(
        **facts
        | {
            "payload": bytes.fromhex(facts["payload"]),
            "user_properties": tuple((name, value) for name, value in facts["user_properties"]),
            "correlation_data": None if data is None else bytes.fromhex(data),
        }
    )


def exchange(
    broker: BrokerProcess,
    page: Page,
    topic: str,
    *,
    version: int,
    path: str,
    up: list[Heard],
    down: list[Heard],
    server: str = "",
    library: str = "mqtt.js",
) -> tuple[list[Heard], list[Heard]]:
    """Let the page publish `up` and a TCP client publish `down`; return what the TCP client and what the page heard."""
    with PahoClient(broker, version=V5 if version == 5 else V311) as device:
        device.subscribe(f"{topic}/up/#")
        job = page.start(
            {
                "url": (server or f"ws://127.0.0.1:{broker.ws_port}") + path,
                "version": version,
                "library": library,
                "client_id": f"page-{topic.rpartition('/')[2]}",
                "filter": f"{topic}/down/#",
                "messages": [for_page(message) for message in up],
                "go": GO,
                "end": END,
            }
        )
        assert page.wait_for(job, "ready")["granted"] == [2]
        for message in down:
            device.publish_message(message)
        device.publish(f"{topic}/down/go", GO, qos=2)
        page.wait_for(job, "go")
        heard = device.received(len(up))
        device.publish(f"{topic}/up/end", END, qos=2)
        assert device.until(END.encode()) == heard, "more than was published"
        device.publish(f"{topic}/down/end", END, qos=2)
        return heard, [from_page(facts) for facts in page.wait_for(job, "done")["messages"]]


@versions
@paths
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_both_directions(broker: BrokerProcess, page: Page, topic: str, version: int, path: str, qos: int) -> None:
    up = [Heard(f"{topic}/up/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    down = [Heard(f"{topic}/down/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    assert exchange(broker, page, topic, version=version, path=path, up=up, down=down) == (up, down)


@paths
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_paho_js(broker: BrokerProcess, page: Page, topic: str, path: str, qos: int) -> None:
    up = [Heard(f"{topic}/up/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    down = [Heard(f"{topic}/down/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    heard = exchange(broker, page, topic, version=4, path=path, up=up, down=down, library="paho")
    assert heard == (up, down)


@paths
def test_properties(broker: BrokerProcess, page: Page, topic: str, path: str) -> None:
    rich = Heard(
        "",
        bytes(range(256)),
        1,
        user_properties=(("unit", "°C"), ("unit", "K"), ("place", "hall")),
        content_type="application/octet-stream",
        response_topic=f"{topic}/reply",
        correlation_data=b"\x00\xff 4711",
    )
    up, down = attrs.evolve(rich, topic=f"{topic}/up/x"), attrs.evolve(rich, topic=f"{topic}/down/x")
    assert exchange(broker, page, topic, version=5, path=path, up=[up], down=[down]) == ([up], [down])


@versions
def test_retained(broker: BrokerProcess, page: Page, topic: str, version: int) -> None:
    kept_down = Heard(f"{topic}/down/state", b"from the device", 1, retain=True)
    kept_up = Heard(f"{topic}/up/state", b"from the page", 2, retain=True)
    with PahoClient(broker) as early:
        early.publish_message(kept_down)
    heard, shown = exchange(broker, page, topic, version=version, path="/mqtt", up=[kept_up], down=[])
    assert heard == [attrs.evolve(kept_up, retain=False)]
    assert shown == [kept_down]
    with PahoClient(broker, transport="websockets") as late:
        late.subscribe(kept_up.topic)
        assert late.received(1) == [kept_up]
