"""Kafka's own command line tools (kafka-consumer-groups.sh, kafka-console-consumer.sh, ...), run from their jars.

A node needs none of them, so scripts/kafka does without; they are fetched once, by the version that it pins, into the
same cache.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

from lib.kafka_install import DEPENDENCY_PLUGIN, KAFKA_VERSION, LOG4J, QUICK_JVM, java
from lib.kafka_process import locked
from tests.lines import require_tool

LIMIT: Final = 120.0
"""Seconds for one command: a Java program starts on a busy machine."""
CLASSES: Final = {
    "consumer-groups": "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
    "console-consumer": "org.apache.kafka.tools.consumer.ConsoleConsumer",
    "topics": "org.apache.kafka.tools.TopicCommand",
    "get-offsets": "org.apache.kafka.tools.GetOffsetShell",
}
"""What kafka-NAME.sh starts."""
POM: Final = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>mqtt-trio</groupId><artifactId>kafka-tools</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>{KAFKA_VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""


@cache
def install() -> Path:
    """Fetch the tools unless they are there; return their folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "mqtt-trio" / f"kafka-tools-{KAFKA_VERSION}"
    with locked(folder / ".lock"):
        (folder / "log4j2.xml").write_text(LOG4J)
        if not (folder / "libs").is_dir():
            (folder / "pom.xml").write_text(POM)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                goal = f"{DEPENDENCY_PLUGIN}:copy-dependencies"
                options = ["-DincludeScope=runtime", f"-DoutputDirectory={scratch}/libs"]
                subprocess.run(
                    [require_tool("mvn"), "-q", "-B", "-f", str(folder / "pom.xml"), goal, *options],
                    check=True,
                    timeout=600,
                )
                os.rename(f"{scratch}/libs", folder / "libs")
    return folder


def run_tool(name: str, servers: str, *arguments: str, code: int | None = 0) -> str:
    """Run kafka-NAME.sh; return what it printed. It must end with `code`; None: with any."""
    folder = install()
    log4j = f"-Dlog4j2.configurationFile={folder / 'log4j2.xml'}"
    command = [java(), "-Xmx128m", *QUICK_JVM, log4j, "-cp", f"{folder / 'libs'}/*", CLASSES[name]]
    done = subprocess.run(
        [*command, "--bootstrap-server", servers, *arguments],
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done.stdout


def rows(output: str) -> list[dict[str, str]]:
    """Return the rows of a table that a tool printed, by its titles."""
    lines = [line.split() for line in output.splitlines() if line.strip()]
    at = next(number for number, line in enumerate(lines) if line[0] == "GROUP")
    return [dict(zip(lines[at], line, strict=False)) for line in lines[at + 1 :] if line[0] != "GROUP"]
