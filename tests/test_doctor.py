"""`mqtt-trio doctor` as a whole: one line a check, and the exit code [F3]."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path

import pytest

from mqtt_trio import __main__ as command_line
from mqtt_trio.archive.spool import SpoolRecord, spool_path
from mqtt_trio.archive.spool_log import SpoolLog
from mqtt_trio.server.sqlite_store import FILE_NAME
from tests.certificates import Certificates

LINE = re.compile(r"(ok|note|PROBLEM) +(\S.*?): (\S.*)")


def doctor(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str
) -> tuple[int, list[tuple[str, str, str]]]:
    """Return the exit code and each line as (verdict, about, text)."""
    code = command_line.main(["doctor", "--data", str(tmp_path), *arguments])
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith("# mqtt-trio ")
    matches = [LINE.fullmatch(line) for line in lines]
    found = [(match[1], match[2], match[3]) for match in matches if match is not None]
    assert len(found) == len(lines), lines
    problems = sum(verdict == "PROBLEM" for verdict, _, _ in found)
    assert last == {0: "no problem found", 1: "1 problem found"}.get(problems, f"{problems} problems found")
    assert code == (1 if problems else 0)
    return code, found


def test_a_first_look(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found = doctor(capsys, tmp_path / "new")
    assert code == 0
    assert [verdict for verdict, _, _ in found] == ["note", "note"]
    assert not (tmp_path / "new").exists(), "a doctor makes nothing"


def test_places_where_no_store_can_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, found = doctor(capsys, tmp_path / "file")
    assert (code, found[0][:2]) == (1, ("PROBLEM", f"directory {tmp_path / 'file'}"))
    assert found[0][2].startswith("is no directory -> ")
    (tmp_path / FILE_NAME).mkdir()
    code, found = doctor(capsys, tmp_path)
    assert (code, found[1][:2]) == (1, ("PROBLEM", f"session store {tmp_path / FILE_NAME}"))


def test_a_directory_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # rights would not stop root
    code, found = doctor(capsys, tmp_path)
    assert code == 1
    assert (
        "PROBLEM",
        f"directory {tmp_path}",
        "cannot be written -> let the user that runs the broker write there",
    ) in found


def test_no_session_store_is_looked_for_where_there_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, found = doctor(capsys, tmp_path, "--set", "Persistence.Store=MEMORY")
    assert [about for _, about, _ in found] == [f"directory {tmp_path}"]


def test_a_spool_that_waits_and_one_that_is_damaged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        log = SpoolLog(spool_path(tmp_path, name), segment_bytes=1000)
        log.open()
        log.append([SpoolRecord(0, 3, b"x" * 100)])
        log.close()
    (segment,) = spool_path(tmp_path, "b").glob("*.seg")
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    code, found = doctor(capsys, tmp_path)
    assert code == 1
    spools = [(verdict, text) for verdict, about, text in found if about.startswith("spool ")]
    assert spools[0][0] == "note"
    assert spools[0][1].startswith("3 messages wait, ")
    assert spools[1][1].startswith("0 messages wait, ")
    assert spools[2][0] == "PROBLEM"
    assert "does not match its checksum" in spools[2][1]


def test_a_spool_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    directory = spool_path(tmp_path, "a")
    (directory / "0.seg").mkdir(parents=True)
    code, found = doctor(capsys, tmp_path)
    assert code == 1
    assert (
        "PROBLEM",
        f"spool {directory}",
        "cannot be read: Is a directory -> let the broker's user read it",
    ) in found


def test_certificates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    good, old = certificates.server(), certificates.issue("localhost", not_after=_in_the_past())
    sets = [f"Listeners.0.Tls.CertFile={good.cert_file}", f"Listeners.0.Tls.KeyFile={good.key_file}"]
    sets += [f"Listeners.1.Tls.CertFile={old.cert_file}", f"Listeners.1.Tls.KeyFile={old.key_file}"]
    sets += [f"Http.Tls.CertFile={good.cert_file}", "Http.Tls.KeyFile=/nowhere/key.pem"]
    code, found = doctor(capsys, tmp_path, *(part for one in sets for part in ("--set", one)))
    assert code == 1
    lines = {about: (verdict, text) for verdict, about, text in found}
    assert lines["Listeners[0].Tls"][0] == "ok"
    assert lines["Listeners[1].Tls"][0] == "PROBLEM"
    assert "expired" in lines["Listeners[1].Tls"][1]
    assert lines["Http.Tls"] == ("PROBLEM", "KeyFile: cannot read '/nowhere/key.pem': No such file or directory")


def _in_the_past() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3)


def test_kafka_is_part_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sets = ("--set", "Kafka.Servers=127.0.0.1:1", "--set", "Kafka.Bus.Enabled=true")
    code, found = doctor(capsys, tmp_path, *sets)
    assert code == 1
    assert ("PROBLEM", "Kafka 127.0.0.1:1 connection") in [(verdict, about) for verdict, about, _ in found]
    assert "-> is Kafka running" in found[-2][2]
