"""WebSocket frames: masks, lengths, fragments, control frames, bounds, cut anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol.frames import (
    CloseCode,
    FrameDecoder,
    Opcode,
    WebSocketError,
    apply_mask,
    client_frame,
    close_frame,
    frame,
    frame_head,
)

MASK = b"\x01\x80\xff\x00"


def refused(data: bytes, *, maximum_size: int = 1000, masked: bool = True) -> WebSocketError:
    """Feed a whole read, then byte by byte: the same complaint, and silence behind it."""
    errors = []
    for size in (len(data), 1):
        decoder = FrameDecoder(maximum_size, masked=masked)
        reads = [data[at : at + size] for at in range(0, len(data), size)]
        received: list[bytes] = []
        with pytest.raises(WebSocketError) as caught:
            received.extend(decoder.feed(read) for read in reads)
        errors.append((caught.value.close_code, b"".join(received) + caught.value.received))
        assert decoder.closed == caught.value.close_code
        assert decoder.feed(client_frame(b"more")) == b""
        assert isinstance(caught.value, RemoteProtocolError)
    assert errors[0] == errors[1]
    return caught.value


def test_the_examples_of_the_rfc() -> None:
    """RFC 6455, 5.7, as binary."""
    assert client_frame(b"Hello").hex() == "828537fa213d7f9f4d5158"
    assert FrameDecoder(10).feed(bytes.fromhex("828537fa213d7f9f4d5158")) == b"Hello"
    assert frame(b"Hello").hex() == "820548656c6c6f"
    decoder = FrameDecoder(10, masked=False)
    assert decoder.feed(bytes.fromhex("020348656c 80026c6f")) == b"Hello"
    assert frame(bytes(256))[:4].hex() == "827e0100"
    assert frame(bytes(65_536))[:10].hex() == "827f0000000000010000"


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_apply_mask(payload: bytes, mask: bytes) -> None:
    masked = apply_mask(payload, mask)
    assert masked == bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    assert apply_mask(masked, mask) == payload


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
@pytest.mark.parametrize("masked", [True, False])
def test_every_length_form(size: int, masked: bool) -> None:
    payload = bytes(index % 251 for index in range(size))
    data = client_frame(payload) if masked else frame(payload)
    assert FrameDecoder(size, masked=masked).feed(data) == payload
    for cut in (1, 2, 3, 5, 8, 11, 14, 15, 17, len(data) - 1):
        decoder = FrameDecoder(size, masked=masked)
        assert decoder.feed(data[:cut]) + decoder.feed(data[cut:]) == payload


pieces = st.tuples(st.lists(st.binary(max_size=140), min_size=1, max_size=3), st.booleans(), st.binary(max_size=125))


@given(st.lists(pieces, max_size=3), st.lists(st.integers(0, 1000), max_size=6), st.binary(min_size=4, max_size=4))
@settings(deadline=None)
def test_fragments_and_control_frames_cut_anywhere(
    messages: list[tuple[list[bytes], bool, bytes]], cuts: list[int], mask: bytes
) -> None:
    data, expected, pongs = b"", b"", []
    for fragments, ping, ping_payload in messages:
        for index, fragment in enumerate(fragments):
            opcode = Opcode.CONTINUATION if index else Opcode.BINARY
            data += client_frame(fragment, opcode, fin=index == len(fragments) - 1, mask=mask)
            expected += fragment
            if ping:
                data += client_frame(ping_payload, Opcode.PING, mask=mask)
                pongs.append(frame_head(len(ping_payload), 0x8A) + ping_payload)
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    decoder = FrameDecoder(500)
    received = b"".join(decoder.feed(data[a:b]) for a, b in itertools.pairwise(bounds))
    assert received == expected
    assert decoder.replies == pongs
    assert decoder.take_replies() == b"".join(pongs)
    assert decoder.replies == []
    one_by_one = FrameDecoder(500)
    assert b"".join(one_by_one.feed(data[at : at + 1]) for at in range(len(data))) == expected


def test_pong_is_ignored_and_a_client_masks_its_own() -> None:
    decoder = FrameDecoder(10)
    assert decoder.feed(client_frame(b"x", Opcode.PONG) + client_frame(b"y")) == b"y"
    assert decoder.replies == []
    client = FrameDecoder(10, masked=False)
    assert client.feed(frame_head(1, 0x89) + b"z") == b""
    assert client.take_replies() == client_frame(b"z", Opcode.PONG)


@pytest.mark.parametrize(
    "payload,code,answer",
    [
        (b"", CloseCode.NO_STATUS, b"\x88\x00"),
        (b"\x03\xe8", CloseCode.NORMAL, b"\x88\x02\x03\xe8"),
        (b"\x03\xe9bye", CloseCode.GOING_AWAY, b"\x88\x02\x03\xe9"),
        (b"\x0f\xa0", 4000, b"\x88\x02\x0f\xa0"),
    ],
)
def test_close(payload: bytes, code: int, answer: bytes) -> None:
    decoder = FrameDecoder(100)
    data = client_frame(b"last") + client_frame(payload, Opcode.CLOSE) + client_frame(b"ignored")
    assert decoder.feed(data) == b"last"
    assert decoder.closed == code
    assert decoder.take_replies() == answer
    assert decoder.feed(client_frame(b"ignored")) == b""


def test_text_is_refused_and_what_came_before_counts() -> None:
    error = refused(client_frame(b"good") + client_frame(b"text", Opcode.TEXT))
    assert error.close_code == CloseCode.UNSUPPORTED_DATA
    decoder = FrameDecoder(100)
    with pytest.raises(WebSocketError) as caught:
        decoder.feed(client_frame(b"good") + client_frame(b"text", Opcode.TEXT))
    assert caught.value.received == b"good"


@pytest.mark.parametrize(
    "data,code",
    [
        pytest.param(frame(b"x"), CloseCode.PROTOCOL_ERROR, id="unmasked"),
        pytest.param(b"\xc2\x81" + MASK + b"x", CloseCode.PROTOCOL_ERROR, id="RSV1, compressed"),
        pytest.param(b"\x92\x81" + MASK + b"x", CloseCode.PROTOCOL_ERROR, id="RSV3"),
        pytest.param(client_frame(b"x", 3), CloseCode.PROTOCOL_ERROR, id="opcode 3"),
        pytest.param(client_frame(b"x", 11), CloseCode.PROTOCOL_ERROR, id="opcode 11"),
        pytest.param(client_frame(b"x", Opcode.CONTINUATION), CloseCode.PROTOCOL_ERROR, id="continuation of nothing"),
        pytest.param(client_frame(b"", fin=False) + client_frame(b""), CloseCode.PROTOCOL_ERROR, id="nested message"),
        pytest.param(client_frame(b"", Opcode.PING, fin=False), CloseCode.PROTOCOL_ERROR, id="fragmented ping"),
        pytest.param(client_frame(bytes(126), Opcode.PING), CloseCode.PROTOCOL_ERROR, id="long ping"),
        pytest.param(b"\x82\xfe\x00\x7d" + MASK, CloseCode.PROTOCOL_ERROR, id="16 bit length to spare"),
        pytest.param(b"\x82\xff" + bytes(6) + b"\xff\xff", CloseCode.PROTOCOL_ERROR, id="64 bit length to spare"),
        pytest.param(b"\x82\xff\xff" + bytes(7), CloseCode.MESSAGE_TOO_BIG, id="64 bit length, negative"),
        pytest.param(b"\x82\xfe\x03\xe9", CloseCode.MESSAGE_TOO_BIG, id="too large, known from the header"),
        pytest.param(
            client_frame(bytes(600), fin=False) + client_frame(bytes(401), Opcode.CONTINUATION),
            CloseCode.MESSAGE_TOO_BIG,
            id="too large in fragments",
        ),
        pytest.param(client_frame(b"\x03", Opcode.CLOSE), CloseCode.PROTOCOL_ERROR, id="close of one byte"),
        pytest.param(client_frame(b"\x03\xed", Opcode.CLOSE), CloseCode.PROTOCOL_ERROR, id="close 1005"),
        pytest.param(client_frame(b"\x03\xe7", Opcode.CLOSE), CloseCode.PROTOCOL_ERROR, id="close 999"),
        pytest.param(client_frame(b"\x0b\xb7", Opcode.CLOSE), CloseCode.PROTOCOL_ERROR, id="close 2999"),
        pytest.param(client_frame(b"\x03\xe8\xff", Opcode.CLOSE), CloseCode.INVALID_PAYLOAD, id="close, bad reason"),
    ],
)
def test_refused(data: bytes, code: CloseCode) -> None:
    assert refused(data).close_code == code


def test_a_client_refuses_masked_frames() -> None:
    assert refused(client_frame(b"x"), masked=False).close_code == CloseCode.PROTOCOL_ERROR


def test_a_large_frame_is_not_kept() -> None:
    decoder = FrameDecoder(10_000_000)
    data = client_frame(bytes(1_000_000))
    total = 0
    for at in range(0, len(data), 4096):
        total += len(decoder.feed(data[at : at + 4096]))
        assert total >= at + 4096 - 14 or at + 4096 > len(data)  # payload goes on as it comes
    assert total == 1_000_000


def test_close_frame_cuts_its_reason_between_characters() -> None:
    assert close_frame(CloseCode.NORMAL) == b"\x88\x02\x03\xe8"
    assert close_frame(CloseCode.MESSAGE_TOO_BIG, "big") == b"\x88\x05\x03\xf1big"
    long = close_frame(CloseCode.NORMAL, "x" + "é" * 100)
    assert long[1] == 125
    assert long[4:].decode() == "x" + "é" * 61


@given(st.lists(st.binary(max_size=40) | st.binary(max_size=20).map(client_frame), max_size=4))
@settings(deadline=None)
def test_any_bytes(parts: list[bytes]) -> None:
    data = b"".join(parts)
    outcomes = []
    for size in (max(len(data), 1), 1, 3):
        decoder = FrameDecoder(50)
        received, code = b"", None
        try:
            for at in range(0, len(data), size):
                received += decoder.feed(data[at : at + size])
        except WebSocketError as exc:
            received, code = received + exc.received, exc.close_code
        outcomes.append((received, code, decoder.closed, decoder.replies))
    assert outcomes[0] == outcomes[1] == outcomes[2]
