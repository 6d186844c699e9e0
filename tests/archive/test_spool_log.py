"""The spool on disk: order, restarts, torn and failed writes, damage, kills."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest

from mqtt_trio.archive.spool_log import SpoolLog
from mqtt_trio.archive.spool_records import RECORD, SEGMENT, SpoolRecord, pack_records
from mqtt_trio.errors import StoreError
from mqtt_trio.gateway import Spool

ALL = 1 << 30
SEGMENT_BYTES = 1000


def open_log(directory: Path, *, segment_bytes: int = SEGMENT_BYTES, synchronous: str = "OFF") -> SpoolLog:
    log = SpoolLog(directory, segment_bytes=segment_bytes, synchronous=synchronous)
    log.open()
    return log


def payload(number: int) -> bytes:
    return b"%d:" % number + bytes([number % 251]) * (number % 60)


def fill(log: SpoolLog, count: int, *, together: int = 1) -> list[SpoolRecord]:
    """Append `count` records of one message, `together` in each commit."""
    made = [SpoolRecord(number, 1, payload(number)) for number in range(log.end, log.end + count)]
    for start in range(0, count, together):
        log.append(made[start : start + together])
    return made


def read_all(directory: Path) -> list[SpoolRecord]:
    """Open, read everything, close."""
    log = open_log(directory)
    found = log.read(ALL)
    log.close()
    return found


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.seg"))


def kept_aside(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.corrupt-*"))


@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL", "OFF"])
def test_what_was_appended_comes_back_in_order_until_acknowledged(tmp_path: Path, synchronous: str) -> None:
    log = open_log(tmp_path / "s", synchronous=synchronous)
    made = fill(log, 40, together=3)
    assert log.read(1) == made[:1]
    assert log.read(ALL) == made[1:]
    assert log.read(ALL) == []
    more = fill(log, 5)
    assert log.read(ALL) == more
    log.acknowledge(17)
    log.close()

    log = open_log(tmp_path / "s", synchronous=synchronous)
    assert (log.acknowledged, log.unread, log.end, log.lost) == (17, 17, 45, 0)
    last = fill(log, 3)
    assert log.read(ALL) == [*made[17:], *more, *last]
    log.acknowledge(log.end)
    assert (log.size, segments(tmp_path / "s")) == (0, [])
    log.close()
    log = open_log(tmp_path / "s")
    assert (log.acknowledged, log.end, log.read(ALL)) == (48, 48, []), "positions go on"
    log.close()


def test_a_record_stands_for_several_messages(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    records = [SpoolRecord(0, 5, b"five"), SpoolRecord(5, 1, b""), SpoolRecord(6, 1000, bytes(5000))]
    log.append(records)
    log.acknowledge(3)
    log.close()
    assert read_all(tmp_path) == records, "a record that is acknowledged in part comes again whole"


def test_segments_are_given_back_one_by_one(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    fill(log, 200)
    files = segments(tmp_path)
    assert len(files) > 5
    assert log.size == sum(path.stat().st_size for path in files)
    assert all(path.stat().st_size < SEGMENT_BYTES + 100 for path in files)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    log.read(ALL)
    for position in range(0, 201, 10):
        log.acknowledge(position)
        assert log.size == sum(path.stat().st_size for path in segments(tmp_path))
        assert all(int(later.stem) > position for later in segments(tmp_path)[1:])
    assert segments(tmp_path) == []
    log.close()


def test_what_the_caller_has_is_not_read(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    made = fill(log, 50)
    log.skip(30)
    assert log.read(ALL) == made[30:]
    log.close()
    assert read_all(tmp_path) == made, "but the next process reads it"


def test_messages_that_need_not_be_kept_leave_a_gap(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    made = fill(log, 5)
    log.acknowledge(20)
    log.append([SpoolRecord(30, 1, b"x")])
    assert log.read(ALL) == [SpoolRecord(30, 1, b"x")]
    log.close()
    assert read_all(tmp_path) == [SpoolRecord(30, 1, b"x")]
    assert made


@pytest.mark.parametrize("together", [1, 4])
def test_a_torn_tail_is_cut_off_wherever_it_ends(
    tmp_path: Path, together: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    original = tmp_path / "original"
    log = open_log(original, segment_bytes=100_000)
    made = fill(log, 12, together=together)
    log.close()
    data = segments(original)[0].read_bytes()
    for cut in range(len(data)):
        directory = tmp_path / f"cut-{cut}"
        directory.mkdir()
        (directory / segments(original)[0].name).write_bytes(data[:cut])
        whole = [record for record in made if SEGMENT.size + len(pack_records(made[: record.end])) <= cut]
        log = open_log(directory)
        assert log.end == len(whole)
        more = fill(log, 3)
        assert log.read(ALL) == [*whole, *more]
        log.close()
        assert [record.data for record in read_all(directory)] == [record.data for record in [*whole, *more]]
        assert kept_aside(directory) == []
    assert caplog.records == []


def test_any_flipped_bit_costs_one_record_at_most(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = tmp_path / "original"
    log = open_log(original)
    made = fill(log, 120)
    log.read(ALL)
    log.acknowledge(30)
    log.close()
    files = [(path.name, path.read_bytes()) for path in sorted(original.iterdir()) if path.name != "lock"]
    total = sum(len(data) for _, data in files)
    rng = random.Random(7)
    for attempt, offset in enumerate(rng.sample(range(total), 200)):
        caplog.clear()
        directory = tmp_path / f"flip-{attempt}"
        directory.mkdir()
        flipped, at = "", offset
        for name, data in files:
            if 0 <= at < len(data):
                flipped = name
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            at -= len(data)
            (directory / name).write_bytes(data)
        log = open_log(directory)
        found = log.read(ALL)
        first = 30 if flipped != "cursor" else found[0].position  # an older cursor: some come again
        missing = [record for record in made[first:] if record not in found]
        assert [record for record in made[first:] if record not in missing] == found, "others are there, in order"
        assert len(missing) <= 1
        if missing and missing[0].end < log.end:
            assert log.lost == 1
        log.acknowledge(log.end)
        log.close()
        if flipped.endswith(".seg"):
            lines = [line.getMessage() for line in caplog.records if line.levelno == logging.ERROR]
            assert flipped in lines[0], "the message names the file"
            assert kept_aside(directory) == [f"{flipped}.corrupt-1"]
        assert segments(directory) == []


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"x" * 64, b"x" * 7])
def test_a_useless_cursor_means_that_everything_comes_again(tmp_path: Path, content: bytes) -> None:
    log = open_log(tmp_path, segment_bytes=ALL)
    made = fill(log, 10)
    log.read(ALL)
    log.acknowledge(6)
    log.close()
    (tmp_path / "cursor").write_bytes(content)
    log = open_log(tmp_path, segment_bytes=ALL)
    assert log.read(ALL) == made
    log.acknowledge(9)
    log.close()
    assert read_all(tmp_path) == made[9:]


def test_a_file_of_a_later_version_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = open_log(tmp_path)
    made = fill(log, 60)
    log.close()
    name = segments(tmp_path)[1]
    later = SEGMENT.pack(b"MTSPOOL", 2, int(name.stem), int(name.stem), 0)[:-4]
    name.write_bytes(later + crc32(later).to_bytes(4, "little") + b"who knows")
    after = int(segments(tmp_path)[2].stem)
    log = open_log(tmp_path)
    assert log.read(ALL) == [*made[: int(name.stem)], *made[after:]]
    assert log.lost == after - int(name.stem)
    log.close()
    assert kept_aside(tmp_path) == [f"{name.name}.corrupt-1"]
    assert "it has format 2" in caplog.text


def test_a_file_that_somebody_removed_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = open_log(tmp_path)
    made = fill(log, 60)
    gone = segments(tmp_path)[1]
    after = int(segments(tmp_path)[2].stem)
    gone.unlink()
    assert log.read(ALL) == [*made[: int(gone.stem)], *made[after:]]
    log.close()
    again = open_log(tmp_path)
    assert again.read(ALL) == [*made[: int(gone.stem)], *made[after:]]
    assert log.lost == again.lost == after - int(gone.stem)
    again.close()
    assert f"{log.lost} messages could not be read back" in caplog.text


def test_everything_lost_is_over(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=ALL)
    fill(log, 9)
    segments(tmp_path)[0].write_bytes(b"?" * 700)
    assert log.read(ALL) == []
    assert (log.lost, log.acknowledged, log.size) == (9, 9, 0)
    log.close()
    assert len(kept_aside(tmp_path)) == 1


def test_blocks_that_the_disk_cannot_read_cost_their_records_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path, segment_bytes=ALL)
    made = [SpoolRecord(number, 1, bytes([number]) * 500) for number in range(100)]
    log.append(made)
    size = RECORD.size + 500
    bad = range(20_480, 20_480 + 4096)
    pread = os.pread

    def failing(descriptor: int, count: int, offset: int) -> bytes:
        if offset < bad.stop and bad.start < offset + count:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", failing)
    found = log.read(ALL)
    places = [SEGMENT.size + number * size for number in range(100)]
    readable = [n for n, at in enumerate(places) if at + size <= bad.start or at >= bad.stop]
    assert [record.position for record in found] == readable
    assert log.lost == 100 - len(readable)
    log.close()


class Faults:
    """Makes writes fail: by call, after some bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        """Bytes that may still be written."""
        self.sync_fails = self.cut_fails = False
        self._write, self._sync, self._cut = os.write, os.fdatasync, os.ftruncate
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "fdatasync", self.sync)
        monkeypatch.setattr(os, "ftruncate", self.cut)

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.room is None:
            return self._write(descriptor, data)
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self._write(descriptor, data[: self.room])
        self.room -= count
        return count

    def sync(self, descriptor: int) -> None:
        if self.sync_fails:
            raise OSError(errno.EIO, "Input/output error")
        self._sync(descriptor)

    def cut(self, descriptor: int, size: int) -> None:
        if self.cut_fails:
            raise OSError(errno.EIO, "Input/output error")
        self._cut(descriptor, size)


@pytest.mark.parametrize("cut_fails", [False, True])
@pytest.mark.parametrize("room", [0, 1, 27, 28, 29, 100, None])
def test_a_failed_write_leaves_nothing_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int | None, cut_fails: bool
) -> None:
    log = open_log(tmp_path, segment_bytes=ALL, synchronous="FULL")
    faults = Faults(monkeypatch)
    made = fill(log, 5)
    for _ in range(3):
        faults.room, faults.sync_fails, faults.cut_fails = room, room is None, cut_fails
        failed = [SpoolRecord(log.end, 1, b"failed" * 20), SpoolRecord(log.end + 1, 1, b"failed" * 20)]
        for _ in range(2):
            with pytest.raises(StoreError, match=r"spool .* cannot be written: (No space left|Input/output)"):
                log.append(failed)
        faults.room, faults.sync_fails = None, False
        made += fill(log, 5)
    assert log.read(ALL) == made
    assert log.lost == 0
    log.close()
    assert read_all(tmp_path) == made


@pytest.fixture(params=["disk", "quota"])
def full_later(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with room for 256 KiB; where only root may mount, others get the quota twice."""
    if request.param == "quota" or os.geteuid() != 0:
        Faults(monkeypatch).room = 256 * 1024
        yield tmp_path
        return
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def until_full(log: SpoolLog) -> list[SpoolRecord]:
    made: list[SpoolRecord] = []
    while len(made) < 10_000:
        try:
            made += fill(log, 20, together=20)
        except StoreError:
            return made
    pytest.fail("the disk has no end")


def test_a_full_disk_is_survived(full_later: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(full_later / "s", segment_bytes=20_000, synchronous="FULL")
    made = until_full(log)
    assert made
    assert until_full(log) == [], "it stays full"
    found = log.read(60_000)
    assert found == made[: len(found)]
    log.acknowledge(found[-1].end)  # on a real disk that is the room
    monkeypatch.undo()
    more = fill(log, 20)
    log.close()
    assert read_all(full_later / "s") == [*made[len(found) :], *more]


def test_two_processes_do_not_share_a_spool(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(StoreError, match="another process uses it"):
        open_log(tmp_path)
    log.close()
    open_log(tmp_path).close()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"file/s cannot be opened: Not a directory"):
        open_log(tmp_path / "file" / "s")


WRITER = """
import sys
from pathlib import Path
from mqtt_trio.archive.spool_log import SpoolLog
from mqtt_trio.archive.spool_records import SpoolRecord
log = SpoolLog(Path(sys.argv[1]), segment_bytes=200_000, synchronous="OFF")
log.open()
while True:
    end = log.end
    log.append([SpoolRecord(end + n, 1, b"%d " % (end + n) * 50) for n in range(50)])
    print(log.end, flush=True)
"""


def test_nothing_that_was_appended_is_lost_to_kills(tmp_path: Path) -> None:
    """Five processes write where the one before was killed; each one's last word is the least that must be there."""
    said = 0
    for patience in (1, 7, 30, 90, 250):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdout is not None
            for _ in range(patience):
                said = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            said = max([said, *(int(line) for line in process.stdout if line.endswith("\n"))])
    found = read_all(tmp_path)
    assert [record.position for record in found] == list(range(len(found)))
    assert all(record.data == b"%d " % record.position * 50 for record in found)
    assert len(found) >= said > 300 * 50
    assert kept_aside(tmp_path) == []


def test_gateways_get_the_same_class() -> None:
    from mqtt_trio.archive import spool

    assert Spool is spool.Spool
