"""`mqtt-trio topics plan|apply` [K3]: with an administration in memory, and with a real Kafka."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from gateways.kafka import topic_commands
from gateways.kafka.topic_plan import DENIED
from mqtt_trio.__main__ import main
from tests.kafka_fakes import FakeAdmin
from tests.kafka_support import KafkaCluster, KafkaNode, unique_name

CONFIG = """\
[Kafka]
Servers = "k:9092"
[Kafka.Bus]
Enabled = true
Topic = "bus"
[Kafka.Topics.Retained]
Name = "retained"
[[ArchiveGroups]]
Name = "A"
Store = "KAFKA"
KafkaTopic = "sensors"
"""
TOPICS = ["mqtt.messages", "mqtt.dlq", "bus", "retained", "sensors"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> FakeAdmin:
    admin = FakeAdmin()
    monkeypatch.setattr(topic_commands, "open_admin", admin.opened)
    return admin


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal(text))
    monkeypatch.setattr("sys.stderr", screen)
    return screen


def test_a_plan_shows_what_is_missing_and_changes_nothing(
    config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["topics", "plan", "--config", config]) == 3
    shown = capsys.readouterr().out
    assert shown.startswith("Kafka at k:9092, 1 broker\n\n+ mqtt.messages is missing\n    partitions           12\n")
    assert shown.endswith(f"\n5 topics: 5 to create. To do it: mqtt-trio topics apply --config {config}\n")
    assert admin.created == []


def test_a_plan_names_the_command_with_what_it_was_given(
    config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", config, "--bootstrap-server", "a:1,b:2", "--topic", "bus"]
    assert main(["topics", "plan", *given]) == 3
    assert capsys.readouterr().out.endswith(f" To do it: mqtt-trio topics apply {' '.join(given)}\n")
    assert main(["topics", "plan", *given, "--set", "Kafka.SSL.TruststorePassword=sesame"]) == 3
    shown = capsys.readouterr().out
    assert shown.endswith(f" To do it: mqtt-trio topics apply {' '.join(given)}, with the same --set\n")
    assert "sesame" not in shown  # what was given may be a secret


def test_apply_creates_without_asking_and_then_all_is_in_step(
    config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["topics", "apply", "--config", config]) == 0
    assert admin.created == TOPICS
    assert "Created topic sensors." in capsys.readouterr().out
    assert main(["topics", "plan", "--config", config]) == 0
    assert capsys.readouterr().out.endswith("\n5 topics, as planned.\n")
    assert main(["topics", "apply", "--config", config]) == 0
    assert capsys.readouterr().out == "Nothing to do.\n"


def drifted(admin: FakeAdmin, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One topic that can grow, one of another retention, one too wide, one compacted and too narrow."""
    main(["topics", "apply", "--config", config])
    admin.change("bus", partitions=4)
    admin.change("sensors", config={"retention.ms": "1000"})
    admin.change("mqtt.dlq", partitions=5)
    admin.change("retained", partitions=1)
    capsys.readouterr()


def test_each_difference_is_told_with_what_can_be_done(
    config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    drifted(admin, config, capsys)
    assert main(["topics", "plan", "--config", config]) == 3
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [
        "= mqtt.messages",
        "! mqtt.dlq",
        "partitions 5 -> 3 not by `apply`: Kafka cannot take partitions away; keep them: [Kafka.Topics.Dlq] "
        "Partitions = 5",
        "~ bus",
        "partitions 4 -> 12 MQTT topics move to other partitions: consumers may meet newer messages of a topic before "
        "older ones",
        "! retained",
        "partitions 1 -> 12 not by `apply`: a compacted topic must not grow: the newest record of a key would lie in "
        "another partition than the older ones; keep them: [Kafka.Topics.Retained] Partitions = 1, or use a new topic",
        "~ sensors",
        "retention.ms 1000 -> 2592000000 only with --configs: kept for 1 second instead of 30 days",
        "",
        "5 topics: 1 to grow, 1 with other properties, 2 with differences that `topics apply` leaves alone. To do it: "
        f"mqtt-trio topics apply --config {config} --configs",
    ]


def test_a_plan_for_programs(config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    drifted(admin, config, capsys)
    del admin.topics["sensors"]
    admin.hidden = {"mqtt.dlq"}
    assert main(["topics", "plan", "--config", config, "--json"]) == 1
    plans = {plan["topic"]: plan for plan in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {name: plan["action"] for name, plan in plans.items()} == {
        "mqtt.messages": "none",
        "mqtt.dlq": "unknown",
        "bus": "change",
        "retained": "change",
        "sensors": "create",
    }
    assert plans["bus"]["differences"][0] | {"note": ""} == {
        "key": "partitions",
        "actual": "4",
        "planned": "12",
        "remedy": "grow",
        "note": "",
    }
    assert plans["sensors"]["planned"]["partitions"] == 12


def test_changes_need_a_yes(
    config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drifted(admin, config, capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # a pipe is nobody to ask
    assert main(["topics", "apply", "--config", config]) == 2
    assert "there is no terminal to ask on: say --yes" in capsys.readouterr().err
    for text in ("n\n", "\n", ""):
        screen = answer(monkeypatch, text)
        assert main(["topics", "apply", "--config", config]) == 1
        assert screen.getvalue() == "Change bus? [y/N] Nothing was changed.\n"
    assert admin.topics["bus"].partitions == 4
    answer(monkeypatch, "yes\n")
    assert main(["topics", "apply", "--config", config]) == 0
    assert admin.topics["bus"].partitions == 12
    assert admin.topics["sensors"].config["retention.ms"] == "1000"
    assert [admin.topics[name].partitions for name in ("mqtt.dlq", "retained")] == [5, 1]


def test_properties_are_set_when_asked_for(config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    drifted(admin, config, capsys)
    admin.change("bus", partitions=12)
    assert main(["topics", "apply", "--config", config]) == 0
    assert capsys.readouterr().out.endswith("Nothing to do without --configs.\n")
    assert main(["topics", "apply", "--config", config, "--configs", "--yes", "--topic", "sensors"]) == 0
    assert capsys.readouterr().out.endswith("Set retention.ms=2592000000 on topic sensors.\n")
    assert main(["topics", "apply", "--config", config, "--configs"]) == 0
    assert capsys.readouterr().out.endswith("Nothing of this can be done by `topics apply`.\n")


def test_what_the_user_may_not_do_is_told_with_the_command(
    config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    drifted(admin, config, capsys)
    del admin.topics["mqtt.dlq"]
    admin.refusal = DENIED
    assert main(["topics", "apply", "--config", config, "--configs", "--yes"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(" --")[0] for line in errors] == [
        "Kafka topic mqtt.dlq is missing and this node may not create it; somebody who may: kafka-topics.sh",
        "Topic bus: this user may not alter it; somebody who may: kafka-topics.sh",
        "Topic sensors: this user may not alter it; somebody who may: kafka-configs.sh",
    ]


def test_what_may_not_be_seen_is_no_success(config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    main(["topics", "apply", "--config", config])
    state = admin.topics["bus"]
    admin.topics["bus"] = type(state)(partitions=12, replication_factor=1, leaders=True, config={})
    capsys.readouterr()
    assert main(["topics", "plan", "--config", config]) == 1
    assert "? bus: its properties may not be seen: this user lacks DescribeConfigs" in capsys.readouterr().out


def test_wrong_usage(config: str, admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topics", "plan", "--config", config, "--topic", "buss"]) == 2
    assert (
        "--topic buss: not in the plan, which has bus, mqtt.dlq, mqtt.messages, retained, sensors"
        in capsys.readouterr().err
    )
    assert main(["topics", "plan"]) == 78
    assert "there is no section [Kafka]" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["topics"])
    assert admin.created == []


def test_a_kafka_that_is_not_there_is_a_failure(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topics", "plan", "--config", config, "--bootstrap-server", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == (
        "mqtt-trio: Kafka at 127.0.0.1:1 cannot be asked: 127.0.0.1:1 refuses connections; "
        "is Kafka running, and is this its port?\n"
    )


@pytest.mark.kafka
def test_a_real_kafka_grows_and_is_configured(
    kafka: KafkaNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = unique_name("grow")
    path = tmp_path / "config.toml"
    path.write_text(f'[Kafka]\nServers = "{kafka.servers}"\n[[ArchiveGroups]]\nName = "A"\nStore = "KAFKA"\n')

    def topics(action: str, partitions: int, retention: str, *more: str) -> int:
        sets = [f"Kafka.Topics.Archive.{each}" for each in (
            f"Name={name}", f"Partitions={partitions}", f'Config={{"retention.ms" = "{retention}"}}',
        )]  # fmt: skip
        given = [part for each in sets for part in ("--set", each)]
        return main(["topics", action, "--config", str(path), "--topic", name, *given, *more])

    assert topics("plan", 2, "600000") == 3
    assert topics("apply", 2, "600000") == 0
    assert topics("plan", 2, "600000") == 0
    assert topics("plan", 5, "700000") == 3
    capsys.readouterr()
    assert topics("apply", 5, "700000", "--yes") == 0
    assert f"Topic {name} has 5 partitions." in capsys.readouterr().out
    assert topics("plan", 5, "700000", "--json") == 3
    assert [one["key"] for one in json.loads(capsys.readouterr().out)["differences"]] == ["retention.ms"]
    assert topics("apply", 5, "700000", "--yes", "--configs") == 0
    assert topics("plan", 5, "700000") == 0
    assert topics("apply", 2, "700000", "--yes", "--configs") == 0  # fewer: left alone
    assert topics("plan", 5, "700000") == 0
    assert topics("plan", 5, "700000", "--set", "Kafka.Topics.Archive.Config.cleanup.policy=compact") == 3
    capsys.readouterr()
    assert topics("apply", 5, "soon", "--yes", "--configs") == 1
    assert "retention.ms" in capsys.readouterr().err


@pytest.mark.kafka
def test_three_brokers_hold_three_replicas(
    three_kafkas: KafkaCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    names = {purpose: unique_name(purpose.lower()) for purpose in ("Bus", "Retained", "Dlq", "Archive", "Messages")}
    sections = "".join(f'[Kafka.Topics.{purpose}]\nName = "{name}"\n' for purpose, name in names.items())
    path.write_text(
        f'[Kafka]\nServers = "{three_kafkas.servers}"\n[Kafka.Bus]\nEnabled = true\n{sections}'
        '[[ArchiveGroups]]\nName = "A"\nStore = "KAFKA"\n'
    )
    given = ("--config", str(path))
    assert main(["topics", "apply", *given]) == 0
    assert "replication factor   3\n" in (shown := capsys.readouterr().out)
    assert shown.count("min.insync.replicas  2\n") == 5
    assert main(["topics", "plan", *given]) == 0
    fewer = ("--topic", names["Archive"], "--set", "Kafka.Topics.Archive.ReplicationFactor=2")
    assert main(["topics", "plan", *given, *fewer]) == 3
    capsys.readouterr()
    three_kafkas.kill(2)  # the controller of the quorum, maybe, and the leader of some partitions
    try:
        assert main(["topics", "plan", *given]) == 0  # three replicas are as planned, also with two brokers
        grow = ("--topic", names["Archive"], "--set", "Kafka.Topics.Archive.Partitions=15", "--yes")
        assert main(["topics", "apply", *given, *grow]) == 0
    finally:
        three_kafkas.start(2)
