"""One Kafka node in KRaft mode, broker and controller at once: its properties, its folder, its process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lib import kafka_secure
from lib.kafka_install import QUICK_JVM, Installation
from lib.kafka_process import HOST, KafkaError, free_port, live_brokers, start_time, wait_gone

CLUSTER_ID: Final = "bXF0dC10cmlvLWthZmthMQ"
"""Fixed: a development node never meets another cluster. 16 bytes in unpadded base64."""
START_TIMEOUT: Final = 60.0
STOP_TIMEOUT: Final = 20.0
KILL_TIMEOUT: Final = 10.0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a node stands: its id, its ports, the controllers of its quorum as id -> port, its secured listeners as
    name -> port, and its listener behind a proxy, if it has any.

    A quorum remembers the addresses of its controllers, so these never change while there are data.
    """

    node_id: int
    port: int
    controller_port: int
    voters: dict[int, int]
    secured: dict[str, int]
    proxied: tuple[int, int] | None = None
    """Port of the listener, and that of the proxy in front of it, where clients of it are sent."""

    @classmethod
    def read(cls, path: Path) -> Place | None:
        """Return what `write` wrote, None before the first start."""
        try:
            state = json.loads(path.read_text())
            port, controller_port, node_id = int(state["port"]), int(state["controller_port"]), int(state.get("id", 1))
            voters = {int(voter): int(at) for voter, at in state.get("voters", {1: controller_port}).items()}
            secured = {str(name): int(at) for name, at in state.get("secured", {}).items()}
            proxied = tuple(map(int, state.get("proxied") or ()))
        except (OSError, ValueError, KeyError):
            return None
        return cls(node_id, port, controller_port, voters, secured, (proxied[0], proxied[1]) if proxied else None)

    def write(self, path: Path) -> None:
        state = {
            "id": self.node_id,
            "port": self.port,
            "controller_port": self.controller_port,
            "voters": self.voters,
            "secured": self.secured,
            "proxied": self.proxied,
        }
        path.write_text(json.dumps(state) + "\n")

    @property
    def listeners(self) -> dict[str, int]:
        """Name -> port of each listener of the broker."""
        proxied = {"PROXIED": self.proxied[0]} if self.proxied else {}
        return {"PLAINTEXT": self.port, **self.secured, **proxied}

    @property
    def advertised(self) -> dict[str, int]:
        """Name -> port where each listener says that it is."""
        return self.listeners | ({"PROXIED": self.proxied[1]} if self.proxied else {})


def secure_place(port: int) -> Place:
    """Choose the ports of a node with secured listeners: `port` and those behind it, or any free ones when it is 0."""
    (place,) = places(1, port)
    taken = [place.port, place.controller_port]
    for number in range(len(kafka_secure.LISTENERS)):
        taken.append(port + number + 1 if port else free_port(*taken))
    return dataclasses.replace(place, secured=dict(zip(kafka_secure.LISTENERS, taken[2:], strict=True)))


def places(count: int, port: int) -> list[Place]:
    """Choose the ports of `count` nodes: `port` and those behind it, or any free ones when it is 0."""
    taken: list[int] = []
    for number in range(count):
        taken.append(port + number if port else free_port(*taken))
    for _ in range(count):
        taken.append(free_port(*taken))
    voters = {number + 1: taken[count + number] for number in range(count)}
    return [Place(number + 1, taken[number], taken[count + number], voters, {}) for number in range(count)]


def behind_proxies(chosen: Sequence[Place], proxies: Sequence[int]) -> list[Place]:
    """Give each node a further listener, which sends its clients to a port of `proxies`."""
    taken = [port for place in chosen for port in (*place.listeners.values(), place.controller_port)] + [*proxies]
    found = []
    for place, proxy in zip(chosen, proxies, strict=True):
        taken.append(free_port(*taken))
        found.append(dataclasses.replace(place, proxied=(taken[-1], proxy)))
    return found


def properties(place: Place, folder: Path) -> dict[str, str]:
    """Return the server.properties of a node: three nodes and more keep every partition three times, two of them in
    sync, so that one may be lost.

    A restart after kill -9 waits until the old session has expired and partitions of a dead node wait as long for a new
    leader, hence the short session; a small cleaner buffer because the default (128 MiB) does not fit the small heap.
    """
    replicas = min(3, len(place.voters))
    in_sync = max(1, replicas - 1)
    own = {"CONTROLLER": place.controller_port}
    listeners, advertised = (
        ",".join(f"{name}://{HOST}:{port}" for name, port in (ports | own).items())
        for ports in (place.listeners, place.advertised)
    )
    voters = [f"{number}@{HOST}:{port}" for number, port in place.voters.items()]
    quorum = (
        {"controller.quorum.bootstrap.servers": f"{HOST}:{place.controller_port}"}
        if len(voters) == 1
        else {"controller.quorum.voters": ",".join(voters)}
    )
    found = quorum | {
        "process.roles": "broker,controller",
        "node.id": str(place.node_id),
        "listeners": listeners,
        "advertised.listeners": advertised,
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT",
        "log.dirs": str(folder / "data"),
        "num.partitions": "4",
        "default.replication.factor": str(replicas),
        "min.insync.replicas": str(in_sync),
        "offsets.topic.num.partitions": "4",
        "offsets.topic.replication.factor": str(replicas),
        "transaction.state.log.replication.factor": str(replicas),
        "transaction.state.log.min.isr": str(in_sync),
        "share.coordinator.state.topic.replication.factor": str(replicas),
        "share.coordinator.state.topic.min.isr": str(in_sync),
        "group.initial.rebalance.delay.ms": "0",
        "auto.create.topics.enable": "false",
        "log.cleaner.dedupe.buffer.size": "8388608",
        "broker.session.timeout.ms": "2000",
        "broker.heartbeat.interval.ms": "500",
    }
    return found | kafka_secure.properties(place.secured, folder / "tls") if place.secured else found


@dataclasses.dataclass(frozen=True)
class Node:
    """A node and its folder: server.properties, data/, node.json (its place), pid, out.log, kafka.log."""

    folder: Path

    @property
    def place(self) -> Place | None:
        """Where the node stands, None before its first start."""
        return Place.read(self.folder / "node.json")

    @property
    def process(self) -> tuple[int, int] | None:
        """Pid and start time of the running process, None when there is none."""
        try:
            pid, started = map(int, (self.folder / "pid").read_text().split())
        except (OSError, ValueError):
            return None
        return (pid, started) if start_time(pid) == started else None

    def prepare(self, place: Place) -> None:
        """Write the configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place.write(self.folder / "node.json")
        if place.secured:
            kafka_secure.make_certificates(self.folder / "tls")
        lines = [f"{name}={value}\n" for name, value in properties(place, self.folder).items()]
        (self.folder / "server.properties").write_text("".join(lines))

    def format(self, installation: Installation, *, standalone: bool = True) -> subprocess.Popen[str] | None:
        """Begin to write the cluster id into an empty data folder; `formatted` waits for the end. None: it is there.

        `standalone`: a single node is its own quorum; without it the properties must name the voters.
        """
        if (self.folder / "data" / "meta.properties").exists():
            return None
        shutil.rmtree(self.folder / "data", ignore_errors=True)  # what a start that was cut short left
        place = self.place
        assert place is not None
        kind = ("--standalone",) if standalone and len(place.voters) == 1 else ()
        users = kafka_secure.scram_arguments() if place.secured else ()
        arguments = ("format", *kind, *users, "-t", CLUSTER_ID, "-c", str(self.folder / "server.properties"))
        flags = (*QUICK_JVM, *installation.use_archive())
        return subprocess.Popen(
            installation.command("kafka.tools.StorageTool", *arguments, flags=flags),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def formatted(self, process: subprocess.Popen[str] | None) -> None:
        """Wait for the end of `format`."""
        if process is None:
            return
        output, _ = process.communicate()
        if process.returncode != 0:
            raise KafkaError(f"formatting {self.folder} failed:\n{output.strip()[-2000:]}")

    def launch(self, installation: Installation, class_flags: tuple[str, ...]) -> None:
        """Start the process in a session of its own, so that Ctrl-C in a terminal reaches the broker only."""
        flags = (*installation.run_flags(), *class_flags, f"-Dnode.log={self.folder / 'kafka.log'}")
        command = installation.command("kafka.Kafka", str(self.folder / "server.properties"), flags=flags)
        with (self.folder / "out.log").open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.folder, start_new_session=True
            )
        (self.folder / "pid").write_text(f"{process.pid} {start_time(process.pid) or 0}\n")

    def answers(self, *node_ids: int) -> bool:
        """Tell whether the node answers and knows these brokers, none: itself, to serve."""
        place = self.place
        return place is not None and {*(node_ids or (place.node_id,))} <= live_brokers(place.port)

    def wait_answer(self, *node_ids: int) -> None:
        """Wait until `answers`."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers(*node_ids):
            if self.process is None:
                raise KafkaError(f"Kafka ended while starting; the last lines of its logs:\n{self.last_lines()}")
            if time.monotonic() > deadline:
                raise KafkaError(f"Kafka does not answer after {START_TIMEOUT:.0f} s; its logs:\n{self.last_lines()}")
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> bool:
        """Send a signal. Return whether something ran."""
        if (process := self.process) is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(process[0], number)
        return True

    def end(self, number: signal.Signals, timeout: float) -> bool:
        """Send a signal and wait for the end, at last with SIGKILL. Return whether something ran."""
        if (process := self.process) is None:
            (self.folder / "pid").unlink(missing_ok=True)
            return False
        for wanted, limit in ((number, timeout), (signal.SIGKILL, KILL_TIMEOUT)):
            self.send(wanted)
            self.send(signal.SIGCONT)  # a paused process hears of SIGTERM only when it goes on
            if wait_gone(*process, limit):
                (self.folder / "pid").unlink(missing_ok=True)
                return True
        raise KafkaError(f"process {process[0]} does not end")

    def last_lines(self) -> str:
        """Return the end of both logs."""
        lines: list[str] = []
        for name in ("out.log", "kafka.log"):
            with contextlib.suppress(OSError):
                lines += (self.folder / name).read_text(errors="replace").splitlines()[-15:]
        return "\n".join(lines)


def make_archive(installation: Installation) -> None:
    """Run a throw-away node once and keep the classes that it loaded; without them nodes start slower, no more."""
    with tempfile.TemporaryDirectory(dir=installation.folder) as scratch:
        node = Node(Path(scratch) / "node")
        archive = Path(scratch) / "classes.jsa"
        try:
            node.prepare(places(1, 0)[0])
            node.formatted(node.format(installation))
            node.launch(installation, (f"-XX:ArchiveClassesAtExit={archive}",))
            node.wait_answer()
        except KafkaError as exc:
            print(f"no class archive, Kafka will start slower: {exc}", file=sys.stderr)
        finally:
            node.end(signal.SIGTERM, START_TIMEOUT)
        if archive.exists():
            archive.rename(installation.archive)
