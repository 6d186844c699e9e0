"""One of our nodes as the ledger sees it: a process that is killed and started again, and the sockets to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tests.ledger.campaign import CannotMeasure
from tests.ledger.server import Server
from tests.ledger.sockets import SocketWorld

START_LIMIT: Final = 60.0


class Neighbour(SocketWorld):
    """The sockets to a further node, in the time and on the selector of the first one's."""

    def __init__(self, port: int, first: SocketWorld) -> None:
        self._first = first
        super().__init__(port)
        self.selector.close()
        self.selector, self.events = first.selector, first.events

    @property
    def now(self) -> float:
        return self._first.now

    @now.setter
    def now(self, _value: float) -> None:
        """The first one looks at the clock."""

    def close(self) -> None:
        for connection in list(self.connections):
            connection.release()


class Node:
    """A node over all its processes."""

    def __init__(self, directory: Path, command: Sequence[str], arguments: Sequence[str], first: Node | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.name = directory.name
        self.server = Server(directory, command, arguments)
        port = self.server.port
        self.world: SocketWorld = SocketWorld(port) if first is None else Neighbour(port, first.world)
        self._run = (first or self).world.run
        self.longest_recovery = 0.0
        """Seconds from the start of a process to its first CONNACK."""
        self._started_at: float | None = None

    @property
    def life(self) -> int:
        """Number of the present process."""
        return self.world.generation

    def start(self, *, timed: bool = True) -> None:
        """Start a process; `wait` says when it serves. `timed`: `wait` follows at once.

        Raises:
          CannotMeasure: there is no such program.
        """
        self.world.generation += 1
        self.world.is_ending = self.world.is_served = False
        self._started_at = self.world.now if timed else None
        try:
            self.server.start()
        except OSError as exc:
            raise CannotMeasure(f"{self.server.command[0]} cannot be run: {exc.strerror}") from exc

    def wait(self) -> None:
        """Let time pass until a client was answered.

        Raises:
          CannotMeasure: the process ended, or serves nobody.
        """
        if not self._run(self._serves, START_LIMIT):
            raise CannotMeasure(f"node {self.name} does not serve; its last words:\n{self.server.last_words()}")
        if self._started_at is not None:
            self.longest_recovery = max(self.longest_recovery, self.world.now - self._started_at)
            self._started_at = None

    def _serves(self) -> bool:
        if self.server.ended_by_itself:
            raise CannotMeasure(f"node {self.name} ended by itself; its last words:\n{self.server.last_words()}")
        return self.world.is_served

    def kill(self, *, lose: bool) -> None:
        """End the process at once; `lose`: with what was on its way to clients."""
        self.world.is_ending = True
        self.server.kill()
        self.world.kills += 1
        if lose:
            self.world.lose_connections()

    def stop(self, run: Callable[[Callable[[], bool], float], bool], limit: float) -> int:
        """Send SIGTERM, let time pass until the process has ended; return its exit code, -9 when it did not end."""
        self.world.is_ending = True
        self.server.ask_to_stop()
        run(lambda: self.server.ended_by_itself, limit)
        if not self.server.ended_by_itself:
            self.server.kill()
            return -9
        return self.server.wait_for_end()
