"""Remote rewards: equal to local ones over a real server, and honest when anything on the way breaks."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.batch import Prompt, Samples
from flowrl.cli import main
from flowrl.data import load_prompts
from flowrl.reward_models import RewardError, load_reward
from flowrl.reward_models.base import traits_of
from flowrl.reward_models.http import HttpError, bearer, get_json, post_json
from flowrl.reward_models.remote import Remote
from flowrl.serve import Arrives
from tests.runs import finish, start

OWN = '''
import os
import time
import torch
from flowrl.reward_models.base import Traits

def dark_fails(images, prompts):
    """Raises when a dark picture is among them."""
    means = images.flatten(1).mean(1)
    if (means < 0.5).any():
        raise ValueError("too dark\\nto see")
    return means

seen = set()

def fails_once(images, prompts):
    """Every prompt makes it fail once."""
    new = set(prompts) - seen
    seen.update(new)
    if new:
        raise ConnectionError("the scorer was away")
    return [float(len(prompt)) for prompt in prompts]

def broken(images, prompts):
    raise KeyError("weights")

def short(images, prompts):
    return [1.0]

def text(images, prompts):
    return ["good"] * len(prompts)

def infinite(images, prompts):
    return [float("inf")] * len(prompts)

def every_other(images, prompts):
    return [None if i % 2 else 0.0 for i in range(len(prompts))]

def gate(images, prompts):
    """Says that it has begun, and waits until it may go on."""
    with open("begun", "a") as file:
        file.write("x")
    while not os.path.exists("go"):
        time.sleep(0.01)
    return [1.0] * len(prompts)

def call_size(images, prompts):
    return [float(len(prompts))] * len(prompts)

def column(images, prompts, target):
    return [None if value is None else value["weight"] for value in target]

class Leads:
    """How much brighter than its group."""
    name, traits = "leads", Traits(arity="group", range=(-1.0, 1.0), licence="of the house")
    def __call__(self, samples):
        means, out = samples.images.flatten(1).mean(1), torch.zeros(len(samples))
        for rows in samples.by_group():
            out[rows] = means[rows] - means[rows].mean()
        return out

class Whole:
    name, traits = "whole", Traits(arity="batch")
    def __call__(self, samples):
        means = samples.images.flatten(1).mean(1)
        return means - means.mean()

class Clip:
    name, traits = "clip", Traits(needs=("clips", "fps"))
    def __call__(self, samples):
        return samples.images.flatten(1).mean(1) * samples.fps

class Likeness:
    name, traits = "likeness", Traits(needs=("images", "references", "latents"))
    def __call__(self, samples):
        far = (samples.images[:, None] - samples.references).abs().flatten(1).mean(1)
        return -far + samples.latents.flatten(1).sum(1)
'''
FUNCTIONS = (
    *("dark_fails", "fails_once", "broken", "short", "text", "infinite", "every_other", "gate", "call_size", "column"),
    *("Leads", "Whole", "Clip", "Likeness"),
)
LIMITS = ("--max-batch", 16, "--max-pixels", 10_000, "--max-megabytes", 2)


class Server:
    """A `flowrl serve` process; url is where it listens."""

    def __init__(self, log: Path, *argv: object, env: dict[str, str] | None = None):
        self.log = log
        self.process = start(["serve", *argv], log, env=env)
        until = time.monotonic() + 60
        while not (found := re.search(r"at (http://\S+)", Path(f"{log}.out").read_text() if Path(f"{log}.out").exists() else "")):
            assert self.process.is_alive() and time.monotonic() < until, Path(f"{log}.err").read_text()
            time.sleep(0.02)
        self.url = found[1]

    def close_gate(self) -> None:
        """Let `gate` wait from now on."""
        for name in ("begun", "go"):
            self.log.with_name(name).unlink(missing_ok=True)

    def open_gate(self) -> None:
        self.log.with_name("go").touch()

    @property
    def begun(self) -> int:
        """Calls of `gate` since it was closed."""
        file = self.log.with_name("begun")
        return len(file.read_text()) if file.exists() else 0

    @property
    def queue(self) -> int:
        return get_json(f"{self.url}/health")["queue"]

    def lines(self) -> list[str]:
        return Path(f"{self.log}.err").read_text().splitlines()

    def stop(self):
        self.process.terminate()
        return finish(self.process, self.log)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "own_served.py").write_text(OWN)
    before = os.getcwd()
    os.chdir(folder)  # where a dotted path starts
    try:
        own = [f"own_served.{name}" for name in FUNCTIONS]
        server = Server(folder / "log", "brightness", "jpeg_size", "tiny_dense", *own, "--port", 0, *LIMITS)
    finally:
        os.chdir(before)
    yield server
    stopped = server.stop()
    assert stopped.code == 0 and "stopped after" in stopped.out
    assert "Traceback" not in stopped.err


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "waited for 30 s"
        time.sleep(0.01)


def remote(server, reward, **options) -> Remote:
    return load_reward("remote", url=server.url, reward=reward, **{"backoff": 0.01, **options})


def samples(
    n: int = 6, *, size: int = 32, eight_bit: bool = True, prompts: list[Prompt] | None = None, groups: int = 2
) -> Samples:
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(n))
    images = images.mul(255).round().div(255) if eight_bit else images
    prompts = prompts or [Prompt(f"prompt {i}") for i in range(n)]
    return Samples(prompts, list(range(n)), torch.arange(n) // groups, torch.zeros(n, 1), images)


def shaded(*levels: float) -> Samples:
    """Flat pictures."""
    batch = samples(len(levels))
    batch.images = torch.tensor(levels)[:, None, None, None].expand(-1, 3, 8, 8).clone()
    return batch


def png(image: Image.Image | None = None, **options) -> str:
    buffer = io.BytesIO()
    (image or Image.new("RGB", (8, 8))).save(buffer, "PNG", **options)
    return base64.b64encode(buffer.getvalue()).decode()


def npy(array: np.ndarray, **options) -> dict[str, str]:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return {"npy": base64.b64encode(buffer.getvalue()).decode()}


def raw_png(width: int, height: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> str:
    """A PNG file that says what it likes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + head + body).decode()


def refused(server, body, **headers) -> HttpError:
    with pytest.raises(HttpError) as error:
        post_json(f"{server.url}/score", body, headers=headers, retries=0)
    return error.value


# ------------------------------------------------------------------------------------------------ equal to local


@pytest.mark.parametrize("form", ["png", "npy"])
@pytest.mark.parametrize("name", ["brightness", "jpeg_size", "tiny_dense"])
def test_remote_scores_equal_local_ones(server, name, form):
    """Bit for bit on pictures of 8 bit, in requests of 4, 4 and 2; columns (null among them) arrive as they were."""
    prompts = load_prompts("tiny-test")[:10]
    assert any(None in prompt.columns.values() for prompt in prompts)
    batch = samples(10, size=64, prompts=prompts)
    assert torch.equal(remote(server, name, format=form, batch_size=4)(batch), load_reward(name)(batch))


def test_npy_keeps_floats_and_png_rounds_them(server):
    batch = samples(4, eight_bit=False)
    local = load_reward("brightness")(batch)
    assert torch.equal(remote(server, "brightness", format="npy")(batch), local)
    rounded = remote(server, "brightness", format="png")(batch)
    assert not torch.equal(rounded, local) and (rounded - local).abs().max() <= 0.5 / 255
    batch.images = batch.images.mul(255).round().div(255)
    assert torch.equal(rounded, load_reward("brightness")(batch))


def test_clips_references_and_latents_travel(server):
    clip = samples(3)
    clip.images = torch.rand(3, 4, 3, 8, 8).mul(255).round().div(255)
    clip.fps = 12.5
    for form in ("png", "npy"):
        assert torch.equal(remote(server, "clip", format=form)(clip), clip.images.flatten(1).mean(1) * 12.5)
    batch = samples(3)
    batch.references, batch.latents = torch.rand(3, 2, 3, 32, 32), torch.randn(3, 4, 2)
    expected = -(batch.images[:, None] - batch.references).abs().flatten(1).mean(1) + batch.latents.flatten(1).sum(1)
    assert torch.equal(remote(server, "likeness", format="npy")(batch), expected)
    with pytest.raises(HttpError, match="needs references"):
        remote(server, "likeness")(samples(3))


def test_traits_are_the_served_rewards(server):
    traits = remote(server, "leads").traits
    assert (traits.arity, traits.range, traits.licence, traits.remote) == ("group", (-1.0, 1.0), "of the house", True)
    assert not remote(server, "brightness").traits.differentiable and load_reward("brightness").traits.differentiable
    assert remote(server, "clip").traits.needs == ("clips", "fps")


def test_abstentions_and_columns(server):
    assert remote(server, "every_other")(samples(4)).isnan().tolist() == [False, True, False, True]
    prompts = [Prompt("a", {"target": {"weight": 0.1}}), Prompt("b"), Prompt("c", {"target": None})]
    scores = remote(server, "column")(samples(3, prompts=prompts))
    assert scores[0] == torch.tensor(0.1) and scores[1:].isnan().all()
    with pytest.raises(RewardError, match="columns cannot travel as JSON .*set"):
        remote(server, "column")(samples(1, prompts=[Prompt("a", {"target": {1}})]))
    assert remote(server, "brightness")(samples(2).select([])).shape == (0,)


def test_groups_travel_whole_and_batches_at_once(server):
    """12 samples, requests of 4: groups of 3 go one by one; a set of 12 goes as one, and 17 are above the server's limit."""
    batch = samples(12, groups=3)
    means = batch.images.flatten(1).mean(1)
    assert torch.allclose(remote(server, "leads", batch_size=4)(batch), means - means.view(4, 3).mean(1).repeat_interleave(3))
    assert torch.allclose(remote(server, "whole", batch_size=4)(batch), means - means.mean())
    with pytest.raises(RewardError, match="scores all samples at once: 17 in one request, and .* takes 16 .*--max-batch"):
        remote(server, "whole")(samples(17))


def test_requests_keep_to_the_servers_limits(server):
    """40 samples with batch_size 32 at a server that takes 16; fp32 pictures of 96 x 96, of which 2 MB hold 13."""
    assert remote(server, "call_size")(samples(40)).max() <= 16
    sizes = remote(server, "call_size", format="npy", concurrency=1)(samples(16, size=96))
    assert sizes.max() == 13


def test_small_requests_are_scored_together_and_groups_never(server):
    """While one request is scored, five of one sample wait: those of a pointwise reward share a call."""

    def behind_a_slow_one(reward: str) -> list[torch.Tensor]:
        server.close_gate()
        with ThreadPoolExecutor(6) as pool:
            pool.submit(remote(server, "gate"), samples(1))
            until(lambda: server.begun)
            scores = [pool.submit(remote(server, reward), samples(1)) for _ in range(5)]
            until(lambda: server.queue == 5)
            server.open_gate()
            return [future.result() for future in scores]

    assert torch.cat(behind_a_slow_one("call_size")).tolist() == [5.0] * 5
    assert torch.cat(behind_a_slow_one("whole")).tolist() == [0.0] * 5  # one call of five samples would differ from its mean


# ------------------------------------------------------------------------------------------------ rewards that fail


def test_half_the_batch_failing_names_the_samples(server):
    batch = shaded(0.9, 0.1, 0.8, 0.2)
    with pytest.raises(RewardError) as error:
        remote(server, "dark_fails", retries=1)(batch)
    assert re.search(
        r"'dark_fails' at http://\S+ failed on 2 of 4 samples; sample 1 \('prompt 1'\): .*too dark to see", str(error.value)
    )
    assert "(failed: 1, 3)" in str(error.value)


def test_half_the_batch_may_abstain(server, caplog):
    """As NaN, counted and warned about, never as 0. A batch of which nothing is left is an error all the same."""
    reward = remote(server, "dark_fails", format="npy", retries=1, on_error="abstain", batch_size=2)
    scores = reward(shaded(0.9, 0.1, 0.2, 0.3, 0.8))  # the second request fails as a whole
    assert torch.allclose(scores[[0, 4]], torch.tensor([0.9, 0.8])) and scores[1:4].isnan().all()
    assert reward.failed == 3 and "failed on 3 of 5 samples" in caplog.text and "they abstain" in caplog.text
    with pytest.raises(RewardError, match="failed on 2 of 2 samples"):
        reward(shaded(0.1, 0.2))


def test_a_failure_that_passes_is_a_success(server):
    """Each prompt makes the reward fail once: in the batch, and then sample by sample."""
    assert remote(server, "fails_once")(samples(5)).tolist() == [8.0] * 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "reward 'broken' raised KeyError: 'weights'"),
        ("short", r"reward 'short' returned values of shape \(1,\) for 3 samples"),
        ("text", "reward 'text' returned list instead of one number"),
        ("infinite", "reward 'infinite' returned infinity for sample 0"),
    ],
)
def test_a_broken_reward_says_so(server, name, message):
    with pytest.raises(RewardError, match=f"failed on 3 of 3 samples.*failed after 2 attempts.*answers 500: {message}"):
        remote(server, name, retries=1)(samples(3))
    assert get_json(f"{server.url}/health")["status"] == "ok"


def test_a_slow_reward_times_out_and_its_work_is_dropped(server):
    """Three attempts at a reward that does not come back: the two that waited behind the first are never begun."""
    server.close_gate()
    with pytest.raises(
        HttpError, match=r"failed after 3 attempts in .* s: no answer within 0.2 s; raise timeout, lower batch_size"
    ):
        reward = remote(server, "gate", timeout=0.2, retries=2)
        reward._facts = remote(server, "gate").facts  # which may take longer on a busy machine
        reward(samples(1))
    until(lambda: server.queue == 0)
    server.open_gate()
    assert remote(server, "brightness")(samples(1)).isfinite().all() and server.begun == 1


# ------------------------------------------------------------------------------------------------ servers that fail


class Raw:
    """A server of one's own words: each connection gets the next answer (bytes, or None for a reset); the last one repeats."""

    ABOUT = {
        "limits": {"batch": 64, "pixels": 1 << 24, "megabytes": 256},
        "rewards": {"r": {"arity": "point", "needs": ["images"], "columns": [], "range": [None, None], "licence": ""}},
    }

    def __init__(self, *answers: bytes | None):
        self.answers, self.asked = list(answers), 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    @staticmethod
    def json(value: object, status: str = "200 OK") -> bytes:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body

    def run(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection, connection.makefile("rb") as told:
                head = b"".join(iter(told.readline, b"\r\n"))
                length = re.search(rb"Content-Length: (\d+)", head)
                told.read(int(length[1]) if length else 0)
                if head.startswith(b"GET /rewards"):
                    connection.sendall(self.json(self.ABOUT))
                    continue
                answer = self.answers[min(self.asked, len(self.answers) - 1)]
                self.asked += 1
                if answer is None:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    with suppress(ConnectionError):  # a client that has read enough
                        connection.sendall(answer)


GOOD = Raw.json({"scores": [0.5, None, 1], "errors": {}})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Raw.json({"scores": [0.5, 1]}), "sent 2 scores for 3 samples"),
        (Raw.json({"scores": [0.5, "1", 1]}), "sent '1' as score 1 instead of a finite number or null"),
        (Raw.json({"scores": [0.5, True, 1]}), "sent True as score 1"),
        (Raw.json(b'{"scores": [0.5, NaN, 1]}'), "sent nan as score 1"),
        (Raw.json(b'{"scores": [0.5, 1e999, 1]}'), "sent inf as score 1"),
        (Raw.json({"scores": [0.5, 1e39, 1]}), r"sent 1e\+39 as score 1"),
        (Raw.json({"scores": [0.5, 10**400, 1]}), "sent 1000.* as score 1"),
        (Raw.json({"scores": {"0": 1}}), "answers no scores but"),
        (Raw.json([0.5, 1, 1]), "answers no scores but"),
        (Raw.json({"scores": [0.5, 1, 1], "errors": {"1": "x"}}), "errors that do not belong"),
        (Raw.json({"scores": [0.5, None, 1], "errors": {"9": "x"}}), "errors that do not belong"),
        (Raw.json({"scores": [0.5, None, 1], "errors": [1]}), "errors that do not belong"),
        (Raw.json({"error": "no reward 'r' here"}, "404 Not Found"), "answers 404: no reward 'r' here; check the address"),
        (Raw.json(b"", "302 Found\r\nLocation: http://elsewhere/"), "a redirect to http://elsewhere/"),
        (Raw.json({"error": "too much"}, "413 Too Large"), r"answers 413: too much; send less at once \(batch_size\)"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(answer, message):
    server = Raw(answer)
    with pytest.raises(RewardError, match=message) as error:
        remote(server, None)(samples(3))
    assert server.asked == 1 and server.url in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "the connection broke"),
        (b"", "the connection broke"),
        (b"hello\r\n\r\n", "the connection broke"),
        (GOOD[:-5], "the answer was cut off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{}", "the answer was cut off"),
        (Raw.json(b"<html><h1>It works"), "not JSON but begins '<html><h1>It works'; is this the address of the right server"),
        (Raw.json(b"[" * 100_000), "not JSON but begins"),
        (Raw.json(b"<html>", "502 Bad Gateway"), r"it answers 502 \(Bad Gateway\)"),
        (Raw.json({"error": {"message": "loading"}}, "503 Busy"), "it answers 503: loading"),
        (
            Raw.json({"error": "slow down"}, "429 Too Many\r\nRetry-After: 0"),
            "answers 429: slow down; the server is busy: lower conc",
        ),
    ],
)
def test_a_broken_answer_is_asked_for_again(answer, message):
    """It comes right in the third attempt; where it does not, the error says what was wrong and how often."""
    expected = torch.tensor([0.5, torch.nan, 1])
    assert torch.equal(remote(Raw(answer, answer, GOOD), None)(samples(3)).nan_to_num(-1), expected.nan_to_num(-1))
    server = Raw(answer)
    with pytest.raises(RewardError, match=f"{server.url}/score failed after 3 attempts in .* s: .*{message}"):
        remote(server, None, retries=2, on_error="abstain")(samples(3))  # a server that fails is nobody's abstention
    assert server.asked == 3


def test_a_flood_is_cut_off(monkeypatch):
    server = Raw(Raw.json(b" " * (3 << 20)))
    with pytest.raises(HttpError, match="the answer is larger than 1 MiB"):
        post_json(f"{server.url}/score", {}, max_bytes=1 << 20)
    assert server.asked == 1


def test_a_server_that_is_not_there(tmp_path):
    """Nobody listens: an error. It comes up while attempts are left: a success."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    reward = load_reward("remote", url=f"http://127.0.0.1:{port}", backoff=0.2, retries=1)
    with pytest.raises(
        HttpError, match=r"/rewards failed after 2 attempts .*: nothing listens there; start the server, or check"
    ):
        traits_of(reward)
    reward = load_reward("remote", url=f"http://127.0.0.1:{port}", backoff=0.2, retries=8)
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(reward, samples(2))
        time.sleep(0.3)
        late = Server(tmp_path / "late", "brightness", "--port", port)
        assert torch.equal(scores.result(60), load_reward("brightness")(samples(2)))
    assert late.stop().code == 0


BARE = """
import sys

class Gone:
    names = {names}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Gone())
from flowrl.cli import main
sys.exit(main(["serve", "brightness", "--port", "0"]))
"""


def test_it_serves_where_a_scorers_packages_leave_no_room_for_the_generators():
    """Without diffusers, transformers and their like, which old scorers pin to versions of their own."""
    names = ("diffusers", "transformers", "accelerate", "peft", "open_clip", "torchvision", "safetensors", "scipy", "tqdm")
    command = [sys.executable, "-c", BARE.format(names=names)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            assert "serving brightness at http://" in said, process.stderr.read()
            reward = load_reward("remote", url=said.split()[-1])
            assert torch.equal(reward(samples(2)), load_reward("brightness")(samples(2)))
        finally:
            process.terminate()
        assert process.wait(20) == 0 and "stopped after 1 requests" in process.stdout.read()


def test_stopping_answers_what_is_under_way(tmp_path, monkeypatch):
    (tmp_path / "own_served.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    server = Server(tmp_path / "log", "own_served.gate", "--port", 0)
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(remote(server, None, retries=0), samples(1))
        until(lambda: server.begun)
        server.process.terminate()
        time.sleep(0.3)
        assert server.process.is_alive()
        server.open_gate()
        assert scores.result(10).tolist() == [1.0]
    stopped = finish(server.process, server.log)
    assert stopped.code == 0 and "stopped after 1 requests" in stopped.out
    line = stopped.err.splitlines()[-1]
    assert re.fullmatch(r"\d\d:\d\d:\d\d 127.0.0.1 POST /score 200 \d.\d\ds  gate 1 samples", line)


# ------------------------------------------------------------------------------------------------ hostile clients


def test_the_token(tmp_path, monkeypatch):
    """Without it only a bare /health; wrong ones are refused once and never tried again; it appears in no log."""
    server = Server(tmp_path / "log", "brightness", "--port", 0, "--token-env", "SERVED", env={"SERVED": "correct-horse"})
    assert get_json(f"{server.url}/health") == {"status": "ok"}
    monkeypatch.setenv("MINE", "correct-horse")
    assert torch.equal(remote(server, None, token_env="MINE")(samples(2)), load_reward("brightness")(samples(2)))
    assert get_json(f"{server.url}/health", headers={"Authorization": "Bearer correct-horse"})["served"] == 1
    refusals = (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic correct-horse"},
        {"Authorization": "Bearer \u00e9"},
    )
    for headers in refusals:
        with pytest.raises(HttpError, match="rewards failed: it answers 401: wrong or missing token; give the server's token"):
            get_json(f"{server.url}/rewards", headers=headers)
    big = {"reward": "brightness", "prompts": ["x" * 1_000_000]}
    assert refused(server, big).status == 401
    monkeypatch.setenv("MINE", "guess")
    with pytest.raises(HttpError, match="401.*token_env") as error:
        remote(server, None, token_env="MINE")(samples(2))
    assert "guess" not in str(error.value)
    stopped = server.stop()
    assert "correct-horse" not in stopped.out + stopped.err and stopped.err.count(" 401 ") == len(refusals) + 2


PIXELS = zlib.compress(b"\0" * 8 * 25)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"images": ["?" * 8]}, 400, r"images\[0\] is no base64"),
        ({"images": [base64.b64encode(b"GIF89a" * 10).decode()]}, 400, r"images\[0\] is no PNG"),
        ({"images": [png()[:80]]}, 400, r"images\[0\] is a broken PNG"),
        ({"images": [raw_png(8, 8, zlib.compress(bytes(range(200)))[:100])]}, 400, r"images\[0\] is a broken PNG"),
        ({"images": [raw_png(8, 8, b"no zlib")]}, 400, r"images\[0\] is a broken PNG"),
        ({"images": [raw_png(60_000, 60_000, PIXELS)]}, 413, r"images\[0\] has .*pixels .*\(--max-pixels\)"),
        ({"images": [raw_png(101, 100, PIXELS)]}, 413, r"images\[0\] has 101x100 pixels, more than 10000"),
        ({"images": [raw_png(0, 8, PIXELS)]}, 400, r"images\[0\] is "),
        ({"images": [png(Image.new("RGBA", (8, 8)))]}, 400, "mode RGBA; pictures are RGB of 8 bit"),
        ({"images": [png(Image.new("I;16", (8, 8)))]}, 400, "mode I;16"),
        ({"images": [png(), png(Image.new("RGB", (8, 9)))], "prompts": ["a", "b"]}, 400, r"images\[1\] is \(8, 9\), images\[0\]"),
        ({"images": [png()] * 2}, 400, "images has 2 values for 1 prompts"),
        ({"images": png()}, 400, "images is a str; it is a list"),
        ({"images": [1]}, 400, r"images\[0\] is a int"),
        ({"images": None}, 400, "needs images"),
        ({"images": {"npy": "AAAA"}}, 400, "images is no npy file"),
        ({"images": npy(np.array([[{}]]), allow_pickle=True)}, 400, "images: object; an npy is uint8 or float32"),
        ({"images": npy(np.zeros((1, 3, 8, 8)))}, 400, "images: float64; an npy is uint8 or float32"),
        ({"images": npy(np.zeros((1, 8, 8, 3), np.uint8))}, 400, r"shape \(1, 8, 8, 3\) instead of \(N, 3, H, W\) or"),
        ({"images": npy(np.zeros((2, 3, 8, 8), np.uint8))}, 400, r"shape \(2, 3, 8, 8\) for 1 prompts"),
        ({"images": npy(np.zeros((1, 3, 0, 8), np.uint8))}, 400, r"shape \(1, 3, 0, 8\)"),
        ({"images": npy(np.full((1, 3, 8, 8), np.nan, np.float32))}, 400, "not numbers"),
        ({"images": npy(np.full((1, 3, 8, 8), 255, np.float32))}, 400, r"in \[0, 1\] or uint8, and these go from 255 to 255"),
        ({"images": npy(np.zeros((1, 3, 200, 100), np.uint8))}, 413, "images has 100x200 pixels"),
        ({"images": {"npy": npy(np.zeros((1, 3, 8, 8), np.uint8))["npy"].replace("ICg4", "ICg4")[:-8]}}, 400, "do not fill"),
        ({"images": {"file": "/etc/passwd"}}, 400, "images is a list of PNGs or"),
        ({"reward": "brightnes"}, 404, r"no reward 'brightnes' here; did you mean brightness\?"),
        ({"reward": None}, 404, "no reward 'None' here"),
        ({"prompts": []}, 400, "0 prompts"),
        ({"prompts": ["a"] * 17}, 413, r"17 prompts; a request has 1 to 16 \(--max-batch\)"),
        ({"prompts": [None]}, 400, r"prompts\[0\] is a NoneType"),
        ({"columns": {"kind": ["x"]}}, 400, "columns is a dict; it is a list"),
        ({"groups": [True]}, 400, r"groups\[0\] is a bool"),
        ({"groups": [1 << 70]}, 400, "64 bit"),
        ({"reward": "leads"}, 400, "groups is missing"),
        ({"reward": "clip"}, 400, "needs clips"),
        ({"fps": 0}, 400, "fps is a positive number"),
        ({"promts": ["a"]}, 400, r"unknown field 'promts'; did you mean prompts"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(server, change, status, message):
    error = refused(server, {"reward": "brightness", "prompts": ["a"], "images": [png()], **change})
    assert error.status == status
    assert re.search(message, str(error)), str(error)


def peak(server) -> int:
    """Largest memory of the server process so far, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_bombs_cost_no_memory(server):
    """Small files that claim gigabytes or unpack to a quarter of one, in pixels, in text, in an npy's header, in JSON."""
    post_json(f"{server.url}/score", {"reward": "brightness", "prompts": ["a"], "images": [png()]})
    before = peak(server)
    zeros = zlib.compressobj(9)
    bomb = b"".join(zeros.compress(bytes(1 << 22)) for _ in range(64)) + zeros.flush()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (1, 3, 1 << 15, 1 << 15)})
    bodies = [
        ([raw_png(30_000, 30_000, bomb)], 413),
        ([raw_png(8, 8, PIXELS, (b"zTXt", b"a\0\0" + bomb))], 400),
        ([raw_png(8, 8, PIXELS, (b"iCCP", b"a\0\0" + bomb))], 400),
        ({"npy": base64.b64encode(head.getvalue() + bytes(100)).decode()}, 400),
    ]
    for images, status in bodies:
        assert refused(server, {"reward": "brightness", "prompts": ["a"], "images": images}).status == status
    longer = {"reward": "brightness", "prompts": ["a"], "images": [raw_png(100, 100, bomb)]}
    assert post_json(f"{server.url}/score", longer)["scores"] == [0.0]  # what is behind the last line stays packed
    assert refused(server, {"prompts": [[] for _ in range(600_000)]}).status == 413
    assert refused(server, {"prompts": ["x" * (3 << 20)]}).status == 413
    assert peak(server) - before < 64 << 20


def talk(server, told: bytes) -> bytes:
    """What the server answers to these bytes, until it closes or says nothing for a second."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=1) as connection:
        connection.sendall(told)
        heard = b""
        try:
            while more := connection.recv(65536):
                heard += more
        except TimeoutError:
            pass
    return heard


def test_requests_that_are_none(server):
    def post(headers: str, body: bytes = b"{}") -> bytes:
        return talk(server, f"POST /score HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n".encode() + body).split(b"\r\n")[0]

    kind = "Content-Type: application/json\r\n"
    assert post("Content-Length: 2") == b"HTTP/1.1 415 Unsupported Media Type"  # what a browser sends across sites
    assert post("Content-Type: text/plain\r\nContent-Length: 2").startswith(b"HTTP/1.1 415")
    assert post(kind + "Transfer-Encoding: chunked").startswith(b"HTTP/1.1 411")
    assert post(kind + "Content-Length: -1").startswith(b"HTTP/1.1 411")
    assert post(kind + f"Content-Length: {10**18}").startswith(b"HTTP/1.1 413")
    assert post(kind + "Content-Length: 9", b"[" * 9).startswith(b"HTTP/1.1 400")
    assert post(kind + "Content-Length: 100000", b"[" * 100_000).startswith(b"HTTP/1.1 400")
    assert post(kind + "Content-Length: 11", b'{"fps":NaN}').startswith(b"HTTP/1.1 400")
    assert talk(server, b"GET /../etc/passwd HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 404")
    assert talk(server, b"DELETE /score HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 501")
    assert b" 400 " in talk(server, b"\x16\x03\x01\x02\x00\x01\r\n")
    two = talk(server, b"GET /health HTTP/1.1\r\n\r\nGET /rewards HTTP/1.1\r\n\r\n")
    assert two.count(b"HTTP/1.1 200 OK") == 2  # a connection serves several requests
    assert not any("\x1b" in line or "Traceback" in line for line in server.lines())


def test_a_sender_that_dawdles_is_left():
    """A byte every 50 ms for ever: the deadline holds for the whole, not for each byte."""
    ours, theirs = socket.socketpair()
    arrives = Arrives(ours)
    arrives.within(0.3)
    go_on = threading.Event()

    def dawdle() -> None:
        while not go_on.wait(0.05):
            theirs.send(b"x")

    thread = threading.Thread(target=dawdle, daemon=True)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        io.BufferedReader(arrives).read(1000)
    assert 0.25 < time.monotonic() - begun < 2
    go_on.set()
    thread.join()
    ours.close()
    theirs.close()


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "gpu2:8000"}, "an address looks like http://host:8000"),
        ({"url": "file:///etc/passwd"}, "an address looks like"),
        ({"url": "http://me:secret@gpu2"}, "a token goes into token_env"),
        ({"format": "jpeg"}, "format='jpeg': choose png or npy"),
        ({"on_error": "zero"}, "on_error='zero': choose raise or abstain"),
        ({"batch_size": 0}, "batch_size=0: a whole number, 1 or more"),
        ({"timeout": 0}, "timeout=0: seconds, more than 0"),
        ({"token_env": "NO_SUCH_TOKEN"}, "token_env=NO_SUCH_TOKEN: this variable is not set; export"),
    ],
)
def test_options_are_checked_before_anything_is_sent(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("remote", **{"url": "http://gpu2:8000", **options})


def test_a_reward_that_is_not_served(server):
    with pytest.raises(RewardError, match=r"serves no reward 'brightnes'; did you mean brightness\?"):
        remote(server, "brightnes")(samples(1))
    with pytest.raises(RewardError, match="serves brightness, jpeg_size, .*: say which with reward=NAME"):
        remote(server, None)(samples(1))


def test_pictures_that_are_not_numbers_are_not_sent(server):
    batch = samples(3)
    batch.images[1, 0, 0, 0] = torch.nan
    with pytest.raises(RewardError, match="sample 1 has pixels that are not numbers"):
        remote(server, "brightness")(batch)


def test_a_remote_rewards_waits_leave_random_numbers_alone():
    state = torch.get_rng_state()
    import random

    python = random.getstate()
    remote(Raw(None, GOOD), None)(samples(3))
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["brightness", "--host", "0.0.0.0"],
            "--host 0.0.0.0 is reached from other machines: set --token-env NAME, or say --open",
        ),
        (["brightnes"], "unknown reward 'brightnes'; did you mean brightness?"),
        (["brightness", "--token-env", "NO_SUCH_TOKEN"], "NO_SUCH_TOKEN: this variable is not set"),
        (["brightness", "--host", "192.0.2.1", "--open"], "cannot listen at --host 192.0.2.1"),
        (["brightness", "--port", "70000"], "a port is at most 65535"),
    ],
)
def test_serve_refuses_with_one_line(capsys, argv, message):
    assert main(["serve", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(capsys, server):
    assert main(["serve", "brightness", "--port", server.url.rpartition(":")[2]]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_a_server_that_repeats_the_token_does_not_get_it_printed(monkeypatch, caplog):
    """Some answer a bad request with its headers. Answered by a real server; 503 is tried again, and logged."""
    import http.server

    class Echo(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            said = f"not {self.headers['Authorization']}".encode()
            self.send_response(503)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("SECRET_TOKEN", "correct-horse")
    with http.server.HTTPServer(("127.0.0.1", 0), Echo) as echo:
        threading.Thread(target=echo.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{echo.server_port}/score"
        with pytest.raises(HttpError, match=r"it answers 503: not Bearer \(token\)") as error:
            post_json(address, {}, headers=bearer("SECRET_TOKEN"), retries=1, backoff=0.01)
        echo.shutdown()
    assert "correct-horse" not in str(error.value) + caplog.text and "(token)" in caplog.text
