"""What tests of AVRO records need beside Kafka: a schema registry and Java's Avro, by pinned Maven coordinates.

``python -m lib.registry_install`` in ``scripts`` makes the cache complete, which is that of scripts/kafka.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from lib.kafka_install import DEPENDENCY_PLUGIN
from lib.kafka_process import KafkaError, locked

REGISTRY_VERSION: Final = "3.3.3"
REGISTRY: Final = f"io.apicurio:apicurio-registry-app:{REGISTRY_VERSION}:tar.gz:all"
AVRO_VERSION: Final = "1.12.2"
SLF4J_VERSION: Final = "2.0.17"
POM: Final = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>mqtt-trio</groupId><artifactId>avro</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.avro</groupId><artifactId>avro</artifactId><version>{AVRO_VERSION}</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-nop</artifactId><version>{SLF4J_VERSION}</version></dependency>
  </dependencies>
</project>
"""


def cache() -> Path:
    """Return the folder that all installations of a user share."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mqtt-trio"


def install_registry() -> Path:
    """Return the folder of Apicurio Registry, which speaks Confluent's API; the first call fetches 159 MB."""
    folder = cache() / f"apicurio-{REGISTRY_VERSION}"
    with locked(folder / ".lock"):
        if not (folder / "app").is_dir():
            print(
                f"fetching Apicurio Registry {REGISTRY_VERSION} by Maven into {folder} (once, 159 MB)", file=sys.stderr
            )
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                maven("copy", f"-Dartifact={REGISTRY}", f"-DoutputDirectory={scratch}")
                (archive,) = Path(scratch).glob("*.tar.gz")
                (unpacked := Path(scratch) / "app-unpacked").mkdir()
                subprocess.run(["tar", "-xzf", str(archive), "-C", str(unpacked)], check=True)
                os.rename(unpacked, folder / "app")
    return folder / "app"


def install_avro() -> Path:
    """Return the folder with the jars of Java's Avro."""
    folder = cache() / f"avro-{AVRO_VERSION}"
    with locked(folder / ".lock"):
        if not (folder / "libs").is_dir():
            (folder / "pom.xml").write_text(POM)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                options = ("-DincludeScope=runtime", f"-DoutputDirectory={scratch}/libs")
                maven("copy-dependencies", *options, pom=folder / "pom.xml")
                os.rename(f"{scratch}/libs", folder / "libs")
    return folder / "libs"


def maven(goal: str, *options: str, pom: Path | None = None) -> None:
    """Run a goal of Maven's dependency plugin."""
    command = shutil.which("mvn")
    if command is None:
        raise KafkaError("no mvn found: install Maven, it fetches the jars (Debian: maven)")
    place = ("-f", str(pom)) if pom is not None else ()
    result = subprocess.run(
        [command, "-q", "-B", *place, f"{DEPENDENCY_PLUGIN}:{goal}", *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode != 0:
        raise KafkaError(f"Maven could not fetch the jars:\n{(result.stdout + result.stderr).strip()[-2000:]}")


if __name__ == "__main__":
    install_registry()
    install_avro()
