"""The configuration as a whole: assembles each layer's options, `load_config`, and the checks across sections [C]."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Final

import attrs
from attrs.validators import ge, gt, in_, le, max_len, min_len, optional

from mqtt_trio import config_schema as schema
from mqtt_trio import config_status as status
from mqtt_trio.archive.options import ArchiveGroupOptions, merge_groups
from mqtt_trio.broker.limits import Limits
from mqtt_trio.config_convert import make_strict_converter, problems_of, split_problem
from mqtt_trio.config_schema import Key, Path
from mqtt_trio.config_sources import COMMAND_LINE, DEFAULT, Origin, Sources, split_path
from mqtt_trio.errors import ConfigError
from mqtt_trio.server.http import HttpOptions
from mqtt_trio.server.listeners import ListenerOptions

SPOOL_SLACK: Final = 1024 * 1024
"""Bytes by which a spool must be larger than the largest message."""
DEFAULT_LISTENERS: Final = ({"Type": "tcp", "Port": 1883}, {"Type": "websocket", "Port": 8083})
LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def level_name(value: str) -> str:
    """Level names without regard to case, with the short ones of other systems."""
    folded = value.upper()
    other = {"WARN": "WARNING", "TRACE": "DEBUG", "ALL": "DEBUG", "FATAL": "CRITICAL", "OFF": "CRITICAL"}
    return other.get(folded, folded)


def _check_loggers(_instance: object, _attribute: attrs.Attribute[Any], value: Mapping[str, str]) -> None:
    for name, level in value.items():
        if level_name(level) not in LEVELS:
            raise ValueError(f"{name}: expected one of {', '.join(LEVELS)}, got {schema.quote(level)}")


@attrs.frozen(kw_only=True)
class NodeOptions:
    """[Node]"""

    id: str = attrs.field(factory=socket.gethostname)
    """Name of this node; unique in a cluster."""
    sys_interval: float = attrs.field(default=10.0, validator=[ge(0), le(86_400)], metadata={"unit": "seconds"})
    """Seconds from one look at the `$SYS` topics to the next; 0: there are none."""

    @id.validator
    def _check_id(self, _attribute: attrs.Attribute[str], value: str) -> None:
        if not value or len(value.encode()) > 255 or not value.isprintable():
            raise ValueError(f"expected 1 to 255 printable characters, got {schema.quote(value)}")


@attrs.frozen(kw_only=True)
class PersistenceOptions:
    """[Persistence]"""

    store: str = attrs.field(default="SQLITE", validator=in_(("MEMORY", "SQLITE")))
    """Where sessions and retained messages live. MEMORY: they end with the process."""
    path: FilePath = FilePath("data")
    """Directory of everything that the node keeps on disk, archives included."""
    synchronous: str = attrs.field(default="FULL", validator=in_(("FULL", "NORMAL", "OFF")))
    """How far SQLite waits for the disk: what a power loss costs. FULL: nothing; NORMAL: the last commits; OFF: also
    the soundness of the file. A kill of the process costs nothing in any case."""
    journal_bytes: int = attrs.field(default=64 * 1024 * 1024, validator=ge(1024 * 1024), metadata={"unit": "bytes"})
    """Bytes of changes that wait to be committed. Outcome: QoS 1 and 2 publishers wait."""


@attrs.frozen(kw_only=True)
class LoggingOptions:
    """[Logging]"""

    level: str = attrs.field(default="INFO", converter=level_name, validator=in_(LEVELS))
    format: str = attrs.field(default="text", validator=in_(("text", "json")))
    loggers: Mapping[str, str] = attrs.field(factory=dict, validator=_check_loggers)
    """Level by name of the logger."""


@attrs.frozen(kw_only=True)
class ShutdownOptions:
    """[Shutdown]"""

    timeout: float = attrs.field(default=10.0, validator=[gt(0), le(3600)], metadata={"unit": "seconds"})
    """Seconds from the signal to the end of the process, whatever clients, stores and gateways do."""
    server_reference: str | None = attrs.field(default=None, validator=optional([min_len(1), max_len(1024)]))
    """Where clients find another server meanwhile, such as "other.example:1883": 5.0 clients get DISCONNECT 0x9C with
    it [MQTT5-4.11]. Without it, and where it does not fit a client's Maximum Packet Size, 0x8B."""


@attrs.frozen(kw_only=True)
class Options:
    """Everything that the file may say, gateways apart."""

    node: NodeOptions = attrs.field(factory=NodeOptions)
    listeners: tuple[ListenerOptions, ...] = ()
    archive_groups: tuple[ArchiveGroupOptions, ...] = ()
    persistence: PersistenceOptions = PersistenceOptions()
    limits: Limits = attrs.field(factory=Limits)
    logging: LoggingOptions = LoggingOptions()
    http: HttpOptions = attrs.field(factory=HttpOptions)
    shutdown: ShutdownOptions = ShutdownOptions()


@attrs.frozen(kw_only=True)
class Overrides:
    """What the command line says about the configuration."""

    sets: Sequence[str] = ()
    """`Section.Key=VALUE`"""
    host: str | None = None
    port: int | None = None
    ws_port: int | None = None
    data: str | None = None


@attrs.frozen(kw_only=True)
class LoadedConfig:
    options: Options
    gateways: Mapping[str, object] = attrs.field(factory=dict)
    """Options of each gateway whose section is given or whose store a group uses, by the name of the section."""
    origins: Mapping[Path, Origin] = attrs.field(factory=dict)
    """Who set which key; a key that is not here, nor anything above it, has its default."""
    inactive: tuple[str, ...] = ()
    """Keys that are set and mean nothing yet."""
    path: FilePath | None = None
    """The file; None without one."""

    def origin(self, path: Path) -> Origin:
        """Return who set the key."""
        for length in range(len(path), 0, -1):
            if (origin := self.origins.get(path[:length])) is not None:
                return origin
        return DEFAULT


def load_config(
    path: FilePath | None,
    environ: Mapping[str, str],
    overrides: Overrides | None = None,
    sections: Mapping[str, type] | None = None,
) -> LoadedConfig:
    """Read the file, the environment and the command line; later ones win.

    `sections`: options classes of the gateways by the name of their section, such as `{"Kafka": KafkaOptions}`.

    Raises:
      ConfigError: with every mistake; none of its texts shows a secret.
    """
    sections = sections or {}
    root: dict[str, Key] = {**schema.keys_of(Options)}
    root.update({name: Key(name=name, type=options) for name, options in sections.items()})
    sources = Sources(root, environ)
    if path is not None:
        sources.read_file(path)
        if any(not where for where, _ in sources.problems):  # nothing of the file is known
            raise ConfigError([text for _, text in sources.problems])
    _default_listeners(sources)
    sources.read_environment()
    _apply(sources, overrides or Overrides())
    sources.read_secret_files()
    options, gateways = _structure(sources, sections)
    if options is not None:
        sources.problems.extend(_cross_check(options, archive_topic(gateways)))
        for name in _wanted(options, sections):
            gateways.setdefault(name, sections[name]())
    if sources.problems or options is None:
        raise ConfigError(_lines(sources))
    return LoadedConfig(
        options=options,
        gateways=gateways,
        origins=sources.origins,
        inactive=status.inactive(sources.table, sources.origins),
        path=path,
    )


def _default_listeners(sources: Sources) -> None:
    if "Listeners" not in sources.table:
        sources.table["Listeners"] = [dict(listener) for listener in DEFAULT_LISTENERS]
        for index, listener in enumerate(DEFAULT_LISTENERS):
            sources.origins.update({("Listeners", index, name): DEFAULT for name in listener})


def _apply(sources: Sources, overrides: Overrides) -> None:
    """Lay the command line over the tree: first what is said in general, then the flags that name one thing."""
    for text in overrides.sets:
        name, equals, value = text.partition("=")
        if not equals:
            sources.problem((), f"--set {name}: expected Section.Key=VALUE")
            continue
        sources.set_text(split_path(name.strip()), value, COMMAND_LINE)
    if overrides.data is not None and isinstance(sources.table.setdefault("Persistence", {}), dict):
        sources.set_value(("Persistence", "Path"), overrides.data, COMMAND_LINE)
    listeners = sources.table.get("Listeners")
    if not isinstance(listeners, list):
        return
    for kind, port in (("tcp", overrides.port), ("websocket", overrides.ws_port)):
        index = next((i for i, one in enumerate(listeners) if _type_of(one) == kind), None)
        if port is not None:
            if index is None:
                index = len(listeners)
                sources.set_value(("Listeners", index, "Type"), kind, COMMAND_LINE)
            sources.set_value(("Listeners", index, "Port"), port, COMMAND_LINE)
        if overrides.host is not None and index is not None:
            sources.set_value(("Listeners", index, "Host"), overrides.host, COMMAND_LINE)


def _type_of(listener: object) -> object:
    return listener.get("Type", "tcp") if isinstance(listener, dict) else None


def _structure(sources: Sources, sections: Mapping[str, type]) -> tuple[Options | None, dict[str, object]]:
    converter = make_strict_converter()
    core = {name: value for name, value in sources.table.items() if name not in sections}
    unknown = [name for name in core if name not in sources.root]
    for name in unknown:
        hint = schema.did_you_mean(name, sources.root) or f"; known: {', '.join(sources.root)}"
        sources.problem((name,), f"unknown section{hint}")
        del core[name]
    options: Options | None = None
    gateways: dict[str, object] = {}
    try:
        options = converter.structure(core, Options)
    except Exception as exc:
        sources.problems.extend(problems_of(exc, ()))
    for name, tp in sections.items():
        if name in sources.table:
            try:
                gateways[name] = converter.structure(sources.table[name], tp)
            except Exception as exc:
                sources.problems.extend(problems_of(exc, (name,)))
    return options, gateways


def archive_topic(gateways: Mapping[str, object]) -> str:
    """Return where KAFKA groups without a KafkaTopic write, which is an option of that gateway."""
    return str(getattr(gateways.get("Kafka"), "archive_topic", "mqtt.archive"))


def _cross_check(options: Options, default_kafka_topic: str) -> Iterator[tuple[Path, str]]:
    """Find what only shows when several keys are seen together."""
    try:
        merge_groups(options.archive_groups, default_kafka_topic=default_kafka_topic)
    except ConfigError as exc:
        yield from (split_problem(line, ()) for line in exc.problems)
    largest = options.limits.maximum_packet_size
    for index, group in enumerate(options.archive_groups):
        if group.outage_policy == "spool" and group.spool_bytes < largest + SPOOL_SLACK:
            text = (
                f"{group.spool_bytes} bytes have no room for a message of Limits.MaximumPacketSize, {largest}; "
                f"at least {largest + SPOOL_SLACK} are needed"
            )
            yield ("ArchiveGroups", index, "SpoolBytes"), text
    taken: dict[tuple[str, int], int] = {}
    for index, listener in enumerate(options.listeners):
        if listener.port and (other := taken.setdefault((listener.host, listener.port), index)) != index:
            text = f"Listeners[{other}] has {listener.host}:{listener.port} already"
            yield ("Listeners", index, "Port"), text
    http = options.http
    if http.is_open:
        text = f"needed, because others can reach Http.Host {schema.quote(http.host)}; or keep to 127.0.0.1"
        yield ("Http", "TokenFile"), text
    if (wrong := http.check_token()) is not None:
        yield ("Http", "Token"), wrong
    if http.port and (http.host, http.port) in taken:
        text = f"Listeners[{taken[http.host, http.port]}] has {http.host}:{http.port} already"
        yield ("Http", "Port"), text


def _wanted(options: Options, sections: Mapping[str, type]) -> list[str]:
    """Return the gateways that hold the store of an enabled group: with the defaults where the file has no section."""
    stores = {group.store for group in options.archive_groups if group.enabled}
    return [name for name in sections if name.upper() in stores]


def _lines(sources: Sources) -> list[str]:
    """Return each mistake as one line; of several at one key the first, which the others follow from."""
    lines: dict[Path | str, str] = {}
    for path, text in sources.problems:
        origin = next((o for n in range(len(path), 0, -1) if (o := sources.origins.get(path[:n]))), DEFAULT)
        suffix = f" ({origin.text})" if origin.rank > 1 else ""
        line = f"{schema.show_path(path)}: {text}{suffix}" if path else text
        lines.setdefault(path or text, line)
    return list(lines.values())
