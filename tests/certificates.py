"""Certificates for tests, made on the spot: an authority, servers and clients that it signed, as PEM files."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import attrs
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from mqtt_trio.server.tls import TlsOptions

NAMES = ("localhost", "127.0.0.1")


@attrs.frozen
class Pair:
    """A certificate and its private key."""

    cert_file: str
    key_file: str


class Certificates:
    """One authority, and what it signs; every file is in `folder`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.name = name
        self.ca = trustme.CA()
        self.ca_file = str(folder / f"{name}.pem")
        self.ca.cert_pem.write_to_path(self.ca_file)
        self._count = 0

    def issue(
        self,
        *names: str,
        common_name: str | None = None,
        not_after: datetime.datetime | None = None,
        password: str = "",
    ) -> Pair:
        """Sign a certificate for host names or addresses; a password encrypts its key."""
        self._count += 1
        issued = self.ca.issue_cert(*names, common_name=common_name, not_after=not_after)
        stem = self.folder / f"{self.name}-{self._count}"
        cert_file, key_file = Path(f"{stem}.pem"), Path(f"{stem}.key")
        cert_file.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key = issued.private_key_pem.bytes()
        if password:
            loaded = load_pem_private_key(key, None)
            encryption = BestAvailableEncryption(password.encode())
            key = loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        key_file.write_bytes(key)
        return Pair(str(cert_file), str(key_file))

    def server(self) -> Pair:
        """A certificate for this machine."""
        return self.issue(*NAMES)

    def client(self, common_name: str) -> Pair:
        """A certificate that names a client."""
        return self.issue(common_name=common_name)

    def tls_options(self, *, mutual: bool = False) -> TlsOptions:
        """Options of a listener with a certificate of its own; `mutual`: clients must show one of this authority."""
        pair = self.server()
        ca_file = self.ca_file if mutual else None
        return TlsOptions(cert_file=pair.cert_file, key_file=pair.key_file, ca_file=ca_file, require_client_cert=mutual)

    def client_context(self, pair: Pair | None = None) -> ssl.SSLContext:
        """What a client needs that trusts this authority; `pair` is what it shows itself."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if pair is not None:
            context.load_cert_chain(pair.cert_file, pair.key_file)
        return context
