"""What groups write into their spool reads back as the same messages."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies

from mqtt_trio.archive.spooled import HEAD, Item, count_of, pack_items, read_items
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import read_run
from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion
from tests.archive.store_suite import SAMPLES
from tests.archive_support import run_of


def messages_of(items: list[Item]) -> list[Message]:
    return [message for item in items for message in ([item] if isinstance(item, Message) else read_run(item))]


def test_messages_and_runs_come_back_as_they_were() -> None:
    items: list[Item] = [
        *SAMPLES,
        run_of(b"1", b"", b"\xff" * 70_000),
        run_of(b"2", qos=2),
        run_of(b"3", qos=1, version=ProtocolVersion.MQTT_3_1_1),
        Message("a/" * 5000, b"", 2, True, client_id="c" * 65_000, published_at=0.125),
    ]
    assert read_items(pack_items(items)) == messages_of(items)
    assert sum(map(count_of, items)) == len(messages_of(items))
    assert read_items(pack_items([])) == []


@given(strategies.data())
def test_foreign_bytes_are_refused_and_nothing_worse(data: strategies.DataObject) -> None:
    packed = pack_items([*SAMPLES[:2], run_of(b"x", b"y")])
    at = data.draw(strategies.integers(0, len(packed) - 1))
    changed = (
        packed[:at] + data.draw(strategies.binary(max_size=30)) + packed[at + data.draw(strategies.integers(0, 9)) :]
    )
    try:
        read_items(changed)
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize("kind, version", [(3, 5), (0, 5), (1, 6), (2, 0)])
def test_items_of_later_versions_are_refused(kind: int, version: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"kind {kind} is not known"):
        read_items(HEAD.pack(kind, 0, version, 0.0, 1, 0, 0))
