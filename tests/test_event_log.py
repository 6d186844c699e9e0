"""What the log says about clients."""

from __future__ import annotations

import logging

import pytest

from mqtt_trio.broker.events import ClientConnected, ClientDisconnected, ClientRefused, Event, SessionTakenOver
from mqtt_trio.event_log import log_event
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode

CONNECTED = ClientConnected(
    at=0.0,
    client_id="c\n1",
    peer="127.0.0.1:1",
    listener="tcp 127.0.0.1:1883",
    protocol_version=ProtocolVersion.MQTT_5_0,
    user_name="u",
    keep_alive=60,
    session_present=True,
)
LEFT = ClientDisconnected(
    at=0.0, client_id="c", peer="p", listener="l", reason_code=ReasonCode.KEEP_ALIVE_TIMEOUT, reason="silent"
)


@pytest.mark.parametrize(
    "event,parts",
    [
        (CONNECTED, ("'c\\n1'", "'u'", "127.0.0.1:1", "version 5", "60 s", "resumed")),
        (LEFT, ("'c'", "KEEP_ALIVE_TIMEOUT silent")),
        (
            ClientDisconnected(at=0.0, client_id="c", peer="p", listener="l", reason_code=None, by_client=True),
            ("DISCONNECT by the client",),
        ),
        (
            ClientRefused(at=0.0, client_id="c", peer="p", listener="l", reason_code=ReasonCode.NOT_AUTHORIZED),
            ("refused: NOT_AUTHORIZED",),
        ),
        (SessionTakenOver(at=0.0, client_id="c", old_peer="p1", new_peer="p2"), ("p1", "taken over by p2")),
    ],
)
def test_lines(event: Event, parts: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_event(event)
    (record,) = caplog.records
    assert all(part in record.getMessage() for part in parts)
    assert "\n" not in record.getMessage()
