"""The architecture, read from the source: imports point one way, the core is sans-I/O, modules stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for folder in ("mqtt_trio", "gateways") for p in (ROOT / folder).rglob("*.py"))
LONGEST_MODULE = 500
"""Lines."""

CORE = ("errors", "protocol", "broker")
MAY_IMPORT = {
    "errors": (),
    "protocol": ("errors",),
    "broker": ("errors", "protocol"),
    "archive": CORE,
    "server": (*CORE, "archive"),
    # What gateways see: the archive's interface is re-exported for them.
    "gateway": (*CORE, "archive.store", "archive.spool"),
    "config": (*CORE, "archive", "server", "gateway"),
    "app": (*CORE, "archive", "server", "gateway", "config"),
    "testing": (*CORE, "archive", "server", "gateway", "config", "app"),
    # Clients and tools: they share the protocol with the broker, not the broker.
    "commands": ("errors", "protocol"),
    "__main__": (*CORE, "archive", "server", "gateway", "config", "app", "commands"),
}
"""Layer of mqtt_trio -> the layers, or single modules, that it may import besides itself.

`server` may use the archive and `archive` may not use `server`; neither knows `gateway`, `config` or `app`. The top
package only re-exports public names; no layer imports through it.
"""

PART_OF = dict.fromkeys(("doctor", "event_log", "host", "logs", "monitor", "summary", "unfinished"), "app")
"""Modules of their own that belong to a layer with another name."""

VERSION = "__version__"
"""All that a layer may take from the top package."""

GATEWAYS_MAY_IMPORT = ("mqtt_trio.gateway", "mqtt_trio.archive.store", "mqtt_trio.errors")

IMPURE = {
    "asyncio", "concurrent", "datetime", "http", "kafka", "multiprocessing", "os", "outcome", "queue", "random",
    "secrets", "select", "selectors", "signal", "socket", "sqlite3", "ssl", "subprocess", "sys", "tempfile",
    "threading", "time", "trio", "trio_websocket", "urllib", "uuid",
}  # fmt: skip
"""What `protocol` and `broker` must not import: I/O, threads, clocks, randomness. These arrive as arguments."""

ONLY_IN = {
    "kafka": {
        "gateways/kafka/admin.py",
        "gateways/kafka/batches.py",
        "gateways/kafka/member_consumer.py",
        "gateways/kafka/security.py",
        "gateways/kafka/stream_consumer.py",
        "gateways/kafka/workers.py",
    },
    "ssl": {
        "mqtt_trio/server/tls.py",
        "mqtt_trio/commands/endpoint.py",
        "gateways/kafka/oauth.py",
        "gateways/kafka/precheck_steps.py",
        "gateways/kafka/security.py",
    },
    "urllib3": {"gateways/kafka/schema_registry.py"},
    "sqlite3": {
        "mqtt_trio/archive/rebuild.py",
        "mqtt_trio/archive/sqlite.py",
        "mqtt_trio/archive/sqlite_file.py",
        "mqtt_trio/server/sqlite_store.py",
        "mqtt_trio/server/store_doctor.py",
        "mqtt_trio/server/store_file.py",
        "mqtt_trio/server/store_reader.py",
        "mqtt_trio/server/store_repair.py",
        "mqtt_trio/server/store_writer.py",
    },
}
"""Library -> the modules that may import it: its blocking calls stay in their threads."""


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield every module that a module of `package` imports, anywhere in it; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(f"{allowed}.")


def layer_of(path: Path) -> str:
    """Return the layer of a file of mqtt_trio: `config_schema.py` belongs to `config`, `broker/x.py` to `broker`."""
    first = path.relative_to(ROOT / "mqtt_trio").parts[0].removesuffix(".py")
    if first in PART_OF:
        return PART_OF[first]
    return first.partition("_")[0] if not first.startswith("_") else first


def wrong_imports(source: str, path: Path) -> list[str]:
    """Return one line for every import in `source` that its place `path` does not allow."""
    name = path.relative_to(ROOT).as_posix()
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = []
    for module in imported(ast.parse(source), package):
        top = module.split(".")[0]
        if top in ONLY_IN and name not in ONLY_IN[top]:
            found.append(f"{name} imports {module}: only {sorted(ONLY_IN[top])} may")
        if name.startswith("gateways/"):
            if top == "mqtt_trio" and not any(within(module, allowed) for allowed in GATEWAYS_MAY_IMPORT):
                found.append(f"{name} imports {module}: a gateway may import {GATEWAYS_MAY_IMPORT}")
            if top == "gateways" and not within(module, package):
                found.append(f"{name} imports {module}: gateways do not know each other")
            continue
        layer = layer_of(path)
        if layer in ("protocol", "broker", "errors") and top in IMPURE:
            found.append(f"{name} imports {module}: this layer is sans-I/O")
        if top == "gateways":
            found.append(f"{name} imports {module}: gateways are named in the configuration and loaded by name")
        if top == "mqtt_trio" and layer != "__init__":
            inner = module.partition(".")[2]
            allowed = (VERSION, *(each for one in (layer, *MAY_IMPORT[layer]) for each in own_modules(one)))
            if not any(within(inner, each) for each in allowed):
                found.append(f"{name} imports {module}: layer {layer} may import {allowed}")
    return found


def own_modules(layer: str) -> tuple[str, ...]:
    """Return the modules that make up a layer of several files at the top level (config, config_schema, ...)."""
    files = (p.stem for p in (ROOT / "mqtt_trio").glob(f"{layer}_*.py"))
    return (layer, *files, *(module for module, owner in PART_OF.items() if owner == layer))


def test_imports_point_one_way() -> None:
    assert len(SOURCES) > 10
    assert [line for path in SOURCES for line in wrong_imports(path.read_text(), path)] == []


def test_modules_stay_small() -> None:
    scripts = [p for p in (ROOT / "scripts").iterdir() if p.is_file()]
    tests = [p for p in (ROOT / "tests").rglob("*.py") if "node_modules" not in p.parts]
    sizes = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in [*SOURCES, *scripts, *tests]}
    assert {name: size for name, size in sizes.items() if size > LONGEST_MODULE} == {}


def test_every_layer_is_known() -> None:
    layers = {layer_of(path) for path in SOURCES if path.is_relative_to(ROOT / "mqtt_trio")} - {"__init__"}
    assert layers - set(MAY_IMPORT) == set()


@pytest.mark.parametrize(
    "place, source",
    [
        ("mqtt_trio/protocol/x.py", "import trio"),
        ("mqtt_trio/protocol/x.py", "from mqtt_trio.broker.message import Message"),
        ("mqtt_trio/protocol/x.py", "from ..broker import message"),
        ("mqtt_trio/broker/x.py", "def f():\n    from time import monotonic"),
        ("mqtt_trio/broker/x.py", "from mqtt_trio import gateway"),
        ("mqtt_trio/archive/x.py", "from mqtt_trio.server.link import Link"),
        ("mqtt_trio/server/x.py", "import mqtt_trio.config"),
        ("mqtt_trio/server/x.py", "import sqlite3"),
        ("mqtt_trio/config_x.py", "from mqtt_trio.app import run"),
        ("mqtt_trio/app.py", "import gateways.kafka"),
        ("mqtt_trio/app.py", "from mqtt_trio.commands import pub"),
        ("mqtt_trio/commands/x.py", "from mqtt_trio.broker.message import Message"),
        ("gateways/kafka/bus.py", "from mqtt_trio.broker.tap import Tap"),
        ("gateways/kafka/bus.py", "from kafka import KafkaProducer"),
        ("gateways/kafka/bus.py", "from gateways.other import x"),
    ],
)
def test_a_wrong_import_is_seen(place: str, source: str) -> None:
    assert len(wrong_imports(source, ROOT / place)) == 1


@pytest.mark.parametrize(
    "place, source",
    [
        ("mqtt_trio/protocol/x.py", "from mqtt_trio.errors import MqttTrioError\nfrom . import codes"),
        ("mqtt_trio/config_x.py", "from mqtt_trio.config_schema import Options"),
        ("mqtt_trio/gateway.py", "import trio\nfrom mqtt_trio.archive.store import ArchiveStore"),
        ("gateways/kafka/workers.py", "from kafka import KafkaProducer\nfrom gateways.kafka.mapping import x"),
        ("gateways/kafka/bus.py", "from mqtt_trio.gateway import Message"),
    ],
)
def test_a_right_import_passes(place: str, source: str) -> None:
    assert wrong_imports(source, ROOT / place) == []
