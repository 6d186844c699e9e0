"""Fixtures with a real Apache Kafka. `conftest.py` brings them to every test; such tests carry the mark `kafka`.

`kafka` is one node for the whole test run (of each worker, where pytest-xdist has several): tests keep apart by topic
names of their own (`unique_name`). `own_kafka` is a node of one test alone, which may stop and kill it. `three_kafkas`
is a cluster of three nodes for the whole test run, started for the first test that asks for it; tests may kill its
nodes one at a time, and find all three running at their start. `secure_kafka` is a node with secured listeners for the
whole run. Nodes are started through scripts/kafka on free ports; each is ended by its pid, also when a test fails or is
interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import attrs
import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "kafka"
COMMAND_TIMEOUT = 300.0
"""Seconds; the first start of all fetches the jars."""

_numbers = itertools.count(1)
AnyNode = TypeVar("AnyNode", bound="KafkaNode")


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
        return run_script(command, "--dir", str(self.folder), "--name", self.name, *arguments)


@attrs.define
class SecureKafka(KafkaNode):
    """A node with secured listeners beside its PLAINTEXT one, as `scripts/kafka start --secure` makes it."""

    PASSWORDS: ClassVar[Mapping[str, str]] = {
        "alice": "alice-secret",
        "bob": "bob-secret",
        "limited": "limited-secret",
    }
    """alice logs in with SCRAM, bob with PLAIN, limited with either; it may do nothing, they everything. So may the
    client certificate and an OAuth token of `oscar`."""
    STORE_PASSWORD: ClassVar[str] = "store-secret"
    KEY_PASSWORD: ClassVar[str] = "key-secret"

    def start(self) -> None:
        """Start the node and wait until it answers."""
        output = self._run("start", "--secure", "--port", str(self.port))
        self.port = int(output.partition("127.0.0.1:")[2].split()[0])

    def address(self, listener: str) -> str:
        """Return `host:port` of SASL_SSL, SSL, SASL_PLAINTEXT, EXPIRED or WRONGHOST."""
        state = json.loads((self.folder / self.name / "node.json").read_text())
        return f"127.0.0.1:{state['secured'][listener]}"

    def file(self, name: str) -> str:
        """Return the path of a certificate, key or store, such as `trust.jks`."""
        path = self.folder / self.name / "tls" / name
        assert path.exists(), path
        return str(path)


@attrs.define
class KafkaCluster:
    """Nodes 1 to `brokers` that scripts/kafka runs as one cluster: replication factor 3, two in sync.

    All methods block; those with a `node` mean that one alone, None: all.
    """

    folder: Path
    """Folder of the cluster's folder."""
    name: str
    brokers: int = 3
    ports: dict[int, int] = attrs.field(factory=dict)
    """Node id -> port, after the first start."""
    proxies: tuple[int, ...] = ()
    """Ports to which a further listener of each node sends its clients."""

    @property
    def servers(self) -> str:
        """Value for `Kafka.Servers` and for `bootstrap_servers`."""
        return ",".join(f"127.0.0.1:{port}" for port in self.ports.values())

    def start(self, node: int | None = None) -> None:
        """Start what does not run, with the ports and data it had, and wait until it serves.

        Raises:
          RuntimeError: it did not start; the message holds the end of its logs.
        """
        cluster: list[str] = []
        if node is None:
            cluster += ["--brokers", str(self.brokers)]
            if self.proxies:
                cluster += ["--proxies", ",".join(map(str, self.proxies))]
        output = self._run("start", node, "--port", "0", *cluster)
        if node is None:
            self.ports = dict(enumerate(map(int, re.findall(r"127\.0\.0\.1:(\d+)", output)), start=1))

    def stop(self, node: int | None = None) -> None:
        """End in order (SIGTERM)."""
        self._run("stop", node)

    def kill(self, node: int | None = None) -> None:
        """End as a crash would (SIGKILL)."""
        self._run("kill", node)

    def pause(self, node: int | None = None) -> None:
        """Freeze (SIGSTOP): connections stand, nothing answers."""
        self._run("pause", node)

    def resume(self, node: int | None = None) -> None:
        """Undo `pause`; a node that runs does not mind."""
        self._run("resume", node)

    def resume_all(self) -> None:
        """Let go on whatever is paused; killed nodes are left alone."""
        for node in self.ports:
            with contextlib.suppress(RuntimeError):  # not running
                self.resume(node)

    def behind_proxies(self) -> dict[int, int]:
        """Return the port of each proxy -> the port of the listener that sends clients to it."""
        folder = self.folder / self.name
        files = (
            [folder / f"node-{node}" / "node.json" for node in self.ports]
            if self.brokers > 1
            else [folder / "node.json"]
        )
        states = [json.loads(file.read_text())["proxied"] for file in files]
        return {proxy: port for port, proxy in states}

    def _run(self, command: str, node: int | None, *arguments: str) -> str:
        one = () if node is None else ("--node", str(node))
        return run_script(command, "--dir", str(self.folder), "--name", self.name, *one, *arguments)


def run_script(*arguments: str) -> str:
    """Run scripts/kafka and return what it printed.

    Raises:
      RuntimeError: it failed; the message is its own.
    """
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(result.stderr.strip() or result.stdout.strip())
    return result.stdout


def run_node(node: AnyNode) -> Iterator[AnyNode]:
    """Start a node, yield it, end it whatever happens. For fixtures: ``yield from run_node(...)``."""
    try:
        node.start()
        yield node
    finally:
        node.kill()


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaNode]:
    """The node of the test run; leave it running."""
    yield from run_node(KafkaNode(tmp_path_factory.mktemp("kafka"), "shared"))


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[KafkaNode]:
    """A node of this test alone, which may stop, kill and start it."""
    yield from run_node(KafkaNode(tmp_path, "own"))


@pytest.fixture(scope="session")
def secure_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    """The node with secured listeners of the test run; leave it running."""
    yield from run_node(SecureKafka(tmp_path_factory.mktemp("kafka"), "secure"))


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    """The cluster behind `three_kafkas`."""
    cluster = KafkaCluster(tmp_path_factory.mktemp("kafka"), "three")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()


@pytest.fixture
def three_kafkas(shared_cluster: KafkaCluster) -> KafkaCluster:
    """Three nodes of which a test may kill, pause and start one at a time; what an earlier test killed runs again."""
    shared_cluster.resume_all()
    shared_cluster.start()
    return shared_cluster
