"""The broker process that the ledger kills: started, killed, told to stop, always on the same port and directory."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PORTS: Final = range(18_000, 30_000)
"""Below the ports that systems give to outgoing connections: nobody takes the broker's port while it is down, and no
client that asks for it there connects to itself."""
STOP_LIMIT: Final = 30.0
STOPPED: Final = re.compile(r"^.*\bmqtt_trio: stopped (\{.*\})$", re.MULTILINE)
WORRIES: Final = re.compile(r"^.*\b(?:Traceback \(most|ERROR|CRITICAL)\b.*$", re.MULTILINE)


class Server:
    """One broker over all its processes."""

    def __init__(self, directory: Path, command: Sequence[str], arguments: Sequence[str]) -> None:
        self.directory = directory
        self.log = directory / "broker.log"
        self.port = free_port()
        options = ["--data", str(directory / "data"), "--port", str(self.port), "--ws-port", "0"]
        self.command = [*command, "serve", *options, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a process; it serves a little later.

        Raises:
          OSError: there is no such program.
        """
        assert self._process is None
        environment = {key: value for key, value in os.environ.items() if not key.upper().startswith("MQTT_TRIO__")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def ended_by_itself(self) -> bool:
        """Whether the process ended and nobody wanted it."""
        return self._process is not None and self._process.poll() is not None

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def wait_for_end(self) -> int:
        """Return the exit code once the process has ended; kill it when it does not."""
        assert self._process is not None
        try:
            return self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._process = None

    def last_words(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-1500:]

    def counters(self) -> dict[str, int]:
        """Return the counters of the last process that ended in order."""
        lines = STOPPED.findall(self.log.read_text(errors="replace"))
        found: dict[str, int] = json.loads(lines[-1]) if lines else {}
        return found

    def worries(self) -> list[str]:
        """Return what no sound broker logs."""
        return WORRIES.findall(self.log.read_text(errors="replace"))


def free_port() -> int:
    """Return a port that nobody uses."""
    rng = random.Random()
    while True:
        port = rng.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
