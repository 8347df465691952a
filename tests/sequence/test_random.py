"""Random numbers by position: the same for a place wherever it is, and otherwise as if drawn one by one."""

import itertools

import pytest
import torch
from torch import Tensor

from lightning_lss.sequence.random import _AT_A_TIME, _mix, draw_seed, keep_mask, kept

P = 0.3
SEED = torch.tensor(1234567)


def grid(*ranges: range) -> list[Tensor]:
    """Indices that broadcast to the product of the ranges."""
    count = len(ranges)
    return [
        torch.tensor(r, dtype=torch.int64).view([-1 if i == j else 1 for j in range(count)])
        for i, r in enumerate(ranges)
    ]


def draw(*ranges: range, seed: Tensor = SEED, p: float = P) -> Tensor:
    return kept(seed, *grid(*ranges), p=p)


def test_the_hash_is_splitmix64() -> None:
    """Against Python's own integers, whose arithmetic has no sign to copy and no end to wrap at."""

    def finalize(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    xs = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]
    assert [x % 2**64 for x in _mix(torch.tensor(xs)).tolist()] == [finalize(x % 2**64) for x in xs]


def test_a_seed_is_drawn_from_the_default_generator_of_the_cpu() -> None:
    torch.manual_seed(5)
    expected = torch.randint(2**62, ())
    torch.manual_seed(5)
    with torch.device("meta"):
        seed = draw_seed()
    assert torch.equal(seed, expected)


def test_a_block_of_the_places_has_the_block_of_the_decisions() -> None:
    # 2 x 3 x 70 x 330 places are more than a piece
    whole = (range(2), range(3), range(70), range(330))
    decisions = draw(*whole)
    assert decisions.numel() > 4 * _AT_A_TIME["cpu"]
    parts = (range(1, 2), range(1, 3), range(17, 40), range(5, 330, 2))
    block = decisions[1:2, 1:3, 17:40, 5:330:2]
    assert torch.equal(draw(*parts), block)
    assert torch.equal(torch.stack([draw(*parts[:2], range(q, q + 1), parts[3])[:, :, 0] for q in parts[2]], 2), block)
    places = [x.expand(block.shape).contiguous() for x in grid(*parts)]  # indices that vary along all dimensions
    assert torch.equal(kept(SEED, *places, p=P), block)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_mask_keeps_the_mean(dtype) -> None:
    index = torch.arange(100)
    mask = keep_mask(SEED, index, p=P, dtype=dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask, kept(SEED, index, p=P).to(dtype) * (1 / (1 - P)))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.97])
def test_the_right_share_is_dropped(p) -> None:
    shape = (range(4), range(16), range(128), range(128))  # 2**20 places
    dropped = ~draw(*shape, p=p)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped.double().mean() - p) < 5 * sigma / 2**10
    for dim in range(4):  # and nowhere more than elsewhere
        others = [d for d in range(4) if d != dim]
        share = dropped.double().mean(others)
        assert ((share - p).abs() < 5 * sigma * (share.numel() / dropped.numel()) ** 0.5).all()
    assert not draw(range(10_000), p=1 - 2**-53).any()
    assert draw(range(10_000), p=0.0).all()


def agree_by_chance(one: Tensor, other: Tensor, p: float = P) -> bool:
    """Whether two masks are correlated no more than independent ones: within 5 sigma."""
    one, other = ((x.double() - (1 - p)) / (p * (1 - p)) ** 0.5 for x in (one, other))
    return bool((one * other).mean().abs() < 5 / one.numel() ** 0.5)


def test_neighbours_along_each_index_are_independent() -> None:
    mask = draw(range(8), range(8), range(64), range(256))
    for offsets in itertools.product((0, 1, 2), repeat=4):
        if any(offsets):
            moved = mask[tuple(slice(offset, None) for offset in offsets)]
            start = mask[tuple(slice(0, size - offset) for size, offset in zip(mask.shape, offsets))]
            assert agree_by_chance(start, moved), offsets


def test_rectangles_are_independent() -> None:
    """The parity of four corners: hashes that are sums or exclusive ors of hashes of the indices fail it."""
    mask = draw(range(512), range(512), p=0.5)
    corners = mask[::2, ::2] ^ mask[1::2, ::2] ^ mask[::2, 1::2] ^ mask[1::2, 1::2]
    assert abs(corners.double().mean() - 0.5) < 5 * 0.5 / 256
    for x in (mask[::2, ::2] ^ mask[1::2, ::2], mask[::2, ::2] ^ mask[::2, 1::2]):
        assert abs(x.double().mean() - 0.5) < 5 * 0.5 / 256


def test_indices_do_not_change_places() -> None:
    mask = draw(range(64), range(64), range(64))
    for dims in ((0, 1), (1, 2), (0, 2)):
        first, second = (index.view(-1) for index in torch.triu_indices(64, 64, 1))
        one = mask.movedim(dims, (0, 1))
        assert agree_by_chance(one[first, second], one[second, first]), dims


def test_other_seeds_draw_other_masks() -> None:
    seeds = [0, 1, 2, 2**32, 2**62 - 1, -1]
    masks = [draw(range(64), range(1024), seed=torch.tensor(seed)) for seed in seeds]
    for one, other in itertools.combinations(masks, 2):
        assert agree_by_chance(one, other)
    # nor is a seed's stream the one of its neighbour, a step later
    assert agree_by_chance(masks[0][:, 1:], masks[1][:, :-1])
    assert agree_by_chance(masks[0][1:], masks[1][:-1])


@pytest.mark.parametrize("start", [2**31, 2**32, 2**53])
def test_indices_beyond_32_bits_are_as_good_as_others(start) -> None:
    across = range(start - 256, start + 256)
    for mask in (draw(across, range(256)), draw(range(256), across).T):
        assert abs(mask.double().mean() - (1 - P)) < 5 * 0.46 / mask.numel() ** 0.5
        assert agree_by_chance(mask[1:], mask[:-1])
        below = draw(range(256), range(256))
        assert agree_by_chance(mask[256:], below)  # 2**32 + i is not i again


def test_nothing_is_drawn_of_nothing() -> None:
    assert draw(range(3), range(0), range(2)).shape == (3, 0, 2)


@pytest.mark.slow
def test_a_compiled_graph_draws_the_same() -> None:
    def masked(seed: Tensor, x: Tensor) -> Tensor:
        rows, columns = torch.arange(x.size(0)), torch.arange(x.size(1))
        return x * keep_mask(seed, rows[:, None], columns, p=P, dtype=x.dtype)

    x = torch.ones(200, 300)
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(SEED, x), masked(SEED, x))
