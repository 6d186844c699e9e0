"""-F of sub [F3]; what mosquitto_sub 2.0.11 printed for the same messages is in the expectations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from mqtt_trio.commands.failures import UsageError
from mqtt_trio.commands.message_json import InvalidPayloadError
from mqtt_trio.commands.output import Arrived, formatted, plain, verbose
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import MessageProperties, Publish

PROPERTIES = MessageProperties(
    payload_format_indicator=1,
    message_expiry_interval=33,
    content_type="ct",
    response_topic="r/t",
    correlation_data=b"c\xffd",
    user_properties=(("k", "v"), ("k", "w")),
)
NANOSECONDS = 1_588_801_680_000_123_456
"""2020-05-06T21:48:00 UTC."""


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def shown(text: str, payload: bytes = b"hello", *, pretty: bool = False, **fields: Any) -> bytes:
    message = Publish("f", payload, properties=PROPERTIES)
    for name, value in fields.items():
        setattr(message, name, value)
    return formatted(text, b"", pretty=pretty)(Arrived(message, NANOSECONDS))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("%10p|%-10p|%3p|%010p", b"     hello|hello     |hel|00000hello"),
        ("%x|%X|%12x|%-12x|%012X|%6x", b"68656c6c6f|68656C6C6F|  68656c6c6f|68656c6c6f  |0068656C6C6F|68656c"),
        ("%.3t|%3t|%-3t|%3.0t", b"f|  f|f  |   "),
        ("%C|%9C|%-9C|%.1C", b"ct|       ct|ct       |c"),
        ("%D|%P|%R|%5R", b"c\xffd|k:v k:w|r/t|  r/t"),
        ("%E|%05E|%-5E|%F|%3F", b"33|00033|33   |1|  1"),
        ("%A|%3A|%S|%03S", b"|   ||000"),
        ("%q%r%m|%l|%04l|%%", b"000|5|0005|%"),
        (r"\\|\0|\a|\e|\n|\r|\t|\v", b"\\|\0|\a|\x1b|\n|\r|\t|\v"),
        ("@@|@Y-@m-@d|@N|%U", b"@|2020-05-06|000123456|1588801680.000123456"),
        ("%I|%26I", b"2020-05-06T21:48:00+0000|  2020-05-06T21:48:00+0000"),
        ("ä%%", "ä%".encode()),
    ],
)
def test_specifiers(text: str, expected: bytes) -> None:
    assert shown(text) == expected


def test_what_a_message_has_besides() -> None:
    fields: dict[str, Any] = {"qos": QoS.EXACTLY_ONCE, "retain": True, "packet_id": 7, "topic_alias": 3}
    assert shown("%q %r %m %A %S", subscription_identifiers=(12, 13), **fields) == b"2 1 7 3 12"


@pytest.mark.parametrize(
    "text, words",
    [
        ("%", "% at the end"),
        ("%-05", "%-05 at the end is incomplete"),
        ("@", "@ at the end"),
        ("a\\", "\\ at the end"),
        ("%z", "no format specifier %z"),
        ("%5q", "%q takes no flags"),
        ("\\q", "no escape \\q"),
    ],
)
def test_wrong_formats(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        formatted(text, b"")
    assert words in str(caught.value)


def test_json() -> None:
    assert shown("%j") == (
        b'{"tst":"2020-05-06T21:48:00.000123Z+0000","topic":"f","qos":0,"retain":0,"payloadlen":5,"properties":'
        b'{"payload-format-indicator":1,"message-expiry-interval":33,"content-type":"ct","response-topic":"r/t",'
        b'"correlation-data":[99,255,100],"user-properties":{"k":"v","k":"w"}},"payload":"hello"}'
    )


@pytest.mark.parametrize(
    "payload, expected",
    [
        (b"", b"null"),
        (b'"\\\n\x01/\xc3\xa4', b'"\\"\\\\\\n\\u0001/\xc3\xa4"'),
        (b"\xff\0", b"[255,0]"),
    ],
)
def test_quoted_payloads(payload: bytes, expected: bytes) -> None:
    assert shown("%j", payload, properties=MessageProperties()).endswith(b',"payload":' + expected + b"}")


@pytest.mark.parametrize(
    "payload, expected",
    [
        (b"", b"null"),
        (b' {"a" : 1.0, "b":[1,2e3,null,"x/y"], "a": {}} ', b'{"a":1,"b":[1,2000,null,"x/y"],"a":{}}'),
        (b"12345678901234567890", b"12345678901234567890"),
        (b"0.1", b"0.1"),
        ('"ä"'.encode(), '"ä"'.encode()),
    ],
)
def test_payloads_that_are_json(payload: bytes, expected: bytes) -> None:
    assert shown("%J", payload, properties=MessageProperties()).endswith(b',"payload":' + expected + b"}")


@pytest.mark.parametrize("payload", [b"hello", b"NaN", b"\xff", b"1 2", b"[" * 100_000])
def test_payloads_that_are_no_json(payload: bytes) -> None:
    with pytest.raises(InvalidPayloadError, match="not valid JSON on topic f"):
        shown("%J", payload)


def test_pretty_json() -> None:
    text = shown("%J", b'{"a":[1,{"b":{}}]}', pretty=True, properties=MessageProperties()).decode()
    assert text == (
        '{\n\t"tst":\t"2020-05-06T21:48:00.000123Z+0000",\n\t"topic":\t"f",\n\t"qos":\t0,\n\t"retain":\t0,\n'
        '\t"payloadlen":\t18,\n\t"payload":\t{\n\t\t"a":\t[1, {\n\t\t\t\t"b":\t{\n\t\t\t\t}\n\t\t\t}]\n\t}\n}'
    )


def test_without_a_format() -> None:
    full, empty = Arrived(Publish("a", b"x\0"), 0), Arrived(Publish("a"), 0)
    assert [plain(b"\n")(full), plain(b"")(full), plain(b"\n")(empty)] == [b"x\0\n", b"x\0", b""]
    assert [verbose(b"\n")(full), verbose(b"")(full), verbose(b"\n")(empty), verbose(b"")(empty)] == [
        b"a x\0\n",
        b"a x\0",
        b"a (null)\n",
        b"",
    ]
