"""The comparison that all others rest on: whatever is wrong with one tensor among many, it is found."""

import math

import pytest
import torch
from torch import Tensor

from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks, worst_difference


def tensors() -> dict[str, Tensor]:
    """First, middle and last matter: a maximum that meets NaN depends on its place."""
    generator = torch.Generator().manual_seed(0)
    named = {name: torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in ("first", "middle", "last")}
    return {**named, "zero": torch.zeros(2), "count": torch.arange(3), "scalar": torch.tensor(2.0)}


INEXACT = ["first", "middle", "last", "zero", "scalar"]


@pytest.mark.parametrize("name", INEXACT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["actual", "expected", "both"])
def test_what_is_not_finite_is_never_equal(name, value, side) -> None:
    actual, expected = tensors(), tensors()
    for own, whose in ((actual, "actual"), (expected, "expected")):
        if side in (whose, "both"):
            own[name].view(-1)[-1] = value
    assert worst_difference(actual, expected)[:2] == (math.inf, name)
    assert worst_difference(list(actual.values()), list(expected.values()))[0] == math.inf
    with pytest.raises(AssertionError, match=f"{name}: 1 of .* values are not finite"):
        assert_equal(actual, expected, 1e30)
    with pytest.raises(AssertionError, match="not finite"):
        assert_equal(actual, expected, math.inf)


@pytest.mark.parametrize("name", INEXACT)
def test_one_wrong_tensor_among_many_is_named(name) -> None:
    actual, expected = tensors(), tensors()
    actual[name] += 1e-3
    found = worst_difference(actual, expected)
    assert found.name == name
    assert found.error > 1e-4
    with pytest.raises(AssertionError, match=rf"1 of 6 tensors.*\n  {name}: relative error"):
        assert_equal(actual, expected, 1e-4)


def test_what_is_zero_in_the_reference_must_be_zero() -> None:
    actual = {"a": torch.full((3,), 5.0)}
    assert worst_difference(actual, {"a": torch.zeros(3)}).error > 1e6
    assert worst_difference({"a": torch.zeros(3)}, actual).error == 1
    tiny = {"a": torch.full((3,), 1e-14, dtype=torch.float64)}
    assert_equal(tiny, {"a": torch.zeros(3)}, 1e-7)
    with pytest.raises(AssertionError, match="a: relative error"):
        assert_equal(tiny, {"a": torch.zeros(3)}, 1e-10)


def test_errors_are_relative_to_the_tensor_and_not_to_the_largest() -> None:
    expected = {"large": torch.full((9,), 1e6), "small": torch.full((9,), 1e-4)}
    actual = {"large": expected["large"].clone(), "small": 2 * expected["small"]}
    error, name, _ = worst_difference(actual, expected)
    assert (error, name) == (pytest.approx(1), "small")


def test_names_must_be_the_same_on_both_sides() -> None:
    more = {**tensors(), "another": torch.zeros(1)}
    assert worst_difference(more, tensors()) == (math.inf, "another", "not in the reference")
    assert worst_difference(tensors(), more) == (math.inf, "another", "missing")
    with pytest.raises(AssertionError, match="another: not in the reference"):
        assert_equal(more, tensors(), 1)
    with pytest.raises(AssertionError, match="another: missing"):
        assert_equal(tensors(), more, 1)
    assert worst_difference([torch.ones(2)], [torch.ones(2)] * 2)[:2] == (math.inf, "1")


def test_shapes_and_integers() -> None:
    column = {"a": torch.ones(3, 1)}
    assert worst_difference(column, {"a": torch.ones(3)}).error == math.inf  # would broadcast
    assert worst_difference({"a": torch.ones(3)}, {"a": torch.ones(3).double()}).error == 0
    with pytest.raises(AssertionError, match=r"count: 1 of 3 values differ"):
        assert_equal({"count": torch.tensor([0, 1, 3])}, {"count": torch.arange(3)}, 1e9)
    with pytest.raises(AssertionError, match=r"a: torch.int64 instead of torch.float32"):
        assert_equal({"a": torch.arange(3)}, {"a": torch.arange(3).float()}, 1e9)
    assert_equal({"a": torch.tensor([True])}, {"a": torch.tensor([True])}, 0)


def test_zero_tolerance_is_equality() -> None:
    one = torch.ones(4, dtype=torch.float64)
    next_to_one = one.clone()
    next_to_one[0] = math.nextafter(1, 2)
    assert_equal([one], [one.clone()], 0)
    tiny = torch.full((4,), 1e-300, dtype=torch.float64)  # whose squares are zero
    for actual, expected in ((next_to_one, one), (tiny, 2 * tiny), (tiny, 0 * tiny)):
        with pytest.raises(AssertionError):
            assert_equal([actual], [expected], 0)


def test_norms_that_overflow_are_no_agreement() -> None:
    huge = torch.full((4,), 1e300, dtype=torch.float64)
    assert worst_difference([huge], [-huge]).error == math.inf


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tensors"):
        worst_difference({}, {})
    with pytest.raises(ValueError, match="no ranks"):
        assert_equal_on_ranks([], tensors(), 1)
    for wrong in ([None], [1.0]):
        with pytest.raises(TypeError, match="0 is not a tensor"):
            worst_difference(wrong, [torch.ones(1)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="in order"):
        worst_difference(tensors(), list(tensors().values()))
    with pytest.raises(TypeError, match="into a list"):
        worst_difference(torch.ones(3), torch.ones(3))  # type: ignore[arg-type]


def test_the_rank_is_named() -> None:
    wrong = {**tensors(), "last": torch.zeros(3, 4)}
    with pytest.raises(AssertionError, match="rank 1: 1 of 6 tensors"):
        assert_equal_on_ranks([tensors(), wrong], tensors(), 1e-3)
