"""The cache of scripts/kafka: Kafka's jars by pinned coordinates and a class archive, shared by all nodes of a user."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lib.kafka_process import KafkaError, locked

KAFKA_VERSION: Final = "4.1.1"
LOG4J_VERSION: Final = "2.24.3"
DEPENDENCY_PLUGIN: Final = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1"
OLDEST_JAVA: Final = 17
QUICK_JVM: Final = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")

POM: Final = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>mqtt-trio</groupId><artifactId>kafka-node</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId>
      <version>{LOG4J_VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId><artifactId>log4j-core</artifactId>
      <version>{LOG4J_VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""

LOG4J: Final = """<Configuration status="OFF">
  <Appenders>
    <File name="F" fileName="${sys:node.log:-/dev/null}" append="true" immediateFlush="true">
      <PatternLayout pattern="%d{HH:mm:ss.SSS} %p %c{1} %m%n"/>
    </File>
  </Appenders>
  <Loggers><Root level="WARN"><AppenderRef ref="F"/></Root></Loggers>
</Configuration>
"""


def java() -> str:
    """Return the path of a Java that is new enough."""
    home = os.environ.get("JAVA_HOME")
    command = f"{home}/bin/java" if home and os.access(f"{home}/bin/java", os.X_OK) else shutil.which("java")
    if command is None:
        raise KafkaError(f"no Java found: install a JRE {OLDEST_JAVA} or newer (Debian: default-jre-headless)")
    match = re.search(r'version "(\d+)', java_version(command))
    if match is None or int(match[1]) < OLDEST_JAVA:
        found = f"Java {match[1]}" if match else "no version that can be read"
        raise KafkaError(f"{command}: Java {OLDEST_JAVA} or newer is needed, found {found}")
    return command


@functools.cache
def java_version(command: str) -> str:
    result = subprocess.run([command, "-version"], capture_output=True, text=True, check=False)
    return result.stderr + result.stdout


@dataclasses.dataclass(frozen=True)
class Installation:
    """What it takes to run Kafka's main classes."""

    java: str
    folder: Path

    @property
    def archive(self) -> Path:
        """The class archive; it fits one JDK build only, hence the digest in its name."""
        return self.folder / f"classes-{hashlib.sha256(java_version(self.java).encode()).hexdigest()[:12]}.jsa"

    def use_archive(self) -> tuple[str, ...]:
        """Flags that take classes from the archive, none before there is one."""
        return (f"-XX:SharedArchiveFile={self.archive}", "-Xshare:auto") if self.archive.exists() else ()

    def command(self, main_class: str, *arguments: str, flags: tuple[str, ...] = ()) -> list[str]:
        """Build the command line for a main class of Kafka's jars."""
        log4j = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.xml'}"
        return [self.java, *flags, log4j, "-cp", f"{self.folder / 'libs'}/*", main_class, *arguments]

    def run_flags(self) -> tuple[str, ...]:
        """Flags of a node: small heap unless KAFKA_HEAP_OPTS says otherwise, quick compiler, serial collector."""
        heap = shlex.split(os.environ.get("KAFKA_HEAP_OPTS", "")) or ["-Xmx256m"]
        return (*heap, *QUICK_JVM)


def install(make_archive: Callable[[Installation], None]) -> Installation:
    """Make the cache complete. Any number of first starts may run at once: one works, the others wait for it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "mqtt-trio" / f"kafka-{KAFKA_VERSION}"
    installation = Installation(java(), folder)
    with locked(folder / ".lock"):
        if not (folder / "log4j2.xml").exists():
            (folder / "log4j2.xml").write_text(LOG4J)
        if not (folder / "libs").is_dir():
            fetch_jars(folder)
        if not installation.archive.exists():
            make_archive(installation)
    return installation


def fetch_jars(folder: Path) -> None:
    """Fetch the jars into `folder`/libs, whole or not at all."""
    maven = shutil.which("mvn")
    if maven is None:
        raise KafkaError("no mvn found: install Maven for the first start, it fetches Kafka's jars (Debian: maven)")
    print(f"fetching Apache Kafka {KAFKA_VERSION} by Maven into {folder} (once, 43 MB)", file=sys.stderr, flush=True)
    (folder / "pom.xml").write_text(POM)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        goal = f"{DEPENDENCY_PLUGIN}:copy-dependencies"
        options = ["-DincludeScope=runtime", f"-DoutputDirectory={scratch}/libs"]
        result = subprocess.run(
            [maven, "-q", "-B", "-f", str(folder / "pom.xml"), goal, *options],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode != 0:
            raise KafkaError(f"Maven could not fetch the jars:\n{(result.stdout + result.stderr).strip()[-2000:]}")
        os.rename(f"{scratch}/libs", folder / "libs")
