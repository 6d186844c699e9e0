"""The reader of runs: equal to the full decoder for whatever lies side by side."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import FrameRun, frames_size, read_run
from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import NO_PROPERTIES, MessageProperties, Publish

V3, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0

topics = st.sampled_from(["t", "t/1", "u", "tt", "\U0001f600/x", "long/" * 30])
payloads = st.binary(max_size=20) | st.sampled_from([b"", b"\x00", b"x" * 127, b"x" * 20_000])
properties = st.sampled_from(
    [
        NO_PROPERTIES,
        MessageProperties(payload_format_indicator=1),
        MessageProperties(content_type="a", user_properties=(("k", "v"), ("k", ""))),
        MessageProperties(content_type="b", user_properties=(("k", "v"), ("k", ""))),
        MessageProperties(correlation_data=b"c" * 300, response_topic="r", message_expiry_interval=3),
    ]
)


@given(
    items=st.lists(st.tuples(topics, payloads, properties), min_size=1, max_size=12),
    version=st.sampled_from([V3, V5]),
    qos=st.sampled_from([0, 1, 2]),
)
def test_equal_to_the_full_decoder(
    items: list[tuple[str, bytes, MessageProperties]], version: ProtocolVersion, qos: int
) -> None:
    packets = [
        Publish(
            topic, payload, QoS(qos), packet_id=7 if qos else None, properties=p if version is V5 else NO_PROPERTIES
        )
        for topic, payload, p in items
    ]
    frames = b"".join(encode(packet, version) for packet in packets)
    messages = read_run(FrameRun(frames, len(packets), qos, version, "c", 1.5))
    assert messages == [Message(p.topic_name, p.payload, qos, False, p.properties, "c", 1.5) for p in packets]


FRAME = b"\x30\x05\x00\x01t\x00x"


@pytest.mark.parametrize(
    "frames, count",
    [
        (FRAME, 2),
        (FRAME * 2, 1),
        (FRAME + FRAME[:-1], 2),
        (FRAME + b"\x30", 2),
        (FRAME + b"\x32" + FRAME[1:], 2),
        (FRAME + b"\x31" + FRAME[1:], 2),
        (FRAME + b"\x30\x03\x00\x01t", 2),
        (FRAME + b"\x30\x04\x00\x01t\x05", 2),
        (FRAME + b"\x30\x04\x00\x02t\x00", 2),
        (b"\x30\x05\x00\x01+\x00x", 1),
        (b"\x30\x05\x00\x01\xff\x00x", 1),
        (b"\x30\x07\x00\x00\x03\x23\x00\x01x", 1),
        (b"\x30\x04\x00\x00\x00\x00", 1),
        (b"\xc0\x00", 1),
        (b"\x30\xff\xff\xff\xff\x01", 1),
    ],
)
def test_other_bytes_are_refused(frames: bytes, count: int) -> None:
    with pytest.raises(RemoteProtocolError):
        read_run(FrameRun(frames, count, 0, V5, "c", 0.0))


@given(frames=st.binary(max_size=60), qos=st.sampled_from([0, 1, 2]), version=st.sampled_from([V3, V5]))
def test_any_bytes_give_messages_or_a_protocol_error(frames: bytes, qos: int, version: ProtocolVersion) -> None:
    try:
        messages = read_run(FrameRun(FRAME + frames, 2, qos, version, "c", 0.0))
    except RemoteProtocolError:
        return
    assert len(messages) == 2


def test_window_size_counts_frames_and_what_messages_cost_beside_them() -> None:
    assert frames_size(FrameRun(FRAME * 3, 3, 0, V5, "c", 0.0)) == 3 * (len(FRAME) + 128)
