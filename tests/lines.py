"""Foreign programs as tests see them: lines that they print, waited for without polling."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

LIMIT: Final = 15.0
"""Seconds that a step which takes milliseconds may take on a busy machine."""
SYSTEM_FOLDERS: Final = ("/usr/sbin", "/usr/local/sbin", "/snap/bin")
"""Where Debian puts what an ordinary user's PATH does not show."""
TICK: Final = 0.02


def require_tool(*names: str) -> str:
    """Return the path of the first program of `names` that exists; fail the test where there is none."""
    for name in names:
        path = shutil.which(name) or next(
            (p for p in (f"{d}/{name}" for d in SYSTEM_FOLDERS) if Path(p).exists()), None
        )
        if path is not None:
            return path
    pytest.fail(f"{names[0]} is not installed; `scripts/test` installs it")


def wait_until(condition: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
    """Return as soon as `condition()` holds. For state that nobody announces; otherwise wait for an event.

    Raises:
      AssertionError: it does not hold after `limit` seconds.
    """
    end = time.monotonic() + limit
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"not within {limit} s: {what}"
        pause.wait(TICK)


class LineProcess:
    """A running program and the lines that it has printed so far (stdout and stderr together)."""

    def __init__(self, command: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        self.command = list(command)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._at_end = False
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=cwd
        )
        self._reader = threading.Thread(target=self._read, name=f"lines of {self.process.pid}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        if value is not None:
            print(f"--- output of {' '.join(self.command)}\n{self.text}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for raw in stdout:
                with self._changed:
                    self.lines.append(raw.decode("utf-8", "backslashreplace").rstrip("\r\n"))
                    self._changed.notify_all()
        with self._changed:
            self._at_end = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        """Everything printed so far."""
        with self._changed:
            return "\n".join(self.lines)

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """Return the match of each line so far in which `pattern` is found."""
        with self._changed:
            lines = list(self.lines)
        return [found for line in lines if (found := re.search(pattern, line)) is not None]

    def wait_for(self, pattern: str, *, count: int = 1, limit: float = LIMIT) -> re.Match[str]:
        """Return the match of the `count`-th line in which `pattern` is found, waiting for it up to `limit` seconds."""
        compiled = re.compile(pattern)
        seen = 0
        position = 0
        end = time.monotonic() + limit
        with self._changed:
            while True:
                while position < len(self.lines):
                    found = compiled.search(self.lines[position])
                    position += 1
                    if found is not None:
                        seen += 1
                        if seen == count:
                            return found
                left = end - time.monotonic()
                if self._at_end or left <= 0:
                    why = f"ended (exit code {self.process.poll()})" if self._at_end else f"{limit} s passed"
                    output = "\n".join(self.lines)
                    pytest.fail(f"{why} before line {count} of {pattern!r}; {self.command[0]} printed:\n{output}")
                self._changed.wait(left)

    def wait(self, limit: float = LIMIT) -> int:
        """Wait for the end of the program and of its output; return the exit code (minus the signal that killed it)."""
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"{self.command} did not end within {limit} s:\n{self.text}")
        self._reader.join(limit)
        return code

    def terminate(self, limit: float = LIMIT) -> int:
        """Send SIGTERM, wait, return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(limit)

    def kill(self) -> None:
        """End the program with SIGKILL, if it still runs. Idempotent."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(LIMIT)
