"""MQTT over TLS on real sockets: versions, certificates, what is no TLS, ends, bounds."""

from __future__ import annotations

import logging
import os
import ssl
import tracemalloc
from contextlib import suppress
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import ReasonCode
from mqtt_trio.protocol.packets import Disconnect, Publish, Will
from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.streams import StreamLink
from tests.certificates import Certificates
from tests.server.tls_support import Served, serve, until

BIG = bytes(range(256)) * 7800
"""Bytes, a little below the Maximum Packet Size."""


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture
def options(certificates: Certificates) -> ListenerOptions:
    return ListenerOptions(port=0, tls=certificates.tls_options())


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mqtt_trio")


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says about handshakes, without peer and listener."""
    return [r.message.partition(" failed: ")[2] for r in caplog.records if r.message.startswith("TLS handshake of ")]


@pytest.mark.parametrize("version", [3, 4, 5])
async def test_messages_both_ways_of_any_size(
    certificates: Certificates, options: ListenerOptions, version: int
) -> None:
    async with serve(options, ListenerOptions(port=0)) as served:
        secure = await served.connect(
            await served.open_tls(certificates.client_context()), "secure", version=version, clean_start=True
        )
        plain = await served.connect(await served.open(1), "plain", version=version, clean_start=True)
        await secure.subscribe("to/secure")
        await plain.subscribe("to/plain")
        for qos in (0, 1, 2):
            for payload in (b"", b"x", BIG):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(secure.publish, "to/plain", payload, qos=qos))
                    assert (await plain.next_message()).payload == payload
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(plain.publish, "to/secure", payload, qos=qos))
                    assert (await secure.next_message()).payload == payload
        await secure.disconnect()
        assert served.broker.metrics.handshakes_failed == 0


async def test_alpn_is_spoken_where_it_is_offered(certificates: Certificates, options: ListenerOptions) -> None:
    pages = attrs.evolve(options, type="websocket")
    async with serve(options, pages) as served:
        for offered, index, chosen in (
            (["mqtt"], 0, "mqtt"),
            (["x-other", "mqtt"], 0, "mqtt"),
            (["x-other"], 0, None),
            ([], 0, None),
            (["h2", "http/1.1"], 1, "http/1.1"),
        ):
            context = certificates.client_context()
            context.set_alpn_protocols(offered)
            stream = await served.open_tls(context, index)
            assert stream.selected_alpn_protocol() == chosen
            assert stream.version() == "TLSv1.3"


async def test_tls_1_1_is_refused_and_1_2_is_served(
    certificates: Certificates, options: ListenerOptions, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(options) as served:
        old = certificates.client_context()
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1 is deprecated"):
            old.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
            await served.shake_hands(old)
        await until(lambda: served.broker.metrics.handshakes_failed == 1)
        assert failures(caplog) == ["the client offers no version from TLS 1.2 on"]
        older = certificates.client_context()
        older.maximum_version = ssl.TLSVersion.TLSv1_2
        stream = await served.open_tls(older)
        assert stream.version() == "TLSv1.2"
        await (await served.connect(stream, "c")).disconnect()


async def test_a_client_that_trusts_another_authority_leaves(
    certificates: Certificates, options: ListenerOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Certificates(tmp_path, "other")
    async with serve(options) as served:
        with pytest.raises(ssl.SSLCertVerificationError):
            await served.shake_hands(other.client_context())
        await until(lambda: served.broker.metrics.handshakes_failed == 1)
    assert failures(caplog) == ["the client does not accept the certificate of this server (its alert: unknown ca)"]


# Client certificates


async def assert_turned_away(served: Served, context: ssl.SSLContext) -> None:
    """The client is told why: an alert about its certificate."""
    before = served.broker.metrics.handshakes_failed
    with pytest.raises(ssl.SSLError, match=r"ALERT_(CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE|UNKNOWN_CA)"):
        await served.shake_hands(context)
    await until(lambda: served.broker.metrics.handshakes_failed == before + 1)


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_required_client_certificates(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture, newest: ssl.TLSVersion
) -> None:
    stranger = Certificates(tmp_path, "stranger").client("sensor-1")
    options = ListenerOptions(port=0, tls=certificates.tls_options(mutual=True))
    async with serve(options) as served:
        for pair in (None, stranger, certificates.client("sensor-1")):
            context = certificates.client_context(pair)
            context.maximum_version = newest
            if pair is None or pair is stranger:
                await assert_turned_away(served, context)
                continue
            await served.connect(await served.open_tls(context), "c", user_name="somebody")
    nobody, unknown = failures(caplog)
    assert nobody == "the client showed no certificate (RequireClientCert)"
    assert unknown.startswith("the certificate of the client is refused: ")
    (credentials,) = served.seen.shown
    assert credentials.certificate_subject == "sensor-1"
    assert credentials.listener == served.listeners[0].name
    assert credentials.peer.startswith("127.0.0.1:")


async def test_client_certificates_that_may_be_left_out(certificates: Certificates, tmp_path: Path) -> None:
    tls = attrs.evolve(certificates.tls_options(mutual=True), require_client_cert=False)
    async with serve(ListenerOptions(port=0, tls=tls)) as served:
        await served.connect(await served.open_tls(certificates.client_context()), "a")
        pair = certificates.client("sensor-2")
        await served.connect(await served.open_tls(certificates.client_context(pair)), "b")
        assert [credentials.certificate_subject for credentials in served.seen.shown] == [None, "sensor-2"]
        await assert_turned_away(served, certificates.client_context(Certificates(tmp_path, "other").client("x")))


# What is no TLS, and TLS where it does not belong


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x00", "a plain MQTT CONNECT came; this port speaks TLS"),
        (b"GET /mqtt HTTP/1.1\r\n\r\n", "plain HTTP came; this port speaks TLS"),
        (b"\x00" * 50, "what came is no TLS"),
        (b"\x16\x03\x01\x00\x05hello", ""),
        (b"", "the client left before it said anything"),
    ],
)
async def test_what_is_no_tls_is_named_and_disturbs_nobody(
    certificates: Certificates,
    options: ListenerOptions,
    caplog: pytest.LogCaptureFixture,
    data: bytes,
    words: str,
) -> None:
    async with serve(options) as served:
        client = await served.connect(await served.open_tls(certificates.client_context()), "c")
        stream = await served.open()
        await stream.send_all(data)
        with suppress(trio.BrokenResourceError):  # the broker was faster
            await stream.send_eof()
        await until(lambda: served.broker.metrics.handshakes_failed == 1)
        assert await client.nothing_waits()
        assert served.broker.metrics.client_failures == 0
    (said,) = failures(caplog)
    assert said.startswith(words)
    assert said


@pytest.mark.parametrize(
    "options, words",
    [
        (ListenerOptions(port=0), "plain MQTT begins like this"),
        (ListenerOptions(type="websocket", port=0), "plain WebSocket"),
    ],
)
async def test_tls_at_a_plain_port_is_named(
    certificates: Certificates, caplog: pytest.LogCaptureFixture, options: ListenerOptions, words: str
) -> None:
    async with serve(options) as served:
        with pytest.raises(trio.BrokenResourceError):
            await served.open_tls(certificates.client_context())
    (line,) = [record.message for record in caplog.records if "TLS" in record.message]
    assert line.endswith(words)
    assert "127.0.0.1:" in line


# Ends


async def test_an_end_without_close_notify_is_an_end(
    certificates: Certificates, options: ListenerOptions, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(options) as served:
        watcher = await served.connect(await served.open_tls(certificates.client_context()), "watcher")
        await watcher.subscribe("gone")
        stream = await served.open_tls(certificates.client_context())
        await served.connect(stream, "c", will=Will(topic_name="gone", payload=b"!"))
        ended = next(link for link in served.clients.links if link.session and link.session.client_id == "c")
        await stream.transport_stream.send_eof()
        assert (await watcher.next_message()).payload == b"!"
        assert ended.end_text == "the client closed the network connection"
        assert served.broker.metrics.client_failures == 0
    assert failures(caplog) == []


async def test_the_farewell_is_whole(certificates: Certificates, options: ListenerOptions) -> None:
    """DISCONNECT, then close_notify: a client that looks for truncation sees none."""
    async with serve(options) as served:
        client = await served.connect(await served.open_tls(certificates.client_context()), "c")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.clients.shut_down)
            assert await client.next_packet() == Disconnect(ReasonCode.SERVER_SHUTTING_DOWN)
            assert await client.stream.receive_some() == b""  # an end without close_notify would raise


async def test_new_connections_get_the_new_certificate(certificates: Certificates, options: ListenerOptions) -> None:
    async with serve(options) as served:
        tls = served.listeners[0].tls
        assert tls is not None
        first = await served.open_tls(certificates.client_context())
        client = await served.connect(first, "first")
        renewed = certificates.server()
        os.replace(renewed.cert_file, tls.options.cert_file)
        os.replace(renewed.key_file, tls.options.key_file)
        tls.reload()
        second = await served.open_tls(certificates.client_context())
        await served.connect(second, "second")
        assert first.getpeercert()["serialNumber"] != second.getpeercert()["serialNumber"]
        assert await client.nothing_waits()


# Bounds


async def test_200_connections_that_never_shake_hands(
    certificates: Certificates, options: ListenerOptions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serve(attrs.evolve(options, connect_timeout=2.0)) as served:
        silent = [await served.open() for _ in range(200)]
        for stream in silent[::2]:
            await stream.send_all(b"\x16\x03\x01")  # the beginning of a record
        client = await served.connect(await served.open_tls(certificates.client_context()), "c")
        assert await client.nothing_waits()
        await until(lambda: served.broker.metrics.handshakes_failed == 200)
        await until(lambda: served.listeners[0].connections == 1)
        assert await client.nothing_waits()
    assert failures(caplog) == ["no end of it within 2 s"] * 200


async def test_a_reader_that_stops_is_bounded_and_alone(certificates: Certificates, options: ListenerOptions) -> None:
    limits = Limits(outbox_bytes=1024 * 1024, maximum_packet_size=65_536)
    payload = bytes(60_000)
    async with serve(options, ListenerOptions(port=0), limits=limits) as served:
        frozen = await served.connect(await served.open_tls(certificates.client_context()), "frozen")
        reader = await served.connect(await served.open_tls(certificates.client_context()), "reader")
        publisher = await served.connect(await served.open(1), "publisher")
        await frozen.subscribe("flood")
        await reader.subscribe("flood")
        link = next(one for one in served.clients.links if one.session and one.session.client_id == "frozen")
        assert isinstance(link, StreamLink)
        tracemalloc.start()
        try:
            for _ in range(800):  # 48 MB, far more than what sockets hold
                await publisher.send(Publish("flood", payload))
                assert len((await reader.next_message()).payload) == len(payload)
                assert 0 <= link.outbox.room <= limits.outbox_bytes
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert served.broker.metrics.dropped_outbox_full > 100
        assert peak < 8 * 1024 * 1024
        start = trio.current_time()
        link.end(ReasonCode.ADMINISTRATIVE_ACTION, "the test ends it")
        await until(lambda: link not in served.clients.links)
        assert trio.current_time() - start < 5  # CLOSE_GRACE bounds a farewell that nobody reads
        assert await reader.nothing_waits()
