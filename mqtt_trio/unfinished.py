"""Stores that a rebuild has not finished [K19]: a node that served them would lack what is missing and say nothing, and
the rebuild that goes on later would put old messages over new ones."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from mqtt_trio.archive.groups import merge_groups
from mqtt_trio.archive.rebuild import unfinished_history
from mqtt_trio.archive.sqlite import archive_path
from mqtt_trio.archive.store import Progress
from mqtt_trio.config import Options
from mqtt_trio.errors import StartError, StoreError
from mqtt_trio.server.rebuild import unfinished_retained
from mqtt_trio.server.sqlite_store import FILE_NAME

ELSE: Final = "To start without what is in them, move the files away"


@attrs.frozen
class Unfinished:
    """A store that lacks something."""

    name: str
    argument: str
    """What the command names it by."""
    progress: Progress

    @property
    def missing(self) -> int:
        """Records that were not looked at."""
        progress = self.progress
        return sum(max(0, end - progress.next.get(number, 0)) for number, end in progress.ends.items())


def unfinished(options: Options, marks: Mapping[str, bytes]) -> Iterator[Unfinished]:
    """Yield the stores of a configuration that are unfinished; `marks`: those of the session store. Blocks for the
    files of the groups; one that cannot be read is left to whoever opens it.

    Raises:
      StoreError: what a rebuild noted cannot be read.
    """
    folder = options.persistence.path
    path = folder / FILE_NAME
    if (progress := unfinished_retained(path, marks)) is not None:
        yield Unfinished(f"session store {path}", "--retained", progress)
    for group in merge_groups(options.archive_groups):
        if group.store == "SQLITE":
            path = archive_path(folder, group.name)
            if (progress := unfinished_history(path)) is not None:
                yield Unfinished(f"archive store {path}", f"--group {shlex.quote(group.name)}", progress)


def commands(found: list[Unfinished], config: Path | None) -> list[str]:
    """Return the commands that finish these stores: one for each place that they are rebuilt from."""
    by_source: dict[str, list[str]] = {}
    for each in found:
        by_source.setdefault(each.progress.source, []).append(each.argument)
    given = f" --config {shlex.quote(str(config))}" if config is not None else ""
    return [
        f"mqtt-trio rebuild{given} --from {source.split()[-1]} {' '.join(arguments)}"
        for source, arguments in by_source.items()
    ]


def refuse_unfinished(options: Options, marks: Mapping[str, bytes], config: Path | None) -> None:
    """Look whether the node's stores are whole; see `unfinished`. `config`: the file, for the command that goes on.

    Raises:
      StartError: a store is not.
    """
    try:
        found = list(unfinished(options, marks))
    except StoreError as exc:
        raise StartError(str(exc)) from None
    if not found:
        return
    lacking = ", ".join(f"{each.name} ({each.missing} records of {each.progress.source} to go)" for each in found)
    raise StartError(
        f"a rebuild was not finished: {lacking}. Go on with `{'`, `'.join(commands(found, config))}`. {ELSE}"
    )
