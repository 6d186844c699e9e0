"""The quick reader of runs finds what `read_run` finds, whatever it has seen before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_trio.archive.decoding import KNOWN_TOPICS, RunReader
from mqtt_trio.broker.tap import FrameRun, read_run
from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.encode import encode_publish
from mqtt_trio.protocol.packets import NO_PROPERTIES, MessageProperties, Publish

READER = RunReader()
"""One for all examples: topics come again."""


@given(
    topic=st.sampled_from(["a", "b/ü", "$x", "t" * 200]),
    payload=st.one_of(st.binary(max_size=20), st.sampled_from([bytes(n) for n in (120, 130, 20_000, 3_000_000)])),
    qos=st.sampled_from(QoS),
    version=st.sampled_from([ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0]),
    properties=st.sampled_from([NO_PROPERTIES, MessageProperties(content_type="x")]),
    count=st.integers(1, 3),
)
def test_it_reads_what_read_run_reads(
    topic: str, payload: bytes, qos: QoS, version: ProtocolVersion, properties: MessageProperties, count: int
) -> None:
    packet = Publish(topic, payload, qos, packet_id=7 if qos else None, properties=properties)
    run = FrameRun(encode_publish(packet, version) * count, count, int(qos), version, "c", 5.0)
    assert READER.read(run) == read_run(run)


def test_what_it_remembers_is_bounded() -> None:
    reader = RunReader()
    for number in range(KNOWN_TOPICS + 5):
        frame = encode_publish(Publish(f"t/{number}", b"x"), ProtocolVersion.MQTT_5_0)
        (message,) = reader.read(FrameRun(frame, 1, 0, ProtocolVersion.MQTT_5_0, "c", 5.0))
        assert message.topic_name == f"t/{number}"
    assert len(reader._names) == 5


def test_a_run_that_is_none_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        RunReader().read(FrameRun(b"\x30\x7f\x00", 1, 0, ProtocolVersion.MQTT_5_0, "c", 0.0))
