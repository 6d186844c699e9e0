"""Wiring: options in, a running node out; signals, shutdown, exit codes."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import math
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Final, cast

import trio

from mqtt_trio import __version__
from mqtt_trio.archive.groups import ArchiveGroup, build_groups
from mqtt_trio.archive.memory import MemoryStore
from mqtt_trio.archive.options import ArchiveGroupOptions, merge_groups
from mqtt_trio.archive.spool import SPOOLS_OF_GROUPS, Spool, spool_path, warn_of_strays
from mqtt_trio.archive.sqlite import SqliteArchive, archive_path
from mqtt_trio.archive.store import ArchiveStore
from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.sys_topics import SysTopics
from mqtt_trio.config import LoadedConfig, archive_topic
from mqtt_trio.errors import ConfigError, MqttTrioError, StartError
from mqtt_trio.event_log import log_event
from mqtt_trio.gateway import Gateway
from mqtt_trio.host import Host
from mqtt_trio.logs import configure as configure_logging
from mqtt_trio.monitor import Monitor
from mqtt_trio.server.clients import Clients
from mqtt_trio.server.listeners import Listener, ListenerOptions, open_listeners
from mqtt_trio.server.sqlite_store import FILE_NAME, SqliteStore, Synchronous
from mqtt_trio.server.storage import Storage
from mqtt_trio.server.timers import DeadlineTimer, SysTopicsTimer
from mqtt_trio.summary import ArchiveSummary, Running, summary
from mqtt_trio.unfinished import refuse_unfinished

if TYPE_CHECKING:
    from mqtt_trio.server.poller import Poller

logger = logging.getLogger("mqtt_trio")

GATEWAYS: Final[Mapping[str, str]] = {"Kafka": "gateways.kafka"}
"""Section of the configuration -> package with `build`."""
SWITCH_INTERVAL: Final = 0.0005
"""Seconds: beside a busy thread of a gateway or of the store a round trip takes 4 ms at Python's default, 0.08 ms at
this."""
GC_THRESHOLDS: Final = (100_000, 50, 50)
FAREWELL_SHARE: Final = 0.3
"""Of [Shutdown] Timeout, for clients that read their DISCONNECT slowly, and for what is on its way in."""

SECOND_SIGNAL: Final = 1.0
"""Seconds: a terminal, a wrapper script and a supervisor may all send the one signal that somebody meant."""


class Node:
    """One running node: broker, clients, archive groups, gateways."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self.loaded = loaded
        self.options = loaded.options
        persistence = self.options.persistence
        self.broker = Broker(
            self.options.limits,
            random_id=lambda: f"auto-{secrets.token_hex(8)}",
            wall_offset=time.time() - trio.current_time(),
            events=log_event,
            journal=Journal(limit=persistence.journal_bytes) if persistence.store == "SQLITE" else None,
        )
        self.storage: Storage | None = None
        if persistence.store == "SQLITE":
            store = SqliteStore(persistence.path / FILE_NAME, synchronous=cast(Synchronous, persistence.synchronous))
            self.storage = Storage(self.broker, store)
        self.host = Host(
            self.broker,
            node_id=self.options.node.id,
            instance_id=secrets.token_bytes(16),
            data=persistence.path,
            synchronous=persistence.synchronous,
        )
        self.clients = Clients(self.broker, _make_poller(self.broker, beside_threads=bool(loaded.gateways)))
        self.gateways: dict[str, Gateway] = {}
        self.groups: list[ArchiveGroup] = []
        view = Monitor(self)
        self.monitor = view if self.options.http.port is not None else None
        self.host.look = view.figures
        self._loop_watch = view.watch
        self.listeners: list[Listener[ListenerOptions]] = []
        self.started = trio.Event()
        self.stopping = trio.Event()
        """Set it to end the node."""

    async def run(self) -> None:
        """Serve until `stopping` is set, then shut down within [Shutdown] Timeout [K18].

        Raises:
          StartError: a listener, a store or a gateway cannot start.
        """
        async with trio.open_nursery() as services:
            if self.monitor is not None:
                await services.start(self.monitor.run)  # first, so that it can say that the node starts
            elif self.loaded.gateways:
                services.start_soon(self._loop_watch.run)  # gateways may show figures, too
            if self.clients.poller is not None:
                services.start_soon(self.clients.poller.run)
            if self.options.node.sys_interval:
                sys_topics = SysTopics(
                    self.broker, version=f"mqtt_trio version {__version__}", started_at=trio.current_time()
                )
                services.start_soon(SysTopicsTimer(sys_topics, self.options.node.sys_interval).run)
            self._build()
            if self.storage is not None:
                await self.storage.load()
            await self._refuse_unfinished()
            if self.storage is not None:
                services.start_soon(self.storage.run)
            for gateway in self.gateways.values():
                await services.start(_run_gateway, gateway, self.host)
            for group in self.groups:
                await services.start(group.run)
                self.broker.add_tap(group)
            self.host.complete.set()
            await services.start(DeadlineTimer(self.broker).run)  # every tap sees the Wills that are due at the start
            async with trio.open_nursery() as accepting:
                self.listeners = await open_listeners(self.options.listeners)
                for listener in self.listeners:
                    accepting.start_soon(listener.serve, self.clients.serve, accepting, self.broker.metrics)
                self.started.set()
                await self.stopping.wait()
                await self._shut_down(accepting.cancel_scope)
            services.cancel_scope.cancel()

    async def _refuse_unfinished(self) -> None:
        """Raises StartError: a store is what an unfinished rebuild left."""
        await trio.to_thread.run_sync(refuse_unfinished, self.loaded, self.broker.journal.marks)

    def _build(self) -> None:
        """Make gateways and archive groups."""
        self.gateways = build_gateways(self.loaded)
        if self.gateways or self.storage is not None:
            sys.setswitchinterval(SWITCH_INTERVAL)
        self.groups = build_groups(
            self.options.archive_groups,
            self._make_store,
            self.host,
            make_spool=self._make_spool,
            default_kafka_topic=archive_topic(self.loaded.gateways),
        )
        used = [group.shipper.spool for group in self.groups]
        warn_of_strays(self.options.persistence.path, [spool.directory for spool in used if spool is not None])

    def _make_spool(self, group: ArchiveGroupOptions) -> Spool:
        persistence = self.options.persistence
        name = f"{SPOOLS_OF_GROUPS}{group.target(archive_topic(self.loaded.gateways))}"
        path = spool_path(persistence.path, name)
        return Spool(path, max_bytes=group.spool_bytes, synchronous=persistence.synchronous)

    def _make_store(self, group: ArchiveGroupOptions) -> ArchiveStore:
        if group.store == "KAFKA":
            return _kafka_store(self.gateways, group)
        if group.store == "MEMORY":
            return MemoryStore(retention=group.retention, max_size=group.max_size)
        path = archive_path(self.options.persistence.path, group.name)
        # What PUBACK promises is to survive what sessions survive; else a history is worth no wait for the disk.
        synchronous = self.options.persistence.synchronous if group.ack == "store" else "NORMAL"
        return SqliteArchive(path, retention=group.retention, max_size=group.max_size, synchronous=synchronous)

    async def _shut_down(self, accepting: trio.CancelScope) -> None:
        """Stop intake, say goodbye, drain archives, close gateways; whatever they do, within the timeout."""
        timeout = self.options.shutdown.timeout
        with trio.move_on_after(timeout) as scope:
            for listener in self.listeners:
                listener.close()
            with trio.move_on_after(timeout * FAREWELL_SHARE):
                async with trio.open_nursery() as leaving:
                    leaving.start_soon(self.clients.shut_down, self.options.shutdown.server_reference)
                    for gateway in self.gateways.values():
                        leaving.start_soon(gateway.stop_intake)
            async with trio.open_nursery() as stopping:
                for group in self.groups:
                    stopping.start_soon(group.stop)
            for gateway in self.gateways.values():
                await gateway.stop()
            if self.storage is not None:
                await self.storage.stop()
        if scope.cancelled_caught:
            logger.warning("shutdown took longer than [Shutdown] Timeout = %g s; what was left is given up", timeout)
        accepting.cancel()

    def running(self) -> Running:
        """What was started, for the summary."""
        return Running(
            listeners=[listener.describe() for listener in self.listeners],
            store=self.storage.describe() if self.storage is not None else "",
            archives=[ArchiveSummary(group=group.options, store=group.describe_store()) for group in self.groups],
            gateways={section: gateway.describe() for section, gateway in self.gateways.items()},
            http=self.monitor.describe() if self.monitor is not None else "",
        )

    def counters(self) -> dict[str, int]:
        """All counters of the node that are not zero."""
        counters = self.broker.metrics.snapshot()
        for group in self.groups:
            counters.update({f"archive.{group.options.name}.{name}": n for name, n in group.counters().items()})
        for section, gateway in self.gateways.items():
            counters.update({f"{section.lower()}.{name}": n for name, n in gateway.counters().items()})
        return {name: value for name, value in counters.items() if value}


def build_gateways(loaded: LoadedConfig) -> dict[str, Gateway]:
    """Make the gateways that the configuration names; nothing is contacted.

    Raises:
      ConfigError: options that the gateway's client library does not know, or the library is missing.
    """
    built: dict[str, Gateway] = {}
    problems: list[str] = []
    for section, options in loaded.gateways.items():
        try:
            built[section] = importlib.import_module(GATEWAYS[section]).build(options)
        except ConfigError as exc:
            problems.extend(exc.problems)
    if problems:
        raise ConfigError(problems)
    return built


def _kafka_store(gateways: Mapping[str, Gateway], group: ArchiveGroupOptions) -> ArchiveStore:
    return gateways["Kafka"].archive_store(
        group.kafka_topic,
        group.name,
        form=group.format,
        timestamps=group.timestamp_format,
        spooled=group.outage_policy == "spool",
    )


def check_gateways(loaded: LoadedConfig) -> None:
    """Make the gateways and what archive groups have of them, and forget it all: nothing is contacted.

    Raises:
      ConfigError: see `build_gateways`; or its gateway cannot have a group, such as one with the topic of another use.
    """
    gateways = build_gateways(loaded)
    problems: list[str] = []
    for group in merge_groups(loaded.options.archive_groups, default_kafka_topic=archive_topic(loaded.gateways)):
        if group.store == "KAFKA":
            try:
                _kafka_store(gateways, group)
            except ConfigError as exc:
                problems.extend(exc.problems)
    if problems:
        raise ConfigError(problems)


async def _run_gateway(gateway: Gateway, host: Host, *, task_status: trio.TaskStatus[None]) -> None:
    await gateway.run(host, task_status=task_status)


def _make_poller(broker: Broker, *, beside_threads: bool) -> Poller | None:
    """The epoll Poller, where there is epoll; elsewhere every client is driven by tasks."""
    if not sys.platform.startswith("linux"):
        return None
    from mqtt_trio.server.poller import Poller

    return Poller(broker, beside_threads=beside_threads)


def serve(loaded: LoadedConfig) -> int:
    """Run a node until SIGTERM or SIGINT; return the exit code.

    Raises:
      ConfigError: what only shows when gateways and archive groups are made.
      StartError: the node cannot start, or cannot go on.
    """
    configure_logging(loaded.options.logging)
    _raise_file_limit()
    try:
        trio.run(_main, loaded, strict_exception_groups=True)
    except BaseExceptionGroup as group:
        expected, rest = group.split(MqttTrioError)
        if expected is None or rest is not None:
            raise
        texts = list(dict.fromkeys(map(str, _leaves(expected))))
        if expected.subgroup(ConfigError) is not None:
            raise ConfigError(texts) from None
        raise StartError("; ".join(texts)) from None
    return 0


async def _main(loaded: LoadedConfig) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        node = Node(loaded)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, signals, node, nursery.cancel_scope)
            nursery.start_soon(_announce, node)
            await node.run()
            nursery.cancel_scope.cancel()
    logger.info("stopped %s", json.dumps(node.counters()))


async def _announce(node: Node) -> None:
    """Say what runs [F2], once it does, and settle the garbage collector on what has been made by then."""
    await node.started.wait()
    for line in summary(node.loaded, node.running()):
        print(line, flush=True)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def _stop_on_signal(signals: AsyncIterator[int], node: Node, start: trio.CancelScope) -> None:
    """The first signal stops in order; a later one, SECOND_SIGNAL or more behind it, at once. Until the start is done
    there is nothing to put in order."""
    impatient_at = math.inf
    async for number in signals:
        if trio.current_time() >= impatient_at:
            logger.warning("%s again: stopping at once", signal.Signals(number).name)
            os._exit(1)
        if node.stopping.is_set():
            continue
        impatient_at = trio.current_time() + SECOND_SIGNAL
        logger.info("%s: stopping", signal.Signals(number).name)
        node.stopping.set()
        if not node.started.is_set():
            start.cancel()


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
