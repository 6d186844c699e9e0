"""Limits that depend on each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mqtt_trio.broker.limits import FRAME_OVERHEAD, Limits
from mqtt_trio.config import load_config
from mqtt_trio.errors import ConfigError


def test_an_outbox_holds_the_largest_packet() -> None:
    with pytest.raises(ConfigError, match=r"OutboxBytes: .* MaximumPacketSize"):
        Limits(outbox_bytes=65_536, maximum_packet_size=65_536)
    assert Limits(outbox_bytes=65_536, maximum_packet_size=65_536 - FRAME_OVERHEAD).outbox_bytes == 65_536


@pytest.mark.parametrize("text", ["[Limits]\nMaximumPacketSize = '16MiB'\n", "[Limits]\nOutboxBytes = '1MiB'\n"])
def test_the_configuration_names_both_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {}, None, {})
    assert re.search(
        r"Limits\.OutboxBytes: \d+ bytes have no room for a packet of MaximumPacketSize", str(caught.value)
    )
