"""`$SYS` beside a real mosquitto: every name that it has and we do not, with the reason."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.broker_process import BrokerProcess, Brokers
from tests.lines import LineProcess, require_tool

pytestmark = pytest.mark.interop

NOT_OURS = {
    "$SYS/broker/heap/current": "the memory of mosquitto's own allocator; of a Python process the system knows more",
    "$SYS/broker/heap/maximum": "the same",
    "$SYS/broker/publish/bytes/received": "payload bytes would have to be counted per message; bytes/received has all",
    "$SYS/broker/publish/bytes/sent": "the same",
    "$SYS/broker/packet/out/count": "since 2.1: outboxes are bounded and read one by one, not summed up",
    "$SYS/broker/packet/out/bytes": "the same",
}
"""Name -> why it is missing here."""


@pytest.fixture
def mosquitto_port(tmp_path: Path) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nsys_interval 1\n")
    with LineProcess([require_tool("mosquitto"), "-c", str(config)]) as process:
        process.wait_for(r"mosquitto version \S+ running")
        yield port


def names(port: int, seconds: int) -> dict[str, str]:
    """Return the `$SYS` topics that come within some seconds, with their last values."""
    command = [require_tool("mosquitto_sub"), "-h", "127.0.0.1", "-p", str(port), "-t", "$SYS/#", "-v"]
    command += ["-W", str(seconds), "-F", "%t\t%p"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return dict(line.split("\t", 1) for line in done.stdout.splitlines())


def test_what_mosquitto_has_and_we_do_not(mosquitto_port: int, brokers: Brokers) -> None:
    ours = names(brokers.start().port, 2)
    theirs = names(mosquitto_port, 4)
    assert len(theirs) > 45
    assert theirs.keys() - ours.keys() - NOT_OURS.keys() == set()
    assert ours.keys() & NOT_OURS.keys() == set(), "the table is out of date"
    assert ours.keys() - theirs.keys() <= {"$SYS/broker/connections/socket/count"}  # since 2.1
    number = re.compile(r"\d+(\.\d\d)?\Z")
    for name in theirs.keys() & ours.keys() - {"$SYS/broker/version"}:
        pattern = re.compile(r"\d+ seconds\Z") if name.endswith("/uptime") else number
        assert pattern.match(theirs[name]), (name, theirs[name])
        assert pattern.match(ours[name]), (name, ours[name])


def test_off_is_off(brokers: Brokers) -> None:
    broker = brokers.make("", node_id="quiet")
    broker.config_file.write_text(broker.config_file.read_text().replace("[Node]", "[Node]\nSysInterval = 0"))
    broker.start()
    assert names(broker.port, 1) == {}
    assert "$SYS topics ([Node] SysInterval" in broker.output.text


def test_mosquitto_sub_reads_one(brokers: Brokers) -> None:
    broker: BrokerProcess = brokers.start()
    assert names(broker.port, 1)["$SYS/broker/version"].startswith("mqtt_trio version ")
