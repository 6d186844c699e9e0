"""Prometheus' text format, read back by Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mqtt_trio.server.exposition import Exposition, metric_name

AWKWARD = 'back\\slash "quoted"\nand a new line, {braces} = ü'


def test_what_is_put_in_comes_out() -> None:
    page = Exposition()
    page.add("a_total", "counter", f"Counts {AWKWARD}", 3, group=AWKWARD)
    page.add("b_seconds", "gauge", "Falls, too.", -1.5e-9)
    page.add("a_total", "counter", "", 4, group="other", more="")
    text = page.render()
    assert text.endswith("\n")
    first, second = text_string_to_metric_families(text)
    assert (first.name, first.type, first.documentation) == ("a", "counter", f"Counts {' '.join(AWKWARD.split())}")
    assert [(s.name, s.labels, s.value) for s in first.samples] == [
        ("a_total", {"group": AWKWARD}, 3.0),
        ("a_total", {"group": "other", "more": ""}, 4.0),
    ]
    assert (second.name, second.type, second.samples[0].value) == ("b_seconds", "gauge", -1.5e-9)


def test_a_name_has_one_type() -> None:
    page = Exposition()
    page.add("a", "counter", "", 3)
    with pytest.raises(ValueError, match="a is a counter and a gauge"):
        page.add("a", "gauge", "", 3)


def test_labels_have_any_name() -> None:
    page = Exposition()
    labels = {name: name.upper() for name in ("name", "kind", "meaning", "value")}
    page.add("a", "gauge", "", 3, **labels)
    (family,) = text_string_to_metric_families(page.render())
    assert family.samples[0].labels == labels


def test_a_table_of_counters() -> None:
    page = Exposition()
    meanings = {"held": "Held.", "waiting": "Gauge: what waits."}
    page.add_counters("x_", {"held": 1, "waiting": 2, "new_one": 3}, meanings, group="g")
    families = {family.name: family for family in text_string_to_metric_families(page.render())}
    assert {name: (f.type, f.documentation, f.samples[0].value) for name, f in families.items()} == {
        "mqtt_trio_x_held": ("counter", "Held.", 1.0),
        "mqtt_trio_x_waiting": ("gauge", "What waits.", 2.0),
        "mqtt_trio_x_new_one": ("counter", "new one", 3.0),
    }
    assert all(family.samples[0].labels == {"group": "g"} for family in families.values())


@pytest.mark.parametrize(
    "key, expected",
    [
        ("sessions", ("mqtt_trio_sessions", {})),
        ("bytes_received", ("mqtt_trio_received_bytes", {})),
        ("bus_bytes_waiting", ("mqtt_trio_bus_waiting_bytes", {})),
        ("messages_sent_qos2", ("mqtt_trio_messages_sent", {"qos": "2"})),
        ("qos0_left", ("mqtt_trio_qos0_left", {})),
        ("Dlq.Sent", ("mqtt_trio_dlq_sent", {})),
    ],
)
def test_names(key: str, expected: tuple[str, dict[str, str]]) -> None:
    assert metric_name("", key) == expected
