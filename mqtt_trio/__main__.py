"""The command line [F3]: `mqtt-trio serve` (the default), `check`, `doctor`, `pub`, `sub`.

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
from typing import Final

from mqtt_trio import __version__
from mqtt_trio.config import LoadedConfig, Overrides, load_config
from mqtt_trio.errors import ConfigError, MqttTrioError

EXIT_FAILURE: Final = 1
EXIT_CONFIG: Final = 78
"""EX_CONFIG of sysexits.h."""
COMMANDS: Final = {
    "serve": "run the broker (the default command)",
    "check": "show what a configuration means, start nothing",
    "doctor": "check the session store on disk, change nothing; 1 when something is wrong with it",
}
"""Commands that a configuration is loaded for."""
CLIENTS: Final = {
    "pub": "publish messages, with the flags of mosquitto_pub",
    "sub": "subscribe and print messages, with the flags of mosquitto_sub",
}
"""Commands that read their own arguments, in `mqtt_trio.commands.NAME`: they load no configuration."""

EPILOG: Final = """\
Without --config the defaults hold: TCP 1883 and WebSocket 8083 on 127.0.0.1, no archive, no Kafka.
Command line > environment (MQTT_TRIO__SECTION__KEY, lists by index: MQTT_TRIO__LISTENERS__0__PORT) > file > default.
Exit codes: 0 stopped as asked, 1 failure, 2 wrong usage, 78 configuration that cannot be used."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
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
        _add_config_options(command)
    for name, text in CLIENTS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", type=Path, help="TOML file; config.toml of the repository is a commented example")
    add("--host", help="address of the first listener of each type; 0.0.0.0: all IPv4 addresses")
    add("--port", type=_port, help="port of the first TCP listener; 0: any free one")
    add("--ws-port", type=_port, metavar="PORT", help="port of the first WebSocket listener; 0: any free one")
    add("--data", metavar="DIR", help="directory of what is kept on disk (Persistence.Path)")
    add("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], dest="sets", help="any key; repeatable")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; without a command it is `serve`."""
    parser = make_parser()
    first = arguments[0] if arguments else ""
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
        host=arguments.host,
        port=arguments.port,
        ws_port=arguments.ws_port,
        data=arguments.data,
    )
    return load_config(arguments.config, environ, overrides, gateway_sections())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in CLIENTS:
        return int(importlib.import_module(f"mqtt_trio.commands.{given[0]}").run(given[1:]))
    parsed = parse(given)
    try:
        loaded = load(parsed, os.environ)
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
        return EXIT_FAILURE


def _check(loaded: LoadedConfig) -> int:
    from mqtt_trio.app import build_gateways
    from mqtt_trio.config_show import show

    build_gateways(loaded)  # their client libraries know which options they take
    print(f"# mqtt-trio {__version__}, configuration: {loaded.path or 'defaults (no --config)'}")
    print("\n".join(show(loaded)))
    if loaded.inactive:
        print("\n# not active yet: " + ", ".join(loaded.inactive))
    return 0


def _doctor(loaded: LoadedConfig) -> int:
    from mqtt_trio.server.sqlite_store import FILE_NAME
    from mqtt_trio.server.store_doctor import check_store_file

    report = check_store_file(loaded.options.persistence.path / FILE_NAME)
    print("\n".join(report.lines))
    print("\n".join(f"problem: {each}" for each in report.problems) or "no problem found")
    return EXIT_FAILURE if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
