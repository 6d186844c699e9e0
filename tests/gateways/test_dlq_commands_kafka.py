"""`mqtt-trio dlq list|redrive` with a real Kafka [K12]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import kafka as client
import pytest

from gateways.kafka import admin
from gateways.kafka.admin import Admin, sole_member
from gateways.kafka.dlq import (
    ID_HEADER,
    DeadLetter,
    encode_letter,
    iso_time,
    letter_headers,
)
from gateways.kafka.dlq_redrive import GROUP
from gateways.kafka.dlq_writer import redriven_record
from gateways.kafka.options import KafkaOptions
from gateways.kafka.partitions import partition_for
from gateways.kafka.topic_plan import TopicPlan
from gateways.kafka.topics import survey
from mqtt_trio.__main__ import main
from tests.gateways.dlq_letters import T0, consumed, letter, pending
from tests.kafka_support import KafkaNode, unique_name

pytestmark = pytest.mark.kafka


class Setting:
    """A topic of letters and an archive, and the command on them."""

    def __init__(self, kafka: KafkaNode, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.servers = kafka.servers
        self.options = KafkaOptions(servers=kafka.servers)
        self.dlq, self.archive = unique_name("dlq"), unique_name("archive")
        self.config = folder / "config.toml"
        self.config.write_text(
            f'[Kafka]\nServers = "{kafka.servers}"\n[Kafka.Topics.Dlq]\nName = "{self.dlq}"\n'
            f'[[ArchiveGroups]]\nName = "A"\nStore = "KAFKA"\nKafkaTopic = "{self.archive}"\n'
        )
        self.make(self.dlq, 3)

    def make(self, topic: str, partitions: int, **config: str) -> None:
        properties = {"retention.ms": "-1", **{key.replace("_", "."): value for key, value in config.items()}}
        plan = TopicPlan(name=topic, partitions=partitions, config=properties)
        assert survey(lambda: Admin(self.options), [plan]).refused == {}

    def put(self, *letters: DeadLetter) -> None:
        producer = client.KafkaProducer(bootstrap_servers=self.servers)
        for each in letters:
            headers = list(letter_headers(each))
            producer.send(self.dlq, encode_letter(each), each.id.encode(), headers, timestamp_ms=each.dead_at_ms)
        producer.flush(30)
        producer.close()

    def run(self, *arguments: str) -> int:
        self.capsys.readouterr()
        return main(["dlq", *arguments[:1], "--config", str(self.config), *arguments[1:]])

    def listed(self, *arguments: str) -> list[dict[str, Any]]:
        assert self.run("list", "--json", *arguments) == 0
        return [json.loads(line) for line in self.capsys.readouterr().out.splitlines()]

    def archived(self) -> list[Any]:
        consumer = client.KafkaConsumer(bootstrap_servers=self.servers, group_id=None)
        try:
            partitions = [client.TopicPartition(self.archive, n) for n in consumer.partitions_for_topic(self.archive)]
            consumer.assign(partitions)
            consumer.seek_to_beginning()
            left = sum(consumer.end_offsets(partitions).values())
            found: list[Any] = []
            while len(found) < left:
                for records in consumer.poll(1000).values():
                    found += records
        finally:
            consumer.close()
        return found

    def errors(self) -> list[str]:
        return self.capsys.readouterr().err.splitlines()


@pytest.fixture
def setting(kafka: KafkaNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Setting:
    return Setting(kafka, tmp_path, capsys)


def test_letters_are_listed(setting: Setting) -> None:
    assert setting.run("list") == 0
    assert setting.errors() == ["No dead letter matches."]
    setting.put(*(letter(number, setting.archive) for number in range(6)), consumed(6))
    producer = client.KafkaProducer(bootstrap_servers=setting.servers)
    producer.send(setting.dlq, b"\x1b[2J garbage").get(30)
    producer.close()
    assert setting.run("list", "--limit", "3") == 0
    captured = setting.capsys.readouterr()
    titles, *rows = captured.out.splitlines()
    assert titles.split() == ["TIME", "ID", "REASON", "STAGE", "SOURCE", "TARGET", "SIZE", "REDRIVE", "ERROR"]
    assert [row.split()[2:] for row in rows] == [
        ["no_topic", "archive", "sensors/1", setting.archive, "1", "yes", "no", "topic"],
        ["no_topic", "archive", "sensors/2", setting.archive, "1", "yes", "no", "topic"],
        ["malformed", "consume", "monster-0@6", "-", "1", "no", "no", "topic"],
    ]
    assert "1 record is no dead letter that this version can read" in captured.err
    assert "\x1b" not in captured.err
    shown = setting.listed("--topic", "sensors/0", "--since", iso_time(T0 + 3))
    assert [(one["id"], one["redriven"]) for one in shown] == [(letter(3, setting.archive).id, None)]
    assert "record" not in shown[0]
    (whole,) = setting.listed("--contents", "--id", letter(2, setting.archive).id[:10].upper())
    assert whole["record"]["value"] == {"text": '{"n":2}'}


def test_records_are_written_once(setting: Setting) -> None:
    setting.make(setting.archive, 4)
    letters = [letter(number, setting.archive) for number in range(6)]
    setting.put(*letters, letters[0], consumed(6), letter(7, setting.archive, record=None, redrivable=False))
    assert setting.run("redrive") == 0
    captured = setting.capsys.readouterr()
    assert captured.out.splitlines()[1].split() == [setting.archive, "6", "0"]
    assert captured.err.splitlines() == [
        "1 cannot be redriven: not to be written again",
        "1 cannot be redriven: without their record",
        "Nothing was written: --execute does it.",
    ]
    assert setting.archived() == []
    assert setting.run("redrive", "--execute", "--topic", "sensors/0") == 0
    assert setting.capsys.readouterr().out.splitlines()[-1] == "2 of 2 records were written."
    assert setting.run("redrive", "--execute") == 0
    captured = setting.capsys.readouterr()
    assert captured.out.splitlines()[-1] == "4 of 4 records were written."
    assert "2 were redriven before" in captured.err
    assert setting.run("redrive", "--execute") == 0
    assert setting.capsys.readouterr().out == "There is nothing to write.\n"
    found = sorted(setting.archived(), key=lambda record: record.timestamp)
    assert [(r.key, r.value, dict(r.headers)[ID_HEADER], r.timestamp) for r in found] == [
        (b"sensors/%d" % (n % 3), b'{"n":%d}' % n, letters[n].id.encode(), T0 - 1000 + n) for n in range(6)
    ]
    assert {(r.key, r.partition) for r in found} == {(r.key, partition_for(r.key, 4)) for r in found}
    redriven = {one["id"]: one["redriven"] for one in setting.listed()}
    assert redriven[letters[5].id] == f"{setting.archive}-{found[5].partition}@{found[5].offset}"


def test_what_an_interrupted_redrive_wrote_is_found(setting: Setting) -> None:
    setting.make(setting.archive, 4)
    setting.put(letter(1, setting.archive), letter(2, setting.archive))
    record = redriven_record(attrs.evolve(pending(1), letter=letter(1, setting.archive)))
    producer = client.KafkaProducer(bootstrap_servers=setting.servers)
    for number in range(3):  # others write there all the time
        producer.send(setting.archive, b"x", b"other", timestamp_ms=T0 - 5000 + number)
    producer.send(setting.archive, record.value, record.key, list(record.headers), timestamp_ms=record.timestamp_ms)
    producer.flush(30)
    producer.close()
    assert setting.run("redrive", "--execute") == 0
    assert setting.capsys.readouterr().out.splitlines()[1:] == [
        f"{setting.archive}         1              1",
        "1 of 1 records were written.",
    ]
    ids = [value for record in setting.archived() for name, value in record.headers if name == ID_HEADER]
    assert sorted(ids) == sorted(letter(n, setting.archive).id.encode() for n in (1, 2))
    assert all(one["redriven"] for one in setting.listed())


def test_only_targets_of_this_configuration_that_exist(setting: Setting) -> None:
    foreign = unique_name("foreign")
    setting.make(foreign, 1)
    setting.put(letter(1, setting.archive), letter(2, foreign))
    assert setting.run("redrive", "--execute") == 0
    assert setting.errors() == [
        f"1 cannot be redriven: for {setting.archive}, which does not exist or may not be seen",
        f"1 cannot be redriven: for {foreign}, which is no topic of this configuration (--target {foreign} if it is "
        "meant)",
    ]
    assert setting.run("redrive", "--execute", "--target", foreign) == 0
    assert [bool(one["redriven"]) for one in setting.listed()] == [False, True]


def test_what_kafka_refuses_stays_a_letter(setting: Setting) -> None:
    setting.make(setting.archive, 2, max_message_bytes="500", cleanup_policy="compact")
    letters = [letter(number, setting.archive) for number in range(6)]
    record = letters[2].record
    assert record is not None
    letters[2] = attrs.evolve(letters[2], record=attrs.evolve(record, key=None))  # compacted: Kafka wants a key
    letters[4] = attrs.evolve(letters[4], record=attrs.evolve(record, value=b"x" * 500))
    setting.put(*letters)
    assert setting.run("redrive", "--execute") == 1
    captured = setting.capsys.readouterr()
    assert captured.out.splitlines()[-1] == "4 of 5 records were written."
    assert "1 failed: InvalidRecordError" in captured.err
    assert f"1 cannot be redriven: larger than max.message.bytes of {setting.archive}, 500" in captured.err
    assert [bool(one["redriven"]) for one in setting.listed()] == [True, True, False, True, False, True]
    assert len(setting.archived()) == 4
    assert setting.run("redrive", "--execute") == 1  # and again: only what is left is tried
    assert setting.capsys.readouterr().out.splitlines()[-1] == "0 of 1 records were written."
    assert len(setting.archived()) == 4


def test_one_redrive_at_a_time(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.make(setting.archive, 1)
    setting.put(letter(1, setting.archive))
    with sole_member(setting.options, GROUP, setting.dlq):
        with monkeypatch.context() as patched:
            patched.setattr(admin, "PLACE_TIMEOUT", 0.5)
            assert setting.run("redrive", "--execute") == 1
        assert "another one is at it (mqtt-trio-" in "".join(setting.errors())
        assert setting.run("redrive") == 0  # looking is free
    assert setting.archived() == []
    assert setting.run("redrive", "--execute") == 0
    assert len(setting.archived()) == 1


def test_a_topic_of_letters_that_is_missing_is_a_failure(setting: Setting) -> None:
    assert setting.run("list", "--set", "Kafka.Topics.Dlq.Name=no-such-dlq") == 1
    assert setting.errors() == ["mqtt-trio: there is no topic no-such-dlq, or this user may not see it"]
