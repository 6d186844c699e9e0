"""The commands that docs/monitoring.md gives do what they say, with the topics and groups that stand there [K20]."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import kafka as client
import pytest
from kafka.structs import OffsetAndMetadata

from lib.kafka_install import QUICK_JVM, install, java
from lib.kafka_node import make_archive
from tests.interop import kafka_tools
from tests.kafka_support import KafkaNode

pytestmark = [pytest.mark.kafka, pytest.mark.interop]

GUIDE: Final = Path(__file__).parent.parent.parent / "docs" / "monitoring.md"
CLASSES: Final = {
    **kafka_tools.CLASSES,
    "log-dirs": "org.apache.kafka.tools.LogDirsCommand",
    "configs": "kafka.admin.ConfigCommand",
    "reassign-partitions": "org.apache.kafka.tools.reassign.ReassignPartitionsCommand",
}
"""What kafka-NAME.sh starts. `configs` is in the jars of a broker."""
SAYS: Final = {
    "--group monstermq-cluster": "mqtt.messages",
    "--group mqtt-trio-bus-broker-1": "monster",
    "--describe --topic mqtt.archive": "PartitionCount",
    "--under-replicated-partitions": "",
    "--topic monster": "monster:0:1",
    "--topic-list mqtt.archive": '"partition":"mqtt.archive-0"',
    "--entity-type clients": "mqtt-trio-archive",
    "--generate": "Proposed partition reassignment configuration",
    "--execute": "Successfully started partition reassignments",
    "--verify": "Reassignment of partition monster-0 is completed",
}
"""Part of a command -> what is in its output."""


def commands() -> list[str]:
    """Return the commands of the guide, each on one line."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("kafka-")]


def run(command: Sequence[str], directory: Path) -> str:
    name = command[0].removeprefix("kafka-").removesuffix(".sh")
    libs = f"{kafka_tools.install() / 'libs'}/*:{install(make_archive).folder / 'libs'}/*"
    log4j = f"-Dlog4j2.configurationFile={kafka_tools.install() / 'log4j2.xml'}"
    done = subprocess.run(
        [java(), "-Xmx128m", *QUICK_JVM, log4j, "-cp", libs, CLASSES[name], *command[1:]],
        cwd=directory, capture_output=True, text=True, timeout=kafka_tools.LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def prepare(servers: str) -> None:
    """Make what the commands look at."""
    names = ("mqtt.archive", "mqtt.messages", "monster")
    admin = client.KafkaAdminClient(bootstrap_servers=servers)
    admin.create_topics({name: {"num_partitions": 1, "replication_factor": 1} for name in names})
    admin.close()
    producer = client.KafkaProducer(bootstrap_servers=servers)
    producer.send("monster", b"x", partition=0)
    producer.flush()
    producer.close()
    for group, topic in (("monstermq-cluster", "mqtt.messages"), ("mqtt-trio-bus-broker-1", "monster")):
        consumer = client.KafkaConsumer(bootstrap_servers=servers, group_id=group, enable_auto_commit=False)
        partition = client.TopicPartition(topic, 0)
        consumer.assign([partition])
        consumer.commit({partition: OffsetAndMetadata(0, "", -1)}, timeout_ms=60_000)
        consumer.close()


@pytest.mark.timeout(400)
def test_the_commands_of_the_guide(own_kafka: KafkaNode, tmp_path: Path) -> None:
    prepare(own_kafka.servers)
    quota = "kafka-configs.sh --alter --entity-type clients --entity-name mqtt-trio-archive --add-config"
    run([*quota.split(), "producer_byte_rate=1000000", "--bootstrap-server", own_kafka.servers], tmp_path)
    (topics,) = re.findall(r"^echo '(.*)' > topics\.json$", GUIDE.read_text(), re.MULTILINE)
    (tmp_path / "topics.json").write_text(topics)
    assert {entry["topic"] for entry in json.loads(topics)["topics"]} == {"monster", "mqtt.archive"}
    said = set()
    for command in commands():
        (part,) = (part for part in SAYS if part in command)
        line = command.replace("localhost:9092", own_kafka.servers).replace("--broker-list 1,2,3,4", "--broker-list 1")
        output = run(shlex.split(line), tmp_path)
        assert SAYS[part] in output, command
        if part == "--generate":
            (tmp_path / "reassignment.json").write_text(output.strip().splitlines()[-1])
        said.add(part)
    assert said == set(SAYS)
