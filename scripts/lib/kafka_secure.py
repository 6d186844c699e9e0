"""The secured listeners of `scripts/kafka start --secure`: certificates, key stores, users, properties.

Everything here is for tests and development: the passwords are known to everybody and stand below.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lib.kafka_install import java
from lib.kafka_process import HOST, KafkaError

LISTENERS: Final = ("SASL_SSL", "SSL", "SASL_PLAINTEXT", "EXPIRED", "WRONGHOST")
"""Beside PLAINTEXT. SSL wants a client certificate; the last two speak TLS with a bad certificate."""
STORE_PASSWORD: Final = "store-secret"
KEY_PASSWORD: Final = "key-secret"
PLAIN_USERS: Final = {"bob": "bob-secret", "limited": "limited-secret"}
SCRAM_USERS: Final = {"alice": "alice-secret", "limited": "limited-secret"}
SUPER_USERS: Final = ("ANONYMOUS", "alice", "bob", "gateway", "oscar")
"""May do everything: PLAINTEXT clients, those above, the client certificate, and the `sub` of OAuth tokens. `limited`
may do nothing until somebody gives it a right."""
MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
VALID_DAYS: Final = "3650"

_CA_CONFIG: Final = """[ca]
default_ca = d
[d]
database = index.txt
serial = serial.txt
new_certs_dir = .
default_md = sha256
policy = p
unique_subject = no
[p]
commonName = supplied
"""
_LOOPBACK_NAMES: Final = f"IP:{HOST},DNS:localhost"


def properties(ports: Mapping[str, int], tls: Path) -> dict[str, str]:
    """Return what a node's properties say about the listeners on `ports`, with the files of `make_certificates`."""
    login = "org.apache.kafka.common.security"
    found = {
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL,"
        "SASL_PLAINTEXT:SASL_PLAINTEXT,EXPIRED:SSL,WRONGHOST:SSL",
        "ssl.truststore.type": "JKS",
        "ssl.truststore.location": str(tls / "trust.jks"),
        "ssl.truststore.password": STORE_PASSWORD,
        **_key_store("", tls / "broker.p12"),
        **_key_store("listener.name.expired.", tls / "expired.p12"),
        **_key_store("listener.name.wronghost.", tls / "wronghost.p12"),
        "listener.name.ssl.ssl.client.auth": "required",
        "listener.name.ssl.ssl.principal.mapping.rules": "RULE:^CN=([^,]+).*$/$1/,DEFAULT",
        "sasl.enabled.mechanisms": ",".join(MECHANISMS),
        "listener.name.sasl_plaintext.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config": f"{login}.scram.ScramLoginModule required;",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": ";".join(f"User:{name}" for name in SUPER_USERS),
    }
    users = " ".join(f'user_{name}="{password}"' for name, password in PLAIN_USERS.items())
    modules = {
        "plain": f"{login}.plain.PlainLoginModule required {users};",
        "scram-sha-256": f"{login}.scram.ScramLoginModule required;",
        "scram-sha-512": f"{login}.scram.ScramLoginModule required;",
        # Kafka's own validator of unsigned tokens, which it takes where no other is named.
        "oauthbearer": f'{login}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";',
    }
    found |= {f"listener.name.sasl_ssl.{name}.sasl.jaas.config": module for name, module in modules.items()}
    assert set(ports) == set(LISTENERS)
    return found


def _key_store(prefix: str, file: Path) -> dict[str, str]:
    return {
        f"{prefix}ssl.keystore.type": "PKCS12",
        f"{prefix}ssl.keystore.location": str(file),
        f"{prefix}ssl.keystore.password": STORE_PASSWORD,
        f"{prefix}ssl.key.password": STORE_PASSWORD,
    }


def scram_arguments() -> tuple[str, ...]:
    """Return the arguments that tell the formatter about the SCRAM users."""
    return tuple(
        argument
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        for name, password in SCRAM_USERS.items()
        for argument in ("--add-scram", f"{mechanism}=[name={name},password={password}]")
    )


def describe(ports: Mapping[str, int], tls: Path) -> str:
    """Return what a person needs to connect."""
    listeners = ", ".join(f"{name} {HOST}:{port}" for name, port in ports.items())
    users = ", ".join(f"{name} ({password})" for name, password in {**SCRAM_USERS, **PLAIN_USERS}.items())
    return f"  {listeners}\n  users {users}; stores in {tls}, their password {STORE_PASSWORD}"


def make_certificates(tls: Path) -> None:
    """Make authorities, certificates and stores in `tls`, whole or not at all: ca, otherca (which nobody trusts), the
    broker's, expired and wronghost; client and clientexpired for clients, in all three kinds of store."""
    if tls.is_dir():
        return
    tls.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tls.parent) as scratch:
        workshop = _Workshop(Path(scratch) / "tls")
        for name in ("ca", "otherca"):
            workshop.authority(name)
        workshop.leaf("broker", "localhost", _LOOPBACK_NAMES)
        workshop.leaf("wronghost", "other.example", "DNS:other.example")
        workshop.leaf("expired", "localhost", _LOOPBACK_NAMES, expired=True)
        workshop.leaf("client", "gateway", "DNS:gateway", key="rsa:2048")
        workshop.leaf("clientexpired", "gateway", "DNS:gateway", expired=True)
        workshop.stores()
        workshop.folder.rename(tls)


class _Workshop:
    """openssl and keytool at work in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        (folder / "ca.cnf").write_text(_CA_CONFIG)

    def run(self, command: str, *arguments: str) -> None:
        beside_java = Path(java()).resolve().parent
        program = shutil.which(command) or shutil.which(command, path=str(beside_java))
        if program is None:
            package = {"openssl": "openssl", "keytool": "default-jre-headless"}[command]
            raise KafkaError(f"no {command} found: --secure makes certificates with it (Debian: {package})")
        result = subprocess.run(
            [program, *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise KafkaError(f"{command} {arguments[0]} failed:\n{(result.stderr + result.stdout).strip()[-2000:]}")

    def authority(self, name: str) -> None:
        self.run(
            "openssl", "req", "-x509", *_new_key("ec"), "-keyout", f"{name}.key", "-out", f"{name}.pem",
            "-days", VALID_DAYS, "-subj", f"/CN=mqtt-trio-{name}",
            "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def leaf(self, name: str, subject: str, names: str, *, key: str = "ec", expired: bool = False) -> None:
        """Make NAME.key, NAME.pem (its certificate) and NAME.p12, signed by ca."""
        request = f"{name}.csr"
        self.run(
            "openssl", "req", *_new_key(key), "-keyout", f"{name}.key", "-out", request, "-subj", f"/CN={subject}"
        )  # fmt: skip
        (self.folder / "leaf.ext").write_text(
            f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\nkeyUsage=digitalSignature\n"
        )
        (self.folder / "index.txt").write_text("")
        (self.folder / "serial.txt").write_text(f"{sum(name.encode()):04X}\n")
        # `openssl x509 -req` of OpenSSL 3.0 cannot say when the validity begins.
        dates = ("-startdate", "20240101000000Z", "-enddate", "20240201000000Z") if expired else ("-days", VALID_DAYS)
        self.run(
            "openssl", "ca", "-batch", "-config", "ca.cnf", "-cert", "ca.pem", "-keyfile", "ca.key", "-in", request,
            "-out", f"{name}.pem", "-extfile", "leaf.ext", "-notext", *dates,
        )  # fmt: skip
        self.run(
            "openssl", "pkcs12", "-export", "-inkey", f"{name}.key", "-in", f"{name}.pem", "-certfile", "ca.pem",
            "-name", name, "-out", f"{name}.p12", "-passout", f"pass:{STORE_PASSWORD}",
        )  # fmt: skip

    def stores(self) -> None:
        """Make trust.jks, trust.p12, client.jks; client-all.pem holds key and certificates, client-encrypted.pem the
        same with an encrypted key."""
        for kind, file in (("JKS", "trust.jks"), ("PKCS12", "trust.p12")):
            self.run(
                "keytool", "-importcert", "-noprompt", "-alias", "ca", "-file", "ca.pem", "-keystore", file,
                "-storetype", kind, "-storepass", STORE_PASSWORD,
            )  # fmt: skip
        self.run(
            "keytool", "-importkeystore", "-noprompt", "-srckeystore", "client.p12", "-srcstoretype", "PKCS12",
            "-srcstorepass", STORE_PASSWORD, "-destkeystore", "client.jks", "-deststoretype", "JKS",
            "-deststorepass", STORE_PASSWORD,
        )  # fmt: skip
        self.run(
            "openssl", "pkcs8", "-topk8", "-v2", "aes256", "-in", "client.key", "-out", "client-encrypted.key",
            "-passout", f"pass:{KEY_PASSWORD}",
        )  # fmt: skip
        chain = (self.folder / "client.pem").read_text() + (self.folder / "ca.pem").read_text()
        for target, key in (("client-all.pem", "client.key"), ("client-encrypted.pem", "client-encrypted.key")):
            (self.folder / target).write_text((self.folder / key).read_text() + chain)


def _new_key(kind: str) -> tuple[str, ...]:
    curve = ("-pkeyopt", "ec_paramgen_curve:P-256") if kind == "ec" else ()
    return ("-newkey", kind, *curve, "-nodes")
