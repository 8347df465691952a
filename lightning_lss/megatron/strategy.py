"""``MegatronStrategy``: Lightning's ``ModelParallelStrategy`` for modules written for LSS."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_lss.megatron.parallelize import DATA, TENSOR, reduce_gradients
from lightning_lss.parallel.broadcast import share_random_state
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard
from lightning_lss.strategy.sequence import SequenceParallel


class MegatronStrategy(SequenceParallel, ModelParallelStrategy):
    """Nvidia's sequence parallelism (arXiv 2205.05198) under Lightning's ``ModelParallelStrategy``.

    The world is a grid of data-parallel groups x tensor-parallel groups. The ranks of a tensor-parallel group share a
    batch, and each gets its contiguous segment. The module's ``configure_model`` splits the model with
    :func:`lightning_lss.megatron.parallelize`, as :class:`~lightning_lss.megatron.MegatronTransformer` does. Losses
    follow the rule of :func:`~lightning_lss.token_mean`: their average over the world is the loss of the global batch.

    Args:
        sequence_parallel_size: number of ranks in a tensor-parallel group, a divisor of the world size; ``"auto"`` puts
            all ranks into one group.
        sequence_dims, check_batches: as in :class:`~lightning_lss.LSSStrategy`.
        **kwargs: further arguments of :class:`~lightning.pytorch.strategies.ModelParallelStrategy`, such as
            ``save_distributed_checkpoint=False`` for checkpoints in one file.

    Raises:
        ValueError: at once, if the size is not positive.
        MisconfigurationException: from the Trainer, if the size does not divide the world size, or the module has no
            ``configure_model``.
    """

    _syncs_gradients = True

    @property
    @override
    def shard_of_run(self) -> SequenceShard:
        """This process's place in its tensor-parallel group; the trivial shard before the first run."""
        if self._device_mesh is None:
            return WHOLE_SEQUENCE
        mesh = self._device_mesh[TENSOR]
        return SequenceShard(mesh.get_local_rank(), mesh.size(), "contiguous", mesh.get_group())

    @property
    @override
    def data_group_of_run(self) -> dist.ProcessGroup | None:
        mesh = self._device_mesh
        return mesh[DATA].get_group() if mesh is not None and self.data_parallel_size > 1 else None

    @override
    def _configure_launcher(self) -> None:
        self._tensor_parallel_size, self._data_parallel_size = self.sequence_parallel_size, self.data_parallel_size
        super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        module = self.lightning_module
        if module is not None and not is_overridden("configure_model", module):
            raise MisconfigurationException(
                f"{type(module).__name__} does not split itself over the ranks of a tensor-parallel group in configure_model."
                " Use lightning_lss.megatron.MegatronTransformer, call lightning_lss.megatron.parallelize there, or use"
                " strategy='lss', which needs neither."
            )
        super().setup_environment()
        group = self.shard_of_run.require_group()
        share_random_state(group, self.root_device)  # loaders that shuffle give the group one batch

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The adjoints of a group's collectives sum the gradients of its ranks' losses, but the loss is their mean.
        return super().backward(closure_loss / self.sequence_parallel_size, *args, **kwargs)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        if self._syncs_gradients and self.lightning_module is not None:
            reduce_gradients(self.lightning_module.parameters(), self.device_mesh)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Do not reduce gradients while they accumulate."""
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
