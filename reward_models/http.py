"""JSON over HTTP for the scorers that live elsewhere: one request, its retries, and an error that says what to do.

    post_json("http://127.0.0.1:8000/score", {"prompts": [...]}, headers=bearer("REWARD_TOKEN"), timeout=60, retries=4)

Tried again, after a wait that doubles: refused and broken connections, timeouts, answers that are cut off or not JSON, and the
statuses 408, 409, 425, 429 and 5xx (a 500 may be the scorer's own fault, but also its memory's: the message is shown either way).
Not tried again: other statuses, redirects, and what is wrong here (address, token, certificate).
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import os
import random
import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import Any, TypedDict, Unpack
from urllib.parse import urlsplit

from flowrl.reward_models.base import RewardError

#: Longest wait between two attempts, in seconds.
LONGEST_WAIT = 30.0
#: Statuses beside 5xx that may be gone next time.
PASSING = (408, 409, 425, 429)
#: Waits are jittered by a generator of their own: a run's random numbers do not depend on its network.
_jitter = random.Random()
_log = logging.getLogger(__name__)


class HttpError(RewardError):
    """A request that failed for good. status: of the last answer, None where there was none."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class _Attempt(Exception):
    """One failed attempt: what happened, what helps, and whether it may go better next time."""

    def __init__(self, cause: str, fix: str = "", status: int | None = None, passing: bool = True, wait: float = 0.0):
        super().__init__(cause)
        self.fix, self.status, self.passing, self.wait = fix, status, passing, wait


class How(TypedDict, total=False):
    """How a request is made."""

    headers: dict[str, str]
    timeout: float  #: Seconds of one attempt, 60 by default.
    retries: int  #: Further attempts, 4 by default.
    #: Seconds before the second attempt, 0.5 by default, doubled each time up to 30 and jittered by half. A Retry-After of the
    #: server is waited for.
    backoff: float
    max_bytes: int  #: Of the answer, 64 MiB by default.


def post_json(url: str, body: Any, **how: Unpack[How]) -> Any:
    """The JSON that `url` answers to `body` (sent as JSON), after at most `retries` further attempts.

    Raises HttpError (a RewardError) with the address, the cause and the fix; ValueError for an address that is not http(s),
    TypeError or ValueError for a body that is not JSON.
    """
    data = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    how["headers"] = {"Content-Type": "application/json", **how.get("headers", {})}
    return _retried(url, data, **how)


def get_json(url: str, **how: Unpack[How]) -> Any:
    """As post_json, without a body."""
    return _retried(url, None, **how)


def check_url(url: str) -> str:
    """The host of an address. Raises ValueError where it is none of http(s), or holds a password."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.port != 0 and "@" not in parts.netloc and not set(url) & set(" \t\r\n")
    except (ValueError, TypeError, AttributeError):
        good = False
    if not good or not parts.hostname:
        raise ValueError(f"url={url!r}: an address looks like http://host:8000 (a token goes into token_env)")
    return parts.hostname


def token_of(name: str) -> str:
    """The token that an environment variable holds. Raises ValueError where it is not set."""
    token = os.environ.get(name, "").strip()
    if not token:
        raise ValueError(f"token_env={name}: this variable is not set; export {name}=... with the server's token")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(f"token_env={name}: a token is one word of plain characters")
    return token


def bearer(token_env: str | None) -> dict[str, str]:
    """The Authorization header with the token of an environment variable; {} for None."""
    return {} if token_env is None else {"Authorization": f"Bearer {token_of(token_env)}"}


def pause(attempt: int, backoff: float, least: float = 0.0) -> None:
    """Wait after a failed attempt (0, 1, ...): backoff seconds, doubled each time up to 30, jittered by half."""
    time.sleep(max(min(LONGEST_WAIT, backoff * 2**attempt) * _jitter.uniform(0.5, 1.5), least))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def one_line(text: str, limit: int = 300) -> str:
    """What somebody else's server said, fit for an error message."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def _retried(
    url: str,
    data: bytes | None,
    headers: dict[str, str] | None = None,
    timeout: float = 60.0,
    retries: int = 4,
    backoff: float = 0.5,
    max_bytes: int = 64 << 20,
) -> Any:
    opener, headers = _opener(check_url(url)), headers or {}
    start = time.monotonic()
    for attempt in range(retries + 1):
        try:
            return _once(opener, urllib.request.Request(url, data, headers), timeout, max_bytes)
        except _Attempt as error:
            if not error.passing or attempt == retries:
                times = f" after {attempt + 1} attempts in {time.monotonic() - start:.1f} s" if attempt else ""
                fix = f"; {error.fix}" if error.fix else ""
                raise HttpError(f"{url} failed{times}: {_hidden(error, headers)}{fix}", error.status) from error.__cause__
            _log.warning("flowrl: %s: %s; trying again (%d of %d)", url, _hidden(error, headers), attempt + 1, retries)
            pause(attempt, backoff, error.wait)
    raise AssertionError("the loop returns or raises")


def _hidden(error: Exception, headers: dict[str, str]) -> str:
    """What happened, without the token: some servers repeat it in their refusal. Shorter ones than 8 may be any word."""
    token = headers.get("Authorization", "").removeprefix("Bearer ").strip()
    return str(error).replace(token, "(token)") if len(token) >= 8 else str(error)


def _once(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout: float, limit: int) -> Any:
    deadline = time.monotonic() + timeout
    try:
        with opener.open(request, timeout=timeout) as response:
            raw = _read(response, deadline, timeout, limit)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error, _read_quietly(error, deadline, timeout)) from None
    except urllib.error.URLError as error:
        raise _broken(error.reason if isinstance(error.reason, Exception) else error, timeout) from error
    except (OSError, http.client.HTTPException) as error:
        raise _broken(error, timeout) from error
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        begins = one_line(raw[:200].decode("utf-8", "replace"), 60)
        raise _Attempt(f"the answer is not JSON but begins {begins!r}", "is this the address of the right server?") from None


def _read(response: Any, deadline: float, timeout: float, limit: int) -> bytes:
    """The whole answer; a server that sends it drop by drop does not outstay the timeout."""
    chunks, size = [], 0
    while chunk := response.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise _Attempt(f"the answer is larger than {limit >> 20} MiB", "is this the right server?", passing=False)
        if time.monotonic() > deadline:
            raise TimeoutError
    if getattr(response, "length", None):  # read1 takes a closed connection for the end
        raise http.client.IncompleteRead(b"".join(chunks), response.length)
    return b"".join(chunks)


def _read_quietly(error: urllib.error.HTTPError, deadline: float, timeout: float) -> bytes:
    """The body of a refusal, as much as there is."""
    try:
        return _read(error, deadline, timeout, 1 << 20)
    except (OSError, http.client.HTTPException, _Attempt):
        return b""


def _refusal(error: urllib.error.HTTPError, raw: bytes) -> _Attempt:
    """What a status other than 200 means, with the server's own words."""
    fixes = {
        401: "give the server's token (token_env=NAME of the environment variable that holds it)",
        403: "give the server's token (token_env=NAME of the environment variable that holds it)",
        404: "check the address and the name",
        413: "send less at once (batch_size), or raise the server's limit",
        429: "the server is busy: lower concurrency",
    }
    status, said = error.code, one_line(_message(raw))
    if 300 <= status < 400:
        place = one_line(str(error.headers.get("Location", "?")))
        return _Attempt(f"it answers {status}, a redirect to {place}", "give that address if it is the server's", status, False)
    try:
        wait = min(float(error.headers.get("Retry-After", 0)), LONGEST_WAIT)
    except ValueError:  # a date
        wait = 0.0
    cause = f"it answers {status}" + (f": {said}" if said else f" ({error.reason})")
    return _Attempt(cause, fixes.get(status, ""), status, status in PASSING or status >= 500, max(wait, 0.0))


def _message(raw: bytes) -> str:
    """{"error": "..."}, {"error": {"message": "..."}}, {"detail": ...}; otherwise the text as it is, but no web page."""
    text = raw.decode("utf-8", "replace").strip()
    try:
        told = json.loads(text)
    except ValueError:
        return "" if text.startswith("<") else text
    for name in ("error", "detail", "message"):
        if isinstance(told, dict) and told.get(name):
            inner = told[name]
            return str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    return text


def _broken(error: Exception, timeout: float) -> _Attempt:
    """What an exception of the connection means."""
    if isinstance(error, TimeoutError):
        return _Attempt(f"no answer within {timeout:g} s", "raise timeout, lower batch_size, or see what the server is doing")
    if isinstance(error, ssl.SSLCertVerificationError):
        return _Attempt(
            f"its certificate is not trusted ({error.verify_message})",
            "SSL_CERT_FILE names an authority of your own",
            None,
            False,
        )
    if isinstance(error, ConnectionRefusedError):
        return _Attempt("nothing listens there", "start the server, or check host and port")
    if isinstance(error, socket.gaierror):
        return _Attempt("the host is not known", "check its name")
    if isinstance(error, http.client.IncompleteRead):
        return _Attempt("the answer was cut off", "see the server's log")
    if isinstance(error, ConnectionError | http.client.BadStatusLine):
        return _Attempt(f"the connection broke ({type(error).__name__})", "see the server's log")
    return _Attempt(one_line(f"{type(error).__name__}: {error}"))


def _opener(host: str) -> urllib.request.OpenerDirector:
    """http(s) only, no redirects (they would carry the token elsewhere), no proxy for this machine itself."""
    proxies: dict[str, str] | None = {} if is_loopback(host) else None
    return urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirect)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None
