"""Trace the first two and the last of many equal blocks, and infer the others from the second."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_lss.planner.tracker import Span, Tracker


def skip_repeated(module: nn.Module, tracker: Tracker, structure: Callable[[nn.Module], Any]) -> list["Repeated"]:
    """Skip the blocks between the second and the last of each run of equal ones.

    A skipped block occupies as much memory as the second one leaves occupied, and gives gradients to its parameters.
    (The first block does not serve as the pattern: it may fill caches that all use.) Memory grows or shrinks evenly
    along a run, so no peak is missed between its ends.

    Args:
        module: its blocks map a tensor to a tensor, and are children of an ``nn.ModuleList`` or ``nn.Sequential``.
        tracker: follows the step.
        structure: maps equal blocks to equal values.

    Returns:
        the runs; call :meth:`Repeated.add_work` of each when the step is over.
    """
    runs = []
    for stack in [x for x in module.modules() if isinstance(x, (nn.ModuleList, nn.Sequential))]:
        for _, equal in groupby(stack.children(), structure):
            _, *blocks = equal
            if len(blocks) > 3 and any(True for _ in blocks[0].children()):
                runs.append(Repeated(tracker, blocks[0], blocks[1:-1]))
    return runs


class Repeated:
    """A run of equal blocks: one of them, the pattern, stands for the skipped ones."""

    def __init__(self, tracker: Tracker, pattern: nn.Module, skipped: list[nn.Module]) -> None:
        self.tracker = tracker
        self.left: dict[str, int] | None = None  # bytes by part that a block's forward leaves for its backward
        self.like: tuple[torch.Size, torch.dtype] | None = None  # the output of a block
        self.waiting: list[Any] = []  # contexts of skipped blocks, until their backward
        self.times = [0, 0]  # numbers of skipped forwards and backwards
        self.spans: list[Span] = []  # of the pattern's forward, and of its backward
        self.started: Span | None = None  # where the pattern's backward begins
        self._allocated: tuple[range, int] = (range(0), 0)
        self._run_pattern = pattern.forward
        pattern.forward = self._call_pattern
        for block in skipped:
            block.forward = _skip(block, self)

    def begin_backward(self) -> None:
        """Measure again what a block holds: the weights that autocast had cached are freed by now."""
        self.left = self.tracker.left_of(*self._allocated)
        with self.tracker.paused():
            for context in self.waiting:
                context.left = None
                context.left = self.occupy()

    def add_work(self) -> None:
        """Count the work of the skipped blocks."""
        for span, times in zip(self.spans, self.times):
            self.tracker.repeat(span, times)

    def occupy(self) -> list[Tensor]:
        """Allocate as much memory as a block's forward leaves occupied."""
        assert self.left is not None
        tensors = [torch.empty(size, dtype=torch.uint8) for size in self.left.values()]
        for part, tensor in zip(self.left, tensors):
            self.tracker.relabel(tensor, part)
        return tensors

    def _call_pattern(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self.left is not None or not isinstance(x, Tensor):
            return self._run_pattern(x, *args, **kwargs)
        before, span = self.tracker.allocated, self.tracker.span()
        out = self._run_pattern(_End.apply(x, self), *args, **kwargs)
        if isinstance(out, Tensor) and out.requires_grad:
            self._allocated = (range(before, self.tracker.allocated), self.tracker.number_of(out))
            self.left = self.tracker.left_of(*self._allocated)
            self.like = (out.shape, out.dtype)
            self.spans.append(self.tracker.span(span))
        return out


def _skip(block: nn.Module, run: Repeated) -> Callable[..., Any]:
    """Return a forward that skips ``block`` as soon as the pattern has run."""
    forward, parameters = block.forward, [x for x in block.parameters() if x.requires_grad]

    def skip(x: Any, *args: Any, **kwargs: Any) -> Any:
        if run.left is None or not isinstance(x, Tensor):
            return forward(x, *args, **kwargs)
        return _Skipped.apply(x, run, *parameters)

    return skip


class _Skipped(torch.autograd.Function):
    """Occupy the memory of a block, and return gradients like its input and parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Repeated, *parameters: Tensor) -> Tensor:
        assert run.like is not None
        ctx.run, ctx.parameters, ctx.left = run, parameters, None
        ctx.save_for_backward(x)
        shape, dtype = run.like
        with run.tracker.paused():
            if run.tracker.stage == 0:  # in a later stage the block is recomputed
                ctx.left = run.occupy()
                run.waiting.append(ctx)
                run.times[0] += 1
            return x.new_empty(shape, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        run, ctx.left = ctx.run, None
        run.waiting = [context for context in run.waiting if context is not ctx]
        with run.tracker.paused():
            grads = (torch.empty_like(x), None, *map(torch.empty_like, ctx.parameters))
        run.times[1] += 1
        run.started = run.tracker.span()
        return grads


class _End(torch.autograd.Function):
    """Pass on the input of the pattern: when its gradient arrives, the pattern's backward is over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Repeated) -> Tensor:
        ctx.run = run
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.run.started is not None:
            ctx.run.spans.append(ctx.run.tracker.span(ctx.run.started))
        return grad, None
