"""Bits per byte against the formula, in one process and summed over ranks."""

import math

import pytest
import torch

from lightning_lss.nn.metrics import BitsPerByte


def test_bits_are_nats_over_bytes_over_ln_2() -> None:
    metric = BitsPerByte()
    metric.update(torch.tensor(3.0), torch.tensor(2))
    metric.update(torch.tensor(5.0), torch.tensor(10))  # weighted by bytes, not a mean of means
    assert metric.compute().item() == pytest.approx(8 / 12 / math.log(2), rel=1e-15, abs=0)
    assert metric.compute().dtype == torch.float64


def test_a_uniform_guess_over_bytes_is_eight_bits() -> None:
    metric = BitsPerByte()
    metric.update(1000 * math.log(256), 1000)
    # Python's floats are float64, and must not pass through float32
    assert metric.compute().item() == pytest.approx(8.0, rel=1e-14, abs=0)


def test_long_runs_lose_no_byte() -> None:
    metric = BitsPerByte()
    metric.update(float(2**24), 2**24)
    for _ in range(3):
        metric.update(1.0, 1.0)  # a float32 sum of 2^24 would stay as it is
    assert metric.num_bytes.item() == 2**24 + 3
    assert metric.nats.item() == 2**24 + 3


def test_reset_forgets() -> None:
    metric = BitsPerByte()
    metric.update(9.0, 1)
    metric.reset()
    metric.update(torch.tensor(2.0, dtype=torch.float64).log(), 1)
    assert metric.compute().item() == pytest.approx(1.0, rel=1e-15, abs=0)


def test_no_bytes_are_no_number() -> None:
    metric = BitsPerByte()
    metric.update(0.0, 0)
    assert metric.compute().isnan()


def test_no_graph_is_kept() -> None:
    metric = BitsPerByte()
    metric.update(torch.tensor(1.0, requires_grad=True) * 2, 1)
    assert not metric.nats.requires_grad


def compute_on_rank(rank: int) -> tuple[float, float]:
    metric = BitsPerByte()
    for step in range(rank + 1):  # ranks may have different numbers of batches
        metric.update(torch.tensor(1.0 + rank), 10**rank + step)
    synced = metric.compute().item()
    return synced, metric.nats.item()


def test_ranks_with_different_numbers_of_bytes_are_summed(world) -> None:
    nats, num_bytes = 1.0 + 2 * 2.0, 1 + 10 + 11
    for synced, own in world.run(2, compute_on_rank):
        assert synced == pytest.approx(nats / num_bytes / math.log(2), rel=1e-15, abs=0)
        assert own in (1.0, 4.0)  # afterwards each rank goes on with its own sum
