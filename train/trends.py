"""Does a series drift? A sequential test whose false alarms are bounded over a whole run, however long it becomes.

x_1, x_2, ... is one value per step. While nothing drifts they are exchangeable, for prompts and noise are drawn anew in each
step. Then the rank of x_n among m values with itself is uniform on 1 .. m and independent of how the others are ordered, whatever
the values' distribution: mean and spread need not be known, outliers do no harm. On these ranks bets of two kinds are laid, one
for every step k at which a drift may begin; the bets are fair, so the capital M_k(n) of each is a martingale that starts at 1.

slope   z_n = (R_n - (m + 1) / 2) / sqrt((m^2 - 1) / 12), R_n the rank of x_n among x_k .. x_n. The sum S of these is Mann's and
        Kendall's statistic of a trend, term by term. Uniform variables are strictly sub-Gaussian, E exp(a z) <= exp(a^2 / 2), so

            M_k(n) = integral of exp(a S - a^2 (m - 1) / 2) N(a; 0, 1) da = exp(S^2 / (2 m)) / sqrt(m)      (Robbins 1970)

        which is a supermartingale. It finds what keeps moving, also back from a peak.

shift   s_n = (share of x_1 .. x_{k-1} below x_n) - 1/2, what Wilcoxon's two-sample statistic sums. x_n falls with equal chance
        into any of the n gaps between the values before it, each of which has an s, so that

            M_k(n) = mean over a of product of exp(a s_i) / (mean over the i gaps of exp(a s)),    a in SLOPES

        is a martingale. It finds what moved and stays, the sooner the longer it had stood still.

Ville's inequality: P(M_k(n) >= c for any n) <= 1 / c. With a share 1 / (2 k (k + 1)) of the error for each bet, which sum to 1,

    evidence(n) = max over bets of M_k(n) / (2 k (k + 1)),    P(evidence(n) >= 1 / alpha for any n) <= alpha.

Proven for any distribution and any length, and somewhat less in fact, since a maximum is bounded by a sum. Ranks know nothing of
size: whether a drift is large enough to matter is another question. Any drift is one, also of a sampler whose schedule moves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

#: Strengths of the bets on a shift, upwards and downwards.
SLOPES = np.array([2.0, 8.0, 32.0, -2.0, -8.0, -32.0])
#: Values whose median stands for the level at the beginning of a slope, and for that of today.
LEVEL = 5


@dataclass(frozen=True)
class Drift:
    """What a series has been doing since a step. evidence: log of the above. start, now: its level before, and today."""

    up: bool
    evidence: float
    since: int
    start: float
    now: float


class Trend:
    """A series as it grows, and the evidence that it drifts. Work and memory per step grow with the number of steps so far."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values = np.zeros(0)
        self.sums = np.zeros(0)  # S of a slope since each value
        self.capital = np.zeros((0, len(SLOPES)))  # log M of a shift behind each value but the last
        self.gaps = np.zeros((0, len(SLOPES)))  # sum of exp(a s) over the gaps, of the same
        self._order()

    def _order(self) -> None:
        """Numbers that decide between equal values; the same for every series."""
        self._rng = np.random.default_rng(0)
        self._ties = self._rng.random(len(self.values))

    def add(self, step: int, value: float) -> None:
        """The next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        tie, n = self._rng.random(), len(self.values)
        below = (self.values < value) | ((self.values == value) & (self._ties < tie))
        m = np.arange(n + 1, 1, -1)
        rank = 1 + below[::-1].cumsum()[::-1]
        self.sums = np.append(self.sums + (rank - (m + 1) / 2) / np.sqrt((m**2 - 1) / 12), 0.0)
        if n:
            opened = np.exp(np.outer(np.arange(n + 1) / n - 0.5, SLOPES)).sum(0, keepdims=True)
            self.gaps = np.concatenate([self.gaps, opened])
            self.capital = np.concatenate([self.capital, np.zeros((1, len(SLOPES)))])
            s = np.outer(below.cumsum() / np.arange(1, n + 1) - 0.5, SLOPES)
            self.capital += s - np.log(self.gaps / (n + 1))
            self.gaps += np.exp(s)
        self.steps.append(step)
        self.values, self._ties = np.append(self.values, value), np.append(self._ties, tie)

    def drift(self, up: bool) -> Drift | None:
        """The best supported drift in one direction; None where there is none."""
        n, found = len(self.values), []
        now = float(np.median(self.values[-LEVEL:])) if n else math.nan
        m, k = np.arange(n, 0, -1), np.arange(1, n + 1)
        share = np.log(2.0 * k * (k + 1))
        along = (self.sums > 0) if up else (self.sums < 0)
        slope = np.where(along, self.sums**2 / (2 * m) - np.log(m) / 2 - share, -math.inf)
        if along.any():
            best = int(slope.argmax())
            found.append(Drift(up, float(slope[best]), self.steps[best], float(np.median(self.values[best : best + LEVEL])), now))
        if n > 1:
            bets = (SLOPES > 0) if up else (SLOPES < 0)
            shift = np.logaddexp.reduce(self.capital[:, bets], 1) - math.log(len(SLOPES)) - share[1:]
            best = int(shift.argmax())
            now = float(np.median(self.values[max(best + 1, n - LEVEL) :]))
            found.append(Drift(up, float(shift[best]), self.steps[best + 1], float(np.median(self.values[: best + 1])), now))
        return max(found, key=lambda drift: drift.evidence, default=None)

    def state_dict(self) -> dict[str, Any]:
        arrays = {"values": self.values, "sums": self.sums, "capital": self.capital, "gaps": self.gaps}
        return {"steps": list(self.steps), **{name: torch.from_numpy(array.copy()) for name, array in arrays.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = list(state["steps"])
        self.values, self.sums, self.capital, self.gaps = (
            state[name].numpy().copy() for name in ("values", "sums", "capital", "gaps")
        )
        self._order()


class Repeated:
    """The same items measured again and again, as evaluations do: has it fallen below what it was?

    A paired t-test over the items against each earlier measurement; of the n-th measurement each of these n - 1 tests gets the
    share 1 / (n (n - 1)^2) of the error, so that all comparisons of a run sum to less than 1.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.measured: list[Sequence[float]] = []

    def add(self, step: int, values: Sequence[float]) -> None:
        """values: one per item; NaN where there is none."""
        self.steps.append(step)
        self.measured.append([float(value) for value in values])

    def fall(self) -> Drift | None:
        """The best supported fall from an earlier measurement to the last one; None where there is none."""
        from scipy.stats import ttest_rel

        found, n = [], len(self.measured)
        for step, earlier in zip(self.steps[:-1], self.measured[:-1], strict=True):
            pairs = np.array([earlier, self.measured[-1]])
            before, after = pairs[:, np.isfinite(pairs).all(0)]
            if len(before) > 1 and before.mean() > after.mean() and np.ptp(after - before) > 0:
                p = float(ttest_rel(after, before, alternative="less").pvalue)
                evidence = -math.log(max(p, 1e-300) * n * (n - 1) ** 2)
                found.append(Drift(False, evidence, step, float(before.mean()), float(after.mean())))
        return max(found, key=lambda drift: drift.evidence, default=None)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "measured": [list(values) for values in self.measured]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.measured = list(state["steps"]), [list(values) for values in state["measured"]]
