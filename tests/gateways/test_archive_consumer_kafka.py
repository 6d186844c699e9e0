"""`ArchiveConsumer` and programs of other people on what our archive writes to a real Kafka [K14]."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import kafka as client
import pytest
import trio

from gateways.kafka import ArchiveConsumer, ArchivedMessage
from gateways.kafka.admin import Admin
from gateways.kafka.lag import Partition
from gateways.kafka.mapping import JsonMapper
from gateways.kafka.member_consumer import SHORTEST_WAIT, MemberConsumer
from gateways.kafka.options import KafkaOptions
from gateways.kafka.topic_plan import TopicPlan
from gateways.kafka.topics import survey
from gateways.kafka.workers import quiet_loggers
from mqtt_trio.gateway import Message, MessageProperties
from tests.gateway_support import LIMIT
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import wait_until

pytestmark = pytest.mark.kafka
PARTITIONS = 4
T0 = 1_700_000_000.5
PROPERTIES = MessageProperties(
    payload_format_indicator=1,
    message_expiry_interval=3600,
    content_type="text/plain",
    response_topic="reply/to",
    correlation_data=b"\xff\x00",
    user_properties=(("unit", "°C"), ("unit", "K")),
)


class Setting:
    """A topic with messages as the archive writes them, and the consumer group of the test."""

    def __init__(self, kafka: KafkaNode) -> None:
        quiet_loggers()
        self.options = KafkaOptions(servers=kafka.servers)
        self.servers = kafka.servers
        self.topic = unique_name("archive")
        self.group = unique_name("readers")
        plan = TopicPlan(name=self.topic, partitions=PARTITIONS, config={"retention.ms": "-1"})  # records are old
        assert survey(lambda: Admin(self.options), [plan]).refused == {}

    def write(self, messages: list[Message], *garbage: bytes) -> None:
        mapper = JsonMapper(self.topic, "node-1")
        producer = client.KafkaProducer(bootstrap_servers=self.servers)
        records = [mapper.record(message) for message in messages]
        for value in garbage:  # in front of the first: who has read all messages has read it as well
            producer.send(self.topic, value, records[0].key)
        for record in records:
            assert record.value is not None
            producer.send(self.topic, record.value, record.key, list(record.headers), timestamp_ms=record.timestamp_ms)
        producer.flush(LIMIT)
        producer.close()

    def consumer(self, **more: object) -> ArchiveConsumer:
        return ArchiveConsumer(options=self.options, group=self.group, topics=self.topic, **more)  # type: ignore[arg-type]

    def committed(self) -> dict[int, int]:
        admin = Admin(self.options)
        try:
            return {number: offset for (_, number), offset in admin.committed(self.group).items()}
        finally:
            admin.close()


@pytest.fixture
def setting(kafka: KafkaNode) -> Setting:
    return Setting(kafka)


def numbered(numbers: range) -> list[Message]:
    return [Message(f"room-{n % 16}/temperature", b"%d" % n, client_id="c", published_at=T0 + n) for n in numbers]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  what is waited for has no event
        await trio.sleep(0.01)


async def test_messages_come_back_as_they_were_and_offsets_are_stored(setting: Setting) -> None:
    payloads = [b"23.5", b"", bytes(range(256)), "grün".encode()]
    messages = [
        Message(f"sensors/{at}", payload, at % 3, at % 2 == 0, PROPERTIES, "client", T0 + at)
        for at, payload in enumerate(payloads)
    ]
    setting.write(messages, b"{", b"\xff")
    found: list[ArchivedMessage] = []
    with trio.fail_after(LIMIT):
        async with setting.consumer() as consumer:
            async for message in consumer:
                found.append(message)
                if len(found) == len(messages) and consumer.malformed == 2:
                    break
            while sum(behind.records for behind in consumer.lag().values()) != 1:  # noqa: ASYNC110  that in hand
                await trio.sleep(0.02)
            assert consumer.failed_fetch_rate == 0
    made = [
        Message(m.topic_name, m.payload, m.qos, m.retain, m.properties, m.client_id, m.published_at)
        for m in sorted(found, key=lambda m: m.published_at)
    ]
    assert made == messages
    assert {m.broker_id for m in found} == {"node-1"}
    assert {(m.kafka.topic, m.kafka.timestamp_ms) for m in found} == {
        (setting.topic, round(m.published_at * 1000)) for m in messages
    }
    assert sum(setting.committed().values()) == len(messages) + 2


async def test_two_members_share_and_hand_over(setting: Setting) -> None:
    """A partition that goes to another member goes with its offset: but for the message in hand nothing comes twice."""
    setting.write(numbered(range(200)))
    found: dict[str, list[ArchivedMessage]] = {"one": [], "two": []}
    left: dict[str, trio.CancelScope] = {}
    shared = trio.Event()

    async def read(name: str) -> None:
        with trio.CancelScope() as scope:
            left[name] = scope
            async with setting.consumer() as consumer:
                async for message in consumer:
                    found[name].append(message)
                    await trio.sleep(0.01)
                    if name == "one" and len(found["one"]) >= 20:  # what is left is to last until there are two of them
                        with trio.move_on_after(0.5):
                            await shared.wait()

    def seen() -> set[int]:
        return {int(m.payload) for messages in found.values() for m in messages}

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "one")
            await until(lambda: len(found["one"]) >= 20)
            nursery.start_soon(read, "two")
            await until(lambda: len(found["two"]) >= 10)
            shared.set()
            await trio.to_thread.run_sync(setting.write, numbered(range(200, 300)))
            await until(lambda: seen() == set(range(300)))
            shares = [{m.kafka.partition for m in messages[-5:]} for messages in found.values()]
            left["one"].cancel()
            before = len(found["two"])
            await trio.to_thread.run_sync(setting.write, numbered(range(300, 340)))
            await until(lambda: seen() == set(range(340)))
            nursery.cancel_scope.cancel()
    assert shares[0].isdisjoint(shares[1])
    assert {m.kafka.partition for m in found["two"][before:]} == set(range(PARTITIONS))
    total = sum(map(len, found.values()))
    assert 340 <= total <= 340 + 2 * PARTITIONS, total
    for messages in found.values():
        for partition in range(PARTITIONS):
            offsets = [m.kafka.offset for m in messages if m.kafka.partition == partition]
            assert offsets == sorted(offsets)


PROGRAM = """\
import sys, trio
from gateways.kafka import ArchiveConsumer, KafkaOptions

async def main(servers, topic, group):
    options = KafkaOptions(servers=servers, consumer={"group_instance_id": "one"})
    async with ArchiveConsumer(options=options, topics=topic, group=group) as consumer:
        async for message in consumer:
            print(message.payload.decode(), flush=True)

trio.run(main, *sys.argv[1:])
"""


async def test_killed_between_process_and_commit_it_repeats_and_loses_nothing(setting: Setting) -> None:
    setting.write(numbered(range(60)))
    # A static member: its successor need not wait until Kafka gives it up.
    setting.options = KafkaOptions(servers=setting.servers, consumer={"group_instance_id": "one"})
    program = [sys.executable, "-c", PROGRAM, setting.servers, setting.topic, setting.group]

    def run_and_kill(lines: int) -> list[int]:
        process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        found = [int(process.stdout.readline()) for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        found += [int(line) for line in process.stdout.read().splitlines()]
        process.wait()
        process.stdout.close()
        return found

    with trio.fail_after(LIMIT):
        lives = [await trio.to_thread.run_sync(run_and_kill, lines) for lines in (7, 9)]
        lives.append([])
        async with setting.consumer() as consumer:
            async for message in consumer:
                lives[-1].append(int(message.payload))
                if {n for life in lives for n in life} == set(range(60)):
                    break
    repeated = sum(map(len, lives)) - 60
    assert 0 <= repeated <= 2 * len(lives), "what was printed and not stored, the last one of each life, comes again"


async def test_kafka_may_go_away_and_come_back(own_kafka: KafkaNode) -> None:
    setting = Setting(own_kafka)
    setting.write(numbered(range(40)))
    found: list[int] = []
    with trio.fail_after(LIMIT):
        async with setting.consumer() as consumer:
            async for message in consumer:
                found.append(int(message.payload))
                if len(found) == 10:
                    await trio.to_thread.run_sync(own_kafka.kill)
                    await until(lambda: consumer.trouble is not None)
                    await trio.to_thread.run_sync(own_kafka.start)
                    await trio.to_thread.run_sync(setting.write, numbered(range(40, 50)))
                if set(found) == set(range(50)):
                    break
            assert consumer.trouble is None
    assert len(found) <= 50 + PARTITIONS, "what was processed and not stored comes again, no more"
    assert sum(setting.committed().values()) == 50


async def test_latest_begins_at_the_end_and_a_restart_where_it_was(setting: Setting) -> None:
    setting.write(numbered(range(20)))
    with trio.fail_after(LIMIT):
        async with setting.consumer(start="latest") as consumer:
            await until(lambda: len(setting.committed()) == PARTITIONS)
            await trio.to_thread.run_sync(setting.write, numbered(range(20, 30)))
            batch = await anext(consumer.batches())
            assert {int(m.payload) for m in batch} <= set(range(20, 30))
        seen = {int(m.payload) for m in batch}
        await trio.to_thread.run_sync(setting.write, numbered(range(30, 40)))
        async with setting.consumer(start="latest") as consumer:
            while len(seen) < 20:
                batch = await anext(consumer.batches())
                assert seen.isdisjoint({int(m.payload) for m in batch})
                seen |= {int(m.payload) for m in batch}
    assert seen == set(range(20, 40))


async def test_the_example_of_the_guide(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "kafka-archive.md").read_text()
    example = re.search(r"```python\n(import os\n.*?)```", guide, re.DOTALL)
    assert example is not None
    setting.write(numbered(range(3)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text(f'[Kafka]\nServers = "{setting.servers}"\n')
    code = example[1].replace('"billing"', repr(setting.group)).replace('"mqtt.archive"', repr(setting.topic))
    names: dict[str, Callable[[], Awaitable[None]]] = {"__name__": "example"}  # type: ignore[dict-item]
    exec(compile(code, "docs/kafka-archive.md", "exec"), names)
    lines: list[str] = []
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(names["main"])
            while len(lines) < 3:  # what is waited for has no event
                await trio.sleep(0.01)
                lines += capsys.readouterr().out.splitlines()
            nursery.cancel_scope.cancel()
    assert sorted(lines)[0].startswith("room-0/temperature b'0' c ")


def test_the_example_with_kafka_python(setting: Setting) -> None:
    """examples/archive_consumer.py: what people run who do not use Trio."""
    setting.write(numbered(range(10)), b"garbage")
    example = Path(__file__).parents[2] / "examples" / "archive_consumer.py"
    arguments = ["--servers", setting.servers, "--topic", setting.topic, "--group", setting.group]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(example), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        found = [json.loads(process.stdout.readline()) for _ in range(10)]
    finally:
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=LIMIT)
    assert {(each["topic"], each["payload"]) for each in found} == {
        (f"room-{n}/temperature", str(n)) for n in range(10)
    }
    assert rest == ""
    assert ("skipped" in errors) == (sum(setting.committed().values()) == 11)
    assert process.returncode == 0
    assert sum(setting.committed().values()) in (10, 11)  # the garbage may lie behind what was waited for


class NoListener:
    """A member's listener that has nothing to store."""

    def assigned(self, partitions: Sequence[Partition]) -> None: ...
    def revoked(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        return {}

    def lost(self, partitions: Sequence[Partition]) -> None: ...


def test_a_share_that_is_dealt_out_between_two_polls_is_taken(setting: Setting) -> None:
    """The leader of a group joins anew because the topic has grown, and its `poll` ends while it waits for Kafka."""
    member = MemberConsumer(setting.options, "member", setting.group, [setting.topic], NoListener())
    coordinator = member._consumer._coordinator
    try:
        member.join()
        while not coordinator.stable():
            member.poll(0.1, paused=True)
        while coordinator.stable():
            coordinator._assignment_snapshot = {}  # as when its metadata are new
            member.poll(0.001, paused=True)
        wait_until(lambda: coordinator._join_task.is_done, "Kafka has dealt out the shares")
        assert not coordinator.stable(), "it was not caught between two polls"
        for _ in range(50):
            if not coordinator.stable():
                member.poll(0.1, paused=True)
        member.commit({(setting.topic, 0): 0}, LIMIT)
    finally:
        member.close()


def test_a_heartbeat_that_kafka_does_not_answer_lets_nothing_spin(setting: Setting) -> None:
    """A frozen Kafka takes the heartbeat, so the next one is overdue until the session ends."""
    member = MemberConsumer(setting.options, "member", setting.group, [setting.topic], NoListener())
    consumer, looks = member._consumer, 0
    try:
        member.join()
        while not consumer._coordinator.stable():
            member.poll(0.1, paused=True)
        consumer._coordinator.time_to_next_heartbeat = lambda: 0.0
        fetch_records = consumer._fetcher.fetch_records

        def counted(*arguments: object, **more: object) -> object:
            nonlocal looks
            looks += 1
            return fetch_records(*arguments, **more)

        consumer._fetcher.fetch_records = counted
        for paused in (False, True):
            looks = 0
            member.poll(10 * SHORTEST_WAIT, paused=paused)
            assert 0 < looks <= 20
    finally:
        member.close()
