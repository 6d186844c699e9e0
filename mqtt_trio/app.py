"""Wiring: options in, a running node out; signals, shutdown, exit codes."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import trio

from mqtt_trio.archive.groups import ArchiveGroup, build_groups
from mqtt_trio.archive.memory import MemoryArchiveStore
from mqtt_trio.archive.options import ArchiveGroupOptions
from mqtt_trio.archive.sqlite import SqliteArchiveStore
from mqtt_trio.archive.store import ArchiveStore
from mqtt_trio.broker.broker import Broker
from mqtt_trio.config import LoadedConfig
from mqtt_trio.errors import ConfigError, MqttTrioError, StartError
from mqtt_trio.gateway import Gateway
from mqtt_trio.host import Host
from mqtt_trio.server.clients import Clients
from mqtt_trio.server.listeners import Listener, open_listener
from mqtt_trio.server.timers import DeadlineTimer

logger = logging.getLogger("mqtt_trio")

GATEWAYS: Final[Mapping[str, str]] = {"Kafka": "gateways.kafka"}
"""Section of the configuration -> package with `build`."""
SWITCH_INTERVAL: Final = 0.0005
"""Seconds: beside a busy gateway thread a round trip takes 4 ms at Python's default, 0.08 ms at this."""
GC_THRESHOLDS: Final = (100_000, 50, 50)
FAREWELL_SHARE: Final = 0.3
"""Of [Shutdown] Timeout, for clients that read their DISCONNECT slowly."""


class Node:
    """One running node: broker, clients, archive groups, gateways."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self.loaded = loaded
        self.options = loaded.options
        self.broker = Broker(
            self.options.limits,
            random_id=lambda: f"auto-{secrets.token_hex(8)}",
            wall_offset=time.time() - trio.current_time(),
        )
        self.host = Host(self.broker, node_id=self.options.node.id, instance_id=secrets.token_bytes(16))
        self.clients = Clients(self.broker, _make_poller(self.broker))
        self.gateways: dict[str, Gateway] = {}
        self.groups: list[ArchiveGroup] = []
        self.listeners: list[Listener] = []
        self.started = trio.Event()
        self.stopping = trio.Event()
        """Set it to end the node."""

    async def run(self) -> None:
        """Serve until `stopping` is set, then shut down within [Shutdown] Timeout [K18].

        Raises:
          StartError: a listener, a store or a gateway cannot start.
        """
        async with trio.open_nursery() as services:
            if self.clients.poller is not None:
                services.start_soon(self.clients.poller.run)
            services.start_soon(DeadlineTimer(self.broker).run)
            self._build()
            for gateway in self.gateways.values():
                await services.start(_run_gateway, gateway, self.host)
            for group in self.groups:
                await services.start(group.run)
                self.broker.add_tap(group)
            async with trio.open_nursery() as accepting:
                for number, options in enumerate(self.options.listeners):
                    listener = await open_listener(options, number, self.broker.metrics)
                    self.listeners.append(listener)
                for listener in self.listeners:
                    accepting.start_soon(listener.serve, self.clients.serve)
                self.started.set()
                await self.stopping.wait()
                await self._shut_down(accepting.cancel_scope)
            services.cancel_scope.cancel()

    def _build(self) -> None:
        """Make gateways and archive groups; the order of taps is groups first, then what gateways add."""
        groups = [group for group in self.options.archive_groups if group.enabled and group.store != "NONE"]
        needs_kafka = any(group.store == "KAFKA" for group in groups)
        for section, package in GATEWAYS.items():
            options = self.loaded.gateways.get(section)
            if options is not None or needs_kafka:
                self.gateways[section] = importlib.import_module(package).build(options)
        if self.gateways:
            sys.setswitchinterval(SWITCH_INTERVAL)
        self.groups = build_groups(groups, self._make_store, self.host)

    def _make_store(self, group: ArchiveGroupOptions) -> ArchiveStore:
        if group.store == "KAFKA":
            return self.gateways["Kafka"].archive_store(group.kafka_topic, group.name)
        if group.store == "MEMORY":
            return MemoryArchiveStore(group)
        return SqliteArchiveStore(group, Path(self.options.persistence.path))

    async def _shut_down(self, accepting: trio.CancelScope) -> None:
        """Stop intake, say goodbye, drain archives, close gateways; whatever they do, within the timeout."""
        timeout = self.options.shutdown.timeout
        with trio.move_on_after(timeout) as scope:
            for listener in self.listeners:
                listener.close()
            with trio.move_on_after(timeout * FAREWELL_SHARE):
                await self.clients.shut_down()
            for group in self.groups:
                await group.stop()
            for gateway in self.gateways.values():
                await gateway.stop()
        if scope.cancelled_caught:
            logger.warning("shutdown took longer than [Shutdown] Timeout = %g s; what was left is given up", timeout)
        accepting.cancel()

    def counters(self) -> dict[str, int]:
        """All counters of the node that are not zero."""
        counters = self.broker.metrics.snapshot()
        for group in self.groups:
            counters.update({f"archive.{group.options.name}.{name}": n for name, n in group.counters().items()})
        for section, gateway in self.gateways.items():
            counters.update({f"{section.lower()}.{name}": n for name, n in gateway.counters().items()})
        return {name: value for name, value in counters.items() if value}


async def _run_gateway(gateway: Gateway, host: Host, *, task_status: trio.TaskStatus[None]) -> None:
    await gateway.run(host, task_status=task_status)


def _make_poller(broker: Broker) -> object | None:
    """The epoll Poller, where there is epoll; elsewhere every client is driven by tasks."""
    if not sys.platform.startswith("linux"):
        return None
    from mqtt_trio.server.poller import Poller

    return Poller(broker)


def serve(loaded: LoadedConfig, summary: Callable[[Node], Sequence[str]]) -> int:
    """Run a node until SIGTERM or SIGINT; return the exit code. `summary` makes the lines that say what runs [F2]."""
    _raise_file_limit()
    try:
        trio.run(_main, loaded, summary, strict_exception_groups=True)
    except* StartError as group:
        for exc in _leaves(group):
            print(f"mqtt-trio: {exc}", file=sys.stderr)
        return 1
    except* ConfigError as group:
        for exc in _leaves(group):
            print(f"mqtt-trio: {exc}", file=sys.stderr)
        return 78
    except* MqttTrioError as group:
        for exc in _leaves(group):
            print(f"mqtt-trio: {exc}", file=sys.stderr)
        return 1
    return 0


async def _main(loaded: LoadedConfig, summary: Callable[[Node], Sequence[str]]) -> None:
    node = Node(loaded)
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            nursery.start_soon(_stop_on_signal, signals, node)
            nursery.start_soon(_announce, node, summary)
            await node.run()
            nursery.cancel_scope.cancel()
    logger.info("stopped %s", json.dumps(node.counters()))


async def _announce(node: Node, summary: Callable[[Node], Sequence[str]]) -> None:
    """Say what runs, once it does, and settle the garbage collector on what has been made by then."""
    await node.started.wait()
    for line in summary(node):
        print(line, flush=True)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def _stop_on_signal(signals: object, node: Node) -> None:
    async for number in signals:  # type: ignore[attr-defined]
        if node.stopping.is_set():
            logger.warning("%s again: stopping at once", signal.Signals(number).name)
            os._exit(1)
        logger.info("%s: stopping", signal.Signals(number).name)
        node.stopping.set()


def _leaves(group: BaseExceptionGroup[MqttTrioError]) -> list[BaseException]:
    found: list[BaseException] = []
    for exc in group.exceptions:
        found.extend(_leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc])
    return found


def _raise_file_limit() -> None:
    """Let the process have as many connections as the machine allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            logger.warning("the limit on open files stays at %d", soft)
