"""How a trajectory is drawn: the flow and its coordinates, the Gaussian steps, and which steps are stochastic."""

from flowrl.samplers.schedules import SCHEDULES, TIMES, AllButLast, Backward, Fraction, Late, Spread, Window, t_max_of, time_grid
from flowrl.samplers.transitions import (
    CPS,
    DDIM,
    GLASS,
    ODE,
    TRANSITIONS,
    DanceSDE,
    FlowSDE,
    Gaussian,
    MatchedCPS,
    Memoryless,
    Transition,
)

__all__ = [
    "CPS",
    "DDIM",
    "GLASS",
    "ODE",
    "SCHEDULES",
    "TIMES",
    "TRANSITIONS",
    "AllButLast",
    "Backward",
    "DanceSDE",
    "FlowSDE",
    "Fraction",
    "Gaussian",
    "Late",
    "MatchedCPS",
    "Memoryless",
    "Spread",
    "Transition",
    "Window",
    "t_max_of",
    "time_grid",
]
