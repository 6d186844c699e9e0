"""The process around a command: standard streams that never hold Trio up, signals, exit codes."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import attrs
import trio

from mqtt_trio.commands.arguments import Connection
from mqtt_trio.commands.client import Session
from mqtt_trio.commands.failures import EXIT_USAGE, CommandError, UsageError
from mqtt_trio.errors import MqttTrioError

READ_SIZE: Final = 65_536


@attrs.define(kw_only=True)
class Terminal:
    """Standard input, output and error of a command, and the wish that it ends."""

    quiet: bool = False
    stopping: trio.Event = attrs.field(factory=trio.Event)
    """Set by SIGINT and SIGTERM."""

    def say(self, text: str) -> None:
        """Print a line on stderr, unless --quiet."""
        if not self.quiet:
            sys.stderr.write(f"{text}\n")  # one write, so that lines of several processes stay whole
            sys.stderr.flush()

    async def read(self) -> bytes:
        """Return what standard input has, at least one byte; nothing at its end. Cancellation abandons the read."""
        return await trio.to_thread.run_sync(os.read, sys.stdin.fileno(), READ_SIZE, abandon_on_cancel=True)

    async def write(self, data: bytes) -> None:
        """Write to standard output and flush; wait while its reader is slow.

        Raises:
          OSError: a BrokenPipeError, most likely.
        """
        await trio.to_thread.run_sync(_write_all, sys.stdout.fileno(), data, abandon_on_cancel=True)


def _write_all(descriptor: int, data: bytes) -> None:
    """Bypass sys.stdout: nothing is left in a buffer that would be flushed into a broken pipe at exit."""
    with memoryview(data) as view:
        start = 0
        while start < len(view):
            try:
                start += os.write(descriptor, view[start:])
            except BlockingIOError:  # somebody who shares the terminal made it non-blocking
                select.select([], [descriptor], [])


def run_command(name: str, command: Callable[[Terminal], Awaitable[int]], *, quiet: bool = False) -> int:
    """Run a command on Trio; return its exit code."""
    terminal = Terminal(quiet=quiet)
    try:
        return trio.run(_with_signals, command, terminal)
    except MqttTrioError as exc:
        return report(name, exc, quiet=quiet)
    except KeyboardInterrupt:  # before the signals were handled
        return 1


def run_client(
    name: str,
    parsed: argparse.Namespace,
    connection: Connection,
    command: Callable[[Session, Terminal], Awaitable[int]],
) -> int:
    """Run a command that talks to the server of `connection`, the shared flags of `parsed`; return its exit code."""

    async def with_session(terminal: Terminal) -> int:
        session = Session(
            opener=connection.endpoint.open,
            where=str(connection.endpoint),
            connect=connection.connect,
            disconnect=connection.disconnect,
            log=terminal.say if parsed.debug else None,
        )
        return await command(session, terminal)

    return run_command(name, with_session, quiet=parsed.quiet)


def report(name: str, exc: MqttTrioError, *, quiet: bool = False) -> int:
    """Print a failure on stderr; return its exit code. Usage is never quiet."""
    if isinstance(exc, UsageError):
        print(f"mqtt-trio {name}: {exc}\n\nUse 'mqtt-trio {name} --help' to see usage.", file=sys.stderr)
        return EXIT_USAGE
    if not quiet:
        print(exc, file=sys.stderr)
    return exc.exit_code if isinstance(exc, CommandError) else 1


async def _with_signals(command: Callable[[Terminal], Awaitable[int]], terminal: Terminal) -> int:
    failure: MqttTrioError | None = None
    code = 1
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:

        async def watch() -> None:
            async for _ in signals:
                terminal.stopping.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                code = await command(terminal)
            except MqttTrioError as exc:  # a value, so that no exception group needs unwrapping
                failure = exc
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return code
