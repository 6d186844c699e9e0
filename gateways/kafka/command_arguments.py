"""Arguments that the commands about Kafka share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Final

from gateways.kafka.options import KafkaOptions

EXIT_FAILURE: Final = 1


class SetServers(argparse.Action):
    """`--bootstrap-server`: overrides both names that the servers have in the configuration."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.bootstrap_server = str(values)
        namespace.sets = [*namespace.sets, *sets_of_servers(str(values))]


def sets_of_servers(servers: str | None) -> list[str]:
    """Return what `--bootstrap-server` stands for."""
    return [] if servers is None else [f"Kafka.{key}={servers}" for key in ("Servers", "BootstrapServers")]


def add_common(parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    """Add what every command about Kafka takes."""
    parser.add_argument(
        "--bootstrap-server",
        action=SetServers,
        metavar="HOST:PORT",
        help="instead of Kafka.Servers of the configuration; several separated by commas",
    )
    if json:
        parser.add_argument("--json", action="store_true", help="one JSON object a line")


def options_of(options: object) -> KafkaOptions:
    """Return the options of a command's context, checked.

    Raises:
      ConfigError: an option means nothing to kafka-python, or kafka-python is not installed.
    """
    if not isinstance(options, KafkaOptions):
        raise TypeError(f"expected KafkaOptions, got {type(options).__name__}")
    from gateways.kafka import check

    check(options)
    return options


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Return lines with aligned columns; those in `right` end at one edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
