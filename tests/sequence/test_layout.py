"""Every position has exactly one holder, and a length that cannot be shared out is refused in helpful words."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lss.sequence.layout import (
    STATIC_LAYOUTS,
    check_layout,
    check_length,
    position_ranges,
    resolve_sequence_parallel_size,
)

SIZES, LENGTHS = range(1, 9), range(1, 65)
any_size, any_layout = st.integers(1, 200), st.sampled_from(STATIC_LAYOUTS)


def divisor(size: int, layout: str) -> int:
    """What a length must be a multiple of, said independently of the package."""
    return 2 * size if layout == "zigzag" and size > 1 else size


def positions(length: int, rank: int, size: int, layout: str) -> list[int]:
    return [position for run in position_ranges(length, rank, size, layout) for position in run]


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_every_position_is_held_exactly_once_in_equal_shares(size, layout) -> None:
    for length in LENGTHS:
        if length % divisor(size, layout) == 0:
            held = [positions(length, rank, size, layout) for rank in range(size)]
            assert {len(share) for share in held} == {length // size}
            assert sorted(position for share in held for position in share) == list(range(length))


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_a_length_is_refused_exactly_if_it_is_no_multiple(size, layout) -> None:
    for length in (0, *LENGTHS):
        if length > 0 and length % divisor(size, layout) == 0:
            check_length(length, size, layout)
        else:
            with pytest.raises(ValueError, match=f"length {length} .*divisible by {divisor(size, layout)} "):
                position_ranges(length, 0, size, layout)


def test_contiguous_is_one_run_in_rank_order() -> None:
    assert [position_ranges(12, rank, 3, "contiguous") for rank in range(3)] == [
        (range(0, 4),),
        (range(4, 8),),
        (range(8, 12),),
    ]


def test_zigzag_pairs_an_early_chunk_with_the_late_one_that_mirrors_it() -> None:
    assert [position_ranges(12, rank, 3, "zigzag") for rank in range(3)] == [
        (range(0, 2), range(10, 12)),
        (range(2, 4), range(8, 10)),
        (range(4, 6), range(6, 8)),
    ]


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
def test_one_rank_holds_everything_in_order(layout) -> None:
    assert position_ranges(7, 0, 1, layout) == (range(0, 7),)


@given(size=st.integers(1, 40), layout=any_layout, factor=st.integers(1, 20))
def test_sharing_is_complete_for_any_size(size, layout, factor) -> None:
    length = factor * divisor(size, layout)
    held = [position for rank in range(size) for position in positions(length, rank, size, layout)]
    assert sorted(held) == list(range(length))


@given(length=st.integers(0, 10_000), size=any_size, layout=any_layout)
def test_the_lengths_that_an_error_suggests_are_good_and_nearest(length, size, layout) -> None:
    try:
        check_length(length, size, layout)
    except ValueError as error:
        suggested = [int(number) for number in re.findall(r"\d+", re.search(r"such as ([\d or]+)", str(error))[1])]
        for suggestion in suggested:
            check_length(suggestion, size, layout)
            assert 0 < abs(suggestion - length) <= divisor(size, layout)


@pytest.mark.parametrize(
    ("length", "size", "layout", "words"),
    [
        (
            10,
            4,
            "contiguous",
            r"length 10 .* 4 ranks.*divisible by 4 \(the sequence-parallel size\).*\(such as 8 or 12\)",
        ),
        (20, 4, "zigzag", r"length 20 .*divisible by 8 \(twice.*'zigzag'.*such as 16 or 24.*or layout='contiguous'"),
        (3, 4, "zigzag", r"length 3 .*multiple of 8 \(such as 8\) or another sequence_parallel_size\.$"),
        (0, 2, "contiguous", r"length 0 .*multiple of 2 \(such as 2\)"),
    ],
)
def test_a_refused_length_names_length_divisor_and_remedy(length, size, layout, words) -> None:
    with pytest.raises(ValueError, match=words):
        check_length(length, size, layout)


def test_contiguous_is_suggested_only_where_it_would_help() -> None:
    with pytest.raises(ValueError, match=r"^((?!layout='contiguous').)*$"):
        check_length(10, 4, "zigzag")  # not divisible by 4 either


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'striped' is unknown.*'contiguous', 'zigzag'"):
        check_layout("striped")


def test_the_sequence_parallel_size_divides_the_world() -> None:
    assert resolve_sequence_parallel_size(12, "auto") == 12
    for world_size in range(1, 25):
        for size in range(1, 25):
            if world_size % size == 0:
                assert resolve_sequence_parallel_size(world_size, size) == size
            else:
                with pytest.raises(ValueError, match=f"={size} does not divide the world size {world_size} "):
                    resolve_sequence_parallel_size(world_size, size)


def test_a_size_that_does_not_divide_is_answered_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"Use one of 1, 2, 3, 4, 6, 12, or change the number of devices"):
        resolve_sequence_parallel_size(12, 5)


@pytest.mark.parametrize("request_", [0, -2, 2.0, "2", True, None])
def test_a_size_that_is_no_positive_integer_is_refused(request_) -> None:
    with pytest.raises(ValueError, match=r"must be 'auto' or a positive integer"):
        resolve_sequence_parallel_size(4, request_)
