"""Common to all Lightning strategies that split a sequence over several ranks: the grid of ranks, and batches."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.connectors.data_connector import _auto_add_worker_init_fn
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightning_lss.sequence.batch import SequenceDims, check_same_batch, is_same_batch, split_batch
from lightning_lss.sequence.layout import resolve_sequence_parallel_size
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard
from lightning_lss.strategy import validation
from lightning_lss.strategy.logged import LoggedValues
from lightning_lss.strategy.order import distribute_samples


class SequenceParallel(ParallelStrategy):
    """Mixin for a strategy of W = D x S processes: S neighbouring ranks get the segments of one batch.

    Args:
        sequence_parallel_size: S, a divisor of W; ``"auto"`` puts all ranks into one sequence group.
        sequence_dims: see :func:`lightning_lss.sequence.batch.split_batch`.
        check_batches: how many of the first batches of each data loader are compared over a sequence group, in every
            epoch.
        **kwargs: arguments of the other strategy.

    Raises:
        ValueError: if the size is not positive.
    """

    def __init__(
        self,
        sequence_parallel_size: int | Literal["auto"] = "auto",
        sequence_dims: SequenceDims | None = None,
        check_batches: int = 2,
        **kwargs: Any,
    ) -> None:
        if sequence_parallel_size != "auto":
            resolve_sequence_parallel_size(sequence_parallel_size, sequence_parallel_size)
        super().__init__(**kwargs)
        self._requested_size = sequence_parallel_size
        self._sequence_dims = sequence_dims
        self._batches_to_check = check_batches
        self._batches_seen: dict[tuple[Any, int], tuple[int, int]] = {}  # by stage and loader: the epoch, how many
        self._distributes_samples = False
        self._logged = LoggedValues()
        self._at_teardown = ExitStack()

    @override
    def _configure_launcher(self) -> None:
        _ = self.sequence_parallel_size  # refuse a size that does not divide the world before processes are started
        super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        self._batches_seen.clear()
        self._warned_of_replicas = False
        self._keep_order()
        super().setup_environment()

    def _keep_order(self) -> None:
        """Keep Lightning from shuffling loaders; with one data replica, from changing them at all."""
        trainer = getattr(self.lightning_module, "_trainer", None)
        if trainer is None or not trainer._accelerator_connector.use_distributed_sampler:
            return
        several, fitting = self.data_parallel_size > 1, trainer.state.fn == TrainerFn.FITTING
        if several and not fitting:
            return
        self._distributes_samples = several
        self._at_teardown.callback(setattr, self, "_distributes_samples", False)
        self._at_teardown.callback(setattr, trainer._accelerator_connector, "use_distributed_sampler", True)
        trainer._accelerator_connector.use_distributed_sampler = False

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        module = self.lightning_module
        if self.shard_of_run.size > 1 and module is not None and module.example_input_array is not None:
            # Lightning would run it unsplit for the model summary, and on rank 0 alone for a graph
            rank_zero_warn(
                f"`example_input_array` is ignored under {type(self).__name__}: a forward pass takes all ranks."
            )
            self._at_teardown.callback(setattr, module, "example_input_array", module.example_input_array)
            module.example_input_array = None

    @override
    def teardown(self) -> None:
        with self._at_teardown:
            super().teardown()

    # -- who this process is -------------------------------------------------------------------------------------------

    @property
    def num_ranks(self) -> int:
        """W, known before processes are started."""
        return self.num_nodes * self.num_processes  # type: ignore[attr-defined]

    @property
    def sequence_parallel_size(self) -> int:
        """S, the number of ranks that share one sequence; raises ``MisconfigurationException`` if it does not divide
        W."""
        try:
            return resolve_sequence_parallel_size(self.num_ranks, self._requested_size)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None

    @property
    def data_parallel_size(self) -> int:
        """D = W / S, the number of different batches in flight."""
        return self.num_ranks // self.sequence_parallel_size

    @property
    def data_rank(self) -> int:
        """Which of the D batches this process works on."""
        return self.global_rank // self.sequence_parallel_size

    @property
    def shard_of_run(self) -> SequenceShard:
        """The shard of this process now: the trivial one outside of a run."""
        return WHOLE_SEQUENCE

    @property
    def shard_of_module(self) -> SequenceShard:
        """The shard of the sequences that the module is shown now: the trivial one where they are whole."""
        return self.shard_of_run

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def data_group_of_run(self) -> dist.ProcessGroup | None:
        """The D ranks that hold the same segment of different batches; None where D = 1, and outside of a run."""
        return None

    # -- batches -------------------------------------------------------------------------------------------------------

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # All ranks of a sequence group need the same samples. Lightning reads this before the process group exists.
        return {"num_replicas": self.data_parallel_size, "rank": self.data_rank}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self._distributes_samples:
            overfit_batches = self._module.trainer.overfit_batches  # type: ignore[attr-defined]
            dataloader = distribute_samples(dataloader, overfit_batches, **self.distributed_sampler_kwargs)
        # Lightning would seed workers by global rank; the first to set `worker_init_fn` wins.
        _auto_add_worker_init_fn(dataloader, self.data_rank)
        return super().process_dataloader(dataloader)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        batch = super().batch_to_device(batch, device, dataloader_idx)
        self.arrange(batch)
        shard = self.shard_of_run
        if shard.size == 1 and self.data_group_of_run is None:
            return batch
        module = self._module
        part = self.split_batch(batch)
        loader, epoch = (module.trainer.state.stage, dataloader_idx), module.trainer.current_epoch
        if loader not in self._batches_seen and self.shard_of_module.size > 1 and not self.proves_batches:
            validation.warn_of_images(batch, self._sequence_dims)
        last_epoch, seen = self._batches_seen.get(loader, (epoch, 0))
        seen = seen if last_epoch == epoch else 0
        self._batches_seen[loader] = epoch, seen + 1
        if seen < self._batches_to_check:
            self._compare(batch, module.trainer)
        return part

    def arrange(self, batch: Any) -> None:
        """Choose who holds which part of the whole ``batch``, before it is split."""

    @property
    def proves_batches(self) -> bool:
        """Whether the way that batches are split is proved."""
        return hasattr(self._module, "shard_batch")

    def split_batch(self, batch: Any) -> Any:
        """Cut a batch to this rank's segment, as the module says or by ``sequence_dims``."""
        shard = self.shard_of_run
        by_module = getattr(self._module, "shard_batch", None) if shard.size > 1 else None
        return by_module(batch, shard) if by_module else self.split_entries(batch)

    def split_entries(self, batch: Any) -> Any:
        """Cut the entries of a batch to this rank's segment by ``sequence_dims``."""
        return split_batch(batch, self.shard_of_run, self._sequence_dims)

    def _compare(self, batch: Any, trainer: pl.Trainer) -> None:
        """Compare a batch over the sequence group, where it must be the same, and over the data group, where it should
        not."""
        shard, data_group = self.shard_of_run, self.data_group_of_run
        if shard.size > 1:
            check_same_batch(batch, shard.require_group(), self.root_device)
        if data_group is None or not trainer.training or self._warned_of_replicas:
            return  # only in training do all data replicas take the same number of batches
        if is_same_batch(batch, data_group, self.root_device):
            self._warned_of_replicas = True
            validation.warn_of_equal_replicas(self.data_parallel_size)

    # -- steps ---------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        # All ranks take the same number of steps, and the losses of all make up that of the global batch.
        return self._show_whole("training_step", dist.group.WORLD, super().training_step, *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        # Data replicas may have different numbers of batches, so that one would wait for the others in vain.
        return self._show_whole("validation_step", self.shard_of_run.group, super().validation_step, *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self._show_whole("test_step", self.shard_of_run.group, super().test_step, *args, **kwargs)

    def _show_whole(
        self, name: str, group: dist.ProcessGroup | None, step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any
    ) -> STEP_OUTPUT:
        """Run a step, and return its loss and log its values as those of all ranks of ``group``."""
        if self.shard_of_run.size == 1:
            return step(*args, **kwargs)
        assert group is not None
        copies = self.shard_of_run.size // self.shard_of_module.size
        with self._logged.collect(self._module, name, copies):
            output = step(*args, **kwargs)
        return self._logged.show(output, group, self.root_device)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._logged.warn()
