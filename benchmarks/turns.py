"""Run contestants in turns.

Every contestant runs in the same worker processes, A B A B, so that other load on the machine affects them alike.
Figures are medians of the ratios within a round.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from benchmarks.network import Network
from lightning_lss.testing.world import World

Result = TypeVar("Result")


def start_ranks(size: int, network: Network | None = None) -> World:
    """Start up to ``size`` ranks for benchmarks, behind the limited links of ``network`` where it is given."""
    enter = None if network is None else network.enter
    return World(size, 3600.0, enter, preload=["torch", "lightning_lss", "benchmarks.training"])


def in_turn(
    contestants: Mapping[str, Callable[[], Result]], rounds: int, warm_up: int = 1, most_seconds: float = math.inf
) -> dict[str, list[Result]]:
    """Return the results of every contestant in every round; in each round every contestant runs once, in order.

    Args:
        contestants: by name, a function that runs the contestant and returns its seconds, or more.
        rounds: number of rounds to keep.
        warm_up: number of rounds to discard before them.
        most_seconds: no further round begins after the kept ones have taken so long.
    """
    found: dict[str, list[Result]] = {name: [] for name in contestants}
    start = math.inf
    for index in range(warm_up + rounds):
        if index > warm_up and time.perf_counter() - start > most_seconds:
            break
        if index == warm_up:
            start = time.perf_counter()
        for name, run in contestants.items():
            result = run()
            if index >= warm_up:
                found[name].append(result)
    return found


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))
