"""The same page over WSS: MQTT.js in Chromium, the listener's certificate of an authority made for the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.browser import Page, open_page
from tests.interop.page_client import PAYLOADS, PageClient, Secure, exchange
from tests.interop.page_client import secure as secure
from tests.interop.paho_support import Heard
from tests.interop.test_browser import paho_versions, versions

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def page(secure: Secure, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("chromium"), [secure.trust]) as opened:
        yield opened


@versions
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_both_directions(secure: Secure, page: Page, topic: str, version: int, qos: int) -> None:
    up = [Heard(f"{topic}/up/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    down = [Heard(f"{topic}/down/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    assert exchange(page, topic, PageClient(secure.broker, version, server=secure.server), up, down) == (up, down)


@paho_versions
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_paho_js(secure: Secure, page: Page, topic: str, version: int, qos: int) -> None:
    up = [Heard(f"{topic}/up/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    down = [Heard(f"{topic}/down/{number}", payload, qos) for number, payload in enumerate(PAYLOADS)]
    client = PageClient(secure.broker, version, "paho", server=secure.server)
    assert exchange(page, topic, client, up, down) == (up, down)


def test_a_certificate_that_nobody_vouches_for_is_refused(secure: Secure, tmp_path: Path, topic: str) -> None:
    """The browser decides, and the broker goes on."""
    client = PageClient(secure.broker, 5, server=secure.server)
    with open_page(tmp_path) as distrustful:
        report = distrustful.wait_for(distrustful.start(client.job(topic)), "failed")
        assert report
    assert secure.broker.running
