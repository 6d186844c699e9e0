"""A page with MQTT.js or Paho JS in a real Chromium exchanges messages with a TCP client, in both directions."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import pytest

from tests.interop.broker_process import BrokerProcess
from tests.interop.browser import Page, open_page
from tests.interop.page_client import PAYLOADS, PageClient, exchange
from tests.interop.paho_support import Heard, PahoClient

pytestmark = pytest.mark.interop

paths = pytest.mark.parametrize("path", ["/mqtt", "/"])
versions = pytest.mark.parametrize("version", [pytest.param(4, id="3.1.1"), pytest.param(5, id="5.0")])
paho_versions = pytest.mark.parametrize("version", [pytest.param(3, id="3.1"), pytest.param(4, id="3.1.1")])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests of the module."""
    with open_page(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@versions
@paths
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_both_directions(broker: BrokerProcess, page: Page, topic: str, version: int, path: str, qos: int) -> None:
    up = [Heard(f"{topic}/up/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    down = [Heard(f"{topic}/down/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    assert exchange(page, topic, PageClient(broker, version, path=path), up, down) == (up, down)


@paho_versions
@paths
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_paho_js(broker: BrokerProcess, page: Page, topic: str, version: int, path: str, qos: int) -> None:
    up = [Heard(f"{topic}/up/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    down = [Heard(f"{topic}/down/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    assert exchange(page, topic, PageClient(broker, version, "paho", path=path), up, down) == (up, down)


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
    assert exchange(page, topic, PageClient(broker, 5, path=path), [up], [down]) == ([up], [down])


@versions
def test_retained(broker: BrokerProcess, page: Page, topic: str, version: int) -> None:
    kept_down = Heard(f"{topic}/down/state", b"from the device", 1, retain=True)
    kept_up = Heard(f"{topic}/up/state", b"from the page", 2, retain=True)
    with PahoClient(broker) as early:
        early.publish_message(kept_down)
    heard, shown = exchange(page, topic, PageClient(broker, version), [kept_up], [])
    assert heard == [attrs.evolve(kept_up, retain=False)]
    assert shown == [kept_down]
    with PahoClient(broker, transport="websockets") as late:
        late.subscribe(kept_up.topic)
        assert late.received(1) == [kept_up]
