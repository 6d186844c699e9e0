"""Checking the directory of a spool without changing it; blocking."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import attrs

from mqtt_trio.archive.spool_records import (
    CURSOR_SLOT,
    SEGMENT,
    DamagedError,
    TornRecordError,
    find_record,
    read_cursor,
    read_record,
    read_segment_header,
)


@attrs.define
class SpoolReport:
    """What `check_spool` found."""

    messages: int = 0
    """That are readable and were not acknowledged."""
    size: int = 0
    """Bytes of all segments."""
    segments: int = 0
    in_use: bool = False
    """A broker uses it: what it writes at this moment may look like an end within a record, which is no problem."""
    torn: int = 0
    """Bytes of a record at the end that was not written whole: a kill leaves such, and nobody was told that it is
    kept."""
    set_aside: list[Path] = attrs.Factory(list)
    """Damaged segments that earlier starts have kept."""
    problems: list[str] = attrs.Factory(list)
    """What is wrong, one a line."""


def check_spool(directory: Path) -> SpoolReport:
    """Read every record of a spool and compare it with its checksum.

    Raises:
      OSError: the directory, or a file in it, cannot be read.
    """
    report = SpoolReport(in_use=_is_in_use(directory), set_aside=sorted(directory.glob("*.seg.corrupt-*")))
    acknowledged = _read_cursor(directory / "cursor", report)
    paths = sorted(path for path in directory.glob("*.seg") if path.stem.isdecimal())
    end = acknowledged
    for path in paths:
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # a broker has just delivered all of it
            continue
        report.segments += 1
        report.size += len(data)
        is_last = path == paths[-1]
        for position, behind in _records(path, data, report, is_last=is_last):
            # A write that failed is repeated in the next segment, under the same positions.
            report.messages += max(0, behind - max(position, end))
            end = max(end, behind)
    return report


def _is_in_use(directory: Path) -> bool:
    try:
        descriptor = os.open(directory / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _read_cursor(path: Path, report: SpoolReport) -> int:
    try:
        data = path.read_bytes()[: 2 * CURSOR_SLOT]
    except FileNotFoundError:
        return 0
    found = read_cursor(data)
    if found is None and data.strip(b"\0"):
        report.problems.append(f"{path.name} is damaged: everything in the spool will be sent again")
    return found[1] if found is not None else 0


def _records(path: Path, data: bytes, report: SpoolReport, *, is_last: bool) -> Iterator[tuple[int, int]]:
    """Yield positions (first, behind the last) of each readable record; note what is damaged, once a segment."""
    at, told = SEGMENT.size, False
    try:
        read_segment_header(data, int(path.stem))
    except TornRecordError:
        return  # its making was interrupted, before there was a record in it
    except DamagedError as exc:
        report.problems.append(f"{path.name}: {exc}")
        at, told = find_record(data, 0), True
    while at < len(data):
        try:
            record, at = read_record(data, at)
        except TornRecordError:
            if is_last:
                report.torn += len(data) - at
                return
            reason: object = "it ends within a record"
        except DamagedError as exc:
            reason = exc
        else:
            yield record.position, record.end
            continue
        if not told:
            report.problems.append(f"{path.name}: {reason} (byte {at}); what is readable behind it will be sent")
            told = True
        at = find_record(data, at + 1)
