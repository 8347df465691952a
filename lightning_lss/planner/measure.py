"""Measure what :mod:`lightning_lss.planner.memory` predicts: one rank's training step under torch's memory tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lss.models.transformer import Transformer
from lightning_lss.nn.loss import cross_entropy_by_rows, linear_cross_entropy
from lightning_lss.parallel.replicated import ignore_in_ddp
from lightning_lss.planner.setup import Setup
from lightning_lss.sequence.dtypes import in_autocast_dtype, resolve_communication_dtype
from lightning_lss.sequence.segment import SequenceShard, segment_local_names, segment_modules
from lightning_lss.testing.dispatch import is_own_operator, run_inside


def measure_memory(setup: Setup, group: dist.ProcessGroup, fake_tensors: bool = False) -> dict[str, int]:
    """Bytes at the peak of a rank's second training step, by the categories of torch's memory tracker.

    Args:
        setup: what to train, with ``scheme="lss"``.
        group: the sequence group, of ``setup.size`` ranks: real or of :func:`~lightning_lss.testing.fake_world.fake_world`.
        fake_tensors: whether to work with tensors that have sizes but no contents, for models and sequences that this
            machine could not hold. It needs ``ddp=False``, and a model with rotary positions and without dropout, whose
            generators want numbers.

    Returns:
        ``{"Parameter": ..., "Gradient": ..., "Activation": ..., "Temp": ..., "Optstate": ..., "Total": ...}``; see
        ``torch.distributed._tools.mem_tracker``.

    Raises:
        ValueError: if it cannot be measured.
    """
    if setup.scheme != "lss" or setup.options.sharding is not None:
        raise ValueError(
            f"scheme={setup.scheme!r} with sharding={setup.options.sharding!r} cannot be measured here, only 'lss' without."
        )
    if fake_tensors and (setup.options.ddp or setup.config.dropout or setup.config.positions != "rotary"):
        raise ValueError("fake_tensors needs ddp=False, positions='rotary' and dropout=0.")
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if is_own_operator(func):
                return run_inside(self, func, args, kwargs)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with FakeTensorMode() if fake_tensors else nullcontext():
        model = make_model(setup, group)
        tracker = Tracker()
        tracker.track_external(model)
        with tracker:
            step = make_step(model, setup, tracker.reset_mod_stats)  # it takes one call of each module at a time
            step()
            step()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items()}


def make_model(setup: Setup, group: dist.ProcessGroup) -> Transformer:
    """The model of a rank, with its shard."""
    name, _, kind = setup.options.precision.partition("-")
    with _default_dtype(_DTYPES[name] if kind == "true" else torch.float32):
        chosen: dict[str, Any] = {
            "activation_checkpointing": setup.activation_checkpointing,
            "mlp_tiles": setup.mlp_tiles,
            "head_chunks": setup.head_chunks,
        }
        model = Transformer(replace(setup.config, seq_len=setup.seq_len, **chosen))
    dtype = resolve_communication_dtype(setup.options.communication_dtype)
    shard = SequenceShard(dist.get_rank(group), setup.size, setup.options.layout, group, dtype)
    for module in segment_modules(model):
        module.set_shard(shard)
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make modules with parameters of ``dtype``; fake parameters cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_step(model: Transformer, setup: Setup, after_batch: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """The step of :class:`~lightning_lss.LSSTransformer` under Lightning, without what does not touch memory;
    ``after_batch`` is called when the backward pass of a batch is over."""
    optimizer = torch.optim.AdamW(model.parameters())
    module: nn.Module = _WithLoss(model, setup.loss_rows if setup.chunked_loss else None)
    if setup.options.ddp:
        ignore_in_ddp(module, segment_local_names(module))
        module = DistributedDataParallel(module, gradient_as_bucket_view=setup.options.gradient_as_bucket_view)
        if dist.get_backend() == "fake":  # its all-reduce has no tensor for DDP to go on with
            module.register_comm_hook(None, lambda _, bucket: _done(bucket.buffer()))
    inputs, targets = torch.zeros(2, setup.batch_size, setup.seq_len // setup.size, dtype=torch.int64).unbind()

    def step() -> None:
        for batch in range(setup.options.accumulate_grad_batches):
            with _autocast(setup):
                loss = module(inputs, targets)
            if batch == 0:  # in Lightning's order: the last step's gradients are there throughout the forward pass
                optimizer.zero_grad()
            loss.backward()
            after_batch()
        optimizer.step()

    return step


def _done(result: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(result)
    return future


class _WithLoss(nn.Module):
    """The loss of :class:`~lightning_lss.LSSTransformer`, so that DistributedDataParallel sees one module."""

    def __init__(self, model: Transformer, rows: int | None) -> None:
        super().__init__()
        self.model = model
        self.rows = rows

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        features, weight = self.model.features(inputs).flatten(0, 1), self.model.head.weight
        if self.rows is None:
            return linear_cross_entropy(features, weight, targets.flatten())
        features, weight = in_autocast_dtype(features, weight)  # torch's own chunks are not visible to the tracker
        return cross_entropy_by_rows(features, weight, targets.flatten(), self.rows)


_DTYPES = {"64": torch.float64, "32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def _autocast(setup: Setup) -> AbstractContextManager[object]:
    name, _, kind = setup.options.precision.partition("-")
    return torch.autocast("cpu", _DTYPES[name]) if kind == "mixed" else nullcontext()
