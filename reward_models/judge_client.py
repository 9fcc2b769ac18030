"""A vision-language model behind the OpenAI chat-completions protocol (vLLM, SGLang, llama.cpp, a hosted one), asked many things.

    judge = Judge(url="http://127.0.0.1:8000/v1")
    answers = judge.ask([[picture(image), "Is it red? Answer yes or no."]])      # image: (3, H, W) in [0, 1]
    yes_probability(answers[0].first)       # flowrl.reward_models.judge_read

Pictures travel as PNG, without loss and in their own shape. Retries and errors are `flowrl.reward_models.http`'s.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.reward_models.base import RewardError, to_pil
from flowrl.reward_models.http import How, bearer, get_json, one_line, post_json

#: As many as servers are willing to list (vLLM's and OpenAI's limit).
TOP_LOGPROBS = 20

Order = Literal["both", "random"]


@dataclass(frozen=True)
class Picture:
    """One picture, or the frames of one clip in order, as data URLs."""

    frames: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """text: what the judge said. first: its candidates for the first token with their log-probabilities, where asked for."""

    text: str
    first: tuple[tuple[str, float], ...] = ()

    def excerpt(self) -> str:
        """What it was, for an error message."""
        if not self.first:
            return repr(one_line(self.text, 200))
        return ", ".join(f"{token!r} {math.exp(p):.2f}" for token, p in sorted(self.first, key=lambda c: -c[1])[:5])


@dataclass(kw_only=True, eq=False)
class Judge:
    """The options of every judge: where it is and how it is asked."""

    #: Address of the server's API, up to and with its version: http://127.0.0.1:8000/v1 for most.
    url: str
    #: Name of the model there; unset: the only one that the server has.
    model: str | None = None
    #: Environment variable that holds the server's token, where it wants one.
    token_env: str | None = None
    #: Seconds for one answer.
    timeout: float = 120.0
    #: Further attempts after a failure that may pass.
    retries: int = 4
    #: Seconds before the second attempt; doubles.
    backoff: float = 0.5
    #: Questions under way at the same time.
    concurrency: int = 8
    #: Frames of a clip that the judge sees, evenly spread, first and last among them.
    frames: int = 8
    #: Further fields of the request, or null to take one out. Thinking models answer with a token only when told not to think:
    #: {chat_template_kwargs: {enable_thinking: false}}.
    extra: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "judge"

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"url={self.url!r}: the server's address, like http://127.0.0.1:8000/v1")
        for option, least in (("concurrency", 1), ("frames", 1), ("retries", 0)):
            if getattr(self, option) < least:
                raise ValueError(f"{option}={getattr(self, option)}: at least {least}")
        if self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout:g}: seconds, more than 0")
        bearer(self.token_env)  # a missing token is found before anything is loaded
        self.url = self.url.rstrip("/")
        self.asked = self.unread = 0  #: Answers so far, and those of them that could not be read.

    def pictures(self, images: Tensor) -> list[Picture]:
        """(N, 3, H, W) or clips (N, F, 3, H, W), in [0, 1] -> N pictures."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda image: picture(image, self.frames), images.detach().cpu()))

    def ask(self, questions: Sequence[Sequence[str | Picture]], tokens: bool = True, max_tokens: int = 1) -> list[Answer]:
        """Answers in the order of the questions, each made of texts and pictures. tokens: with log-probabilities of the first.

        Raises RewardError for the first question that fails after its retries, or whose answer is against the protocol.
        """
        if not questions:
            return []
        if self.model is None:
            self.model = self._only_model()

        def one(question: Sequence[str | Picture]) -> Answer:
            body: dict[str, Any] = {
                "model": self.model,
                "messages": [{"role": "user", "content": _content(question)}],
                "max_tokens": max_tokens,
                "temperature": 0,
            }
            if tokens:
                body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
            body = {name: value for name, value in (body | self.extra).items() if value is not None}
            reply = post_json(f"{self.url}/chat/completions", body, **self._how())
            return _answer(reply, self.url, tokens)

        with ThreadPoolExecutor(min(self.concurrency, len(questions))) as pool:
            return list(pool.map(one, questions))  # the first failure cancels those not yet under way

    def each(
        self, samples: Samples, template: str, value: Callable[[Answer], float], max_tokens: int | None = None, **more: str
    ) -> Tensor:
        """(N,) value of the answer to one question per sample; NaN, unasked, where its prompt lacks a column of the template.

        max_tokens: of an answer in text; None asks for the first token's probabilities.
        """
        answers = self.answers(samples, template, max_tokens, **more)
        scores, said = torch.full((len(samples),), torch.nan), [*answers.values()]
        scores[list(answers)] = torch.tensor(self.read([value(answer) for answer in said], said))
        return scores

    def answers(self, samples: Samples, template: str, max_tokens: int | None = None, **more: str) -> dict[int, Answer]:
        """The answer to one question per sample, by its place; those are missing whose prompt lacks a column of the template."""
        assert samples.images is not None
        texts = {i: text for i, prompt in enumerate(samples.prompts) if (text := fill(template, prompt, **more)) is not None}
        pictures = self.pictures(samples.images[list(texts)])
        said = self.ask(list(zip(pictures, texts.values(), strict=True)), max_tokens is None, max_tokens or 1)
        return dict(zip(texts, said, strict=True))

    def read(self, values: list[float], answers: Sequence[Answer]) -> list[float]:
        """Count what could not be read (NaN). Raises RewardError when that is all of it: then the question is at fault."""
        unread = sum(map(math.isnan, values))
        self.asked, self.unread = self.asked + len(values), self.unread + unread
        if values and unread == len(values):
            raise RewardError(
                f"reward {self.name!r}: {self.model} at {self.url} gave {len(values)} answers and none could be read; the first: "
                f"{answers[0].excerpt()}; ask for the expected form (`question`), and turn a model's thinking off (`extra`)"
            )
        return values

    def _how(self) -> How:
        headers = bearer(self.token_env)
        return {"headers": headers, "timeout": self.timeout, "retries": self.retries, "backoff": self.backoff}

    def _only_model(self) -> str:
        reply = get_json(f"{self.url}/models", **self._how())
        try:
            names = [str(model["id"]) for model in reply["data"]]
        except (TypeError, KeyError):
            raise RewardError(f"{self.url}/models is not a list of models; name one with `model`") from None
        if len(names) != 1:
            raise RewardError(f"{self.url} has {len(names)} models ({one_line(', '.join(names))}); choose one with `model`")
        return names[0]


def picture(image: Tensor, frames: int = 8) -> Picture:
    """(3, H, W), or a clip (F, 3, H, W) of which at most `frames` are taken; in [0, 1]."""
    if image.ndim == 3:
        image = image[None]
    count = min(frames, len(image))
    places = [round(i * (len(image) - 1) / max(count - 1, 1)) for i in range(count)]
    return Picture(tuple(_data_url(frame) for frame in to_pil(image[places])))


def fill(template: str, prompt: Prompt, **more: str) -> str | None:
    """The question for one prompt: {prompt} is its text, other {words} are its columns; None where it lacks one.

    What is put in is not looked through again, and braces around anything but one word stay: prompts and JSON are safe.
    """
    words = {**prompt.columns, **more, "prompt": prompt.text}
    if any(words.get(word) is None for word in _BRACED.findall(template)):
        return None
    return _BRACED.sub(lambda match: str(words[match[1]]), template)


def columns_of(template: str, *more: str) -> tuple[str, ...]:
    """The prompt columns that a question asks for; `more`: words that are something else."""
    return tuple(dict.fromkeys(word for word in _BRACED.findall(template) if word not in ("prompt", *more)))


def check_choice(option: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option}={value!r}: choose {' or '.join(known)}")


def check_weights(weights: dict[str, float], known: tuple[str, ...], option: str = "weights") -> None:
    """Weights by name, 1 where one is not named."""
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"{option}: {name!r} is not among {', '.join(known)}")
        if not weight >= 0:
            raise ValueError(f"{option}: {name}={weight} must not be negative")
    if not sum(weights.get(name, 1.0) for name in known) > 0:
        raise ValueError(f"{option}: at least one must be above 0")


_BRACED = re.compile(r"\{(\w+)\}")


def _data_url(frame: Any) -> str:
    buffer = io.BytesIO()
    frame.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _content(question: Sequence[str | Picture]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for part in question:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        if len(part.frames) > 1:
            parts.append({"type": "text", "text": "Frames of one clip, in order:"})
        parts += [{"type": "image_url", "image_url": {"url": url}} for url in part.frames]
    return parts


def _answer(reply: Any, url: str, tokens: bool) -> Answer:
    """What a chat completion says. Raises RewardError where it is none, or lacks the log-probabilities that were asked for."""
    try:
        (choice,) = reply["choices"]
        text = choice["message"].get("content") or ""
        if not isinstance(text, str):
            raise TypeError
    except (TypeError, KeyError, ValueError, AttributeError):
        told = one_line(str(reply), 200)
        raise RewardError(f"{url} answered with something else than a chat completion: {told}; is `url` right?") from None
    if not tokens:
        return Answer(text)
    if choice["message"].get("refusal"):
        return Answer(text)
    try:
        content = choice["logprobs"]["content"]
        first = content[0]["top_logprobs"] if content else []  # an answer may end before its first token
        candidates = tuple((str(c["token"]), float(c["logprob"])) for c in first)
    except (TypeError, KeyError, ValueError, IndexError):
        candidates = ()
        content = None
    if content is None or (content and not candidates) or any(math.isnan(p) for _, p in candidates):
        raise RewardError(
            f"{url} returned no log-probabilities (logprobs, top_logprobs={TOP_LOGPROBS} in the request); use a server that has "
            "them, as vLLM and SGLang do, or a reward that reads the answer as text"
        )
    return Answer(text, tuple(c for c in candidates if c[1] > -math.inf))
