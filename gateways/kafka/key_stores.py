"""Key stores and trust stores as bytes: JKS, PKCS12, PEM and single DER certificates, told apart by their content [K2].

Nothing here opens a file, and no error text holds more than what a store is. `cryptography` reads PKCS12 and private
keys; JKS, which it does not know, takes the few lines below: a store is a list of entries behind which stands a digest
over password and content, and a private key in it is XORed with a stream of digests.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import re
import struct
import warnings
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

import attrs
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import pkcs12

Kind: TypeAlias = Literal["JKS", "PKCS12", "PEM", "DER"]
Part: TypeAlias = Literal["location", "password", "key password"]

LARGEST_STORE: Final = 8 * 1024 * 1024
"""Bytes: more is no key store."""

_JKS: Final = b"\xfe\xed\xfe\xed"
_JCEKS: Final = b"\xce\xce\xce\xce"
_JKS_SALT: Final = b"Mighty Aphrodite"
_JKS_PROTECTOR: Final = bytes.fromhex("2b060104012a02110101")
"""OID 1.3.6.1.4.1.42.2.17.1.1, the only protection of keys that JKS has."""
_DIGEST_SIZE: Final = 20
_BEGIN: Final = b"-----BEGIN "
_CERTIFICATE: Final = re.compile(
    rb"-----BEGIN (?:X509 )?CERTIFICATE-----(.+?)-----END (?:X509 )?CERTIFICATE-----", re.S
)
_CERTIFICATE_BEGIN: Final = re.compile(rb"-----BEGIN (?:X509 )?CERTIFICATE-----")
_KEY: Final = re.compile(rb"-----BEGIN ((?:[A-Z0-9]+ )*)PRIVATE KEY-----.+?-----END \1PRIVATE KEY-----", re.S)


class KeyStoreError(Exception):
    """A store cannot be used. `part` says which option is to blame."""

    def __init__(self, text: str, part: Part = "location") -> None:
        super().__init__(text)
        self.part = part


@attrs.frozen
class Identity:
    """A private key and its certificates: what a client shows to servers."""

    key: PrivateKeyTypes = attrs.field(repr=False)
    chain: tuple[bytes, ...]
    """DER, the client's own first."""
    expires: datetime.datetime

    def pem(self, password: bytes) -> bytes:
        """Return key and certificates in PEM, the key encrypted with `password`."""
        encrypted = serialization.BestAvailableEncryption(password)
        key = self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted)
        return key + b"".join(map(to_pem, self.chain))


def read_trust(data: bytes, password: str | None) -> list[bytes]:
    """Return the certificates of a trust store, each in DER.

    Raises:
      KeyStoreError: it cannot be read, or has none.
    """
    kind = sniff(data)
    if kind == "JKS":
        found = read_jks(data, password).trusted
    elif kind == "PKCS12":
        store = _read_pkcs12(data, password)
        found = [each.certificate.public_bytes(serialization.Encoding.DER) for each in store.additional_certs]
    else:
        found = [data] if kind == "DER" else _pem_certificates(data)
        for der in found:
            _parse(der)
    if not found:
        raise KeyStoreError(f"no certificate of an authority is in it ({kind}); it may be a key store")
    return found


def read_identity(data: bytes, password: str | None, key_password: str | None) -> Identity:
    """Return the private key of a key store, the first where it has several, and its certificates.

    `key_password` opens the key where that is not `password`.

    Raises:
      KeyStoreError: it cannot be read, has no key, or the key does not fit the certificate.
    """
    kind = sniff(data)
    if kind == "JKS":
        key, chain = _jks_identity(data, password, key_password)
    elif kind == "PKCS12":
        store = _read_pkcs12(data, password)
        own = [store.cert] if store.cert is not None else []
        chain = [x.certificate.public_bytes(serialization.Encoding.DER) for x in [*own, *store.additional_certs]]
        if store.key is None:
            raise KeyStoreError("no private key is in it (PKCS12); it may be a trust store")
        key = store.key
    elif kind == "PEM":
        key, chain = _pem_key(data, key_password or password), _pem_certificates(data)
    else:
        raise KeyStoreError("it is a single certificate without a private key; expected PEM, PKCS12 or JKS")
    return _fit_together(key, chain)


def sniff(data: bytes) -> Kind:
    """Tell by its content what a store is.

    Raises:
      KeyStoreError: it is nothing that can be read.
    """
    if not data:
        raise KeyStoreError("the file is empty")
    if data.startswith(_JKS):
        return "JKS"
    if data.startswith(_JCEKS):
        raise KeyStoreError(
            "it is a JCEKS store; make a PKCS12 store of it: keytool -importkeystore -deststoretype PKCS12"
        )
    if _BEGIN in data[:65_536]:
        return "PEM"
    if data[0] == 0x30:
        return "PKCS12" if _is_pkcs12(data) else "DER"
    raise KeyStoreError("it is neither JKS nor PKCS12 nor PEM")


def to_pem(der: bytes) -> bytes:
    """Return a certificate in PEM."""
    text = base64.b64encode(der)
    lines = b"\n".join(text[start : start + 64] for start in range(0, len(text), 64))
    return b"-----BEGIN CERTIFICATE-----\n" + lines + b"\n-----END CERTIFICATE-----\n"


def _fit_together(key: PrivateKeyTypes, chain: Sequence[bytes]) -> Identity:
    """Put the certificate that belongs to the key first."""
    if not chain:
        raise KeyStoreError("a private key is in it, but no certificate")
    wanted = _public(key.public_key())
    own: x509.Certificate | None = None
    rest: list[bytes] = []
    for der in chain:
        certificate = _parse(der)
        if own is None and _key_of(certificate) == wanted:
            own = certificate
        elif der not in rest:
            rest.append(der)
    if own is None:
        raise KeyStoreError("the private key in it does not belong to the certificate in it")
    first = own.public_bytes(serialization.Encoding.DER)
    return Identity(key, (first, *rest), own.not_valid_after_utc)


def _parse(der: bytes) -> x509.Certificate:
    try:
        with warnings.catch_warnings():  # of oddities that OpenSSL takes
            warnings.simplefilter("ignore")
            return x509.load_der_x509_certificate(der)
    except ValueError:
        raise KeyStoreError("a certificate in it is damaged") from None


def _key_of(certificate: x509.Certificate) -> bytes:
    """Return the public key of a certificate, nothing for one that `cryptography` does not know."""
    try:
        return _public(certificate.public_key())
    except (ValueError, UnsupportedAlgorithm):
        return b""


def _public(key: Any) -> bytes:
    """Return any kind of public key as bytes that can be compared."""
    return bytes(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


# PEM


def _pem_certificates(data: bytes) -> list[bytes]:
    try:
        found = [base64.b64decode(b"".join(match[1].split()), validate=True) for match in _CERTIFICATE.finditer(data)]
    except binascii.Error:
        raise KeyStoreError("a certificate in it is damaged (PEM)") from None
    if len(found) != len(_CERTIFICATE_BEGIN.findall(data)):
        raise KeyStoreError("it is cut off within a certificate (PEM)")
    return found


def _pem_key(data: bytes, password: str | None) -> PrivateKeyTypes:
    match = _KEY.search(data)
    if match is None:
        raise KeyStoreError("no private key is in it (PEM); key and certificates stand in one file")
    block = match[0] + b"\n"
    encrypted = match[1] == b"ENCRYPTED " or b"Proc-Type: 4,ENCRYPTED" in block
    if encrypted and not password:
        raise KeyStoreError("the private key is encrypted, and its password is missing", "key password")
    try:
        return serialization.load_pem_private_key(block, password.encode() if encrypted and password else None)
    except UnsupportedAlgorithm:
        raise KeyStoreError("the private key is encrypted, or made, in a way that is not supported") from None
    except (ValueError, TypeError):
        if encrypted:
            raise KeyStoreError("the password does not open the private key", "key password") from None
        raise KeyStoreError("the private key in it is damaged (PEM)") from None


# PKCS12


def _is_pkcs12(data: bytes) -> bool:
    """A PFX begins with its version, a certificate with another sequence (RFC 7292, 4; RFC 5280, 4.1)."""
    try:
        _, start, _ = _tlv(data, 0)
        return data[start : start + 3] == b"\x02\x01\x03"
    except KeyStoreError:
        return False


def _read_pkcs12(data: bytes, password: str | None) -> pkcs12.PKCS12KeyAndCertificates:
    _, start, size = _tlv(data, 0)
    if start + size > len(data):
        raise KeyStoreError("it is cut off (PKCS12)")
    for attempt in (password.encode(),) if password else (None, b""):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return pkcs12.load_pkcs12(data, attempt)
        except UnsupportedAlgorithm:
            raise KeyStoreError("it is encrypted in a way that is not supported (PKCS12)") from None
        except ValueError:
            continue
    if not password:
        raise KeyStoreError("the password of the store is missing (PKCS12)", "password")
    raise KeyStoreError("the password does not open the store (PKCS12), or the file was changed", "password")


# JKS


@attrs.frozen
class JavaStore:
    """The entries of a JKS file."""

    trusted: list[bytes]
    """Certificates in DER."""
    keys: list[tuple[bytes, list[bytes]]] = attrs.field(repr=False)
    """Protected key and its chain."""


def read_jks(data: bytes, password: str | None) -> JavaStore:
    """Read the entries of a JKS store; without a password nothing is verified.

    Raises:
      KeyStoreError: the password is wrong, or it is no sound store.
    """
    try:
        store = _jks_entries(_Reader(data, len(data) - _DIGEST_SIZE))
    except (IndexError, struct.error):
        raise KeyStoreError("it is damaged or cut off (JKS)") from None
    if password is not None:
        digest = hashlib.sha1(_jks_password(password) + _JKS_SALT + data[:-_DIGEST_SIZE], usedforsecurity=False)
        if digest.digest() != data[-_DIGEST_SIZE:]:
            raise KeyStoreError("the password does not open the store (JKS), or the file was changed", "password")
    return store


def _jks_entries(reader: _Reader) -> JavaStore:
    reader.number(">I")  # the magic number
    version, count = reader.number(">I"), reader.number(">I")
    store = JavaStore([], [])

    def certificate() -> bytes:
        if version == 2:
            reader.block(">H")  # its type: X.509
        return reader.block(">I")

    for _ in range(count):
        tag = reader.number(">I")
        reader.block(">H")  # alias
        reader.number(">Q")  # date
        if tag == 2:
            store.trusted.append(certificate())
        elif tag == 1:
            key = reader.block(">I")
            store.keys.append((key, [certificate() for _ in range(reader.number(">I"))]))
        else:
            raise IndexError
    if not reader.is_at_end:
        raise IndexError
    return store


class _Reader:
    """Takes numbers and blocks off a buffer; IndexError or struct.error at its end."""

    def __init__(self, data: bytes, end: int) -> None:
        self._data, self._at, self._end = data, 0, end

    @property
    def is_at_end(self) -> bool:
        return self._at == self._end

    def number(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        if self._at > self._end:
            raise IndexError
        return int(value)

    def block(self, layout: str) -> bytes:
        size = self.number(layout)
        start, self._at = self._at, self._at + size
        if self._at > self._end:
            raise IndexError
        return self._data[start : self._at]


def _jks_password(password: str) -> bytes:
    return password.encode("utf-16-be", "surrogatepass")


def _jks_identity(data: bytes, password: str | None, key_password: str | None) -> tuple[PrivateKeyTypes, list[bytes]]:
    store = read_jks(data, password)
    if not store.keys:
        raise KeyStoreError("no private key is in it (JKS); it may be a trust store")
    opener = key_password or password
    if opener is None:
        raise KeyStoreError("the password of the store is missing (JKS)", "password")
    protected, chain = store.keys[0]
    der = _unprotect(protected, _jks_password(opener))
    try:
        return serialization.load_der_private_key(der, None), chain
    except (ValueError, UnsupportedAlgorithm):
        raise KeyStoreError("the private key in it is of a kind that is not supported (JKS)") from None


def _unprotect(protected: bytes, password: bytes) -> bytes:
    """Return the PKCS#8 of a key: salt, key XOR stream, digest. The stream is SHA-1(password + what came before)."""
    _, outer, _ = _tlv(protected, 0)
    _, algorithm, algorithm_size = _tlv(protected, outer)
    _, name, name_size = _tlv(protected, algorithm)
    if protected[name : name + name_size] != _JKS_PROTECTOR:
        raise KeyStoreError("its private key is protected in a way that JKS does not have")
    _, start, size = _tlv(protected, algorithm + algorithm_size)
    blob = protected[start : start + size]
    block, encrypted, check = blob[:_DIGEST_SIZE], blob[_DIGEST_SIZE:-_DIGEST_SIZE], blob[-_DIGEST_SIZE:]
    stream = b""
    while len(stream) < len(encrypted):
        block = hashlib.sha1(password + block, usedforsecurity=False).digest()
        stream += block
    key = bytes(a ^ b for a, b in zip(encrypted, stream, strict=False))
    if hashlib.sha1(password + key, usedforsecurity=False).digest() != check:
        raise KeyStoreError("the password does not open the private key (JKS)", "key password")
    return key


def _tlv(data: bytes, at: int) -> tuple[int, int, int]:
    """Return tag, start and size of the DER value at `at`."""
    try:
        tag, size, start = data[at], data[at + 1], at + 2
        if size & 0x80:
            count = size & 0x7F
            size = int.from_bytes(data[start : start + count], "big")
            start += count
    except IndexError:
        raise KeyStoreError("it is damaged or cut off") from None
    return tag, start, size
