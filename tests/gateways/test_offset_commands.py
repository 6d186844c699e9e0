"""`mqtt-trio offsets show|reset` [K5, K11]: listening for a node with fakes, everything else with a real Kafka."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import kafka as client
import pytest
import trio

from gateways.kafka import build, node_watch, offset_reset
from gateways.kafka.admin import Admin
from gateways.kafka.bus_records import Kind, encode_header
from gateways.kafka.groups import bus_group
from gateways.kafka.node_watch import hears_from
from gateways.kafka.options import BusOptions, KafkaOptions, TopicOptions, TopicsOptions
from gateways.kafka.records import ConsumedRecord
from gateways.kafka.topic_plan import TopicPlan
from gateways.kafka.topics import survey
from mqtt_trio.__main__ import main
from tests.gateway_support import without_stream
from tests.gateways.memory_bus import FakeHost
from tests.kafka_support import KafkaNode, unique_name

LIMIT = 60.0


# Listening for a node


class FakeConsumer:
    """A bus topic with one partition, to which `values` are written one by one; `unread` more never arrive."""

    def __init__(self, values: Sequence[bytes], unread: int = 0) -> None:
        self.values = list(values)
        self.end = len(values) + unread
        self.read = 0

    def partitions(self, topic: str) -> list[int]:
        return [0] if self.end else []

    def end_offsets(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        return dict.fromkeys(partitions, self.end)

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        assert offsets

    def poll(self, timeout: float) -> list[ConsumedRecord]:
        if self.read == len(self.values):
            return []
        self.read += 1
        return [ConsumedRecord("bus", 0, self.read - 1, None, self.values[self.read - 1], (), 0)]

    def position(self, partition: tuple[str, int]) -> int:
        return self.read


def written(kind: Kind, node_id: str) -> bytes:
    return encode_header(kind, bytes(16), node_id, 1)


@pytest.mark.parametrize(
    "values,unread,expected",
    [
        ([], 0, False),
        ([written(Kind.ANNOUNCE, "n")], 0, True),
        ([b"", b"\x09garbage", written(Kind.BATCH, "other"), written(Kind.BATCH, "n")], 0, True),
        ([written(Kind.ANNOUNCE, "other"), b"\xff", written(Kind.GOODBYE, "n")], 0, False),
        ([written(Kind.ANNOUNCE, "other")], 1, None),  # what could not be read might be a word of it
    ],
)
def test_a_node_is_alive_when_it_says_so(
    values: list[bytes], unread: int, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_watch, "CATCH_UP", 0.05)
    assert hears_from(FakeConsumer(values, unread), "bus", "n", lambda _: None, listen=0) is expected
    assert hears_from(FakeConsumer(values, unread), "bus", "n", lambda _: None, listen=0.02) is expected


# Arguments


@pytest.mark.parametrize(
    "arguments,text",
    [
        (["--to", "yesterday"], "expected earliest, latest, an offset or a time such as"),
        (["--to", "-1"], "or a time such as 2026-11-30T12:00:00Z, got '-1'"),
        (["--topic", "a b", "--to", "latest"], "expected TOPIC or TOPIC:PARTITION,PARTITION"),
        (["--to", "latest", "--execute", "--dry-run"], "not allowed with argument"),
        ([], "the following arguments are required: --to"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["offsets", "reset", "--group", "g", "--topic", "t", *arguments])
    assert text in capsys.readouterr().err


def test_times_without_a_zone_are_utc() -> None:
    expected = 1_700_000_000_500
    for text in ("2023-11-14T22:13:20.500Z", "2023-11-14T22:13:20.500", "2023-11-15T00:13:20.500+02:00"):
        assert offset_reset.target(text).timestamp_ms == expected


# A real Kafka

COUNTS = (10, 3, 0)
"""Records in the partitions of the topic; their timestamps are 1,000,000 + number."""


class Setting:
    """A topic with records, and the command on it."""

    def __init__(self, kafka: KafkaNode, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.topic = unique_name("offsets")
        self.group = unique_name("readers")
        self.options = KafkaOptions(servers=kafka.servers)
        self.config = folder / "config.toml"
        self.config.write_text(
            f'[Kafka]\nServers = "{kafka.servers}"\n[Kafka.Bus]\nTopic = "{unique_name("no-bus")}"\n'
        )
        plan = TopicPlan(name=self.topic, partitions=len(COUNTS), config={"message.timestamp.type": "CreateTime"})
        assert survey(lambda: Admin(self.options), [plan]).refused == {}
        producer = client.KafkaProducer(bootstrap_servers=kafka.servers)
        for partition, count in enumerate(COUNTS):
            for number in range(count):
                producer.send(self.topic, b"x", partition=partition, timestamp_ms=1_000_000 + number)
        producer.flush(LIMIT)
        producer.close()

    def run(self, *arguments: str) -> int:
        self.capsys.readouterr()
        return main(["offsets", *arguments[:1], "--config", str(self.config), *arguments[1:]])

    def reset(self, to: str, *more: str, topic: str | None = None, group: str | None = None) -> int:
        return self.run("reset", "--group", group or self.group, "--topic", topic or self.topic, "--to", to, *more)

    @property
    def errors(self) -> str:
        return self.capsys.readouterr().err

    def offsets(self) -> dict[int, int]:
        admin = Admin(self.options)
        try:
            return {number: offset for (_, number), offset in sorted(admin.committed(self.group).items())}
        finally:
            admin.close()

    def commit(self, group: str, offsets: Mapping[int, int]) -> None:
        admin = Admin(self.options)
        try:
            assert admin.commit(group, {(self.topic, number): offset for number, offset in offsets.items()}) == {}
        finally:
            admin.close()


@pytest.fixture
def setting(kafka: KafkaNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Setting:
    return Setting(kafka, tmp_path, capsys)


@pytest.mark.kafka
def test_show_has_what_was_read_and_what_is_left(setting: Setting) -> None:
    assert setting.run("show", "--group", setting.group) == 1
    assert setting.errors == f"Group {setting.group} has no offsets.\n"
    setting.commit(setting.group, {0: 4, 1: 3})
    assert setting.run("show", "--group", setting.group) == 0
    titles, *rows = setting.capsys.readouterr().out.splitlines()
    assert titles.split() == ["GROUP", "TOPIC", "PARTITION", "CURRENT-OFFSET", "LOG-END-OFFSET", "LAG", "STATE"]
    assert [row.split()[2:] for row in rows] == [
        ["0", "4", "10", "6", "Empty"],
        ["1", "3", "3", "0", "Empty"],
        ["2", "-", "0", "-", "Empty"],
    ]
    setting.commit(bus_group(setting.group), {0: 1})
    assert setting.run("show", "--json") == 0  # all of ours: also the checkpoint of a node
    shown = [json.loads(line) for line in setting.capsys.readouterr().out.splitlines()]
    assert {"partition": 0, "committed": 1, "first": 0, "end": 10, "lag": 9, "state": "Empty"}.items() <= next(
        row for row in shown if row["group"] == bus_group(setting.group)
    ).items()
    assert setting.group not in {row["group"] for row in shown}


@pytest.mark.kafka
def test_reset_shows_first_and_does_it_when_told(setting: Setting) -> None:
    setting.commit(setting.group, {0: 4, 1: 3})
    assert setting.reset("earliest") == 0
    captured = setting.capsys.readouterr()
    assert [row.split()[2:] for row in captured.out.splitlines()[1:]] == [
        ["0", "4", "0"],
        ["1", "3", "0"],
        ["2", "-", "0"],
    ]
    assert captured.err == "Nothing was changed: --execute does it.\n"
    assert setting.offsets() == {0: 4, 1: 3}
    assert setting.reset("latest", "--json", topic=f"{setting.topic}:2") == 0
    assert json.loads(setting.capsys.readouterr().out) == {
        "group": setting.group,
        "topic": setting.topic,
        "partition": 2,
        "committed": None,
        "new": 0,
    }
    for to, topic, expected in (
        ("earliest", setting.topic, {0: 0, 1: 0, 2: 0}),
        ("latest", f"{setting.topic}:0", {0: 10, 1: 0, 2: 0}),
        ("7", f"{setting.topic}:0", {0: 7, 1: 0, 2: 0}),
        ("1970-01-01T00:16:40.002Z", setting.topic, {0: 2, 1: 2, 2: 0}),
        ("1970-01-01T00:16:40.009Z", f"{setting.topic}:0,1", {0: 9, 1: 3, 2: 0}),
    ):
        assert setting.reset(to, "--execute", topic=topic) == 0
        assert setting.offsets() == expected


@pytest.mark.kafka
def test_reset_refuses_what_is_not_there(setting: Setting) -> None:
    setting.commit(setting.group, {0: 4})
    assert setting.reset("latest", "--execute", topic="no-such-topic") == 1
    assert "there is no topic no-such-topic" in setting.errors
    assert setting.reset("latest", "--execute", topic=f"{setting.topic}:1,7,9") == 1
    assert "has partitions 0 to 2; there is no 7, 9" in setting.errors
    assert setting.reset("5", "--execute") == 1
    assert "1 has 0 to 3, 2 has 0 to 0; choose partitions with --topic" in setting.errors
    assert setting.reset("latest", "--execute", group=setting.group + "x") == 1
    assert re.search(rf"there is no group {setting.group}x, .*did you mean {setting.group}", setting.errors)
    assert setting.offsets() == {0: 4}


@pytest.mark.kafka
def test_reset_refuses_a_group_with_members(setting: Setting) -> None:
    consumer = client.KafkaConsumer(
        setting.topic,
        bootstrap_servers=setting.options.server_names,
        group_id=setting.group,
        client_id="somebody",
        auto_offset_reset="earliest",
    )
    try:
        consumer.poll(10_000, max_records=1)
        consumer.commit()
        before = setting.offsets()
        assert setting.reset("latest", "--execute") == 1
        assert f"group {setting.group} is Stable" in (errors := setting.errors)
        assert "somebody at 127.0.0.1" in errors
        admin = Admin(setting.options)
        try:  # Kafka itself holds the line, should one join behind our back
            failed = admin.commit(setting.group, {(setting.topic, 0): 10})
        finally:
            admin.close()
        assert failed == {(setting.topic, 0): "UnknownMemberIdError"}
        assert setting.offsets() == before
    finally:
        consumer.close()
    assert setting.reset("latest", "--execute") == 0


@pytest.mark.kafka
async def test_reset_refuses_the_checkpoint_of_a_live_node(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bus, node = unique_name("bus"), unique_name("node")
    topics = TopicsOptions(retained=TopicOptions(name=unique_name("retained")))
    options = KafkaOptions(servers=setting.options.servers, bus=BusOptions(enabled=True, topic=bus), topics=topics)
    setting.config.write_text(f'[Kafka]\nServers = "{options.servers}"\n[Kafka.Bus]\nTopic = "{bus}"\n')
    group = bus_group(node)
    setting.commit(group, {0: 4})

    def reset() -> int:
        return setting.reset("earliest", "--execute", group=group)

    gateway, host = build(without_stream(options)), FakeHost(node, os.urandom(16))
    host.data = tmp_path
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            await nursery.start(gateway.run, host)
            assert await trio.to_thread.run_sync(reset) == 1
            assert f"node {node} is alive, it writes to the bus topic {bus}" in setting.errors
            await gateway.stop()
        nursery.cancel_scope.cancel()
    monkeypatch.setattr(offset_reset, "LISTEN", 1.0)
    assert await trio.to_thread.run_sync(reset) == 0
    admin = Admin(options)
    try:
        assert admin.committed(group)[setting.topic, 0] == 0
    finally:
        admin.close()


@pytest.mark.kafka
def test_a_topic_that_lost_records_or_was_made_anew_is_told(setting: Setting) -> None:
    setting.commit(setting.group, {0: 4, 1: 99})
    admin = client.KafkaAdminClient(bootstrap_servers=setting.options.server_names)
    try:
        admin.delete_records({client.TopicPartition(setting.topic, 0): 6})
    finally:
        admin.close()
    assert setting.run("show", "--group", setting.group, "--topic", setting.topic) == 0
    rows = [row.split(maxsplit=6) for row in setting.capsys.readouterr().out.splitlines()]
    assert rows[1][5:] == ["4", "Empty, 2 records were deleted unread"]
    assert rows[2][5:] == ["-96", "Empty, behind the end: the topic was made anew"]
