"""A broker as people run it: `python -m mqtt_trio serve` on a configuration file, in a process of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.lines import LineProcess

ROOT: Final = Path(__file__).resolve().parents[2]
START_LIMIT: Final = 30.0
"""Seconds until the start-up summary: an interpreter, its imports, and the topics of a Kafka that is slow to answer."""
STOP_LIMIT: Final = 20.0
TCP_LINE: Final = r"(?i)\btcp\b.*?127\.0\.0\.1:(\d+)"
WEBSOCKET_LINE: Final = r"(?i)\bwebsocket\b.*?127\.0\.0\.1:(\d+)"
STOPPED_LINE: Final = r"\bstopped\b.*?(\{.*\})"

CONFIG: Final = """\
[Node]
Id = "{node_id}"

[[Listeners]]
Type = "tcp"
Host = "127.0.0.1"
Port = 0

[[Listeners]]
Type = "websocket"
Host = "127.0.0.1"
Port = 0
"""
"""Every test's configuration begins with this; ports come from `--port 0 --ws-port 0`."""


class BrokerProcess:
    """One broker. `start` returns when its listeners are open."""

    def __init__(self, directory: Path, *, config: str = "", node_id: str = "node-a", name: str = "broker") -> None:
        self.directory = directory / name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.config_file = self.directory / "config.toml"
        self.config_file.write_text(CONFIG.format(node_id=node_id) + config, encoding="utf-8")
        self.data = self.directory / "data"
        self.environment: dict[str, str] = {}
        """Variables of the process, beside our own."""
        self.port = 0
        self.ws_port = 0
        self._process: LineProcess | None = None
        self._end_wanted = False

    def command(self) -> Sequence[str]:
        """Return the command line that starts the broker."""
        files = ["--config", str(self.config_file), "--data", str(self.data)]
        return [sys.executable, "-m", "mqtt_trio", "serve", *files, "--port", "0", "--ws-port", "0"]

    def launch(self) -> None:
        """Start the process without waiting for anything."""
        assert self._process is None, f"{self.name} runs already"
        environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("MQTT_TRIO__")}
        environment |= {"PYTHONUNBUFFERED": "1", **self.environment}
        self._process = LineProcess(self.command(), env=environment, cwd=ROOT)

    def start(self, limit: float = START_LIMIT) -> BrokerProcess:
        """Start the process and wait for its listeners."""
        self.launch()
        self.wait_for_listeners(limit)
        return self

    def wait_for_listeners(self, limit: float = START_LIMIT) -> None:
        """Wait for the start-up summary and read the bound ports from it."""
        self.port = int(self.output.wait_for(TCP_LINE, limit=limit)[1])
        self.ws_port = int(self.output.wait_for(WEBSOCKET_LINE, limit=limit)[1])

    @property
    def output(self) -> LineProcess:
        """The process and its log."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process

    @property
    def was_started(self) -> bool:
        """Whether there ever was a process."""
        return self._process is not None

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process is not None and self._process.process.poll() is None

    @property
    def rss_mib(self) -> float:
        """Resident memory of the process in MiB."""
        status = Path(f"/proc/{self.output.process.pid}/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def stop(self, limit: float = STOP_LIMIT) -> None:
        """Send SIGTERM; the broker must end with 0 and without a traceback [F3]."""
        self._end_wanted = True
        code = self.output.terminate(limit)
        assert code == 0, f"{self.name} ended with {code} after SIGTERM:\n{self.output.text}"
        self.assert_clean_log()

    def wait_for_exit(self, limit: float = START_LIMIT) -> int:
        """Wait until the broker ends by itself; return its exit code."""
        self._end_wanted = True
        return self.output.wait(limit)

    def kill(self) -> None:
        """End the process with SIGKILL."""
        self._end_wanted = True
        if self._process is not None:
            self._process.kill()

    def counters(self) -> dict[str, int]:
        """Return the counters of the `stopped` line of a broker that has ended."""
        assert not self.running, f"{self.name} has not stopped"
        table = json.loads(self.output.wait_for(STOPPED_LINE, limit=1.0)[1])
        return {key: value for key, value in table.items() if isinstance(value, int)}

    def assert_ended_as_wanted(self) -> None:
        """A broker ends when it is told to, not before."""
        assert self._end_wanted, f"{self.name} ended by itself ({self.output.process.returncode}):\n{self.output.text}"
        self.assert_clean_log()

    def assert_clean_log(self) -> None:
        """No broker shows a traceback to its operator."""
        assert "Traceback (most recent call last)" not in self.output.text, self.output.text


@attrs.define
class Brokers:
    """Starts brokers for one test and ends all of them after it."""

    directory: Path
    started: list[BrokerProcess] = attrs.field(factory=list)

    def make(self, config: str = "", *, name: str | None = None, node_id: str | None = None) -> BrokerProcess:
        """Write the configuration of a broker and do not start it."""
        name = name if name is not None else f"broker-{len(self.started)}"
        made = BrokerProcess(self.directory, config=config, node_id=node_id or name, name=name)
        self.started.append(made)
        return made

    def start(self, config: str = "", *, name: str | None = None, node_id: str | None = None) -> BrokerProcess:
        """Start a broker and wait for its listeners."""
        return self.make(config, name=name, node_id=node_id).start()


@contextmanager
def brokers_in(directory: Path) -> Iterator[Brokers]:
    """Give a `Brokers`; afterwards stop what still runs (exit code 0 demanded) and print each log for a failed test."""
    made = Brokers(directory)
    try:
        yield made
        for broker in made.started:
            if broker.running:
                broker.stop()
            elif broker.was_started:
                broker.assert_ended_as_wanted()
    finally:
        for broker in made.started:
            broker.kill()
            if broker.was_started:
                print(f"--- log of {broker.name}\n{broker.output.text}")


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[Brokers]:
    """Brokers of one test."""
    with brokers_in(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """One broker with embedded defaults for all tests of a module; they keep apart by their topics."""
    with brokers_in(tmp_path_factory.mktemp("broker")) as made:
        yield made.start(name="broker")
