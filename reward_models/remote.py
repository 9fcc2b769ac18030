"""A reward on another machine or in another environment: what `flowrl serve` serves, scored over HTTP.

    rewards: {remote: {weight: 1, url: "http://gpu2:8000", reward: pickscore, token_env: REWARD_TOKEN}}

Protocol and security: docs/serving.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import RewardError, Traits, nearest
from flowrl.reward_models.http import How, HttpError, bearer, check_url, get_json, one_line, pause, post_json
from flowrl.reward_models.wire import Limits, encode, encoded_bytes, traits_from_json

FLOAT32 = torch.finfo(torch.float32).max
_log = logging.getLogger(__name__)


class Remote:
    """A served reward. Its arity, needs and range are the served one's; they are asked for when they are first wanted.

    Samples of a pointwise reward go in requests of `batch_size`, groups whole, and everything at once where the reward looks at
    the whole set. A request that fails is sent again, and so are the samples of a request that alone failed. What fails for good
    raises RewardError; no sample gets a score that the server did not send.
    """

    def __init__(
        self,
        url: str,  #: Of the server, without a path.
        reward: str | None = None,  #: Its name there; may be left out where one is served.
        token_env: str | None = None,  #: Environment variable that holds the server's token.
        timeout: float = 60.0,  #: Seconds of one attempt.
        retries: int = 4,  #: Further attempts.
        batch_size: int = 32,  #: Samples per request, at most; the server's limits hold too.
        concurrency: int = 4,  #: Requests under way.
        #: png rounds pixels to 8 bit, as any saved picture does; npy sends fp32, exact and about ten times as large.
        format: Literal["png", "npy"] = "png",
        #: abstain turns samples on which the served reward fails into NaN, with a warning and in the count `failed`; a server
        #: that does not answer, and a reward that fails on every sample, still raise.
        on_error: Literal["raise", "abstain"] = "raise",
        backoff: float = 0.5,  #: Seconds before the second attempt, doubled each time.
    ):
        if format not in ("png", "npy"):
            raise ValueError(f"format={format!r}: choose png or npy")
        if on_error not in ("raise", "abstain"):
            raise ValueError(f"on_error={on_error!r}: choose raise or abstain")
        for name, value, least in (("retries", retries, 0), ("batch_size", batch_size, 1), ("concurrency", concurrency, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: a whole number, {least} or more")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout:g}: seconds, more than 0")
        check_url(url)
        self.url, self.reward, self.name = url.rstrip("/"), reward, reward or "remote"
        self.batch_size, self.concurrency, self.format, self.on_error = batch_size, concurrency, format, on_error
        self.failed = 0  #: Samples so far that abstain because the served reward failed on them.
        self._http: How = {"headers": bearer(token_env), "timeout": timeout, "retries": retries, "backoff": backoff}
        self._facts: tuple[str, Traits, Limits] | None = None

    @property
    def traits(self) -> Traits:
        """The served reward's. Raises RewardError when the server cannot be asked."""
        return self.facts[1]

    @property
    def facts(self) -> tuple[str, Traits, Limits]:
        """The reward's name at the server, its traits, and the server's limits; asked for once."""
        if self._facts is None:
            told = get_json(f"{self.url}/rewards", **self._http)
            try:
                rewards = {str(name): traits_from_json(traits) for name, traits in told["rewards"].items()}
                limits = Limits(**{name: int(told["limits"][name]) for name in ("batch", "pixels", "megabytes")})
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RewardError(f"{self.url}/rewards answers something else than flowrl serve does ({error!r})") from None
            if self.reward is None and len(rewards) != 1:
                raise RewardError(f"{self.url} serves {', '.join(rewards)}: say which with reward=NAME")
            name = self.reward or next(iter(rewards))
            if name not in rewards:
                raise RewardError(f"{self.url} serves no reward {name!r}{nearest(name, rewards)}")
            self._facts = name, rewards[name], limits
        return self._facts

    def __call__(self, samples: Samples) -> Tensor:
        if not len(samples):
            return torch.zeros(0)
        scores = torch.full((len(samples),), torch.nan)
        errors: dict[int, str] = {}
        parts = list(self._parts(samples))
        pool = ThreadPoolExecutor(min(self.concurrency, len(parts)), thread_name_prefix="remote")
        try:
            for rows, (values, failed) in zip(parts, pool.map(lambda rows: self._score(samples, rows), parts), strict=True):
                scores[rows] = values
                errors |= {rows[i]: message for i, message in failed.items()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # one has failed: the others are not waited for
        if errors:
            self._report(samples, errors)
        return scores

    def _parts(self, samples: Samples) -> Iterator[list[int]]:
        """The indices that travel together."""
        _, traits, limits = self.facts
        most = min(limits.batch, int(limits.bytes / encoded_bytes(samples, traits, self.format)))
        size = max(1, min(self.batch_size, most))
        if traits.arity == "batch":
            units = [list(range(len(samples)))]
        elif traits.arity == "group":
            units = [rows.tolist() for rows in samples.by_group()]
        else:
            units = [[i] for i in range(len(samples))]
        longest = max(map(len, units))
        if longest > most:
            whole = {
                "batch": "scores all samples at once",
                "group": "compares whole groups",
                "point": "scores samples of this size",
            }
            raise RewardError(
                f"reward {self.name!r} {whole[traits.arity]}: {longest} in one request, and {self.url} takes {most} of them; "
                f"raise --max-batch (now {limits.batch}) or --max-megabytes (now {limits.megabytes}) there"
            )
        part: list[int] = []
        for unit in units:
            if part and len(part) + len(unit) > size:
                yield part
                part = []
            part = part + unit
        yield part

    def _score(self, samples: Samples, rows: list[int]) -> tuple[Tensor, dict[int, str]]:
        """Scores of some samples, and the places among them that failed in every attempt, with why."""
        scores = torch.full((len(rows),), torch.nan)
        left, errors = list(range(len(rows))), {}
        for attempt in range(self._http["retries"] + 1):
            if attempt:
                pause(attempt - 1, self._http["backoff"])
            try:
                values, failed = self._request(samples.select([rows[i] for i in left]))
            except HttpError as error:
                if error.status != 500:
                    raise
                return scores, dict.fromkeys(left, str(error))  # the request was repeated already
            scores[left] = values
            errors = {left[i]: message for i, message in failed.items()}
            left = list(errors)
            if not left:
                break
        return scores, errors

    def _request(self, samples: Samples) -> tuple[Tensor, dict[int, str]]:
        """One request, its answer checked. Raises RewardError for any answer that is not one number or null per sample."""
        name, traits, _ = self.facts
        body = {"reward": name, **encode(samples, traits, self.format)}
        try:
            answer = post_json(f"{self.url}/score", body, **self._http)
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self.name!r}: a prompt's columns cannot travel as JSON ({error})") from None

        def wrong(what: str) -> RewardError:
            return RewardError(f"{self.url}/score {what}; it does not speak the protocol of flowrl serve")

        if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
            raise wrong(f"answers no scores but {one_line(repr(answer), 80)}")
        scores, errors = answer["scores"], answer.get("errors") or {}
        if len(scores) != len(samples):
            raise wrong(f"sent {len(scores)} scores for {len(samples)} samples")
        for i, value in enumerate(scores):
            number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32
            if not number and value is not None:
                raise wrong(f"sent {one_line(repr(value), 40)} as score {i} instead of a finite number or null")
        places = {str(i): i for i in range(len(samples))}
        if not isinstance(errors, dict) or any(i not in places or scores[places[i]] is not None for i in errors):
            raise wrong("sent errors that do not belong to samples without a score")
        failed = {places[i]: one_line(str(message)) for i, message in errors.items()}
        return torch.tensor([math.nan if value is None else float(value) for value in scores]), failed

    def _report(self, samples: Samples, errors: dict[int, str]) -> None:
        """Raise, or warn and count."""
        first = min(errors)
        what = (
            f"reward {self.name!r} at {self.url} failed on {len(errors)} of {len(samples)} samples; "
            f"sample {first} ({one_line(samples.texts[first], 60)!r}): {errors[first]}"
        )
        if len(errors) == len(samples):
            raise RewardError(what)
        if self.on_error == "raise":
            others = f" (failed: {', '.join(map(str, sorted(errors)[:20]))}{', ...' if len(errors) > 20 else ''})"
            raise RewardError(f"{what}{others}; on_error=abstain lets them abstain")
        self.failed += len(errors)
        _log.warning("flowrl: %s; they abstain", what)
