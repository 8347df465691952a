"""``MegatronStrategy``: Lightning's ``ModelParallelStrategy`` for modules that are written for LSS."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.data_connector import _auto_add_worker_init_fn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_lss.batch import check_same_batch, split_batch
from lightning_lss.layout import resolve_sequence_parallel_size
from lightning_lss.megatron import TENSOR, reduce_gradients
from lightning_lss.shard import WHOLE_SEQUENCE, SequenceShard


class MegatronStrategy(ModelParallelStrategy):
    """Nvidia's sequence parallelism (arXiv 2205.05198) under Lightning's ``ModelParallelStrategy``.

    The world is a grid of data-parallel groups x tensor-parallel groups. The ranks of a tensor-parallel group share a
    batch, of which each gets its contiguous segment; the module's ``configure_model`` shares out the model with
    :func:`lightning_lss.megatron.parallelize`, as :class:`~lightning_lss.LSSTransformer` does. Losses follow the rule
    of :func:`~lightning_lss.token_mean`: their average over the world is the loss of the global batch.

    Args:
        sequence_parallel_size: number of ranks of a tensor-parallel group, a divisor of the world size; ``"auto"`` puts
            all ranks into one group.
        check_batches: how many of the first batches of a run are compared over a tensor-parallel group.
        **kwargs: further arguments of :class:`~lightning.pytorch.strategies.ModelParallelStrategy`, such as
            ``save_distributed_checkpoint=False`` for checkpoints of one file.

    Raises:
        ValueError: at once, if the size is not positive.
        MisconfigurationException: from the Trainer, if the size does not divide the world size.
    """

    def __init__(
        self, sequence_parallel_size: int | Literal["auto"] = "auto", check_batches: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if sequence_parallel_size != "auto":
            resolve_sequence_parallel_size(sequence_parallel_size, sequence_parallel_size)
        self._requested_size = sequence_parallel_size
        self._batches_to_check = check_batches
        self._syncs_gradients = True

    @property
    def sequence_parallel_size(self) -> int:
        """The number of ranks that share one sequence and one copy of the model."""
        try:
            return resolve_sequence_parallel_size(self.num_nodes * self.num_processes, self._requested_size)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None

    @property
    def data_parallel_size(self) -> int:
        """The number of different batches in flight."""
        return self.num_nodes * self.num_processes // self.sequence_parallel_size

    @property
    def data_rank(self) -> int:
        """Which of the batches in flight this process works on."""
        return self.global_rank // self.sequence_parallel_size

    @property
    def shard_of_run(self) -> SequenceShard:
        """The segment of the sequence that this process gets; the whole before the first run."""
        if self._device_mesh is None:
            return WHOLE_SEQUENCE
        mesh = self._device_mesh[TENSOR]
        return SequenceShard(mesh.get_local_rank(), mesh.size(), "contiguous", mesh.get_group())

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.data_rank}

    @override
    def _configure_launcher(self) -> None:
        # a size that does not divide the world is refused before processes are started
        self._tensor_parallel_size, self._data_parallel_size = self.sequence_parallel_size, self.data_parallel_size
        super()._configure_launcher()

    @override
    def process_dataloader(self, dataloader: object) -> object:
        # Lightning would seed workers by global rank; the first to set `worker_init_fn` wins.
        _auto_add_worker_init_fn(dataloader, self.data_rank)
        return super().process_dataloader(dataloader)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        batch = super().batch_to_device(batch, device, dataloader_idx)
        shard = self.shard_of_run
        if shard.size == 1:
            return batch
        if self._batches_to_check > 0:
            self._batches_to_check -= 1
            check_same_batch(batch, shard.require_group(), self.root_device)
        return split_batch(batch, shard, None)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The adjoints of a group's collectives add up what its ranks' losses say; their mean is meant.
        return super().backward(closure_loss / self.sequence_parallel_size, *args, **kwargs)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        if self._syncs_gradients and self.lightning_module is not None:
            reduce_gradients(self.lightning_module.parameters(), self.device_mesh)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """While gradients accumulate, leave them as they are."""
        self._syncs_gradients = False
        try:
            yield
        finally:
            self._syncs_gradients = True

    def gradient_norm(self) -> Tensor:
        """2-norm of the gradients of the whole model; every rank must call it."""
        assert self.lightning_module is not None
        norm = nn.utils.get_total_norm([x.grad for x in self.lightning_module.parameters() if x.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
