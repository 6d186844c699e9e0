"""Checking the directory of a spool: what is told, and that nothing is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mqtt_trio.archive.spool import SpoolRecord
from mqtt_trio.archive.spool_doctor import check_spool
from mqtt_trio.archive.spool_log import SpoolLog
from mqtt_trio.archive.spool_records import SEGMENT


def fill(directory: Path, count: int, *, acknowledged: int = 0, segment_bytes: int = 2000) -> None:
    """Spool records of two messages each, one append a record."""
    log = SpoolLog(directory, segment_bytes=segment_bytes)
    log.open()
    for number in range(count):
        log.append([SpoolRecord(log.end, 2, f"record {number}".encode() * 10)])
    while log.unread < acknowledged:
        log.read(1)
    log.acknowledge(acknowledged)
    log.close()


def everything_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_sound_spool(tmp_path: Path) -> None:
    fill(tmp_path, 100, acknowledged=50)
    before = everything_in(tmp_path)
    report = check_spool(tmp_path)
    assert (report.messages, report.problems, report.torn, report.in_use) == (150, [], 0, False)
    assert report.segments == len([name for name in before if name.endswith(".seg")]) > 3
    assert report.size == sum(len(data) for name, data in before.items() if name.endswith(".seg"))
    assert everything_in(tmp_path) == before


def test_an_empty_directory(tmp_path: Path) -> None:
    report = check_spool(tmp_path)
    assert (report.messages, report.segments, report.problems) == (0, 0, [])


def test_a_spool_in_use(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    log = SpoolLog(tmp_path, segment_bytes=2000)
    log.open()
    assert check_spool(tmp_path).in_use
    log.close()
    assert not check_spool(tmp_path).in_use


def test_a_torn_end_is_no_damage(tmp_path: Path) -> None:
    fill(tmp_path, 3, segment_bytes=1_000_000)
    (path,) = tmp_path.glob("*.seg")
    whole = path.read_bytes()
    for cut in (1, 50):
        path.write_bytes(whole[:-cut])
        report = check_spool(tmp_path)
        assert (report.messages, report.problems) == (4, [])
        assert report.torn > 0
    path.write_bytes(whole[: SEGMENT.size - 1])
    assert check_spool(tmp_path).problems == []


@pytest.mark.parametrize("at", [0, SEGMENT.size + 10, 900])
def test_a_flipped_bit_is_told_once(tmp_path: Path, at: int) -> None:
    fill(tmp_path, 100)
    path = sorted(tmp_path.glob("*.seg"))[1]
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
    before = everything_in(tmp_path)
    report = check_spool(tmp_path)
    (problem,) = report.problems
    assert problem.startswith(f"{path.name}: ")
    assert 190 <= report.messages <= 200
    assert everything_in(tmp_path) == before


def test_a_segment_that_ends_early_in_the_middle(tmp_path: Path) -> None:
    fill(tmp_path, 100)
    path = sorted(tmp_path.glob("*.seg"))[1]
    path.write_bytes(path.read_bytes()[:-5])
    (problem,) = check_spool(tmp_path).problems
    assert "it ends within a record" in problem


def test_a_damaged_cursor(tmp_path: Path) -> None:
    fill(tmp_path, 10, acknowledged=4)
    cursor = tmp_path / "cursor"
    cursor.write_bytes(bytes(byte ^ 0xFF for byte in cursor.read_bytes()))
    report = check_spool(tmp_path)
    assert report.problems == ["cursor is damaged: everything in the spool will be sent again"]


def test_what_was_set_aside_is_named(tmp_path: Path) -> None:
    aside = tmp_path / "00000000000000000000.seg.corrupt-1"
    aside.write_bytes(b"?")
    assert check_spool(tmp_path).set_aside == [aside]
