"""`flowrl serve`: rewards behind HTTP, for `remote` in another environment or on another machine. Protocol: docs/serving.md.

    GET /health    "ok"; with the token also version, rewards, requests served, samples waiting
    GET /rewards   the rewards with their traits, and the limits of a request
    POST /score    {"reward": ..., "prompts": [...], "images": [...], ...} -> {"scores": [0.5, null], "errors": {"1": "..."}}

Connections are threads, which read and decode; one thread scores. Small requests for a pointwise reward that arrive together are
scored together. What a stranger sends is bounded before it is stored, and before it is unpacked.
"""

from __future__ import annotations

import hmac
import io
import json
import os
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from flowrl import __version__
from flowrl.batch import Samples, concatenate
from flowrl.config import ConfigError
from flowrl.reward_models.base import NotScores, Reward, RewardError, as_scores, load_rewards, nearest, traits_of
from flowrl.reward_models.http import is_loopback, one_line, token_of
from flowrl.reward_models.wire import BadRequest, Limits, decode, traits_to_json

IDLE = 30.0  #: Seconds that a connection may take to send a request's head.
SLOWEST = 100_000  #: Bytes per second that its body arrives with, at least.
CONNECTIONS = 128  #: At once; further ones are told to come again.
BODIES = 4  #: Requests of the largest size that memory is spent on at once; further ones wait unread.
STRUCTURE = 1_000_000  #: Commas, colons and brackets of a request: small objects are many times as large in memory as in JSON.
SINGLY = 30.0  #: Seconds spent on finding the samples that made a batch fail.


# ------------------------------------------------------------------------------------------------ scoring


@dataclass(eq=False)
class Job:
    """A request's samples on their way through the scoring thread."""

    name: str
    samples: Samples
    done: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False
    scores: Tensor | None = None  #: (N,); NaN abstains, or failed.
    errors: dict[int, str] = field(default_factory=dict)
    failure: str = ""  #: Why there are no scores.

    def alike(self, other: Job) -> bool:
        """Whether one call can score both."""

        def shape(samples: Samples) -> list[Any]:
            tensors = (samples.images, samples.references, samples.latents)
            return [samples.fps, *(None if tensor is None else tensor.shape[1:] for tensor in tensors)]

        return self.name == other.name and not other.abandoned and shape(self.samples) == shape(other.samples)


class Scorer:
    """The thread that calls the rewards: one call at a time, since networks are not re-entrant and share a device."""

    def __init__(self, rewards: dict[str, Reward], batch: int, window: float, device: str):
        """batch: samples per call, at most. window: seconds that a small pointwise request waits for others."""
        self.rewards, self.batch, self.window, self.device = rewards, batch, window, device
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        threading.Thread(target=self._run, name="scorer", daemon=True).start()

    @property
    def queue(self) -> int:
        """Samples that wait."""
        with self.changed:
            return sum(len(job.samples) for job in self.waiting if not job.abandoned)

    def submit(self, job: Job) -> None:
        with self.changed:
            self.waiting.append(job)
            self.changed.notify_all()

    def _run(self) -> None:
        while True:
            jobs = self._next()
            try:
                self._score(jobs)
            except Exception as error:  # a fault of ours; the thread goes on and every request gets its answer
                for job in jobs:
                    job.failure = job.failure or one_line(f"{type(error).__name__}: {error}")
            for job in jobs:
                job.done.set()

    def _next(self) -> list[Job]:
        """The oldest request, and others like it."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.waiting)
                first = self.waiting.popleft()
                if not first.abandoned:
                    break
            jobs, count, until = [first], len(first.samples), time.monotonic() + self.window
            while traits_of(self.rewards[first.name]).arity == "point" and count < self.batch:
                fits = next((j for j in self.waiting if first.alike(j) and count + len(j.samples) <= self.batch), None)
                if fits is not None:
                    self.waiting.remove(fits)
                    jobs.append(fits)
                    count += len(fits.samples)
                elif not self.changed.wait(max(0.0, until - time.monotonic())):
                    break
            return jobs

    def _score(self, jobs: list[Job]) -> None:
        try:
            scores = self._call(jobs[0].name, concatenate([job.samples for job in jobs]) if len(jobs) > 1 else jobs[0].samples)
            for job, values in zip(jobs, scores.split([len(job.samples) for job in jobs]), strict=True):
                job.scores = values
        except _Raised as error:
            if len(jobs) > 1:  # which request was it?
                for job in jobs:
                    self._score([job])
                return
            job = jobs[0]
            if error.contract or len(job.samples) == 1 or traits_of(self.rewards[job.name]).arity != "point":
                job.failure = str(error)
            else:
                self._singly(job, error)

    def _singly(self, job: Job, error: _Raised) -> None:
        """Sample by sample, so that those which the reward can score are not lost with the others."""
        job.scores = torch.full((len(job.samples),), torch.nan)
        until = time.monotonic() + SINGLY
        for i in range(len(job.samples)):
            try:
                if time.monotonic() > until:
                    raise error
                job.scores[i] = self._call(job.name, job.samples.select([i]))[0]
            except _Raised as own:
                job.errors[i] = str(own)
        if len(job.errors) == len(job.samples):
            job.failure = str(error)

    def _call(self, name: str, samples: Samples) -> Tensor:
        """(N,) fp32 on the CPU. Raises _Raised for whatever the reward raises or returns that is no score."""
        samples.images = None if samples.images is None else samples.images.to(self.device)
        samples.references = None if samples.references is None else samples.references.to(self.device)
        samples.latents = samples.latents.to(self.device)
        try:
            with torch.no_grad():
                values = self.rewards[name](samples)
        except Exception as error:
            if os.environ.get("FLOWRL_TRACEBACK"):
                traceback.print_exception(error)
            what = str(error) if isinstance(error, RewardError) else f"reward {name!r} raised {type(error).__name__}: {error}"
            raise _Raised(one_line(what), contract=isinstance(error, NotScores)) from error
        try:
            return as_scores(values, len(samples), name)
        except RewardError as error:
            raise _Raised(one_line(str(error)), contract=True) from error


class _Raised(Exception):
    """A reward failed. contract: it returned something that is no score, which calling it again does not mend."""

    def __init__(self, message: str, contract: bool):
        super().__init__(message)
        self.contract = contract


# ------------------------------------------------------------------------------------------------ serving


class RewardServer(ThreadingHTTPServer):
    """Rewards at an address, until `shutdown`. token: every request but /health carries it; None asks for none."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(
        self,
        rewards: dict[str, Reward],
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        limits: Limits | None = None,
        window: float = 0.005,
        device: str = "cpu",
        log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ):
        self.rewards, self.token, self.limits, self.log = rewards, token, limits or Limits(), log
        self.scorer = Scorer(rewards, self.limits.batch, window, device)
        self.served = 0
        self.slots = threading.Semaphore(CONNECTIONS)
        self.memory, self.answering = BODIES * self.limits.bytes, 0
        self.changed = threading.Condition()  #: Of memory and answering.
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without HTTPServer's question to the name service, which may take long
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        try:
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no news; anything else is a fault of ours, in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.log(f"{client_address[0]} failed: {type(error).__name__}: {one_line(str(error))}")

    @contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        """Memory for a body. Raises BadRequest (503) where none came free for a minute."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.memory >= size, 60):
                raise BadRequest("the server is busy", 503)
            self.memory -= size
        try:
            yield
        finally:
            with self.changed:
                self.memory += size
                self.changed.notify_all()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with self.changed:
            self.answering += 1
        try:
            yield
        finally:
            with self.changed:
                self.answering -= 1
                self.changed.notify_all()

    def finish(self, seconds: float) -> None:
        """Take no more connections, and wait until the requests that are here have their answer."""
        self.server_close()
        with self.changed:
            self.changed.wait_for(lambda: not self.answering, seconds)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"flowrl/{__version__}", ""
    server: RewardServer

    def setup(self) -> None:
        super().setup()
        self.arrives = Arrives(self.connection)
        self.rfile = io.BufferedReader(self.arrives, 1 << 16)
        self.note = ""

    def handle_one_request(self) -> None:
        self.arrives.within(IDLE)
        super().handle_one_request()

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # nobody reads it
        with self.server.at_work():
            self.answer({"/health": self.health, "/rewards": self.about}.get(self.path))

    def do_POST(self) -> None:
        with self.server.at_work():
            self.answer({"/score": self.score}.get(self.path))

    def answer(self, method: Callable[[], Any] | None) -> None:
        """Run the method of a path, and put what it returns or raises on the wire."""
        start, status, self.note = time.monotonic(), 200, ""
        try:
            if self.path != "/health":
                self.check_token()
            if method is None:
                raise BadRequest(f"no {self.command} {one_line(self.path, 60)}; there are /health, /rewards and POST /score", 404)
            told = method()
        except BadRequest as error:
            told, status = {"error": str(error)}, error.status
        except (TimeoutError, ConnectionError):
            told, status = {"error": "the request did not arrive in time"}, 408
        except Exception as error:  # a fault of ours
            told, status = {"error": one_line(f"{type(error).__name__}: {error}")}, 500
        if status != 200:
            self.close_connection = True  # its body may be unread
        raw = json.dumps(told, allow_nan=False).encode()
        self.connection.settimeout(IDLE)
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            if status == 503:
                self.send_header("Retry-After", "1")
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(raw)
        except OSError:
            status, self.close_connection = 499, True
        said = ": ".join(part for part in (self.note, "" if status == 200 else one_line(told["error"], 200)) if part)
        line = f"{self.client_address[0]} {self.command} {one_line(self.path, 60)} {status}"
        self.server.log(f"{time.strftime('%H:%M:%S')} {line} {time.monotonic() - start:.2f}s{f'  {said}' if said else ''}")
        if self.close_connection:
            self.discard()

    def discard(self) -> None:
        """Read what is still on its way for some seconds: closing on it would take the answer from the sender's hands."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.arrives.within(5)
            while self.rfile.read1(1 << 16):
                pass
        except OSError:
            pass

    def check_token(self) -> None:
        if self.server.token is None:
            return
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        good = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.server.token.encode())
        if not (good and scheme.lower() == "bearer"):
            raise BadRequest("wrong or missing token", 401)

    def health(self) -> dict[str, Any]:
        try:
            self.check_token()
        except BadRequest:
            return {"status": "ok"}  # enough for a load balancer
        return {
            "status": "ok",
            "version": __version__,
            "rewards": [*self.server.rewards],
            "served": self.server.served,
            "queue": self.server.scorer.queue,
        }

    def about(self) -> dict[str, Any]:
        limits = self.server.limits
        return {
            "version": __version__,
            "limits": {"batch": limits.batch, "pixels": limits.pixels, "megabytes": limits.megabytes},
            "rewards": {name: traits_to_json(traits_of(reward)) for name, reward in self.server.rewards.items()},
        }

    def score(self) -> dict[str, Any]:
        start = time.monotonic()
        with self.server.room_for(size := self.length()):
            name, samples = self.read_samples(size)
            job = Job(name, samples)
            self.server.scorer.submit(job)
            while not job.done.wait(0.25):
                if self.gone():
                    job.abandoned = True
                    raise ConnectionAbortedError
        self.note = f"{name} {len(samples)} samples"
        if job.failure:
            raise BadRequest(job.failure, 500)
        assert job.scores is not None
        self.server.served += 1
        self.note += f", {len(job.errors)} failed" if job.errors else ""
        return {
            "scores": [None if value != value else value for value in job.scores.tolist()],
            "errors": {str(i): message for i, message in job.errors.items()},
            "seconds": round(time.monotonic() - start, 4),
        }

    def length(self) -> int:
        """Of the body, checked before it is read."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a browser does not send for a page of somebody else's without asking
            raise BadRequest("Content-Type is application/json", 415)
        told = self.headers.get("Content-Length", "")
        if not told.isdecimal() or "Transfer-Encoding" in self.headers:
            raise BadRequest("a request has a Content-Length", 411)
        if len(told) > 15 or int(told) > self.server.limits.bytes:
            raise BadRequest(f"{told[:20]} bytes; a request has at most {self.server.limits.megabytes} MB (--max-megabytes)", 413)
        return int(told)

    def read_samples(self, size: int) -> tuple[str, Samples]:
        self.arrives.within(IDLE + size / SLOWEST)
        raw = self.rfile.read(size)
        if len(raw) < size:
            raise ConnectionAbortedError
        if sum(map(raw.count, (b",", b":", b"[", b"{"))) > STRUCTURE:
            raise BadRequest("too many values in one request", 413)
        try:
            body = json.loads(raw, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON ({one_line(str(error), 80)})") from None
        del raw
        rewards = self.server.rewards
        name = body.get("reward") if isinstance(body, dict) else None
        if name is None and len(rewards) == 1:
            name = next(iter(rewards))
        if not isinstance(name, str) or name not in rewards:
            raise BadRequest(f"no reward {one_line(str(name), 60)!r} here{nearest(str(name)[:60], rewards)}", 404)
        return name, decode(body, traits_of(rewards[name]), self.server.limits)

    def gone(self) -> bool:
        """Whether the sender has hung up while it waited."""
        try:
            self.connection.settimeout(0)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def log_message(self, format: str, *arguments: Any) -> None:
        """`answer` writes the line of a request; http.server's own are of broken ones."""
        if format != '"%s" %s %s':
            self.server.log(f"{time.strftime('%H:%M:%S')} {self.client_address[0]} {one_line(format % arguments, 120)}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


class Arrives(io.RawIOBase):
    """What a connection sends, until a deadline: one that sends a byte now and then does not keep its thread."""

    def __init__(self, connection: socket.socket):
        self.connection, self.until = connection, 0.0

    def within(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


# ------------------------------------------------------------------------------------------------ the command


def serve(
    rewards: list[str],
    host: str,
    port: int,
    *,
    token_env: str | None = None,
    everybody: bool = False,
    limits: Limits,
    window: float = 0.005,
    device: str | None = None,
) -> None:
    """`flowrl serve`: until Ctrl-C or SIGTERM, after which the requests that are here get their answer.

    everybody: allow an address that other machines reach without a token. Raises ConfigError for what cannot be served.
    """
    token = None if token_env is None else token_of(token_env)
    if token is None and not everybody and not is_loopback(host):
        raise ConfigError(f"--host {host} is reached from other machines: set --token-env NAME, or say --open to let anybody in")
    loaded = {name: reward for name, (reward, _) in load_rewards(rewards).items()}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        server = RewardServer(loaded, host, port, token, limits, window, device)
    except OSError as error:
        raise ConfigError(f"cannot listen at --host {host} --port {port}: {error.strerror or error}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(loaded)} at http://{place}:{server.server_port}", flush=True)
    try:
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        server.finish(10)
        print(f"stopped after {server.served} requests", flush=True)
