"""Counters, events and the default access rules."""

from __future__ import annotations

import attrs
import pytest

from mqtt_trio.broker.access import (
    AllowAnyone,
    AllowEverything,
    Authenticator,
    Authorizer,
    Credentials,
    Granted,
    Principal,
)
from mqtt_trio.broker.events import MessageDropped
from mqtt_trio.broker.metrics import Metrics


def test_snapshot_has_every_counter_by_name() -> None:
    metrics = Metrics()
    assert set(metrics.snapshot()) == {field.name for field in attrs.fields(Metrics)}
    assert set(metrics.snapshot().values()) == {0}
    metrics.messages_received_qos1 += 3
    metrics.dropped_queue_full += 1
    assert {name: n for name, n in metrics.snapshot().items() if n} == {
        "messages_received_qos1": 3,
        "dropped_queue_full": 1,
    }


def test_snapshot_is_a_copy() -> None:
    metrics = Metrics()
    before = metrics.snapshot()
    metrics.bytes_sent += 1
    assert before["bytes_sent"] == 0


def test_a_misspelt_counter_is_an_error() -> None:
    with pytest.raises(AttributeError):
        Metrics().mesages_sent += 1  # type: ignore[attr-defined]


def test_events_cannot_be_changed() -> None:
    event = MessageDropped(at=0.0, reason="queue_full", topic_name="a")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.count = 2  # type: ignore[misc]


def test_defaults_allow_everything() -> None:
    authenticator: Authenticator = AllowAnyone()
    authorizer: Authorizer = AllowEverything()
    decision = authenticator.authenticate(Credentials("c", "u", b"secret"))
    assert decision == Granted(Principal("c", "u"))
    principal = Principal("c")
    assert authorizer.may_publish(principal, "a")
    assert authorizer.may_subscribe(principal, "#")
    assert authorizer.may_receive(principal, "$SYS/x")


def test_passwords_do_not_show() -> None:
    assert "secret" not in repr(Credentials("c", "u", b"secret"))
