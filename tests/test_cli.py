"""The command line, the summary and the log lines [F2, F3]; the processes that it starts are real ones."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import attrs
import pytest

from mqtt_trio import __main__ as command_line
from mqtt_trio import __version__
from mqtt_trio.config import LoggingOptions, Overrides, load_config
from mqtt_trio.logs import JsonFormatter, TextFormatter, configure, levels
from mqtt_trio.summary import ArchiveSummary, Running, summary


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("[Shutdown]\nTimeout = 5\n")
    return path


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("MQTT_TRIO__")]:
        monkeypatch.delenv(name)


# Arguments


def test_serve_is_the_default_command() -> None:
    assert command_line.parse([]).command == "serve"
    assert command_line.parse(["--port", "0"]).port == 0
    assert command_line.parse(["serve", "--ws-port", "1"]).ws_port == 1
    assert command_line.parse(["check", "--set", "A.B=1", "--set", "C.D=2"]).sets == ["A.B=1", "C.D=2"]


@pytest.mark.parametrize("arguments", [["nonsense"], ["--port", "70000"], ["--port", "x"], ["check", "--bad"]])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    assert "usage: mqtt-trio" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mqtt-trio {__version__}\n"


def test_check_shows_values_with_their_origin(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MQTT_TRIO__LIMITS__SESSIONS", "7")
    monkeypatch.setenv("MQTT_TRIO__HTTP__PORT", "9000")
    assert command_line.main(["check", "--config", str(config), "--set", "Node.Id=n", "--port", "1884"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {re.sub(r"\s+", " ", line) for line in lines}
    assert {
        "[Node]",
        'Id = "n" # command line',
        "Port = 1884 # command line",
        "Port = 8083 # default",
        "Sessions = 7 # environment MQTT_TRIO__LIMITS__SESSIONS",
        "Timeout = 5 # config.toml:Shutdown.Timeout",
        "Port = 9000 # environment MQTT_TRIO__HTTP__PORT",
    } <= shown


def test_mistakes_are_lines_and_78(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("[Limits]\nSession = 1\nQueueMessages = -1\n")
    assert command_line.main(["check", "--config", str(config)]) == 78
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "mqtt-trio: 2 mistakes in the configuration",
        "  Limits.QueueMessages: expected a value >= 0, got -1",
        '  Limits.Session: unknown key, did you mean "Sessions"?',
    ]


def test_a_missing_file_is_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--config", str(tmp_path / "absent.toml")]) == 78
    assert "absent.toml: No such file or directory" in capsys.readouterr().err


def test_check_asks_the_client_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["check", "--set", "Kafka.Producer.no_such_option=1"]) == 78
    assert "no_such_option" in capsys.readouterr().err


def test_check_tells_of_groups_that_would_end_a_start(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = '[[ArchiveGroups]]\nName = "{0}"\nStore = "KAFKA"\nKafkaTopic = "{1}"\n'
    config.write_text(group.format("A", "mqtt.messages") + group.format("B", "mqtt.dlq") + group.format("C", "mqtt.c"))
    assert command_line.main(["check", "--config", str(config)]) == 78
    assert capsys.readouterr().err.splitlines() == [
        "mqtt-trio: 2 mistakes in the configuration",
        "  archive group A: KafkaTopic = mqtt.messages is the topic of Kafka.Topics.Messages; name another; without "
        "the stream of messages: [Kafka.Topics.Messages] Enabled = false",
        "  archive group B: KafkaTopic = mqtt.dlq is the topic of Kafka.Topics.Dlq; name another",
    ]


def test_an_interrupted_command_is_no_success(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gateways.kafka.topic_commands.open_admin", interrupted)
    assert command_line.main(["topics", "plan", "--set", "Kafka.Servers=k"]) == 1
    assert capsys.readouterr().err == "mqtt-trio: topics was interrupted\n"


# The process


@pytest.fixture
def start(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def run(start: list[subprocess.Popen[str]], *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "mqtt_trio", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    start.append(process)
    return process


def read_until(stream: IO[str] | None, pattern: str) -> str:
    """Read lines until one matches; the process ending instead is an error, and the test's time is limited."""
    assert stream is not None
    seen = ""
    for line in stream:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f"no line matches {pattern!r}:\n{seen}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_until_a_signal(start: list[subprocess.Popen[str]], tmp_path: Path, number: signal.Signals) -> None:
    group = ["--set", "ArchiveGroups.0.Name=All", "--set", "ArchiveGroups.0.Filter=#"]
    process = run(start, "--port", "0", "--ws-port", "0", "--data", str(tmp_path / "data"), *group)
    text = read_until(process.stdout, "not built yet")
    port = re.search(r"tcp 127\.0\.0\.1:(\d+)", text)
    assert port is not None
    assert "this machine only" in text
    assert "All: # to" in text
    with socket.create_connection(("127.0.0.1", int(port[1])), timeout=10) as client:
        client.sendall(bytes.fromhex("101000044d5154540502003c000003616263"))  # CONNECT 5.0, Client Identifier abc
        assert client.recv(1) == b"\x20"  # CONNACK
        process.send_signal(number)
        rest = b""
        while data := client.recv(4096):
            rest += data
    assert b"\xe0" in rest, "a 5.0 client gets a DISCONNECT [MQTT5-4.13.2-1]"
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in errors
    stopped = re.search(r"stopped (\{.*\})", errors)
    assert stopped is not None
    assert json.loads(stopped[1])["packets_received"] == 1
    assert list((tmp_path / "data").glob("*.sqlite3"))


def test_a_port_in_use_is_1_and_one_line(start: list[subprocess.Popen[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = run(start, "--port", str(port), "--ws-port", "0")
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("mqtt-trio: Listeners[0] (tcp on 127.0.0.1:")
    assert "the port is in use" in line


def test_a_data_directory_that_cannot_be_is_1_and_one_line(start: list[subprocess.Popen[str]], config: Path) -> None:
    group = ["--set", "ArchiveGroups.0.Name=All"]
    process = run(start, "--port", "0", "--ws-port", "0", "--data", str(config / "x"), *group)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("mqtt-trio: ")


# The summary


def test_summary_of_the_defaults() -> None:
    loaded = load_config(None, {}, Overrides(sets=["Node.Id=n", "ArchiveGroups.0.Name=a"]))
    loaded = attrs.evolve(loaded, inactive=("Kafka.Later.Key",))
    lines = summary(loaded, Running(listeners=["tcp 127.0.0.1:1883: this machine only (loopback address)"]))
    assert lines[0] == f"mqtt-trio {__version__}, node n, configuration: defaults (no --config)"
    text = "\n".join(lines)
    for expected in (
        r"listeners +tcp 127\.0\.0\.1:1883",
        r"archive +none \(\[\[ArchiveGroups\]\]",
        r"persistence +.*in memory.*SQLITE",
        r"off +Kafka: .*\[Kafka\.Bus\] Enabled = true",
        r"HTTP: health, readiness, metrics \(\[Http\] Port = 8080\)",
        r"not active yet +Kafka\.Later\.Key",
    ):
        assert re.search(expected, text), expected


def test_summary_of_archives_and_gateways() -> None:
    sets = ["ArchiveGroups.0.Name=a", "ArchiveGroups.1.Name=b", "ArchiveGroups.1.Enabled=false"]
    loaded = load_config(None, {}, Overrides(sets=sets))
    archive = ArchiveSummary(group=loaded.options.archive_groups[0], store="SQLite x, kept for 7 d")
    text = "\n".join(summary(loaded, Running(archives=[archive], gateways={"Kafka": ["Kafka k:1: away", "bus: off"]})))
    assert "a: # to SQLite x, kept for 7 d" in text
    assert "disabled: b (Enabled = true)" in text
    assert re.search(r"kafka +Kafka k:1: away\n +bus: off", text)


# Log lines


def record(message: str) -> logging.LogRecord:
    made = logging.LogRecord("mqtt_trio.x", logging.INFO, "", 0, message, (), None)
    made.created, made.msecs = 1_700_000_000.0, 7.0
    return made


def test_text_lines_cannot_be_forged() -> None:
    line = TextFormatter().format(record("client a\n2026 INFO fake\x1b[31m\u2028 ü"))
    assert line == r"2023-11-14T22:13:20.007Z INFO mqtt_trio.x: client a\n2026 INFO fake\x1b[31m\u2028 ü"


def test_json_lines() -> None:
    line = JsonFormatter().format(record('say "hi"\n'))
    assert "\n" not in line
    assert json.loads(line) == {
        "timestamp": "2023-11-14T22:13:20.007Z",
        "level": "INFO",
        "logger": "mqtt_trio.x",
        "message": 'say "hi"\n',
    }


def test_levels_by_logger_with_aliases() -> None:
    assert levels({"org.apache.kafka": "warn", "at.rocworks.kafka.bus": "Debug", "mqtt_trio": "ERROR"}) == {
        "kafka": "WARNING",
        "gateways.kafka.bus": "DEBUG",
        "mqtt_trio": "ERROR",
    }
    assert levels({"org.apache.kafka.clients": "INFO", "org.apache.kafka": "WARN"}) == {"kafka": "INFO"}


@pytest.mark.parametrize(
    "name, real",
    [
        ("org.apache.kafka.net", "kafka.net"),
        ("org.apache.kafka.clients.NetworkClient", "kafka.net"),
        ("org.apache.kafka.clients.consumer.internals.Fetcher", "kafka.consumer.fetcher"),
        ("org.apache.kafka.clients.consumer.KafkaConsumer", "kafka.consumer"),
        ("org.apache.kafka.clients.producer.internals.Sender", "kafka.producer.sender"),
        ("org.apache.kafka.common.security.ssl", "kafka.net.sasl"),
        ("org.apache.kafkaesque", "org.apache.kafkaesque"),
        ("kafka.producer", "kafka.producer"),
    ],
)
def test_names_of_java_s_loggers(name: str, real: str) -> None:
    assert levels({name: "DEBUG"}) == {real: "DEBUG"}


def test_configure_replaces_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        configure(LoggingOptions(level="warning", format="json", loggers={"test.cli": "DEBUG"}))
        configure(LoggingOptions(level="WARNING", format="json", loggers={"test.cli": "DEBUG"}))
        logging.getLogger("test.cli").debug("one")
        logging.getLogger("test.other").info("two")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("test.cli").setLevel(logging.NOTSET)
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["one"]
