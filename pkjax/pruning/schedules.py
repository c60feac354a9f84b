"""How much of the network is left after each step of pruning.

A schedule is a function (step, steps, density) → density after that step, for step = 1 … steps; it ends at
``density`` exactly and never rises. Any such function may be passed to ``prune``.
"""

from collections.abc import Callable

__all__ = ["Schedule", "exponential", "linear"]

Schedule = Callable[[int, int, float], float]
"""Maps (step, steps, density) to the density after that step; step runs from 1 to steps."""


def exponential(step: int, steps: int, density: float) -> float:
    """Keep the same fraction of what is left at every step.

        density_k = density^(k/n)

    Source: Tanaka et al. 2020, algorithm 1, where density = 10^−ρ makes it 10^(−ρk/n).

    Examples:
        >>> [round(exponential(k, 4, 0.0001), 6) for k in (1, 2, 3, 4)]
        [0.1, 0.01, 0.001, 0.0001]
    """
    return density ** (step / steps)


def linear(step: int, steps: int, density: float) -> float:
    """Remove the same number of weights at every step.

        density_k = 1 − (1 − density) k/n

    Examples:
        >>> [round(linear(k, 4, 0.2), 6) for k in (1, 2, 3, 4)]
        [0.8, 0.6, 0.4, 0.2]
    """
    # Written from the end, so that the last step is density itself and not 1 − (1 − density).
    return density + (1.0 - density) * (1.0 - step / steps)
