"""Options of archive groups: what is accepted, and what the refusals say."""

from __future__ import annotations

from typing import Any

import pytest

from mqtt_trio.archive.groups import ArchiveGroupOptions


def test_defaults_are_the_embedded_store() -> None:
    options = ArchiveGroupOptions(name="Default")
    assert (options.filter, options.enabled, options.store) == (("#",), True, "SQLITE")
    assert (options.ack, options.on_outage, options.format, options.timestamp_format) == ("none", None, "JSON", "iso")


@pytest.mark.parametrize("given", ["a/+", ["a/+"], ("a/+",)])
def test_filter_is_one_or_a_list(given: Any) -> None:
    assert ArchiveGroupOptions(name="A", filter=given).filter == ("a/+",)


def test_choices_in_capitals_match_without_regard_to_case() -> None:
    options = ArchiveGroupOptions(name="A", store="kafka", format="json", kafka_topic="mqtt.sensors")
    assert (options.store, options.format) == ("KAFKA", "JSON")


@pytest.mark.parametrize(
    "values, text",
    [
        ({"name": ""}, "expected 1 to 100 printable characters, got ''"),
        ({"name": "a\nb"}, "expected 1 to 100 printable characters"),
        ({"filter": []}, "got an empty list"),
        ({"filter": ["ok", "a/#/b", ""]}, r"'a/#/b' is not a Topic Filter: .*; '' is not a Topic Filter: "),
        ({"filter": "$share/g/a"}, "an archive group shares with nobody"),
        ({"filter": "$SYS/#"}, r"\$SYS topics are never archived"),
        ({"store": "POSTGRES"}, "'store' must be in"),
        ({"retention": 0}, "'retention' must be > 0: 0"),
        ({"max_size": 1000}, "'max_size' must be >= 1048576: 1000"),
        ({"store": "KAFKA", "kafka_topic": "a b"}, "expected 1 to 249 of the characters .* got 'a b'"),
        ({"store": "KAFKA", "kafka_topic": ".."}, "got '..'"),
        ({"store": "KAFKA", "kafka_topic": "__consumer_offsets"}, "__consumer_offsets is a topic that Kafka keeps for"),
        ({"store": "KAFKA", "retention": 5}, "Retention: .* set retention.ms in the topic's Config"),
        ({"store": "KAFKA", "max_size": 1 << 30}, "MaxSize: .* set retention.bytes"),
        ({"kafka_topic": "t"}, 'KafkaTopic: has no meaning with Store = "SQLITE"; set Store = "KAFKA"'),
        ({"ack": "all"}, "'ack' must be in"),
        ({"on_outage": "wait"}, "'on_outage' must be in"),
        ({"format": "XML"}, "'format' must be in"),
        ({"format": "raw"}, 'Format: has no meaning with Store = "SQLITE"; set Store = "KAFKA"'),
        ({"store": "KAFKA", "format": "AVRO", "timestamp_format": "epoch_ms"}, "TimestampFormat: AVRO records give"),
        ({"timestamp_format": "rfc"}, "'timestamp_format' must be in"),
        ({"window_messages": 0}, "'window_messages' must be >= 1: 0"),
        ({"window_bytes": 1}, "'window_bytes' must be >= 65536: 1"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ArchiveGroupOptions(**{"name": "A", **values})
