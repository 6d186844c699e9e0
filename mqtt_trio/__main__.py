"""The command line [F3]: `mqtt-trio serve` (the default), `check`, `doctor`, `pub`, `sub`, `topics`, `offsets`, `dlq`,
`rebuild`.

Exit codes: 0, 1 failure, 2 usage, 78 configuration; pub and sub add those of mosquitto's clients.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mqtt_trio import __version__
from mqtt_trio.config import LoadedConfig, Overrides, load_config
from mqtt_trio.errors import ConfigError, MqttTrioError, WrongUsageError

if TYPE_CHECKING:
    from mqtt_trio.config import Options
    from mqtt_trio.gateway import GatewayCommand, RebuildTarget

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
EXIT_CONFIG: Final = 78
"""EX_CONFIG of sysexits.h."""
COMMANDS: Final = {
    "serve": "run the broker (the default command)",
    "check": "show what a configuration means, start nothing",
    "doctor": "check stores, certificates and the way to Kafka, change nothing; 1 when something is wrong",
}
"""Commands that a configuration is loaded for."""
CLIENTS: Final = {
    "pub": "publish messages, with the flags of mosquitto_pub",
    "sub": "subscribe and print messages, with the flags of mosquitto_sub",
}
"""Commands that read their own arguments, in `mqtt_trio.commands.NAME`: they load no configuration."""
GATEWAY_COMMANDS: Final = {
    "topics": ("Kafka", "compare the topics in Kafka with the plan, create and grow them"),
    "offsets": ("Kafka", "show and reset what this deployment has read of its topics"),
    "dlq": ("Kafka", "show what could not be stored or understood, and write it again"),
    "rebuild": ("Kafka", "fill empty stores, retained messages and histories, from an archive in Kafka"),
}
"""Commands that a gateway brings -> its section, help. A configuration is loaded for them."""

EPILOG: Final = """\
Without --config the defaults hold: TCP 1883 and WebSocket 8083 on 127.0.0.1, no archive, no Kafka.
Command line > environment (MQTT_TRIO__SECTION__KEY, lists by index: MQTT_TRIO__LISTENERS__0__PORT) > file > default.
Exit codes: 0 stopped as asked, 1 failure, 2 wrong usage, 78 configuration that cannot be used."""


def make_parser(command_name: str = "") -> argparse.ArgumentParser:
    """Return the parser of the whole command line. What a gateway says of its command is only loaded for that one."""
    parser = argparse.ArgumentParser(
        prog="mqtt-trio",
        description="An MQTT broker: 3.1, 3.1.1 and 5.0 over TCP and WebSocket.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mqtt-trio {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=EPILOG)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        _add_config_file_options(command)
        _add_listener_options(command)
    for name, text in CLIENTS.items():
        commands.add_parser(name, help=text, add_help=False)
    for name, (section, text) in GATEWAY_COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == command_name:
            shared = argparse.ArgumentParser(add_help=False)
            _add_config_file_options(shared)
            gateway_command(section, name).add_arguments(command, shared)
    return parser


def gateway_command(section: str, name: str) -> GatewayCommand:
    """Return a command of the gateway that has `section`.

    Raises:
      ConfigError: this gateway is not installed.
    """
    package = f"gateways.{section.lower()}"
    if importlib.util.find_spec(package) is None:
        raise ConfigError([f"{section}: the package {package} is not installed"])
    command: GatewayCommand = importlib.import_module(package).command(name)
    return command


def _add_config_file_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", type=Path, help="TOML file; config.toml of the repository is a commented example")
    add("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], dest="sets", help="any key; repeatable")


def _add_listener_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", help="address of the first listener of each type; 0.0.0.0: all IPv4 addresses")
    add("--port", type=_port, help="port of the first TCP listener; 0: any free one")
    add("--ws-port", type=_port, metavar="PORT", help="port of the first WebSocket listener; 0: any free one")
    add("--data", metavar="DIR", help="directory of what is kept on disk (Persistence.Path)")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; without a command it is `serve`."""
    first = arguments[0] if arguments else ""
    parser = make_parser(first)
    if first not in (*COMMANDS, "--version", "-h", "--help") and (first.startswith("-") or not first):
        arguments = ["serve", *arguments]
    return parser.parse_args(arguments)


def gateway_sections() -> dict[str, type]:
    """Return the options classes of the gateways that are installed, by the name of their section.

    Options are plain classes: the client library of a gateway is imported only when the gateway is built.
    """
    sections: dict[str, type] = {}
    if importlib.util.find_spec("gateways.kafka") is not None:
        sections["Kafka"] = importlib.import_module("gateways.kafka.options").KafkaOptions
    return sections


def load(arguments: argparse.Namespace, environ: Mapping[str, str]) -> LoadedConfig:
    """Load what the command line names.

    Raises:
      ConfigError: see `load_config`.
    """
    overrides = Overrides(
        sets=arguments.sets,
        host=getattr(arguments, "host", None),
        port=getattr(arguments, "port", None),
        ws_port=getattr(arguments, "ws_port", None),
        data=getattr(arguments, "data", None),
    )
    return load_config(arguments.config, environ, overrides, gateway_sections())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in CLIENTS:
        return int(importlib.import_module(f"mqtt_trio.commands.{given[0]}").run(given[1:]))
    try:
        parsed = parse(given)
        loaded = load(parsed, os.environ)
        if parsed.command in GATEWAY_COMMANDS:
            return _run_gateway_command(parsed, loaded)
        if parsed.command == "check":
            return _check(loaded)
        if parsed.command == "doctor":
            return _doctor(loaded)
        from mqtt_trio.app import serve

        return serve(loaded)
    except ConfigError as exc:
        count = len(exc.problems)
        mistakes = "1 mistake" if count == 1 else f"{count} mistakes"
        print(f"mqtt-trio: {mistakes} in the configuration", file=sys.stderr)
        for problem in exc.problems:
            print(f"  {problem}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:  # Ctrl-C before the broker handles it: it stopped as it was asked to
        return 0
    except MqttTrioError as exc:
        print(f"mqtt-trio: {exc}", file=sys.stderr)
        return EXIT_USAGE if isinstance(exc, WrongUsageError) else EXIT_FAILURE


def _run_gateway_command(arguments: argparse.Namespace, loaded: LoadedConfig) -> int:
    from mqtt_trio.archive.groups import merge_groups
    from mqtt_trio.commands.console import Console
    from mqtt_trio.gateway import CommandContext

    section = GATEWAY_COMMANDS[arguments.command][0]
    if section not in loaded.gateways:
        where = loaded.path or "no --config FILE is given, and"
        raise ConfigError([f"{section}: {where} there is no section [{section}]; `{arguments.command}` is about it"])
    groups = [group for group in merge_groups(loaded.options.archive_groups) if group.store == section.upper()]
    context = CommandContext(
        options=loaded.gateways[section],
        node_id=loaded.options.node.id,
        archive_topics=[group.kafka_topic for group in groups],
        archive_formats={group.kafka_topic: group.format for group in groups},
        rebuild_targets=rebuild_targets(loaded.options),
        console=Console(),
    )
    try:
        return gateway_command(section, arguments.command).run(arguments, context)
    except KeyboardInterrupt:
        print(f"mqtt-trio: {arguments.command} was interrupted", file=sys.stderr)
        return EXIT_FAILURE
    except BrokenPipeError:  # nobody reads the output any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def rebuild_targets(options: Options) -> list[RebuildTarget]:
    """Return the embedded stores of a configuration, none of them opened yet."""
    from mqtt_trio.archive.groups import merge_groups
    from mqtt_trio.archive.rebuild import HistoryTarget
    from mqtt_trio.archive.sqlite import archive_path
    from mqtt_trio.server.rebuild import RetainedTarget
    from mqtt_trio.server.sqlite_store import FILE_NAME

    folder = options.persistence.path
    targets: list[RebuildTarget] = []
    if options.persistence.store == "SQLITE":
        targets.append(RetainedTarget(path=folder / FILE_NAME))
    for group in merge_groups(options.archive_groups):
        if group.store == "SQLITE":
            history = HistoryTarget(group=group.name, path=archive_path(folder, group.name), filters=group.filter)
            history.retention, history.max_size = group.retention, group.max_size
            targets.append(history)
    return targets


def _check(loaded: LoadedConfig) -> int:
    from mqtt_trio.app import check_gateways
    from mqtt_trio.config_show import advice, show

    check_gateways(loaded)  # their client libraries know which options they take
    print(f"# mqtt-trio {__version__}, configuration: {loaded.path or 'defaults (no --config)'}")
    print("\n".join(show(loaded)))
    for line in advice(loaded):
        print(f"\n# warning: {line}")
    if loaded.inactive:
        print("\n# not active yet: " + ", ".join(loaded.inactive))
    return 0


def _doctor(loaded: LoadedConfig) -> int:
    from mqtt_trio.doctor import run

    print(f"# mqtt-trio {__version__}, configuration: {loaded.path or 'defaults (no --config)'}")
    return EXIT_FAILURE if run(loaded) else 0


if __name__ == "__main__":
    sys.exit(main())
