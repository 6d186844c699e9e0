"""Stores that a rebuild has not finished [K19]: a node that served them would lack what is missing and say nothing, and
the rebuild that goes on later would put old messages over new ones."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Final

import attrs

from mqtt_trio.archive.groups import merge_groups
from mqtt_trio.archive.rebuild import unfinished_history
from mqtt_trio.archive.sqlite import archive_path
from mqtt_trio.archive.store import Progress
from mqtt_trio.config import LoadedConfig, Options
from mqtt_trio.config_sources import COMMAND_LINE
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


def commands(found: list[Unfinished], loaded: LoadedConfig) -> list[str]:
    """Return the commands that finish these stores: one for each place that they are rebuilt from. They name the
    directory where the command line did (`--data`): stores in another one would be begun anew."""
    by_source: dict[str, list[str]] = {}
    for each in found:
        by_source.setdefault(each.progress.source, []).append(each.argument)
    given = ["--config", str(loaded.path)] if loaded.path is not None else []
    if loaded.origin(("Persistence", "Path")) == COMMAND_LINE:
        given += ["--set", f"Persistence.Path={loaded.options.persistence.path}"]
    command = shlex.join(["mqtt-trio", "rebuild", *given])
    return [f"{command} --from {source.split()[-1]} {' '.join(arguments)}" for source, arguments in by_source.items()]


def refuse_unfinished(loaded: LoadedConfig, marks: Mapping[str, bytes]) -> None:
    """Look whether the node's stores are whole; see `unfinished`.

    Raises:
      StartError: a store is not.
    """
    try:
        found = list(unfinished(loaded.options, marks))
    except StoreError as exc:
        raise StartError(str(exc)) from None
    if not found:
        return
    lacking = ", ".join(f"{each.name} ({each.missing} records of {each.progress.source} to go)" for each in found)
    raise StartError(
        f"a rebuild was not finished: {lacking}. Go on with `{'`, `'.join(commands(found, loaded))}`. {ELSE}"
    )
