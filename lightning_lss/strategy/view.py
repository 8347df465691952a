"""What a run does to a module that it shows whole sequences, and undoes afterwards."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torchmetrics import Metric

from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.strategy.adapters import ADAPTERS, Adapted
from lightning_lss.tensor.batch import splitting_blocks
from lightning_lss.tensor.functions import functions_of_whole_tensors


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
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # the compiler cannot trace SplitTensor
        yield stack.enter_context(Adapted(ADAPTERS, module))


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
