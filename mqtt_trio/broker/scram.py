"""SCRAM-SHA-256 as an Authentication Method: RFC 5802, RFC 7677, without channel binding.

The password never travels, and what the broker keeps (`ScramCredential`) does not let its reader connect as the user.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import attrs
from attrs.validators import ge, min_len

from mqtt_trio.broker.access import Challenge, Credentials, Denied, Granted, Principal, Step
from mqtt_trio.broker.saslprep import saslprep

NAME: Final = "SCRAM-SHA-256"
MINIMUM_ITERATIONS: Final = 4096
"""Of RFC 7677."""
MAXIMUM_MESSAGE: Final = 4096
"""Bytes of one message of a client; real ones have some hundred."""
_KEY_SIZE: Final = 32


@attrs.frozen
class ScramCredential:
    """What is kept of one user's password."""

    salt: bytes = attrs.field(validator=min_len(1))
    iterations: int = attrs.field(validator=ge(MINIMUM_ITERATIONS))
    stored_key: bytes = attrs.field(repr=False)
    server_key: bytes = attrs.field(repr=False)

    @classmethod
    def derive(cls, password: str, salt: bytes, iterations: int = MINIMUM_ITERATIONS) -> ScramCredential:
        """Make it of a password; takes milliseconds per 10,000 iterations, so not on the Trio thread of a broker.

        Raises:
          ValueError: the password has characters that SASLprep does not allow, or too few iterations.
        """
        prepared = saslprep(password, stored=True).encode()
        salted = hashlib.pbkdf2_hmac("sha256", prepared, salt, iterations)
        stored_key = hashlib.sha256(_hmac(salted, b"Client Key")).digest()
        return cls(salt, iterations, stored_key, _hmac(salted, b"Server Key"))


class ScramCredentials(Protocol):
    """Where the users are kept."""

    def find(self, user_name: str) -> ScramCredential | None:
        """Return what is kept of a user, by the prepared name; None: there is no such user. Must not block."""


class ScramSha256:
    """The server's end; one object serves all clients.

    `nonce` makes printable random text without comma, of 128 bits or more. `secret` is random and outlives the
    process: salts of users that do not exist are made of it, so that they look like those of users that do, also
    tomorrow. `iterations` are those that most users have, for the same reason.
    """

    name = NAME

    def __init__(
        self,
        credentials: ScramCredentials,
        *,
        nonce: Callable[[], str],
        secret: bytes,
        iterations: int = MINIMUM_ITERATIONS,
    ) -> None:
        self.credentials = credentials
        self.nonce = nonce
        self.secret = secret
        self.iterations = iterations

    def start(self, credentials: Credentials, data: bytes | None) -> Step:
        """Take the client-first-message; a CONNECT without data is asked for it."""
        if data is None:
            return Challenge(None, partial(self._first, credentials))
        return self._first(credentials, data)

    def _first(self, credentials: Credentials, data: bytes | None) -> Step:
        try:
            header, bare = _split_header(_text(data))
            user_name, client_nonce = _read_first(bare)
        except ValueError as exc:
            return Denied(reason=f"{NAME}: {exc}")
        known = self.credentials.find(user_name)
        exchange = _Exchange(
            Principal(credentials.client_id, user_name),
            header,
            bare,
            client_nonce + self.nonce(),
            known or self._fake(user_name),
            known is not None,
        )
        return Challenge(exchange.server_first.encode(), exchange.finish)

    def _fake(self, user_name: str) -> ScramCredential:
        """What a user who does not exist would have."""
        made = partial(_hmac, self.secret)
        name = user_name.encode()
        return ScramCredential(
            made(b"salt " + name)[:16], self.iterations, made(b"stored " + name), made(b"server " + name)
        )


class _Exchange:
    """One client between both of its messages."""

    def __init__(
        self, principal: Principal, header: str, bare: str, nonce: str, credential: ScramCredential, known: bool
    ) -> None:
        self.principal = principal
        self.bare = bare
        self.nonce = nonce
        self.binding = _b64(header.encode())
        self.credential = credential
        self.known = known
        self.server_first = f"r={nonce},s={_b64(credential.salt)},i={credential.iterations}"

    def finish(self, data: bytes | None) -> Step:
        """Take the client-final-message."""
        try:
            without_proof, proof = _split_proof(_text(data))
        except ValueError as exc:
            return Denied(reason=f"{NAME}: {exc}")
        if without_proof.split(",")[:2] != [f"c={self.binding}", f"r={self.nonce}"]:
            return Denied(reason=f"{NAME}: the client-final-message does not belong to this exchange")
        message = f"{self.bare},{self.server_first},{without_proof}".encode()
        credential = self.credential
        client_key = _xor(proof, _hmac(credential.stored_key, message))
        right = hmac.compare_digest(hashlib.sha256(client_key).digest(), credential.stored_key)
        if not (right and self.known):
            return Denied(reason=f"{NAME}: unknown user or wrong password")
        signature = _b64(_hmac(credential.server_key, message))
        return Granted(self.principal, f"v={signature}".encode())


class ScramClient:
    """The client's end of one exchange."""

    def __init__(self, user_name: str, password: str, nonce: str) -> None:
        self._password = password
        self._nonce = nonce
        name = saslprep(user_name, stored=False).replace("=", "=3D").replace(",", "=2C")
        self._bare = f"n={name},r={nonce}"
        self._signature = b""

    def first(self) -> bytes:
        """Return the Authentication Data of CONNECT, or of AUTH 0x19."""
        return f"n,,{self._bare}".encode()

    def final(self, server_first: bytes) -> bytes:
        """Return the Authentication Data that answers the server's AUTH. Slow by intent: see `ScramCredential.derive`.

        Raises:
          ValueError: the server's message is not one, or asks for too few iterations.
        """
        fields = dict(part.split("=", 1) for part in server_first.decode().split(",") if "=" in part)
        nonce, iterations = fields.get("r", ""), int(fields.get("i", "0"))
        if not nonce.startswith(self._nonce) or len(nonce) == len(self._nonce) or iterations < MINIMUM_ITERATIONS:
            raise ValueError("the server-first-message is not to be trusted")
        prepared = saslprep(self._password, stored=False).encode()
        salted = hashlib.pbkdf2_hmac("sha256", prepared, _unb64(fields.get("s", "")), iterations)
        client_key = _hmac(salted, b"Client Key")
        without_proof = f"c=biws,r={nonce}"
        message = f"{self._bare},{server_first.decode()},{without_proof}".encode()
        self._signature = _hmac(_hmac(salted, b"Server Key"), message)
        proof = _xor(client_key, _hmac(hashlib.sha256(client_key).digest(), message))
        return f"{without_proof},p={_b64(proof)}".encode()

    def verify(self, server_final: bytes | None) -> bool:
        """Whether the Authentication Data of the CONNACK come from somebody who knows the user."""
        return hmac.compare_digest(server_final or b"", f"v={_b64(self._signature)}".encode())


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unb64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("that is no base64") from None


def _text(data: bytes | None) -> str:
    if not data or len(data) > MAXIMUM_MESSAGE:
        raise ValueError(f"a message has 1 to {MAXIMUM_MESSAGE} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("a message is no UTF-8") from None


def _split_header(text: str) -> tuple[str, str]:
    """Take the gs2-header, with both of its commas, off a client-first-message."""
    parts = text.split(",", 2)
    if len(parts) < 3 or parts[0] not in ("n", "y"):
        raise ValueError("channel binding is not supported" if text.startswith("p=") else "no gs2-header")
    if parts[1]:
        raise ValueError("an authorization identity is not supported")
    return ",".join((*parts[:2], "")), parts[2]


def _read_first(bare: str) -> tuple[str, str]:
    """Return the prepared user name and the nonce of a client-first-message-bare. Extensions behind are ignored."""
    parts = bare.split(",")
    if len(parts) < 2 or not parts[0].startswith("n=") or not parts[1].startswith("r="):
        raise ValueError("the client-first-message has no user name and nonce, or a mandatory extension")
    name, nonce = parts[0][2:], parts[1][2:]
    if "=" in name.replace("=2C", "").replace("=3D", ""):
        raise ValueError("the user name has a bare equals sign")
    user_name = saslprep(name.replace("=2C", ",").replace("=3D", "="), stored=False)
    if not user_name or not nonce or not all("!" <= c <= "~" for c in nonce):
        raise ValueError("user name or nonce are empty or not printable")
    return user_name, nonce


def _split_proof(text: str) -> tuple[str, bytes]:
    without_proof, found, proof = text.rpartition(",p=")
    decoded = _unb64(proof)
    if not found or len(decoded) != _KEY_SIZE:
        raise ValueError("the client-final-message has no proof")
    return without_proof, decoded
