"""A judge for tests: a small LLaVA with random weights behind the OpenAI chat-completions protocol, in a process of its own.

    python -m tests.judge_server        # prints its port, serves until it is killed

The model's name says how the server behaves, as the query of an address would: `tiny` answers with the model's true
log-probabilities; `tiny?status=500&times=2` refuses twice first. GET /seen?model=NAME tells what that model was asked.

status=S, times=N, retry_after=T   the first N requests (default: all) are refused with status S
reset=N                            the connection of the first N requests is torn down
slow=T                             answers after T seconds
body=html|list|two|null            answers with something that is not a chat completion
logprobs=none|empty                leaves them out, or lists no token
first=Yes:.6,The:.3                these candidates for the first token, instead of the model's
text=...                           this text; WINNER in it is `Image 1` or `Image 2`, whichever is brighter
gain=G, bias=B, words=A,B          judges brightness: P(A) = sigmoid(G (mean of the first picture - mean of the last, or 1/2) + B)
                                   (gain=G in the question's text says otherwise)
mute=M, mute_first=M               no readable answer where a mean, or that of the first picture, is above M
token=T                            wants this token
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
from PIL import Image

WORDS = ("Yes", "No", " yes", " no", "YES", "yes", "no", "A", "B", " A")


class TinyVLM:
    """A LLaVA that anyone can build: CLIP vision tower on 32 x 32 pictures, Llama of width 32, byte tokenizer with some words."""

    def __init__(self, seed: int = 0):
        import torch
        import transformers
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        torch.set_num_threads(1)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        reader = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
        reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        reader.decoder = decoders.ByteLevel()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=reader, eos_token="</s>", pad_token="</s>")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
        vision = transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            initializer_factor=3.0,
        )
        text = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,  # ordinary small random weights would answer the same to every picture
            max_position_embeddings=4096,
        )
        config = transformers.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
        torch.manual_seed(seed)
        self.model = transformers.LlavaForConditionalGeneration(config).eval()
        # An answer is one of the words more often than not, as with a model that was taught to answer.
        favoured = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) in WORDS]
        bias = torch.zeros(len(tokenizer))
        bias[favoured] = 6.0
        self.model.lm_head.bias = torch.nn.Parameter(bias)
        images = transformers.CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
        self.processor = transformers.LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
        self.names = [tokenizer.decode([i]) for i in range(len(tokenizer))]

    def log_probs(self, pictures: list[Image.Image], text: str) -> Any:
        """(V,) log-probabilities of the token after `text`, in which every picture is an <image>."""
        import torch

        inputs = self.processor(images=pictures or None, text=text, return_tensors="pt")
        with torch.inference_mode():
            return self.model(**inputs).logits[0, -1].float().log_softmax(-1)


class Judge:
    """What the requests share: the model, one at a time, and what was asked of whom."""

    def __init__(self) -> None:
        self.vlm = TinyVLM()
        self.lock = threading.Lock()
        self.seen: dict[str, dict[str, Any]] = {}

    def arrives(self, body: dict[str, Any], authorization: str | None) -> tuple[dict[str, str], int]:
        """The behaviour that the model's name asks for, and which request of that name this is."""
        with self.lock:
            new = {"requests": 0, "now": 0, "most_at_once": 0}
            seen = self.seen.setdefault(body["model"], new)
            seen["requests"] += 1
            seen["now"] += 1
            seen["most_at_once"] = max(seen["most_at_once"], seen["now"])
            seen |= {"body": body, "authorization": authorization}
            return dict(parse_qsl(urlsplit(body["model"]).query)), seen["requests"]

    def leaves(self, body: dict[str, Any]) -> None:
        with self.lock:
            self.seen[body["model"]]["now"] -= 1

    def reply(self, body: dict[str, Any], how: dict[str, str]) -> Any:
        pictures, text = read_content(body["messages"][0]["content"])
        means = [float(np.asarray(p, dtype=np.float64).mean() / 255) for p in pictures]
        if max(means) > float(how.get("mute", 2)) or means[0] > float(how.get("mute_first", 2)):
            said, first = "I would rather not say.", [("I", -0.1)]
        elif "text" in how:
            brighter = "Image 1" if means[0] > means[-1] else "Image 2"
            said, first = how["text"].replace("WINNER", brighter), []
        elif "gain" in how:
            other = means[-1] if len(means) > 1 else 0.5
            gain = re.search(r"gain=(\S+)", text)
            p = 1 / (1 + math.exp(-float(gain[1] if gain else how["gain"]) * (means[0] - other) - float(how.get("bias", 0))))
            words = how.get("words", "yes,no").split(",")
            first = [(word, math.log(q)) for word, q in zip(words, (p, 1 - p), strict=True)]
            said = words[p < 0.5]
        elif "first" in how:
            pairs = (entry.rpartition(":") for entry in how["first"].split(","))
            first = [(word, math.log(float(p))) for word, _, p in pairs]
            said = first[0][0]
        else:
            said, first = self.true(pictures, text, body)
        return completion(said, first if body.get("logprobs") else None)

    def true(self, pictures: list[Image.Image], text: str, body: dict[str, Any]) -> tuple[str, list[tuple[str, float]]]:
        """Greedy decoding, and the candidates for the first token."""
        first: list[tuple[str, float]] = []
        said = ""
        for _ in range(body["max_tokens"]):
            with self.lock:
                log_probs = self.vlm.log_probs(pictures, text + said)
            top = log_probs.topk(max(body.get("top_logprobs", 1), 1))
            names = [self.vlm.names[i] for i in top.indices.tolist()]
            first = first or list(zip(names, top.values.tolist(), strict=True))
            said += names[0]
        return said, first


def read_content(content: list[dict[str, Any]]) -> tuple[list[Image.Image], str]:
    """The pictures of a message, and its text with an <image> where each stood."""
    pictures, text = [], []
    for part in content:
        if part["type"] == "text":
            text.append(part["text"])
        else:
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            pictures.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB"))
            text.append("<image>")
    return pictures, "\n".join(text) + "\n"


def completion(text: str, first: list[tuple[str, float]] | None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    if first is not None:
        listed = [{"token": token, "logprob": p, "bytes": list(token.encode())} for token, p in first]
        choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}] if listed else []}
    return {"id": "judge-1", "object": "chat.completion", "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: Judge
    asked: dict[str, Any] | None = None

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        if place.path == "/v1/models":
            self.send(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})
        elif place.path == "/two/models":
            self.send(200, {"data": [{"id": "small"}, {"id": "large"}]})
        elif place.path == "/seen":
            self.send(200, self.judge.seen.get(unquote(place.query.removeprefix("model=")), {"requests": 0}))
        else:
            self.send(404, {"error": {"message": f"no {place.path} here"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.send(404, {"error": {"message": f"no {self.path} here"}})
            return
        how, count = self.judge.arrives(body, self.headers["Authorization"])
        self.asked = body
        try:
            self.answer(body, how, count)
        except (BrokenPipeError, ConnectionResetError):
            pass  # a client that did not wait
        finally:
            self.leave()

    def leave(self) -> None:
        """Counted before the answer goes out: the client's next question may be here before this thread goes on."""
        if self.asked is not None:
            self.judge.leaves(self.asked)
            self.asked = None

    def answer(self, body: dict[str, Any], how: dict[str, str], count: int) -> None:
        time.sleep(float(how.get("slow", 0)))
        if count <= int(how.get("reset", 0)):
            # Closed with unread time on it, a socket says RST instead of goodbye.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if "token" in how and self.headers["Authorization"] != f"Bearer {how['token']}":
            self.send(401, {"error": {"message": "who are you?"}})
            return
        if "status" in how and count <= int(how.get("times", sys.maxsize)):
            headers = {"Retry-After": how["retry_after"]} if "retry_after" in how else {}
            self.send(int(how["status"]), {"error": {"message": "not now"}}, headers)
            return
        reply = self.judge.reply(body, how)
        match how.get("body"):
            case "html":
                self.send(200, b"<html>Welcome</html>")
                return
            case "list":
                reply = [1, 2, 3]
            case "two":
                reply["choices"] *= 2
            case "null":
                reply["choices"][0]["message"]["content"] = None
        match how.get("logprobs"):
            case "none":
                reply["choices"][0]["logprobs"] = None
            case "empty":
                reply["choices"][0]["logprobs"] = {"content": []}
        self.send(200, reply)

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.leave()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True


def serve(ready: Callable[[int], Any]) -> None:
    """Serve on a free port, which `ready` is told, until killed."""
    Handler.judge = Judge()
    server = Server(("127.0.0.1", 0), Handler)
    ready(server.server_address[1])
    server.serve_forever()


if __name__ == "__main__":
    serve(lambda port: print(port, flush=True))
