"""compose.yml: the Kafka of people who have containers is the one that scripts/kafka starts [F1]."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from lib.kafka_install import KAFKA_VERSION, Installation, install
from lib.kafka_node import CLUSTER_ID, Node, make_archive, places, properties

COMPOSE = Path(__file__).parent.parent / "compose.yml"
OF_THE_PLACE = {
    "listeners",
    "advertised.listeners",
    "listener.security.protocol.map",
    "log.dirs",
    "controller.quorum.voters",
    "controller.quorum.bootstrap.servers",
}
"""What differs because a container has a network and a disk of its own."""


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    compose = yaml.safe_load(COMPOSE.read_text())
    assert list(compose["volumes"]) == ["kafka-data"]
    found: dict[str, Any] = compose["services"]["kafka"]
    return found


def settings(service: dict[str, Any]) -> dict[str, str]:
    """Return the properties that the image makes of the environment: KAFKA_A_B is a.b."""
    return {
        name.removeprefix("KAFKA_").lower().replace("_", "."): str(value)
        for name, value in service["environment"].items()
        if name.startswith("KAFKA_") and name != "KAFKA_HEAP_OPTS"
    }


def test_the_settings_are_those_of_the_script(service: dict[str, Any]) -> None:
    ours = properties(places(1, 9092)[0], Path("/nowhere"))
    theirs = settings(service)
    assert {k: v for k, v in theirs.items() if k not in OF_THE_PLACE} == {
        k: v for k, v in ours.items() if k not in OF_THE_PLACE
    }
    assert theirs["auto.create.topics.enable"] == "false"
    assert service["image"] == f"apache/kafka:{KAFKA_VERSION}"
    assert service["environment"]["CLUSTER_ID"] == CLUSTER_ID
    assert service["environment"]["KAFKA_HEAP_OPTS"] == Installation("java", Path()).run_flags()[0]


def test_only_this_machine_reaches_it_and_its_data_stay(service: dict[str, Any]) -> None:
    assert service["ports"] == ["127.0.0.1:9092:9092"]
    assert service["volumes"] == [f"kafka-data:{settings(service)['log.dirs']}"]
    listeners = settings(service)["listeners"].split(",")
    advertised = settings(service)["advertised.listeners"].split(",")
    assert [each.split("://")[0] for each in listeners] == ["HOST", "PLAINTEXT", "CONTROLLER"]
    assert advertised == ["HOST://localhost:9092", f"PLAINTEXT://{service['hostname']}:19092"]


@pytest.mark.kafka
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # a node outlives its script
def test_kafka_itself_takes_the_settings(service: dict[str, Any], tmp_path: Path) -> None:
    """The image is not here, its Kafka is: only host names, ports and the folder are put in their place."""
    place = places(1, 0)[0]
    node = Node(tmp_path / "node")
    node.prepare(place)
    found = settings(service) | {"log.dirs": str(node.folder / "data")}
    text = "".join(f"{name}={value}\n" for name, value in found.items())
    free = places(1, 0)[0].port
    for written, put in (
        ("HOST://:9092", f"HOST://127.0.0.1:{free}"),
        ("HOST://localhost:9092", f"HOST://127.0.0.1:{free}"),
        ("PLAINTEXT://:19092", f"PLAINTEXT://127.0.0.1:{place.port}"),
        ("PLAINTEXT://kafka:19092", f"PLAINTEXT://127.0.0.1:{place.port}"),
        ("CONTROLLER://:19093", f"CONTROLLER://127.0.0.1:{place.controller_port}"),
        ("1@kafka:19093", f"1@127.0.0.1:{place.controller_port}"),
    ):
        assert written in text
        text = text.replace(written, put)
    (node.folder / "server.properties").write_text(text)
    installation = install(make_archive)
    try:
        node.formatted(node.format(installation, standalone=False))  # as the image does it
        node.launch(installation, installation.use_archive())
        node.wait_answer()
    finally:
        node.end(signal.SIGKILL, 10)
