"""The arithmetic on traces: parts of parameters, buckets, the longest length."""

import numpy as np
import pytest

from lightning_lss.planner.memory import longest_below, memory_of, moments_of
from lightning_lss.planner.trace import Trace

# forward, backward, update: parameters, gradients, optimizer, activations, K/V buffers, logits
MOMENTS = np.array([[100, 100, 200, 70, 0, 0], [100, 60, 200, 90, 20, 5], [100, 100, 220, 0, 0, 0]], dtype=float)
PARAMETERS = np.array([90, 10, 20, 35, 2], dtype=float)  # shared, own, root, unit, units
TRACE = Trace(MOMENTS, np.arange(3), np.zeros((3, 4)), np.zeros((0, 6)), np.array([], dtype=str), PARAMETERS)


def test_buckets_are_as_large_as_shared_gradients() -> None:
    assert np.array_equal(moments_of(TRACE, 1, ddp=False), MOMENTS)
    assert (moments_of(TRACE, 1, ddp=True) - MOMENTS)[:, 1].tolist() == [90, 90, 90]


def test_parts_of_parameters() -> None:
    forward, backward, update = moments_of(TRACE, 9, ddp=True)
    kept = 10 / 100 + 90 / 100 / 9  # the segment's own, and a ninth of the shared ones
    whole = 20 + 2 * 35  # the root, the unit in use and the next
    assert forward.tolist() == pytest.approx([100 * kept + whole, 100 * kept, 200 * kept, 70, 0, 0])
    assert backward.tolist() == pytest.approx([100 * kept + whole, 60 * kept + whole, 200 * kept, 90, 20, 5])
    assert update.tolist() == pytest.approx([100 * kept, 100 * kept, 220 * kept, 0, 0, 0])


def test_the_peak_and_each_part_at_its_own() -> None:
    memory = memory_of(MOMENTS)
    assert memory.total == 475
    assert (memory.parameters, memory.gradients, memory.optimizer, memory.activations) == (100, 60, 200, 90)
    assert memory.most == dict(parameters=100, gradients=100, optimizer=220, activations=90, kv_buffers=20, logits=5)
    assert memory.beside_state == 115


def test_the_longest_length_is_where_the_first_moment_meets_the_cap() -> None:
    near, far = np.array([[50.0, 50], [110, 40]]), np.array([[150.0, 50], [210, 40]])  # 10 and 20 tokens, two parts
    assert longest_below(400, near[:1], far[:1], (10, 20)) == 40
    assert longest_below(400, near, far, (10, 20)) == 35
    assert longest_below(100, near, far, (10, 20)) == 5


def test_where_state_alone_exceeds_the_cap_no_length_fits() -> None:
    state = np.array([[300.0]])
    assert longest_below(200, state, state, (10, 20)) == 0
    assert longest_below(400, state, state, (10, 20)) == np.inf
