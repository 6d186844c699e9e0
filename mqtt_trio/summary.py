"""The summary that the broker prints when it is up [F2]: who can reach it, what is kept where, what is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from mqtt_trio import __version__
from mqtt_trio.archive.options import ArchiveGroupOptions
from mqtt_trio.config import LoadedConfig


@attrs.frozen(kw_only=True)
class ArchiveSummary:
    """An archive group that runs."""

    group: ArchiveGroupOptions
    store: str
    """`describe()` of its store."""


@attrs.frozen(kw_only=True)
class Running:
    """What was started."""

    listeners: Sequence[str] = ()
    """`describe()` of each open listener."""
    store: str = ""
    """`describe()` of the store of sessions and retained messages, with what it held; empty without one."""
    archives: Sequence[ArchiveSummary] = ()
    gateways: Mapping[str, Sequence[str]] = attrs.field(factory=dict)
    """Lines of each gateway, by its section."""
    http: str = ""
    """`describe()` of the HTTP interface; empty without one."""


def summary(loaded: LoadedConfig, running: Running) -> list[str]:
    """Return the lines of the summary."""
    options = loaded.options
    source = loaded.path or "defaults (no --config)"
    lines = [f"mqtt-trio {__version__}, node {options.node.id}, configuration: {source}"]
    lines += _section("listeners", list(running.listeners) or ["none"])
    lines += _section("access", ["anyone who reaches a listener may publish and subscribe to everything"])
    lines += _section("archive", _archive_lines(loaded, running.archives))
    for name, texts in running.gateways.items():
        lines += _section(name.lower(), list(texts))
    in_memory = 'sessions and retained messages in memory: they end with the process ([Persistence] Store = "SQLITE")'
    lines += _section("persistence", [running.store or in_memory])
    lines += _section("http", [running.http] if running.http else [])
    lines += _section("off", _off_lines(loaded))
    if loaded.inactive:
        lines += _section("not active yet", list(loaded.inactive))
    return lines


def _section(title: str, texts: Sequence[str]) -> list[str]:
    return [f"  {title if index == 0 else '':<15} {text}" for index, text in enumerate(texts)]


def _archive_lines(loaded: LoadedConfig, archives: Sequence[ArchiveSummary]) -> list[str]:
    lines = [f"{one.group.name}: {', '.join(one.group.filter)} to {one.store}" for one in archives]
    disabled = [group.name for group in loaded.options.archive_groups if not group.enabled]
    if disabled:
        lines.append(f"disabled: {', '.join(disabled)} (Enabled = true)")
    return lines or ["none ([[ArchiveGroups]] keeps messages, embedded SQLite needs nothing else)"]


def _off_lines(loaded: LoadedConfig) -> list[str]:
    lines = []
    kinds = {listener.type for listener in loaded.options.listeners}
    if "websocket" not in kinds:
        lines.append('MQTT over WebSocket ([[Listeners]] Type = "websocket")')
    if "tcp" not in kinds:
        lines.append('MQTT over TCP ([[Listeners]] Type = "tcp")')
    if not loaded.gateways:
        lines.append(
            'Kafka: bus, archive, stream of messages ([Kafka] Servers = "host:9092", [Kafka.Bus] Enabled = true)'
        )
    elif not any(getattr(getattr(options, "bus", None), "enabled", False) for options in loaded.gateways.values()):
        lines.append("the bus between nodes ([Kafka.Bus] Enabled = true)")
    if all(listener.tls is None for listener in loaded.options.listeners):
        lines.append('TLS ([[Listeners]] Tls = { CertFile = "server.pem", KeyFile = "server.key" })')
    if not loaded.options.node.sys_interval:
        lines.append('$SYS topics ([Node] SysInterval = "10s")')
    if loaded.options.http.port is None:
        lines.append("HTTP: health, readiness, metrics ([Http] Port = 8080)")
    lines.append("access control: not built yet")
    return lines
