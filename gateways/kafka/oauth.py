"""OAuth tokens for SASL/OAUTHBEARER: a fixed one, one from a file, or one from an OIDC endpoint [K2].

Everything blocks and runs in the worker threads of the gateway, also in those of kafka-python, which asks for a token
at each login and when Kafka wants a login repeated.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import re
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, Final

from gateways.kafka.options import SecurityOptions

log = logging.getLogger("gateways.kafka")

FETCH_TIMEOUT: Final = 1.5
"""Seconds that the endpoint may be silent; a login of kafka-python waits meanwhile."""
LARGEST_ANSWER: Final = 256 * 1024
REFRESH_SHARE: Final = 0.8
"""Of a token's life, after which another one is asked for."""
UNSTATED_LIFE: Final = 60.0
"""Seconds that a token is kept whose endpoint does not say how long it lives."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]+\Z")


class TokenError(Exception):
    """There is no token to log in with. The text names the option and shows no secret."""


class Tokens:
    """Gives out the token that a login needs. Any thread."""

    def __init__(self, options: SecurityOptions, tls: Callable[[], ssl.SSLContext]) -> None:
        """`tls` makes the context for an endpoint behind https."""
        self._options = options
        self._tls = tls
        self._lock = threading.Lock()
        self._token: str | None = None
        self._refresh_at = self._dies_at = 0.0

    def token(self) -> str:
        """Return a token. Blocks for about two seconds at most.

        Raises:
          TokenError: there is none.
        """
        options = self._options
        if options.sasl_oauth_token is not None:
            return _checked(options.sasl_oauth_token, "Kafka.Security.SaslOauthToken")
        if options.sasl_oauth_token_file is not None:
            return self._from_file(options.sasl_oauth_token_file)
        with self._lock:  # clients that log in together share one
            return self._from_endpoint()

    def extensions(self) -> dict[str, str]:
        """Return SASL extensions: none. kafka-python asks for them."""
        return {}

    def _from_file(self, file: str) -> str:
        where = "Kafka.Security.SaslOauthTokenFile"
        try:
            with open(file, "rb") as stream:
                content = stream.read(LARGEST_ANSWER)
        except OSError as exc:
            raise TokenError(f"{where}: cannot read {file}: {exc.strerror}") from None
        return _checked(content.decode("latin-1").strip(), f"{where}: {file}")

    def _from_endpoint(self) -> str:
        now = time.monotonic()
        if self._token is not None and now < self._refresh_at:
            return self._token
        try:
            token, life = self._fetch()
        except TokenError:
            if self._token is not None and now < self._dies_at:
                return self._token  # it still holds; the endpoint has until then
            raise
        self._token, self._refresh_at, self._dies_at = token, now + life * REFRESH_SHARE, now + life
        return token

    def _fetch(self) -> tuple[str, float]:
        """Ask for a token with the client's own credentials (RFC 6749, 4.4); return it and its life in seconds."""
        options = self._options
        where = "Kafka.Security.SaslOauthTokenEndpointUrl"
        url = options.sasl_oauth_token_endpoint_url or ""
        try:
            with self._opener(url).open(self._request(url), timeout=FETCH_TIMEOUT) as response:
                answer = json.loads(response.read(LARGEST_ANSWER))
        except urllib.error.HTTPError as exc:
            with exc:
                raise TokenError(f"{where}: {url} answers {exc.code}{_oauth_error(exc)}") from None
        except urllib.error.URLError as exc:
            raise TokenError(f"{where}: {url}: {_reason(exc.reason)}") from None
        except (ValueError, http.client.HTTPException):
            raise TokenError(f"{where}: {url}: the answer is no JSON over HTTP") from None
        except OSError as exc:
            raise TokenError(f"{where}: {url}: {_reason(exc)}") from None
        if not isinstance(answer, dict) or not isinstance(answer.get("access_token"), str):
            raise TokenError(f"{where}: {url}: the answer holds no access_token")
        life = answer.get("expires_in")
        seconds = float(life) if isinstance(life, int | float) and life > 0 else UNSTATED_LIFE
        return _checked(answer["access_token"], f"{where}: {url}"), seconds

    def _request(self, url: str) -> urllib.request.Request:
        options = self._options
        form = {"grant_type": "client_credentials"}
        if options.sasl_oauth_scope is not None:
            form["scope"] = options.sasl_oauth_scope
        pair = ":".join(
            urllib.parse.quote_plus(part or "")
            for part in (options.sasl_oauth_client_id, options.sasl_oauth_client_secret)
        )
        headers = {
            "Authorization": "Basic " + base64.b64encode(pair.encode()).decode(),
            "Content-Type": "application/x-www-form-urlencoded",
            "Accept": "application/json",
        }
        return urllib.request.Request(url, urllib.parse.urlencode(form).encode(), headers, method="POST")

    def _opener(self, url: str) -> urllib.request.OpenerDirector:
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if url.startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=self._tls()))
        return urllib.request.build_opener(*handlers)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the client's secret to whom nobody named."""

    def redirect_request(self, *_args: Any, **_options: Any) -> None:
        return None


def _checked(token: str, where: str) -> str:
    """Return a token that is one: it must not break out of the message that carries it (RFC 6750, 2.1)."""
    if not _TOKEN.match(token):
        raise TokenError(f"{where}: what it holds is no token")
    return token


def _oauth_error(exc: urllib.error.HTTPError) -> str:
    """Return the `error` of an endpoint's answer, a word that RFC 6749 defines."""
    try:
        word = json.loads(exc.read(LARGEST_ANSWER)).get("error")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({word})" if isinstance(word, str) and re.fullmatch(r"[a-z_]{1,40}", word) else ""


def _reason(reason: object) -> str:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {reason.verify_message}"
    if isinstance(reason, ssl.SSLError):
        return f"TLS fails: {reason.reason or 'no handshake'}"
    if isinstance(reason, TimeoutError):
        return "no answer"
    if isinstance(reason, OSError):
        return reason.strerror or type(reason).__name__
    return str(reason)
