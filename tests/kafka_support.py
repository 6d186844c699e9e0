"""Fixtures with a real Apache Kafka. `conftest.py` brings them to every test; such tests carry the mark `kafka`.

`kafka` is one node for the whole test run: tests keep apart by topic names of their own (`unique_name`). `own_kafka` is
a node of one test alone, which may stop and kill it. Nodes are started through scripts/kafka on free ports; each is
ended by its pid, also when a test fails or is interrupted.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "kafka"
COMMAND_TIMEOUT = 300.0
"""Seconds; the first start of all fetches the jars."""

_numbers = itertools.count(1)


def unique_name(prefix: str) -> str:
    """Return a topic or group name that no other test of this machine uses."""
    return f"{prefix}-{os.getpid()}-{next(_numbers)}"


@attrs.define
class KafkaNode:
    """A node that scripts/kafka runs. All methods block; call them through a thread where a Trio loop must go on."""

    folder: Path
    """Folder of the node's folder."""
    name: str
    port: int = 0

    @property
    def servers(self) -> str:
        """Value for `Kafka.Servers` and for `bootstrap_servers`."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """The pid of the Java process, None while it is not running."""
        try:
            return int((self.folder / self.name / "pid").read_text().split()[0])
        except FileNotFoundError:
            return None

    def start(self) -> None:
        """Start the node and wait until it answers; later starts use the same port and data.

        Raises:
          RuntimeError: it did not start; the message holds the end of its logs.
        """
        output = self._run("start", "--port", str(self.port))
        self.port = int(output.partition("127.0.0.1:")[2].split()[0])

    def stop(self) -> None:
        """End the node in order (SIGTERM)."""
        self._run("stop")

    def kill(self) -> None:
        """End the node as a crash would (SIGKILL)."""
        self._run("kill")

    def _run(self, command: str, *arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, str(SCRIPT), command, "--dir", str(self.folder), "--name", self.name, *arguments],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(result.stderr.strip() or result.stdout.strip())
        return result.stdout


def run_node(folder: Path, name: str) -> Iterator[KafkaNode]:
    """Start a node, yield it, end it whatever happens. For fixtures: ``yield from run_node(...)``."""
    node = KafkaNode(folder, name)
    try:
        node.start()
        yield node
    finally:
        node.kill()


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaNode]:
    """The node of the test run; leave it running."""
    yield from run_node(tmp_path_factory.mktemp("kafka"), "shared")


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[KafkaNode]:
    """A node of this test alone, which may stop, kill and start it."""
    yield from run_node(tmp_path, "own")
