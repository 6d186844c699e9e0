"""What TLS listeners say about their files before they serve anything."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import attrs
import pytest

from mqtt_trio.errors import StartError
from mqtt_trio.server.listeners import ListenerOptions, open_listener
from mqtt_trio.server.tls import TlsOptions, TlsServer
from tests.certificates import Certificates

WHERE = "Listeners[2].Tls"
LONG_AGO = datetime.datetime(2001, 2, 3, tzinfo=datetime.UTC)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def refusal(options: TlsOptions, **changes: Any) -> str:
    """Return what is said about changed options, which is one line."""
    with pytest.raises(StartError) as caught:
        TlsServer(attrs.evolve(options, **changes), WHERE, ("mqtt",))
    text = str(caught.value)
    assert text.startswith(f"{WHERE}.")
    assert "\n" not in text
    return text.removeprefix(f"{WHERE}.")


def written(folder: Path, text: str) -> str:
    file = folder / "written.pem"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("key", ["CertFile", "KeyFile", "CaFile"])
def test_a_missing_file(certificates: Certificates, key: str) -> None:
    attribute = {"CertFile": "cert_file", "KeyFile": "key_file", "CaFile": "ca_file"}[key]
    text = refusal(certificates.tls_options(), **{attribute: "/no/such.pem"})
    assert text == f"{key}: cannot read '/no/such.pem': No such file or directory"


def test_a_directory_in_the_place_of_a_file(certificates: Certificates, tmp_path: Path) -> None:
    assert "Is a directory" in refusal(certificates.tls_options(), key_file=str(tmp_path))


def test_the_key_of_another_certificate(certificates: Certificates) -> None:
    other = certificates.server()
    text = refusal(certificates.tls_options(), key_file=other.key_file)
    assert text.startswith(f"KeyFile: {other.key_file} is not the key of the first certificate in ")


def test_files_that_are_swapped(certificates: Certificates) -> None:
    pair = certificates.server()
    text = refusal(TlsOptions(cert_file=pair.key_file, key_file=pair.cert_file))
    assert text.startswith(f"CertFile: {pair.key_file} has no certificate in PEM")
    text = refusal(TlsOptions(cert_file=pair.cert_file, key_file=pair.cert_file))
    assert text.startswith(f"KeyFile: {pair.cert_file} has no private key in PEM")


def test_damaged_files(certificates: Certificates, tmp_path: Path) -> None:
    options = certificates.tls_options()
    broken = written(tmp_path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert refusal(options, cert_file=broken) == f"CertFile: {broken} is damaged: its certificates cannot be read"
    assert refusal(options, ca_file=broken) == f"CaFile: {broken} is damaged: its certificates cannot be read"
    broken = written(tmp_path, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    assert refusal(options, key_file=broken).startswith(f"KeyFile: {broken} is damaged or of an unknown kind")


def test_an_encrypted_key_needs_its_password(certificates: Certificates) -> None:
    pair = certificates.issue("localhost", password="open sesame")
    options = TlsOptions(cert_file=pair.cert_file, key_file=pair.key_file)
    assert "is encrypted; set Listeners[2].Tls.KeyPassword or KeyPasswordFile" in refusal(options)
    wrong = refusal(options, key_password="close sesame")
    assert wrong == f"KeyPassword: does not open {pair.key_file}"
    served = TlsServer(attrs.evolve(options, key_password="open sesame"), WHERE, ("mqtt",))
    assert served.warning is None
    assert "sesame" not in repr(attrs.evolve(options, key_password="open sesame"))


def test_a_ca_file_without_authorities(certificates: Certificates, tmp_path: Path) -> None:
    options = certificates.tls_options()
    assert "has no certificate in PEM" in refusal(options, ca_file=written(tmp_path, "nothing here\n"))
    assert "has no certificate of an authority (CA)" in refusal(options, ca_file=options.cert_file)


def test_client_certificates_need_an_authority() -> None:
    with pytest.raises(ValueError, match="needs CaFile"):
        TlsOptions(cert_file="a", key_file="b", require_client_cert=True)


def test_the_summary_says_what_is_served(certificates: Certificates) -> None:
    server = TlsServer(certificates.tls_options(mutual=True), WHERE, ("mqtt",))
    assert server.warning is None
    assert server.subject == "localhost"
    assert server.describe() == (
        f"TLS 1.2 and 1.3, certificate of localhost until {server.expires}, client certificates required"
    )
    optional = TlsServer(attrs.evolve(server.options, require_client_cert=False), WHERE, ("mqtt",))
    assert optional.describe().endswith("client certificates checked where shown")


async def test_an_expired_certificate_is_served_with_a_warning(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """As in mosquitto: clients that do not look go on."""
    pair = certificates.issue("localhost", not_after=LONG_AGO)
    tls = TlsOptions(cert_file=pair.cert_file, key_file=pair.key_file)
    listener = await open_listener(ListenerOptions(port=0, tls=tls))
    described = listener.describe()
    listener.close()
    text = f"the certificate in {pair.cert_file} is bad for clients that check it: certificate has expired"
    assert [record.message for record in caplog.records] == [f"Listeners[0] (tcp on 127.0.0.1:0): {text}"]
    assert described.endswith(f"; TLS 1.2 and 1.3, {text}")


async def test_a_tls_listener_says_so(certificates: Certificates) -> None:
    listener = await open_listener(ListenerOptions(type="websocket", port=0, tls=certificates.tls_options()))
    described = listener.describe()
    listener.close()
    assert listener.name == f"websocket+tls 127.0.0.1:{listener.port}"
    assert described.startswith(f"websocket+tls 127.0.0.1:{listener.port}/mqtt: this machine only")
    assert "TLS 1.2 and 1.3, certificate of localhost until " in described


async def test_files_that_cannot_be_used_leave_no_port_bound(certificates: Certificates) -> None:
    tls = attrs.evolve(certificates.tls_options(), key_file="/no/such.key")
    with pytest.raises(StartError, match=r"Listeners\[1\]\.Tls\.KeyFile"):
        await open_listener(ListenerOptions(port=0, tls=tls), "Listeners[1]")


def test_ports_by_type() -> None:
    tls = TlsOptions(cert_file="a", key_file="b")
    assert ListenerOptions(tls=tls).port == 8883
    assert ListenerOptions(type="websocket", tls=tls).port == 8084
    assert ListenerOptions(tls=tls, port=1883).port == 1883


def test_reloading_is_all_or_nothing(certificates: Certificates) -> None:
    server = TlsServer(certificates.tls_options(), WHERE, ("mqtt",))
    before, key = server.context, Path(server.options.key_file).read_bytes()
    Path(server.options.key_file).write_text("torn")
    with pytest.raises(StartError):
        server.reload()
    assert server.context is before
    Path(server.options.key_file).write_bytes(key)
    server.reload()
    assert server.context is not before
