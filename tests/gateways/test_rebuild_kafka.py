"""`mqtt-trio rebuild` [K19] from what our archive wrote to a real Kafka: equal to the original, killed or not."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import kafka as client
import pytest
import trio

from gateways.kafka.avro import AvroMapper, schema_text
from mqtt_trio.__main__ import main
from mqtt_trio.archive.sqlite import archive_path
from mqtt_trio.broker.journal import frame_of
from mqtt_trio.gateway import Message
from mqtt_trio.server.sqlite_store import FILE_NAME
from mqtt_trio.server.store_file import lock_file
from tests.gateway_support import LIMIT
from tests.kafka_support import KafkaNode, unique_name
from tests.rebuild_support import (
    GROUP,
    Original,
    command,
    count_rows,
    first_difference,
    last_values,
    make_topic,
    retained_of,
    rows_of,
    run_and_kill,
    write_archives,
    write_config,
)
from tests.registry_support import RegistryServer

pytestmark = pytest.mark.kafka
COUNT = 20_000


async def test_it_equals_the_original_although_it_was_killed_half_way(kafka: KafkaNode, tmp_path: Path) -> None:
    topic = unique_name("archive")
    original = await write_archives(kafka.servers, topic, tmp_path / "original", COUNT)
    config = write_config(tmp_path / "node", kafka.servers)
    data = tmp_path / "node" / "data"
    history = archive_path(data, GROUP)
    counts = [0]
    for _ in range(2):
        counts.append(await trio.to_thread.run_sync(run_and_kill, config, topic, history, counts[-1]))
    assert 0 < counts[1] < counts[2] < COUNT
    refused = await trio.to_thread.run_sync(serve, config)
    assert refused.returncode == 1, refused.stderr
    told = f"`mqtt-trio rebuild --config {config} --from {topic} --retained --group {GROUP}`"
    assert f"Go on with {told}. " in refused.stderr
    done = await trio.to_thread.run_sync(finish, config, topic, "--retained", "--group", GROUP)
    assert done.returncode == 0, done.stderr
    assert f"An unfinished rebuild from Kafka topic {topic} goes on." in done.stderr
    assert "%" not in done.stderr, "a progress bar, though nobody sees it"
    assert_equal(original, data)
    again = await trio.to_thread.run_sync(finish, config, topic)
    assert again.returncode == 1
    assert again.stderr == (
        f"mqtt-trio: session store {data / FILE_NAME} is not empty ({len(original.retained)} retained messages): only "
        "an empty one is rebuilt; move it away, or choose another place with --set Persistence.Path=DIR\n"
    )
    assert_equal(original, data)


def finish(config: Path, topic: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command(config, topic), *more], capture_output=True, text=True, timeout=LIMIT, check=False)


def serve(config: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mqtt_trio", "serve", "--config", str(config), "--port", "0"]
    return subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, check=False)


def assert_equal(original: Original, data: Path) -> None:
    history = archive_path(data, GROUP)
    assert first_difference(original.history, history) is None
    assert last_values(original.history) == last_values(history)
    assert retained_of(data) == {
        topic: (frame_of(message), message.client_id, round(message.published_at * 1000))
        for topic, message in original.retained.items()
    }


class Setting:
    """A topic with some records, and the command on it."""

    def __init__(self, kafka: KafkaNode, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.servers = kafka.servers
        self.topic = unique_name("archive")
        self.folder = folder
        self.data = folder / "data"
        self.history = archive_path(self.data, GROUP)
        self.config = write_config(folder, kafka.servers)
        make_topic(kafka.servers, self.topic, 3)

    def write(self, *values: bytes, at: float | None = None) -> None:
        producer = client.KafkaProducer(bootstrap_servers=self.servers)
        moment = round((at or time.time()) * 1000)
        for number, value in enumerate(values):
            producer.send(self.topic, value, partition=number % 3, timestamp_ms=moment + number)
        producer.flush(LIMIT)
        producer.close()

    def run(self, *more: str, topic: str | None = None) -> int:
        self.capsys.readouterr()
        return main(["rebuild", "--config", str(self.config), "--from", topic or self.topic, *more])

    @property
    def errors(self) -> str:
        return self.capsys.readouterr().err

    def payloads(self) -> list[bytes]:
        return [row[2] for row in rows_of(self.history)]


@pytest.fixture
def setting(kafka: KafkaNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Setting:
    return Setting(kafka, tmp_path, capsys)


def value(payload: str, topic: str = "a/b", **more: object) -> bytes:
    retained = str(more.get("retained", False)).lower()
    return f'{{"topic": "{topic}", "payload": "{payload}", "retained": {retained}}}'.encode()


def test_records_come_in_the_order_of_their_times_and_others_are_told(setting: Setting) -> None:
    setting.write(value("1", retained=True), b"garbage", value("2", retained=True), b"", value("3", topic="$SYS/x"))
    assert setting.run() == 0
    captured = setting.capsys.readouterr()
    assert setting.payloads() == [b"1", b"2"]
    assert {topic: frame[-1:] for topic, (frame, _, _) in retained_of(setting.data).items()} == {"a/b": b"2"}
    assert captured.out.splitlines()[:2] == [
        "retained messages: 1 topics have one",
        f"history of group {GROUP}: 2 messages are in it",
    ]
    assert captured.out.splitlines()[2].startswith(f"5 records of {setting.topic} were read in ")
    assert f"{setting.topic}-1@0 holds no message and is left out: not JSON" in captured.err
    assert captured.err.count("is left out") == 3


def test_only_what_is_wanted(setting: Setting) -> None:
    setting.config.write_text(
        setting.config.read_text()
        + 'Retention = 3600\n[[ArchiveGroups]]\nName = "Two"\nFilter = ["a/+", "b"]\nStore = "SQLITE"\n'
    )
    setting.write(value("old"), value("old", topic="b"), at=time.time() - 7200)
    setting.write(value("new"), value("x", topic="c"), value("y", topic="b", retained=True))
    assert setting.run("--group", "Two") == 0
    assert not (setting.data / FILE_NAME).exists()
    assert not setting.history.exists()
    two = archive_path(setting.data, "Two")
    assert [(row[1], row[2]) for row in rows_of(two)] == [("a/b", b"old"), ("b", b"old"), ("a/b", b"new"), ("b", b"y")]
    assert setting.run("--retained", "--group", GROUP) == 0  # these are still empty
    assert "2 are older than Retention" in setting.capsys.readouterr().out
    assert setting.payloads() == [b"new", b"x", b"y"]
    assert list(retained_of(setting.data)) == ["b"]
    with pytest.raises(SystemExit, match="2"):
        main(["rebuild"])
    assert setting.run("--group", "Three") == 2
    assert "no embedded store for history of group Three in this configuration; there is: retained" in setting.errors


def test_where_it_would_do_harm_it_refuses(setting: Setting) -> None:
    setting.write(value("1", retained=True))
    lock = lock_file(setting.data / FILE_NAME)
    try:
        assert setting.run() == 1
        assert "is in use by process" in setting.errors
    finally:
        os.close(lock)
    assert setting.run("--group", GROUP) == 0
    with closing(sqlite3.connect(setting.history)) as db:  # a broker without [Persistence] has it open like that
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("SELECT count(*) FROM messages").fetchone()
        assert setting.run("--group", GROUP) == 1
        assert f"archive store {setting.history} is in use: end the broker" in setting.errors
    assert setting.run("--group", GROUP) == 1
    assert f"archive store {setting.history} is not empty" in setting.errors
    assert count_rows(setting.history) == 1
    setting.history.write_bytes(b"no database, and longer than the hundred bytes of a header" * 10)
    assert setting.run("--group", GROUP) == 1
    assert "cannot be opened: file is not a database" in setting.errors
    assert setting.history.read_bytes().startswith(b"no database")
    setting.history.unlink()
    assert setting.run(topic="no-such-topic") == 1
    assert "there is no topic no-such-topic, or this user may not see it" in setting.errors
    setting.config.write_text('[Kafka]\nServers = "127.0.0.1:1"\n[Persistence]\nStore = "MEMORY"\n')
    assert setting.run() == 2
    assert "no store to fill" in setting.errors


def test_an_unfinished_one_is_of_one_topic(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.write(*(value(str(number)) for number in range(9)))
    with monkeypatch.context() as patched:
        patched.setattr("gateways.kafka.rebuild_command.BATCH_RECORDS", 2)
        patched.setattr("gateways.kafka.rebuild_command.read", failing_after(5))
        with pytest.raises(ZeroDivisionError):
            setting.run()
    assert setting.payloads() == [b"0", b"1", b"2", b"3"]
    other = unique_name("archive")
    make_topic(setting.servers, other, 3)
    assert setting.run(topic=other) == 1
    assert f"an unfinished rebuild of these stores is from Kafka topic {setting.topic}: finish it" in setting.errors
    setting.write(value("later"))  # came behind the start: not a part of it
    assert setting.run() == 0
    assert setting.payloads() == [str(number).encode() for number in range(9)]


def test_a_topic_that_was_made_again_is_another_one(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.write(*(value(str(number)) for number in range(9)))
    with monkeypatch.context() as patched:
        patched.setattr("gateways.kafka.rebuild_command.BATCH_RECORDS", 2)
        patched.setattr("gateways.kafka.rebuild_command.read", failing_after(5))
        with pytest.raises(ZeroDivisionError):
            setting.run()
    admin = client.KafkaAdminClient(bootstrap_servers=setting.servers)
    admin.delete_topics([setting.topic])
    until = time.monotonic() + LIMIT
    while setting.topic in admin.list_topics():
        assert time.monotonic() < until
    admin.close()
    make_topic(setting.servers, setting.topic, 3)
    assert setting.run() == 1
    assert "was deleted and made again since the rebuild began" in setting.errors


def failing_after(count: int) -> object:
    from gateways.kafka import rebuild_command

    real, left = rebuild_command.read, [count]

    def read(reader: object, record: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise ZeroDivisionError
        return real(reader, record)  # type: ignore[arg-type]

    return read


@pytest.mark.parametrize("registered", [False, True])
def test_avro_records_are_read_with_the_groups_format(
    setting: Setting, request: pytest.FixtureRequest, registered: bool
) -> None:
    mapper = AvroMapper(setting.topic, "node-1", registered=registered)
    group = f'[[ArchiveGroups]]\nName = "K"\nStore = "KAFKA"\nKafkaTopic = "{setting.topic}"\nFormat = "AVRO"\n'
    if registered:
        registry: RegistryServer = request.getfixturevalue("schema_registry")
        answer = registry.ask("POST", f"/subjects/{setting.topic}-value/versions", {"schema": schema_text()})
        mapper.use_id(answer["id"])
        group += f'[Kafka.SchemaRegistry]\nUrl = "{registry.url}"\n'
    setting.config.write_text(setting.config.read_text() + group)
    messages = [Message("a/b", bytes([n, 255]), 1, True, client_id="c", published_at=time.time()) for n in range(3)]
    producer = client.KafkaProducer(bootstrap_servers=setting.servers)
    for record in map(mapper.record, messages):
        producer.send(setting.topic, record.value, record.key, list(record.headers), timestamp_ms=record.timestamp_ms)
    producer.flush(LIMIT)
    producer.close()
    assert setting.run() == 0
    assert setting.payloads() == [message.payload for message in messages]
    assert list(retained_of(setting.data)) == ["a/b"]
