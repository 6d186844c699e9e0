"""Key stores of any kind, as bytes: what is in them, and what is said about those that cannot be used [K2]."""

from __future__ import annotations

import base64
import datetime
import hashlib
import random
import struct
from collections.abc import Sequence
from contextlib import suppress

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    pkcs12,
)
from cryptography.x509.oid import NameOID

from gateways.kafka.key_stores import KeyStoreError, read_identity, read_trust, sniff, to_pem
from tests.kafka_support import SecureKafka

PASSWORD = "päss wörd"
KEY_PASSWORD = "another"
PRIVATE_HEADER = "-----BEGIN PRIVATE KEY-----"


@attrs.frozen
class Maker:
    """An authority and one certificate that it signed."""

    ca: x509.Certificate
    leaf: x509.Certificate
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

    @property
    def chain(self) -> list[bytes]:
        return [certificate.public_bytes(Encoding.DER) for certificate in (self.leaf, self.ca)]

    def key_pem(self, password: str | None = None, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
        encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
        return self.key.private_bytes(Encoding.PEM, form, encryption)

    def pem(self, password: str | None = None, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
        return self.key_pem(password, form) + b"".join(map(to_pem, self.chain))

    def pkcs12(self, password: str | None = PASSWORD) -> bytes:
        encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
        return pkcs12.serialize_key_and_certificates(b"me", self.key, self.leaf, [self.ca], encryption)

    def jks(self, password: str = PASSWORD, key_password: str | None = None) -> bytes:
        der = self.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return jks_file([("me", protect(der, key_password or password), self.chain)], [("ca", self.chain[1])], password)

    def trust(self, password: str = PASSWORD) -> bytes:
        return jks_file([], [("ca", self.chain[1])], password)


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, issuer: Maker | None
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.ca.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    return builder.sign(issuer.key if issuer else key, hashes.SHA256())


def make(kind: str = "ec") -> Maker:
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = certificate("authority", authority_key, None)
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
    return Maker(authority, certificate("client", key, Maker(authority, authority, authority_key)), key)


# A writer of JKS by the description of sun.security.provider.JavaKeyStore and KeyProtector


def sized(layout: str, data: bytes) -> bytes:
    return struct.pack(layout, len(data)) + data


def protect(key: bytes, password: str) -> bytes:
    word, salt = password.encode("utf-16-be"), bytes(range(20))
    stream, block = b"", salt
    while len(stream) < len(key):
        block = hashlib.sha1(word + block).digest()
        stream += block
    blob = salt + bytes(a ^ b for a, b in zip(key, stream, strict=False)) + hashlib.sha1(word + key).digest()
    algorithm = bytes.fromhex("300e060a2b060104012a021101010500")
    inner = algorithm + b"\x04\x82" + struct.pack(">H", len(blob)) + blob
    return b"\x30\x82" + struct.pack(">H", len(inner)) + inner


def jks_file(
    keys: Sequence[tuple[str, bytes, list[bytes]]],
    trusted: Sequence[tuple[str, bytes]],
    password: str,
    version: int = 2,
) -> bytes:
    kind = sized(">H", b"X.509") if version == 2 else b""
    body = b"\xfe\xed\xfe\xed" + struct.pack(">II", version, len(keys) + len(trusted))
    for alias, key, chain in keys:
        body += struct.pack(">I", 1) + sized(">H", alias.encode()) + struct.pack(">Q", 0) + sized(">I", key)
        body += struct.pack(">I", len(chain)) + b"".join(kind + sized(">I", der) for der in chain)
    for alias, der in trusted:
        body += struct.pack(">I", 2) + sized(">H", alias.encode()) + struct.pack(">Q", 0) + kind + sized(">I", der)
    return body + hashlib.sha1(password.encode("utf-16-be") + b"Mighty Aphrodite" + body).digest()


@pytest.fixture(scope="module")
def maker() -> Maker:
    return make()


# What is in them


def test_authorities_of_every_kind_of_store(maker: Maker) -> None:
    expected = [maker.chain[1]]
    assert read_trust(maker.trust(), PASSWORD) == expected
    assert read_trust(maker.trust(), None) == expected, "as in Java: without its password nothing is verified"
    assert read_trust(jks_file([], [("ca", maker.chain[1])], PASSWORD, version=1), PASSWORD) == expected
    assert read_trust(maker.jks(), PASSWORD) == expected
    assert read_trust(maker.pkcs12(), PASSWORD) == expected
    assert read_trust(maker.pkcs12(None), None) == expected
    assert read_trust(b"a comment\n" + to_pem(maker.chain[1]), None) == expected
    assert read_trust(maker.pem(), None) == maker.chain, "whatever is in it"
    assert read_trust(maker.chain[1], None) == expected


@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_keys_of_every_kind_of_store(kind: str) -> None:
    maker = make(kind)
    traditional = PrivateFormat.TraditionalOpenSSL
    stores = [
        (maker.jks(), PASSWORD, None),
        (maker.jks(key_password=KEY_PASSWORD), PASSWORD, KEY_PASSWORD),
        (maker.pkcs12(), PASSWORD, None),
        (maker.pkcs12(None), None, None),
        (maker.pem(), None, None),
        (maker.pem(KEY_PASSWORD), None, KEY_PASSWORD),
        (maker.pem(KEY_PASSWORD, traditional), None, KEY_PASSWORD),
        (maker.pem(PASSWORD), PASSWORD, None),
        (maker.pem(None, traditional), None, None),
        (b"".join(map(to_pem, reversed(maker.chain))) + maker.key_pem(), None, None),
    ]
    for data, password, key_password in stores:
        identity = read_identity(data, password, key_password)
        assert identity.chain == tuple(maker.chain), "its own certificate first"
        assert identity.expires == maker.leaf.not_valid_after_utc
        assert PRIVATE_HEADER not in repr(identity)
        pem = identity.pem(b"once")
        assert PRIVATE_HEADER.encode() not in pem
        assert load_pem_private_key(pem, b"once").public_key() == maker.key.public_key()


# What is said about others


@pytest.mark.parametrize(
    "data,text",
    [
        (b"", "the file is empty"),
        (b"hello", "neither JKS nor PKCS12 nor PEM"),
        (b"\xce\xce\xce\xce\0\0\0\2", "JCEKS"),
        (b"-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n", "damaged"),
        (b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n", "damaged"),
        (b"-----BEGIN CERTIFICATE-----\nMIIB", "cut off within a certificate"),
        (b"-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----\n", "no certificate of an authority is in it"),
        (b"\x30\x82\x01\0\0", "a certificate in it is damaged"),
        (b"\xfe\xed\xfe\xed", "damaged or cut off (JKS)"),
    ],
)
def test_what_is_no_trust_store(data: bytes, text: str) -> None:
    with pytest.raises(KeyStoreError) as raised:
        read_trust(data, "x")
    assert text in str(raised.value)
    assert raised.value.part == "location"


def test_passwords_that_open_nothing(maker: Maker) -> None:
    cases = [
        (maker.jks(), "wrong", None, "password"),
        (maker.jks(), None, None, "password"),
        (maker.jks(key_password=KEY_PASSWORD), PASSWORD, None, "key password"),
        (maker.jks(), PASSWORD, "wrong", "key password"),
        (maker.pkcs12(), "wrong", None, "password"),
        (maker.pkcs12(), None, None, "password"),
        (maker.pem(KEY_PASSWORD), None, "wrong", "key password"),
        (maker.pem(KEY_PASSWORD), None, None, "key password"),
        (maker.pem(KEY_PASSWORD, PrivateFormat.TraditionalOpenSSL), None, "wrong", "key password"),
    ]
    for data, password, key_password, part in cases:
        with pytest.raises(KeyStoreError) as raised:
            read_identity(data, password, key_password)
        assert raised.value.part == part
        assert "wrong" not in str(raised.value)
        assert PASSWORD not in str(raised.value)
    for data in (maker.trust(), maker.pkcs12()):
        with pytest.raises(KeyStoreError) as raised:
            read_trust(data, "wrong")
        assert raised.value.part == "password"


def test_stores_without_what_is_wanted_of_them(maker: Maker) -> None:
    key_only = jks_file([("me", protect(b"x", PASSWORD), maker.chain)], [], PASSWORD)
    with pytest.raises(KeyStoreError, match="it may be a key store"):
        read_trust(key_only, PASSWORD)
    for data in (maker.trust(), to_pem(maker.chain[1])):
        with pytest.raises(KeyStoreError, match="no private key is in it"):
            read_identity(data, PASSWORD, None)
    with pytest.raises(KeyStoreError, match="single certificate"):
        read_identity(maker.chain[0], None, None)
    with pytest.raises(KeyStoreError, match="no certificate"):
        read_identity(maker.key_pem(), None, None)
    with pytest.raises(KeyStoreError, match="kind that is not supported"):
        read_identity(key_only, PASSWORD, None)


def test_a_key_that_belongs_to_another_certificate(maker: Maker) -> None:
    other = make()
    with pytest.raises(KeyStoreError, match="does not belong to the certificate"):
        read_identity(other.key_pem() + b"".join(map(to_pem, maker.chain)), None, None)
    der = other.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(KeyStoreError, match="does not belong to the certificate"):
        read_identity(jks_file([("me", protect(der, PASSWORD), maker.chain)], [], PASSWORD), PASSWORD, None)


def test_every_cut_and_many_scratches_are_told_not_raised(maker: Maker) -> None:
    dice = random.Random(7)
    for store in (maker.jks(), maker.pem(), maker.pkcs12()):
        cuts = [store[:size] for size in range(0, len(store), 1 if store[:1] == b"\xfe" else 101)]
        scratches = []
        for _ in range(150):
            at = dice.randrange(len(store))
            scratches.append(store[:at] + bytes([store[at] ^ (1 << dice.randrange(8))]) + store[at + 1 :])
        for data in (*cuts, *scratches):
            for read in (lambda d: read_trust(d, PASSWORD), lambda d: read_identity(d, PASSWORD, None)):
                with suppress(KeyStoreError):  # a scratch may also hit what nobody reads
                    read(data)
    for at in range(len(maker.trust())):  # the digest of a JKS covers every bit of it
        scratched = bytearray(maker.trust())
        scratched[at] ^= 4
        with pytest.raises(KeyStoreError):
            read_trust(bytes(scratched), PASSWORD)


def test_a_count_that_lies_takes_no_memory(maker: Maker) -> None:
    data = b"\xfe\xed\xfe\xed" + struct.pack(">II", 2, 2**32 - 1) + maker.trust()[12:]
    with pytest.raises(KeyStoreError, match="damaged or cut off"):
        read_trust(data, None)


def test_content_decides(maker: Maker) -> None:
    kinds = [sniff(data) for data in (maker.jks(), maker.pkcs12(), maker.pem(), maker.chain[0])]
    assert kinds == ["JKS", "PKCS12", "PEM", "DER"]


# As other programs make them


@pytest.mark.kafka
def test_stores_of_keytool_and_openssl(secure_kafka: SecureKafka) -> None:
    def read(name: str) -> bytes:
        with open(secure_kafka.file(name), "rb") as file:
            return file.read()

    password = secure_kafka.STORE_PASSWORD
    authority = base64.b64decode("".join(read("ca.pem").decode().split("-----")[2].split()))
    for name in ("trust.jks", "trust.p12", "ca.pem"):
        assert read_trust(read(name), password) == [authority]
    identities = [
        read_identity(read("client.jks"), password, None),
        read_identity(read("client.p12"), password, None),
        read_identity(read("client-all.pem"), None, None),
        read_identity(read("client-encrypted.pem"), None, secure_kafka.KEY_PASSWORD),
    ]
    assert len({identity.chain for identity in identities}) == 1
