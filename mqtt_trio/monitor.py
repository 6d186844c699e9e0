"""What operators see over HTTP [O3]: whether the process lives, whether it is ready, and its figures."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import os
import resource
import time
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Final

import trio

from mqtt_trio import __version__
from mqtt_trio.archive.groups import MEANINGS as GROUP_MEANINGS
from mqtt_trio.broker.metrics import Metrics
from mqtt_trio.gateway import Figure
from mqtt_trio.server.exposition import CONTENT_TYPE, PREFIX, Exposition
from mqtt_trio.server.http import JSON, HttpServer, Request, Response, open_http
from mqtt_trio.server.listeners import Endpoint, Listener

if TYPE_CHECKING:
    from mqtt_trio.app import Node

logger = logging.getLogger("mqtt_trio")

TICK: Final = 1.0
"""Seconds between two looks at how late the loop is."""
WINDOW: Final = 60
"""Looks that the worst one is taken from."""
LATENCY_LIMIT: Final = 5.0
"""Seconds that a task may wait for its turn; a loop that is later is not healthy."""
PAGE_SIZE: Final = resource.getpagesize()


class LoopWatch:
    """How long tasks wait for their turn: what a callback that does not return costs everybody."""

    def __init__(self) -> None:
        self.latest = 0.0
        """Seconds by which the last look came late."""
        self._seen: deque[float] = deque(maxlen=WINDOW)

    @property
    def worst(self) -> float:
        """Seconds, of the last minute."""
        return max(self._seen, default=0.0)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            due = trio.current_time() + TICK
            await trio.sleep_until(due)
            self.latest = trio.current_time() - due
            self._seen.append(self.latest)


class Monitor:
    """The pages of one node. It serves before anything else is opened and until everything else is closed."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.watch = LoopWatch()
        self.listener: Listener[Endpoint] | None = None
        self.http = HttpServer(
            node.options.http,
            {"/": self.index, "/healthz": self.healthz, "/readyz": self.readyz, "/metrics": self.metrics},
        )
        self._began_at = time.time()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started()` when the port is open.

        Raises:
          StartError: it cannot be opened.
        """
        self.listener = await open_http(self.node.options.http)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.watch.run)
                nursery.start_soon(self.listener.serve, self.http.serve, nursery, self.node.broker.metrics)
                task_status.started()
        finally:
            self.listener.close()

    def describe(self) -> str:
        """One line for the start-up summary."""
        where = self.listener.describe() if self.listener is not None else ""
        return f"{where}; {'with' if self.node.options.http.token else 'without'} a token: /healthz /readyz /metrics"

    # Pages

    def index(self, _request: Request) -> Response:
        """Say what there is."""
        text = "/healthz  200 while the process lives\n/readyz   200 while clients should come here, else 503 and why\n"
        return Response(200, f"mqtt_trio {__version__}\n\n{text}/metrics  figures in Prometheus' text format\n")

    def healthz(self, _request: Request) -> Response:
        """Say whether the process works: 503 asks for its end and a new one."""
        late = self.watch.latest > LATENCY_LIMIT
        table = {
            "status": "the loop is late" if late else "ok",
            "loop_latency_seconds": round(self.watch.latest, 6),
            "uptime_seconds": round(time.time() - self._began_at, 3),
            "version": __version__,
        }
        return Response(503 if late else 200, json.dumps(table) + "\n", JSON)

    def readyz(self, _request: Request) -> Response:
        """Say whether clients should be sent here: 503 with all reasons while they should not."""
        reasons = list(self.reasons())
        table = {"status": "not ready" if reasons else "ready", "reasons": reasons}
        return Response(503 if reasons else 200, json.dumps(table) + "\n", JSON)

    def metrics(self, _request: Request) -> Response:
        """Return all figures."""
        return Response(200, self._gather().render(), CONTENT_TYPE)

    # What they say

    def figures(self) -> Iterator[Figure]:
        """Yield the figures of /metrics under their whole names; the port need not be open."""
        for name, kind, meaning, labels, value in self._gather().samples():
            yield Figure(name, meaning, value, labels, kind)

    def _gather(self) -> Exposition:
        page = Exposition()
        self._add_node(page)
        page.add_counters("", self.node.broker.metrics.snapshot(), meanings_of_metrics())
        self._add_parts(page)
        _add_process(page, self._began_at)
        return page

    def reasons(self) -> Iterator[str]:
        """Yield why clients should not be sent here; nothing: the node is ready [K1]."""
        node = self.node
        if node.stopping.is_set():
            yield "the node shuts down"
        elif not node.started.is_set():
            yield "the node starts"
        for listener in node.listeners:
            if listener.trouble is not None:
                yield listener.trouble
        if node.broker.keeper.outage_since is not None:
            yield f"the session store takes nothing: {node.broker.journal.failing}"
        told = {section.upper() for section in node.gateways}  # once for all groups that store there
        for group in node.groups:
            if group.options.store not in told and (trouble := group.store.trouble()) is not None:
                yield f"archive group {group.options.name}: {trouble}"
        for gateway in node.gateways.values():
            yield from gateway.unready()

    def _add_node(self, page: Exposition) -> None:
        node, broker = self.node, self.node.broker
        labels = {"version": __version__, "node": node.options.node.id}
        ready = not any(self.reasons())
        outage = broker.keeper.outage_since
        failing = 0.0 if outage is None else trio.current_time() - outage
        page.add(f"{PREFIX}info", "gauge", "Always 1; its labels say what runs.", 1, **labels)
        page.add(f"{PREFIX}ready", "gauge", "1 while /readyz says 200, else 0.", int(ready))
        text = "Longest time of the last minute that a task waited for its turn."
        page.add(f"{PREFIX}loop_latency_seconds", "gauge", text, self.watch.worst)
        text = "How long the session store has taken nothing; 0: it takes everything."
        page.add(f"{PREFIX}store_outage_seconds", "gauge", text, failing)
        text = "Changes that wait to be committed to the session store."
        page.add(f"{PREFIX}journal_bytes", "gauge", text, broker.journal.size)
        page.add(f"{PREFIX}retained_bytes", "gauge", "Retained messages.", broker.retained.size)

    def _add_parts(self, page: Exposition) -> None:
        node = self.node
        for listener in node.listeners:
            name, labels = f"{PREFIX}listener_connections", {"listener": listener.name}
            page.add(name, "gauge", "Network Connections of a listener.", listener.connections, **labels)
            page.add(f"{name}_limit", "gauge", "Its MaxConnections.", listener.options.max_connections, **labels)
        for group in node.groups:
            labels = {"group": group.options.name, "store": group.options.store}
            page.add_counters("archive_", group.counters(), GROUP_MEANINGS, **labels)
            if (spool := group.shipper.spool) is not None:
                text = "What the spool of an archive group may take on disk."
                page.add(f"{PREFIX}archive_spool_limit_bytes", "gauge", text, spool.max_bytes, **labels)
        for section, gateway in node.gateways.items():
            page.add_counters(f"{section.lower()}_", gateway.counters(), gateway.meanings())
            for figure in gateway.figures():
                name = f"{PREFIX}{section.lower()}_{figure.name}"
                page.add(name, figure.kind, figure.meaning, figure.value, **figure.labels)
        text = "Times that the HTTP interface failed by an error of the broker."
        page.add(f"{PREFIX}http_failures_total", "counter", text, self.http.failures)
        for status, count in sorted(self.http.answers.items()):
            text = "Answers of the HTTP interface, by status."
            page.add(f"{PREFIX}http_answers_total", "counter", text, count, status=str(status))


def _add_process(page: Exposition, began_at: float) -> None:
    """Add what Prometheus' own libraries say about every process, under their names."""
    user, system, *_ = os.times()
    page.add("process_start_time_seconds", "gauge", "Start of the process, seconds since the epoch.", began_at)
    page.add("process_cpu_seconds_total", "counter", "User and system CPU time spent.", user + system)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    page.add("process_max_fds", "gauge", "File descriptors that may be open.", limit)
    try:
        virtual, resident = (int(pages) * PAGE_SIZE for pages in _read("/proc/self/statm").split()[:2])
        open_files = os.stat("/proc/self/fd").st_size  # counting the entries would take long with many connections
    except OSError:
        return  # no Linux
    page.add("process_virtual_memory_bytes", "gauge", "Virtual memory.", virtual)
    page.add("process_resident_memory_bytes", "gauge", "Resident memory.", resident)
    if open_files:  # 0: a kernel before 6.2
        page.add("process_open_fds", "gauge", "File descriptors that are open.", open_files)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


@cache
def meanings_of_metrics() -> Mapping[str, str]:
    """Return what each counter of `Metrics` counts: the text that stands behind it, or behind its neighbours, in the
    source, so that it is said in one place. Without the source nothing is known."""
    try:
        tree = ast.parse(inspect.getsource(Metrics))
    except (OSError, SyntaxError):
        return {}
    found: dict[str, str] = {}
    waiting: list[str] = []
    (definition,) = tree.body
    for statement in definition.body if isinstance(definition, ast.ClassDef) else ():
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)):
                waiting.append(name)
            case ast.Expr(value=ast.Constant(value=str(text))):
                found.update(dict.fromkeys(waiting, text))
                waiting.clear()
    return found
