"""What a run does to a module that it shows whole sequences or segments, and undoes afterwards."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeGuard

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed import ProcessGroup
from torchmetrics import Metric

from lightning_lss.nn.convolution import crossing_borders, halo_of
from lightning_lss.nn.recompute import named_blocks
from lightning_lss.sequence.segment import SequenceShard, segment_modules
from lightning_lss.strategy.adapters import ADAPTERS, Adapted
from lightning_lss.tensor.batch import splitting_blocks
from lightning_lss.tensor.functions import functions_of_whole_tensors


def wants_whole(module: nn.Module, view: str) -> bool:
    """Whether ``module`` is to be shown whole sequences under a ``view``; one that is written for segments is not."""
    written_for_segments = segment_modules(module) or hasattr(module, "shard_batch")
    return view == "whole" or (view == "auto" and not written_for_segments)


@contextmanager
def showing_whole(
    module: nn.Module, shard_now: Callable[[], SequenceShard], data_group: ProcessGroup | None
) -> Generator[Adapted, None, None]:
    """Show ``module`` whole sequences, split as ``shard_now()`` says, within the ``with`` statement.

    Yields what libraries' own modules are adapted by.
    """
    with ExitStack() as stack:
        stack.enter_context(functions_of_whole_tensors())
        stack.enter_context(splitting_blocks(module, shard_now))
        stack.enter_context(_metrics_over(module, data_group))
        _warn_of_compiled(module)
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # the compiler cannot trace SplitTensor
        yield stack.enter_context(Adapted(ADAPTERS, module))


def _warn_of_compiled(module: nn.Module) -> None:
    """Name what is compiled and will not be."""
    names = [name or type(x).__name__ for name, x in module.named_modules() if _is_compiled(x)]
    if names:
        rank_zero_warn(
            f"{', '.join(names)}: compiled, but run without compilation, since torch's compiler cannot trace sequences that are split and"
            " shown as whole. The results are the same. Modules that are written for segments (LSSAttention) compile."
        )


def _is_compiled(module: nn.Module) -> bool:
    by_method = module._compiled_call_impl is not None
    return by_method or isinstance(module, OptimizedModule) or getattr(module, "_compiler_ctx", None) is not None


@contextmanager
def showing_segments(
    module: nn.Module, shard_now: Callable[[], SequenceShard], convert: bool | Sequence[str]
) -> Generator[Adapted, None, None]:
    """Let convolutions of ``module`` cross the borders of segments, if it is to ``convert`` them, within the ``with`` statement.

    Yields what libraries' own modules are adapted by: nothing.

    Raises:
        MisconfigurationException: if a convolution cannot, or a name matches none.
    """
    convolutions = _convolutions(module, convert)
    names = {x: name for name, x in module.named_modules()}
    for conv in convolutions:
        try:
            halo_of(conv)
        except ValueError as error:
            raise MisconfigurationException(
                f"convert={convert!r} cannot let {names[conv]} = {conv} see across the borders of segments: {error} Or name the"
                " convolutions that are along the sequence: convert=['name', ...]."
            ) from None
    with crossing_borders(convolutions, shard_now):
        yield Adapted(())


def _convolutions(module: nn.Module, convert: bool | Sequence[str]) -> list[nn.Conv1d]:
    """Find what is to be converted: convolutions that compute as ``nn.Conv1d`` does, over more than one position."""
    if not convert:
        return []
    if convert is True:
        return [x for x in module.modules() if _is_torchs(x) and x.kernel_size[0] > 1]
    convolutions: list[nn.Conv1d] = []
    for name in [convert] if isinstance(convert, str) else convert:
        try:
            found = named_blocks(module, [name])
        except ValueError as error:
            raise MisconfigurationException(f"convert={convert!r}: {error}") from None
        own = [x for x in found if _is_torchs(x)]
        if not own:
            raise MisconfigurationException(
                f"convert={convert!r}: {name!r} names a {type(found[0]).__name__}, but only nn.Conv1d can be converted. For other"
                " layers use sequence_shard(self).on_whole(layer, x), or its shift for a few neighbours."
            )
        convolutions += own
    return convolutions


def _is_torchs(x: nn.Module) -> TypeGuard[nn.Conv1d]:
    return isinstance(x, nn.Conv1d) and type(x).forward is nn.Conv1d.forward


@contextmanager
def _metrics_over(module: nn.Module, data_group: ProcessGroup | None) -> Generator[None, None, None]:
    """Let the metrics of ``module`` add up what data replicas counted: the ranks of a sequence group count the same."""
    with ExitStack() as stack:
        for metric in (x for x in module.modules() if isinstance(x, Metric)):
            stack.callback(setattr, metric, "process_group", metric.process_group)
            stack.callback(setattr, metric, "distributed_available_fn", metric.distributed_available_fn)
            metric.process_group = metric.process_group or data_group
            if metric.process_group is None:
                metric.distributed_available_fn = _never
        yield


def _never() -> bool:
    return False
