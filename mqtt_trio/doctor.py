"""`mqtt-trio doctor`: looks at everything that the configuration names, changes nothing, and says how to mend it.

One line a check, as soon as it is made: the verdict, what was looked at, what was found.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mqtt_trio.app import GATEWAYS
from mqtt_trio.archive.options import acknowledging, merge_groups
from mqtt_trio.archive.spool_doctor import check_spool
from mqtt_trio.config import LoadedConfig
from mqtt_trio.errors import StartError, StoreError
from mqtt_trio.gateway import Finding, Verdict
from mqtt_trio.server.sqlite_store import FILE_NAME
from mqtt_trio.server.store_doctor import check_store_file
from mqtt_trio.server.tls import TlsOptions, TlsServer
from mqtt_trio.unfinished import commands, unfinished

ROWS: Final = " rows, checksums right"
"""Ends what the check of a store says about each table."""
LITTLE: Final = 1024**3
"""Bytes of room on the disk below which there is a note."""


def run(loaded: LoadedConfig) -> int:
    """Print what is found; return the number of problems."""
    problems = 0
    for finding in examine(loaded):
        mend = f" -> {finding.mend}" if finding.mend else ""
        print(f"{finding.verdict.value:<8} {finding.about}: {finding.text}{mend}", flush=True)
        problems += finding.verdict is Verdict.PROBLEM
    print("1 problem found" if problems == 1 else f"{problems or 'no'} problem{'s' if problems else ''} found")
    return problems


def examine(loaded: LoadedConfig) -> Iterator[Finding]:
    """Yield what is found as it is found."""
    options = loaded.options
    yield from _directory(options.persistence.path)
    marks: dict[str, bytes] = {}
    if options.persistence.store == "SQLITE":
        yield from _store(options.persistence.path / FILE_NAME, marks)
    yield from _unfinished(loaded, marks)
    yield from _spools(options.persistence.path)
    for index, listener in enumerate(options.listeners):
        yield from _certificate(listener.tls, f"Listeners[{index}].Tls")
    yield from _certificate(options.http.tls, "Http.Tls")
    for section, gateway in loaded.gateways.items():
        groups = [group for group in merge_groups(options.archive_groups) if group.store == section.upper()]
        package = importlib.import_module(GATEWAYS[section])
        waited_for = acknowledging(options.archive_groups, section.upper())
        yield from package.examine(gateway, [group.kafka_topic for group in groups], waited_for)


def _directory(path: Path) -> Iterator[Finding]:
    about = f"directory {path}"
    if not path.is_dir():
        if os.path.lexists(path):
            yield Finding(Verdict.PROBLEM, about, "is no directory", "Persistence.Path or --data names it")
        else:
            yield Finding(Verdict.NOTE, about, "is not there yet; the first start makes it")
        return
    if not os.access(path, os.W_OK | os.X_OK):
        yield Finding(Verdict.PROBLEM, about, "cannot be written", "let the user that runs the broker write there")
    try:
        free = shutil.disk_usage(path).free
    except OSError as exc:
        yield Finding(Verdict.PROBLEM, about, f"cannot be used: {exc.strerror}", "Persistence.Path or --data names it")
        return
    text = f"{free / 1024**3:.1f} GiB are free"
    verdict = Verdict.OK if free > LITTLE else Verdict.NOTE
    yield Finding(verdict, about, text, "" if free > LITTLE else "a full disk refuses QoS 1 and 2 messages")


def _store(path: Path, marks: dict[str, bytes]) -> Iterator[Finding]:
    """`marks` becomes those of the store."""
    about = f"session store {path}"
    if not path.is_file():
        if path.exists():
            yield Finding(Verdict.PROBLEM, about, "is no file", "move it away, or choose another place with --data")
        else:
            yield Finding(Verdict.NOTE, about, "is not there yet; the first start makes it")
        return
    try:
        report = check_store_file(path)
    except StoreError as exc:
        in_use = "is in use by process" in str(exc)
        yield Finding(Verdict.NOTE if in_use else Verdict.PROBLEM, about, f"not checked: {exc}")
        return
    marks.update(report.marks)
    rows = [line.removesuffix(ROWS) for line in report.lines if line.endswith(ROWS)]
    lines = [line.removeprefix(f"{path}: ") for line in report.lines if not line.endswith(ROWS)]
    facts = "; ".join([*lines, f"checksums are right of {', '.join(rows)}"] if rows else lines)
    yield Finding(Verdict.NOTE if report.problems else Verdict.OK, about, facts)
    mend = "the next start keeps what is readable and sets the file aside (docs/reliability.md)"
    for problem in report.problems:
        yield Finding(Verdict.PROBLEM, about, problem, mend)


def _unfinished(loaded: LoadedConfig, marks: dict[str, bytes]) -> Iterator[Finding]:
    try:
        for each in unfinished(loaded.options, marks):
            text = f"a rebuild was not finished: {each.missing} records of {each.progress.source} to go"
            yield Finding(Verdict.PROBLEM, each.name, text, commands([each], loaded)[0])
    except StoreError as exc:
        yield Finding(Verdict.PROBLEM, "rebuild", str(exc))


def _spools(directory: Path) -> Iterator[Finding]:
    for path in sorted(directory.glob("spool-*")):
        about = f"spool {path}"
        try:
            report = check_spool(path)
        except OSError as exc:
            yield Finding(Verdict.PROBLEM, about, f"cannot be read: {exc.strerror}", "let the broker's user read it")
            continue
        text = f"{report.messages} messages wait, {report.size} bytes in {report.segments} files"
        if report.in_use:
            text += "; a broker uses it"
        elif report.torn:
            text += f"; the last {report.torn} bytes were not written whole, which a kill leaves"
        verdict = Verdict.NOTE if report.messages and not report.in_use else Verdict.OK
        yield Finding(verdict, about, text, "the next start delivers them" if verdict is Verdict.NOTE else "")
        for problem in report.problems:
            yield Finding(Verdict.PROBLEM, about, problem)
        for aside in report.set_aside:
            yield Finding(Verdict.NOTE, about, f"{aside.name} was damaged", "delete it once nobody wants to look at it")


def _certificate(options: TlsOptions | None, where: str) -> Iterator[Finding]:
    if options is None:
        return
    try:
        server = TlsServer(options, where, ())
    except StartError as exc:
        yield Finding(Verdict.PROBLEM, where, str(exc).removeprefix(f"{where}."))
        return
    verdict = Verdict.OK if server.warning is None else Verdict.PROBLEM
    yield Finding(verdict, where, server.warning or server.describe())
