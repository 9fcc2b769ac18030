"""How the deterministic steps of a rollout are taken: by Euler (`scheduler.Grid.ode_step`), or with what earlier steps saw.

Euler's step in the flow is exact if x0_hat stays what it is. It does not stay, and a step of second order corrects for how
it changed since the step before, at no further call of the network: fewer steps then do.
"""

import math

from torch import Tensor

from flowrl.samplers.flow import x0_from

#: By the name that a rollout's `solver` takes.
SOLVERS = ("euler", "dpmpp2m")


class DPMpp2M:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, in flow coordinates; lambda = log((1 - t) / t), h_l = lambda' - lambda.

        x' = (t' / t) x + (1 - t') (1 - exp(-h_l)) D,        D = x0_hat + c / 2 (x0_hat - x0_hat_before)
           = x - h v + (h / t) (D - x0_hat)                  since (1 - t') (1 - exp(-h_l)) = h / t

    so it is Euler's step and a correction. There is none on the first step of a piece of the ODE, nor on the last of the grid.
    The paper has c = h_l / h_l_before, which is 0 after t = 1 (h_l_before is infinite). We take c = min(1, h_l / h_l_before):
    grids such as SD3's end with steps whose h_l is many times that of the step before, and extrapolating x0_hat so far is
    worse than Euler (tests/test_solvers.py). Global error O(h^2) either way; Euler's is O(h).
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the past: a stochastic step put the state on another trajectory of the ODE."""
        self.before: tuple[float, Tensor] | None = None  # lambda and x0_hat of the step before

    def step(self, x: Tensor, v: Tensor, t: float, t_next: float, last: bool) -> Tensor:
        """x' at t_next, (B, ...) fp32. x, v: (B, ...) at t. last: whether the grid ends at t_next."""
        x0_hat, log_snr = x0_from(x, v, t), _log_snr(t)
        x_next = x.float() - (t - t_next) * v.float()
        if self.before is not None and not last:
            c = min(1.0, (_log_snr(t_next) - log_snr) / (log_snr - self.before[0]))
            x_next = x_next + (t - t_next) / t * c / 2 * (x0_hat - self.before[1])
        self.before = log_snr, x0_hat
        return x_next


def _log_snr(t: float) -> float:
    """lambda, -inf at t = 1."""
    return math.log((1 - t) / t) if t < 1 else -math.inf
