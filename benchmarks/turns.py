"""Contestants that take turns.

Every contestant is run in the same worker processes, A B A B, so that whatever else the machine does meets them all
alike. Ratios are taken within a round and their median is quoted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from benchmarks.network import Network
from lightning_lss.testing.world import World

Result = TypeVar("Result")


def start_ranks(size: int, network: Network | None = None) -> World:
    """Up to ``size`` ranks for benchmarks, behind the limited links of ``network`` where it is given."""
    enter = None if network is None else network.enter
    return World(size, 3600.0, enter, preload=["torch", "lightning_lss", "benchmarks.training"])


def in_turn(
    contestants: Mapping[str, Callable[[], Result]], rounds: int, warm_up: int = 1, most_seconds: float = math.inf
) -> dict[str, list[Result]]:
    """What every contestant gave in every round; in each round every contestant runs once, in order.

    Args:
        contestants: by name, a function that runs the contestant and returns its seconds, or more.
        rounds: how many rounds are kept.
        warm_up: how many rounds before them are thrown away.
        most_seconds: no round but the first begins when those that are kept have taken as long.
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
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))
