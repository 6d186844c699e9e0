"""A schema registry with the REST API of Confluent's: Apicurio, Karapace and others speak it, too [K8].

Everything blocks and runs in worker threads; urllib3 does HTTP and TLS. One request is one connection, in a thread of
its own that need not be waited for: there are few of them, at the start and when a reader meets a schema that it does
not know.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
import urllib.parse
from concurrent.futures import Future
from typing import Any, Final, NoReturn

import urllib3
from urllib3 import exceptions as http_errors

from gateways.kafka.discretion import hide, keep_secret
from gateways.kafka.options import KafkaOptions
from gateways.kafka.security import LOOPBACK, registry_security
from mqtt_trio.errors import ConfigError, GatewayError

log = logging.getLogger("gateways.kafka")

MEDIA_TYPE: Final = "application/vnd.schemaregistry.v1+json"
LARGEST_ANSWER: Final = 1024 * 1024
"""Bytes. Outcome: the answer counts as none."""
GRACE: Final = 1.0
"""Seconds that a request may take beyond `Timeout` where that cannot be held: name services have no limit, and a server
may send its header byte by byte. Outcome: it is left to its thread, and until that has ended nothing else is asked."""
LARGEST_ID: Final = 2**31 - 1
LONGEST_TEXT: Final = 300
"""Characters of a registry's own words that are repeated."""
SECTION: Final = "Kafka.SchemaRegistry"
NO_SUBJECT: Final = (40401, 40402, 40403)
"""Error codes: no such subject, version or schema. Without one of them, 404 means that there is no such API."""


class RegistryError(GatewayError):
    """What the registry did not do. The text names what can be mended and shows no secret; `retriable` is False only
    where nobody can mend it, such as a schema that is not there."""


def check(options: KafkaOptions) -> None:
    """Look at everything that can be looked at without a server.

    Raises:
      ConfigError: a store cannot be used, or is given where there is no TLS.
    """
    registry = options.schema_registry
    if registry.url is None:
        return
    url = urllib.parse.urlsplit(registry.url)
    if url.scheme == "https":
        registry_security(options).check()
    elif registry.ssl.truststore_location is not None or registry.ssl.keystore_location is not None:
        raise ConfigError([f"{SECTION}.SSL: an http:// Url does without TLS; https:// has it"])
    elif registry.password is not None and url.hostname not in LOOPBACK:
        log.warning("%s.Url: over http:// the password is sent in the clear; https:// does not", SECTION)


class SchemaRegistry:
    """Asks the registry that the options name. Any thread; nothing is kept between requests."""

    def __init__(self, options: KafkaOptions) -> None:
        self._options = options
        self.options = options.schema_registry
        if self.options.url is None:
            raise ValueError("there is no schema registry")
        self.url = self.options.url.rstrip("/")
        self._left: threading.Thread | None = None
        """The thread of a request that was not waited for."""
        keep_secret(self.options.password)

    def subject(self, topic: str, record_name: str) -> str:
        """Return what the schema of values of `topic` stands under."""
        strategy = self.options.subject_name_strategy
        if strategy == "RecordNameStrategy":
            return record_name
        return f"{topic}-{record_name}" if strategy == "TopicRecordNameStrategy" else f"{topic}-value"

    def id_of(self, subject: str, schema: str) -> int:
        """Return the id of an Avro schema under `subject`, registering it where the options say so. Blocks for
        `timeout` and GRACE seconds at most.

        Raises:
          RegistryError: there is none, or nobody answers (`retriable`).
          ConfigError: a file of the TLS options cannot be used.
        """
        path = f"/subjects/{urllib.parse.quote(subject, safe='')}"
        path += "/versions" if self.options.auto_register else ""
        status, answer = self._ask("POST", path, {"schema": schema})
        if status != 200:
            self._refuse_id(status, answer, subject)
        found = answer.get("id") if isinstance(answer, dict) else None
        if type(found) is not int or not 0 <= found <= LARGEST_ID:
            self._fail(f"its answer holds no id for subject {subject}")
        return found

    def schema(self, schema_id: int) -> str:
        """Return the text of the Avro schema with this id. Blocks as `id_of`.

        Raises:
          RegistryError: there is none, or it is no Avro schema, or nobody answers (`retriable`).
          ConfigError: a file of the TLS options cannot be used.
        """
        status, answer = self._ask("GET", f"/schemas/ids/{schema_id}")
        if status == 404 and _code(answer) in NO_SUBJECT:
            text = f"has no schema with the id {schema_id}; the records that name it come from another registry"
            self._fail(text, retriable=False)
        if status != 200:
            self._refuse(status, answer, f"schema {schema_id}")
        found = answer.get("schema") if isinstance(answer, dict) else None
        if not isinstance(answer, dict) or not isinstance(found, str):
            self._fail(f"its answer holds no schema {schema_id}")
        if answer.get("schemaType", "AVRO") != "AVRO":
            self._fail(f"schema {schema_id} is no Avro schema", retriable=False)
        return found

    def look(self) -> None:
        """Find out whether there is a registry that lets us in.

        Raises:
          RegistryError: there is not.
          ConfigError: a file of the TLS options cannot be used.
        """
        status, answer = self._ask("GET", "/schemas/types")
        if status != 200:
            self._refuse(status, answer, "the list of schema types")
        if not isinstance(answer, list) or "AVRO" not in answer:
            self._fail("it does not know Avro schemas")

    # --- requests

    def _ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Return status and JSON of one request; None where the answer is no JSON. Blocks for `timeout` and GRACE."""
        if self._left is not None and self._left.is_alive():
            self._fail("no answer in time, and an earlier request still waits: does the name service answer?")
        outcome: Future[tuple[int, Any]] = Future()

        def run() -> None:
            try:
                outcome.set_result(self._request(method, path, body))
            except BaseException as exc:
                outcome.set_exception(exc)

        thread = threading.Thread(target=run, name="schema-registry", daemon=True)
        thread.start()
        try:
            return outcome.result(self.options.timeout + GRACE)
        except TimeoutError:
            self._left = thread
            self._fail("no answer in time")

    def _request(self, method: str, path: str, body: object) -> tuple[int, Any]:
        timeout = self.options.timeout
        deadline = time.monotonic() + timeout
        pool = urllib3.PoolManager(num_pools=1, retries=False, timeout=urllib3.Timeout(total=timeout), **self._tls())
        try:
            response = pool.request(
                method, self.url + path, body=None if body is None else json.dumps(body).encode(),
                headers=self._headers(), redirect=False, preload_content=False,
            )  # fmt: skip
            try:
                return response.status, _parsed(self._read(response, deadline))
            finally:
                response.close()
        except http_errors.HTTPError as exc:
            raise RegistryError(self._named(_words(exc)), retriable=True) from None
        except (OSError, UnicodeError) as exc:
            raise RegistryError(self._named(str(exc)), retriable=True) from None
        finally:
            pool.clear()

    def _tls(self) -> dict[str, Any]:
        if not self.url.startswith("https:"):
            return {}
        context = registry_security(self._options).context()
        named: dict[str, Any] = {} if context.check_hostname else {"assert_hostname": False}
        return {"ssl_context": context, **named}

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": f"{MEDIA_TYPE}, application/json", "Content-Type": MEDIA_TYPE, "User-Agent": "mqtt-trio",
                   "Accept-Encoding": "identity"}  # fmt: skip
        if self.options.username is not None:
            pair = f"{self.options.username}:{self.options.password}".encode()
            headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
        return headers

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        data = bytearray()
        while chunk := response.read1(65_536, decode_content=False):
            data += chunk
            if len(data) > LARGEST_ANSWER:
                self._fail(f"its answer has more than {LARGEST_ANSWER} bytes")
            if time.monotonic() > deadline:
                self._fail("no answer in time")
        return bytes(data)

    # --- what is wrong

    def _refuse_id(self, status: int, answer: object, subject: str) -> NoReturn:
        words = f": {said}" if (said := _said(answer)) else ""
        if status == 404 and _code(answer) in NO_SUBJECT and not self.options.auto_register:
            self._fail(
                f"subject {subject} does not have the schema of our records; register mqtt_message.avsc of "
                f"gateways/kafka/schemas there, or set {SECTION}.AutoRegister = true"
            )
        if status == 409:
            self._fail(
                f"the schema of our records is not compatible with what subject {subject} has{words}. Give the group "
                "another KafkaTopic, or have the compatibility of the subject set to NONE"
            )
        if status == 422:
            self._fail(f"does not take the schema of our records for subject {subject}{words}")
        self._refuse(status, answer, f"subject {subject}")

    def _refuse(self, status: int, answer: object, what: str) -> NoReturn:
        words = f": {said}" if (said := _said(answer)) else ""
        user = self.options.username
        if status == 401 and user is None:
            self._fail(f"wants a login; set {SECTION}.Username and Password")
        if status == 401:
            self._fail(f"refuses the login of {user}; see {SECTION}.Username and Password")
        if status == 403:
            who = "strangers" if user is None else user
            self._fail(
                f"does not let {who} at {what}; somebody who may has to give the right, or to register the schema"
            )
        if status == 404:
            self._fail(f"there is no schema registry under this path (404); {SECTION}.Url is the base of its API")
        if 300 <= status < 400:
            self._fail(
                f"sends its clients elsewhere ({status}), which is not followed; set {SECTION}.Url to that place"
            )
        self._fail(f"answers {status} to the request for {what}{words}")

    def _fail(self, text: str, *, retriable: bool = True) -> NoReturn:
        raise RegistryError(self._named(text), retriable=retriable)

    def _named(self, text: str) -> str:
        return hide(f"schema registry {self.url}: {text}")


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _code(answer: object) -> object:
    return answer.get("error_code") if isinstance(answer, dict) else None


def _said(answer: object) -> str:
    """Return a registry's own words as one bounded line."""
    words = answer.get("message") if isinstance(answer, dict) else None
    if not isinstance(words, str):
        return ""
    line = " ".join("".join(c if c.isprintable() else " " for c in words[: 4 * LONGEST_TEXT]).split())
    return line if len(line) <= LONGEST_TEXT else line[:LONGEST_TEXT] + "…"


def _words(exc: Exception) -> str:
    """Say what kept an answer away."""
    if isinstance(exc, http_errors.NameResolutionError):
        return "the host cannot be found"
    if isinstance(exc, http_errors.TimeoutError) and not isinstance(exc, http_errors.NewConnectionError):
        return "no answer in time"
    if isinstance(exc, http_errors.NewConnectionError):
        cause = exc.__cause__ or exc.__context__
        return f"no connection: {getattr(cause, 'strerror', None) or 'it failed'}"
    if isinstance(exc, http_errors.SSLError):
        cause = exc.args[0] if exc.args else exc
        verified = getattr(cause, "verify_message", None)
        if verified:
            return f"its certificate is not accepted: {verified}; see {SECTION}.SSL.TruststoreLocation"
        return f"TLS fails: {getattr(cause, 'reason', None) or cause}"
    return "it does not speak HTTP here, or broke off"
