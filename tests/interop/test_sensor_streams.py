"""examples/sensor_streams.py on what our archive writes to a real Kafka [K15]."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from tests.interop.sensors import SKIPPED, aggregates_of, anomalies_of, make_readings, write
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import LIMIT, LineProcess, wait_until
from tests.record_check.examples import check_example
from tests.record_check.rules import Kind

EXAMPLE = Path(__file__).parents[2] / "examples" / "sensor_streams.py"


def test_what_counts_as_a_number() -> None:
    numbers = {"21.5": 21.5, " -3\n": -3.0, "+.5e2": 50.0, "7.": 7.0, "1e5": 1e5}
    others = [raw.decode(errors="replace") for raw in (*SKIPPED, b"1e999", b"--1", b"1,5", "٣".encode(), b".")]
    program = (
        "import json, sys, sensor_streams as s; print(json.dumps([s.number_of(t) for t in json.loads(sys.argv[1])]))"
    )
    texts = json.dumps([*numbers, *others])
    command = [sys.executable, "-W", "ignore", "-c", program, texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True, cwd=EXAMPLE.parent)
    assert json.loads(done.stdout) == [*numbers.values(), *(None for _ in others)]


class Results:
    """What a program has written to the topics of its results; committed transactions alone."""

    def __init__(self, servers: str, *topics: str) -> None:
        self._consumer = KafkaConsumer(
            bootstrap_servers=servers, group_id=None, isolation_level="read_committed", enable_auto_commit=False
        )
        self._topics = topics
        self.records: dict[str, list[Any]] = {topic: [] for topic in topics}

    def look(self) -> None:
        """Read what has come."""
        if not self._consumer.assignment():
            found = [TopicPartition(t, n) for t in self._topics for n in self._consumer.partitions_for_topic(t) or ()]
            if {partition.topic for partition in found} != set(self._topics):
                return  # not made yet
            self._consumer.assign(found)
            self._consumer.seek_to_beginning()
        for records in self._consumer.poll(200).values():
            for record in records:
                self.records[record.topic].append(record)

    def wait(self, topic: str, count: int) -> list[Any]:
        """Wait for so many records of a topic."""

        def there() -> bool:
            self.look()
            return len(self.records[topic]) >= count

        wait_until(there, f"{count} records of {topic}")
        return self.records[topic]

    def close(self) -> None:
        """End reading."""
        self._consumer.close()


@pytest.mark.interop
@pytest.mark.kafka
def test_windows_and_anomalies_equal_those_computed_by_hand(kafka: KafkaNode, tmp_path: Path) -> None:
    source, aggregates, anomalies = (unique_name(name) for name in ("archive", "aggregates", "anomalies"))
    readings = make_readings()
    half = len(readings.messages) // 2
    write(kafka.servers, source, readings.messages[:half], b"{", b"[]")
    command = [sys.executable, str(EXAMPLE), "--servers", kafka.servers, "--from", source, "--partitions", "2"]
    command += ["--aggregates", aggregates, "--anomalies", anomalies, "--group", unique_name("streams")]
    command += ["--state", str(tmp_path / "state")]
    results = Results(kafka.servers, aggregates, anomalies)
    counts: dict[str, int] = {}
    try:
        for messages in (readings.messages[half:], readings.closing):
            program = LineProcess(command)
            try:
                results.wait(aggregates, 1)
                write(kafka.servers, source, messages)
                if messages is readings.closing:
                    results.wait(aggregates, len(readings.aggregates()))
                    results.wait(anomalies, len(readings.anomalies()))
            finally:
                code = program.terminate(LIMIT)
            assert code == 0, program.text
            told = re.findall(r"counts (\{.*\})", program.text)
            for name, count in json.loads(told[-1]).items():
                counts[name] = counts.get(name, 0) + count
        results.look()
    finally:
        results.close()
    for kind, topic in ((Kind.AGGREGATE, aggregates), (Kind.ANOMALY, anomalies)):
        for record in results.records[topic]:
            check_example(kind, record)
    found = results.records[aggregates]
    assert aggregates_of(found) == readings.aggregates()
    assert len(found) == len(readings.aggregates()), "a window was told of twice"
    assert anomalies_of(results.records[anomalies]) == readings.anomalies()
    numbers = [message for message in readings.messages if message.topic_name != "other/topic"]
    skipped = sum(message.payload in SKIPPED for message in numbers)
    assert counts["no number"] + counts["no message"] == skipped + 2
    assert counts["readings"] == len(numbers) - skipped + len(readings.closing)
    assert "late" not in counts
