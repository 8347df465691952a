"""Attention over ranks against attention in one process: output and every gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_lss.attention.functional import lss_attention
from lightning_lss.attention.kernels import KERNELS
from lightning_lss.attention.module import LSSAttention
from lightning_lss.attention.operator import spec_fields
from lightning_lss.attention.spec import AttentionSpec
from lightning_lss.sequence import collectives
from lightning_lss.sequence.layout import STATIC_LAYOUTS
from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.testing.collectives import Collective, CollectiveCounter, Tally, Watch, kinds
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from lightning_lss.testing.fake_world import fake_world
from lightning_lss.testing.world import World

L, WIDTH = 32, 8


def make_inputs(heads: int = 4, kv_heads: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, L, WIDTH), (2, kv_heads, L, WIDTH), (2, kv_heads, L, WIDTH), (2, heads, L, WIDTH)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]  # q, k, v, grad of out


def expected(inputs: list[Tensor], causal: bool) -> list[Tensor]:
    """Output and gradients by the textbook formula, in float64 without any kernel."""
    q, k, v, grad = (x.double().clone() for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    repeat = q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(repeat, 1).mT / WIDTH**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(repeat, 1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def attend_on_rank(rank: int, inputs: list[Tensor], layout: str, wrap: str, options: dict[str, Any]) -> list[Tensor]:
    shard = SequenceShard(rank, dist.get_world_size(), layout, dist.group.WORLD)
    q, k, v, grad = (shard.split(x, dim=2) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def attend(*tensors: Tensor) -> Tensor:
        return lss_attention(*tensors, shard, **options)

    if wrap == "compile":
        attend = torch.compile(
            lambda *t: lss_attention(*(x * 1.0 for x in t), shard, **options) * 1.0, backend="aot_eager", fullgraph=True
        )
    out = checkpoint(attend, *leaves, use_reentrant=wrap == "reentrant") if "entrant" in wrap else attend(*leaves)
    out.backward(grad)
    return [shard.gather(x.detach(), dim=2) for x in (out, *(leaf.grad for leaf in leaves))]


NAMES = ("out", "dq", "dk", "dv")


def check_ranks(
    world: World, size: int, inputs: list[Tensor], layout: str, bound: float, wrap: str = "", **options: Any
) -> None:
    """Compare output and gradients on every rank with the textbook formula."""
    reference = expected(inputs, options.get("causal", True))
    check_all(world.run(size, attend_on_rank, inputs, layout, wrap, options), reference, bound)


def check_all(by_rank: list[list[Tensor]], reference: list[Tensor], bound: float) -> None:
    assert_equal_on_ranks([named(tensors) for tensors in by_rank], named(reference), bound)


def named(tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(NAMES, tensors, strict=True))


@pytest.mark.parametrize("kernel", ["cpu_flash", "reference"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_output_and_gradients_match_one_process(world, size, layout, causal, heads, kernel) -> None:
    # float64 throughout, so only the order of summation differs
    inputs = make_inputs(*heads)
    check_ranks(world, size, inputs, layout, 1e-12, causal=causal, kernel=kernel)


def attend_with_strides(rank: int, inputs: list[Tensor]) -> list[Tensor]:
    def as_channels_first(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT  # what a convolution's output looks like: positions are neighbours in memory

    shard = SequenceShard(rank, dist.get_world_size(), "zigzag", dist.group.WORLD)
    q, k, v, grad = (as_channels_first(shard.split(x, dim=2)) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = lss_attention(*leaves, shard)
    out.backward(grad)
    return [shard.gather(x.detach(), dim=2) for x in (out, *(leaf.grad for leaf in leaves))]


def test_any_memory_layout_of_the_inputs(world) -> None:
    inputs = make_inputs()
    check_all(world.run(2, attend_with_strides, inputs), expected(inputs, causal=True), 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_gathered": True},
        {"head_chunks": 1},
        {"head_chunks": 2},
        {"head_chunks": 4},
        {"scale": None},
    ],
)
@pytest.mark.parametrize("wrap", ["", "reentrant", "non_reentrant", "compile"])
def test_variants_give_the_same_gradients(world, wrap, options) -> None:
    check_ranks(world, 2, make_inputs(), "zigzag", 1e-12, wrap, causal=True, **options)


def travel(
    rank: int, inputs: list[Tensor], layout: str, options: dict[str, Any]
) -> tuple[dict[str, Tensor], set[torch.dtype]]:
    shard = SequenceShard(rank, dist.get_world_size(), layout, dist.group.WORLD, torch.bfloat16)
    q, k, v, grad = (shard.split(x, dim=2).clone().requires_grad_() for x in inputs)
    with CollectiveCounter() as counter:
        out = lss_attention(q, k, v, shard, **options)
        out.backward(grad)
    whole = named([shard.gather(x.detach(), dim=2) for x in (out, q.grad, k.grad, v.grad)])
    return whole, {collective.dtype for collective in counter.tally}


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"keep_gathered": True}, {"head_chunks": 4}])
def test_keys_and_values_may_travel_in_another_dtype(world, options, layout) -> None:
    inputs = make_inputs(dtype=torch.float32)
    rounded = [x.bfloat16().float() if i in (1, 2) else x for i, x in enumerate(inputs)]
    reference = named(expected(rounded, causal=True))  # as if they had been rounded before
    for own, dtypes in world.run(2, travel, inputs, layout, options):
        assert dtypes == {torch.bfloat16}
        assert {x.dtype for x in own.values()} == {torch.float32}
        assert_equal(
            {name: own[name] for name in ("out", "dq")}, {name: reference[name] for name in ("out", "dq")}, 1e-5
        )
        assert_equal(own, reference, 1e-2)  # dk and dv are two summands of bfloat16, rounded at 4e-3 each


def check_operator(rank: int, keep_gathered: bool) -> None:
    q, k, v, _ = (x[:, :, :16].clone().requires_grad_() for x in make_inputs(4, 2))
    shard = SequenceShard(rank, 2, "zigzag", dist.group.WORLD)
    fields = spec_fields(AttentionSpec(shard, causal=True, scale=0.3, keep_gathered=keep_gathered))
    utils = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.lightning_lss.attention.default, (q, k, v), fields, test_utils=utils)


@pytest.mark.parametrize("keep_gathered", [True, False])
def test_the_operator_is_what_its_registration_says(world, keep_gathered) -> None:
    world.run(2, check_operator, keep_gathered)


def test_backward_of_the_operator_is_not_handed_gradients_of_what_it_keeps() -> None:
    q, k, v, grad = make_inputs()
    zeros: list[Any] = []

    def see(func: Any, args: Any, result: Any) -> None:
        if func.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.zeros_like, torch.ops.aten.new_zeros):
            zeros.append(func)

    with fake_world(0, 2) as group, Watch(see):
        shard = SequenceShard(0, 2, "zigzag", group)
        lss_attention(q.requires_grad_(), k, v, shard, keep_gathered=True).backward(grad)
    assert not zeros


class NoGradient(torch.autograd.Function):
    """A step after which autograd knows no gradient at all, as some operators of users return it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_backward_without_a_gradient_still_takes_part_in_its_collectives() -> None:
    q, k, v, _ = (x.requires_grad_() for x in make_inputs())
    with fake_world(0, 2) as group, CollectiveCounter() as counter:
        out = lss_attention(q, k, v, SequenceShard(0, 2, "zigzag", group), keep_gathered=True)
        counter.phase = "backward"
        NoGradient.apply(out).sum().backward()
    assert kinds(counter.tally, "backward") == {"reduce_scatter": 1}
    assert not q.grad.any()


def test_second_derivatives_are_refused() -> None:
    q, k, v, grad = (x.requires_grad_() for x in make_inputs())
    with fake_world(0, 2) as group:
        out = lss_attention(q, k, v, SequenceShard(0, 2, "zigzag", group))
        (first,) = torch.autograd.grad(out, q, grad, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            first.sum().backward()


@pytest.mark.parametrize("causal", [True, False])
def test_torch_counts_the_operations_of_the_visible_pairs(causal) -> None:
    counted = []
    for rank in range(2):
        with fake_world(rank, 2) as group, FlopCounterMode(display=False) as counter:
            shard = SequenceShard(rank, 2, "zigzag", group)
            q, k, v = (shard.split(x, dim=2) for x in make_inputs()[:3])
            lss_attention(q.requires_grad_(), k, v, shard, causal).sum().backward()
        counted.append(counter.get_total_flops())
    pairs = L * (L + 1) // 2 if causal else L * L
    assert sum(counted) == 2 * (2 + 5) * 2 * 4 * WIDTH * pairs  # by multiplications of matrices, batch and heads


# float32 rounds at 6e-8 and bfloat16, float16 at 4e-3 and 5e-4 per operation, a few of which add up in a softmax row
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("kernel", ["cpu_flash", "reference"])
def test_lower_precisions(world, dtype, bound, kernel) -> None:
    check_ranks(world, 2, make_inputs(dtype=dtype), "zigzag", bound, causal=True, kernel=kernel)


def count_by_phase(rank: int, options: dict[str, Any]) -> Tally:
    shard = SequenceShard(rank, dist.get_world_size(), "zigzag", dist.group.WORLD)
    q, k, v, grad = (shard.split(x, dim=2).clone().requires_grad_() for x in make_inputs())
    with CollectiveCounter() as counter:
        out = lss_attention(q, k, v, shard, **options)
        counter.phase = "backward"
        out.backward(grad)
    return counter.tally


def test_keep_gathered_has_exactly_two_collectives(world) -> None:
    for tally in world.run(2, count_by_phase, {"keep_gathered": True}):
        assert kinds(tally, "forward") == {"all_gather": 1}
        assert kinds(tally, "backward") == {"reduce_scatter": 1}


def test_regathering_has_one_more_gather_a_chunk(world) -> None:
    # over gloo in messages, an early and a late one from the other rank, and an all-to-all, summed on arrival
    chunk = 2 * make_inputs()[1].nbytes // 2 // 2  # of K and V, half of the heads, half of the sequence
    gathers = {Collective(phase, "receive", torch.float64, chunk // 2): 2 * 2 for phase in ("forward", "backward")}
    for tally in world.run(2, count_by_phase, {"head_chunks": 2}):
        assert tally == gathers | {Collective("backward", "all_to_all", torch.float64, chunk): 2}


def go_on_after_an_error(rank: int, inputs: list[Tensor]) -> list[Tensor]:
    shard = SequenceShard(rank, dist.get_world_size(), "zigzag", dist.group.WORLD)
    kernel = KERNELS["cpu_flash"]

    def out_of_memory(*args: Any) -> Any:
        raise MemoryError("while the next chunk is on its way")

    KERNELS["cpu_flash"] = kernel._replace(forward=out_of_memory)
    try:
        attend_to_segment(shard, inputs)
    except MemoryError:
        pass
    finally:
        KERNELS["cpu_flash"] = kernel
    attended = attend_to_segment(shard, inputs)
    assert not any(collectives._under_way.values())  # nor is what the error left there kept for ever
    return [shard.gather(x.detach(), dim=2) for x in attended]


def attend_to_segment(shard: SequenceShard, inputs: list[Tensor]) -> list[Tensor]:
    q, k, v, grad = (shard.split(x, dim=2).clone().requires_grad_() for x in inputs)
    out = lss_attention(q, k, v, shard, head_chunks=4)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def test_an_error_between_chunks_does_not_spoil_the_group(world) -> None:
    inputs = make_inputs()
    check_all(world.run(2, go_on_after_an_error, inputs), expected(inputs, causal=True), 1e-10)


MOVES = ("copy_", "stack", "cat", "clone", "_to_copy", "zero_", "zeros", "zeros_like", "fill_")


@contextmanager
def copied_elements() -> Iterator[list[int]]:
    """How many elements are written by operators that only move or fill."""
    elements: list[int] = []

    def see(func: Any, args: Any, result: Any) -> None:
        if func.namespace == "aten" and func.overloadpacket.__name__ in MOVES:
            elements.append(result.numel())

    with Watch(see):
        yield elements


def count_copies(rank: int, layout: str, options: dict[str, Any]) -> tuple[int, int]:
    shard = SequenceShard(rank, dist.get_world_size(), layout, dist.group.WORLD)
    q, k, v, grad = (shard.split(x, dim=2).clone().requires_grad_() for x in make_inputs())
    with copied_elements() as forward:
        out = lss_attention(q, k, v, shard, **options)
    with copied_elements() as backward:
        torch.autograd.grad(out, (q, k, v), grad)
    return sum(forward), sum(backward)


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("options", [{"head_chunks": 4}, {"keep_gathered": True}])
def test_nothing_is_copied_without_a_reason(world, options, layout) -> None:
    # docs/how-it-works.md gives the reason of each
    size, local = 2, 2 * 4 * (L // 2) * WIDTH  # elements of the local queries, of the local keys, of the local values
    chunked = "keep_gathered" not in options
    gathered = 2 * local  # K and V side by side to be sent, and
    if not chunked and layout == "zigzag":  # what one collective brings, put into position order
        gathered += 2 * size * local
    forward = gathered + local + local // WIDTH  # rows of the output, of the log-sum-exp
    backward = 2 * size * local + local + 2 * local  # dK and dV by rank, rows of dq; chunks of dk and dv joined, else
    if chunked:  # what gloo's reduce-scatter copies
        backward += gathered
    assert world.run(size, count_copies, layout, options) == [(forward, backward)] * size


def attend_under_autocast(rank: int) -> tuple[torch.dtype, list[torch.dtype]]:
    shard = SequenceShard(rank, 2, "zigzag", dist.group.WORLD)
    q, k, v, _ = (shard.split(x, dim=2).clone().requires_grad_() for x in make_inputs(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = lss_attention(q, k.bfloat16(), v, shard)
    out.float().sum().backward()
    return out.dtype, [x.grad.dtype for x in (q, k, v)]


def test_autocast_decides_the_dtype(world) -> None:
    assert world.run(2, attend_under_autocast) == [(torch.bfloat16, [torch.float32] * 3)] * 2


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name in ("cpu_flash", "reference")])
def test_without_a_shard_it_is_plain_attention(kernel) -> None:
    inputs = make_inputs(4, 2)
    out, *_ = expected(inputs, causal=True)
    for module in (LSSAttention(), LSSAttention(kernel=kernel)):
        assert_equal([module(*inputs[:3])], [out], 1e-12)


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        ([(2, 4, 8), (2, 4, 8, 8), (2, 4, 8, 8)], {}, r"\[batch, heads, length, width\].*\(2, 4, 8\)"),
        ([(2, 4, 8, 8), (2, 4, 8, 8), (2, 4, 4, 8)], {}, r"must agree.*\(2, 4, 4, 8\)"),
        ([(2, 4, 8, 8), (2, 3, 8, 8), (2, 3, 8, 8)], {}, "multiple of the number of key/value heads"),
        (
            [(2, 4, 8, 8), (2, 2, 8, 8), (2, 2, 8, 8)],
            {"head_chunks": 3, "kernel": "reference"},
            "head_chunks=3.*divisor of the 2",
        ),
        ([(2, 4, 8, 8)] * 3, {"head_chunks": 2, "keep_gathered": True, "kernel": "reference"}, "keep_gathered=True"),
        ([(2, 4, 8, 8)] * 3, {"kernel": "flash9"}, "kernel='flash9' is unknown"),
        ([(2, 4, 8, 8)] * 3, {"kernel": "cudnn"}, "kernel='cudnn' runs on CUDA tensors"),
    ],
)
def test_bad_input_names_the_values(shapes, options, words) -> None:
    with pytest.raises(ValueError, match=words):
        lss_attention(*(torch.zeros(shape) for shape in shapes), **options)


def test_mixed_dtypes_are_refused() -> None:
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"one dtype.*float32.*float64"):
        lss_attention(q, q.double(), q)


def test_a_shard_without_a_group_says_so() -> None:
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="no process group"):
        lss_attention(q, q, q, SequenceShard(0, 2))
