"""Which batches a strategy proves, and how it runs a step apart from the training."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_lss.parallel.members import Members
from lightning_lss.proof.batch import BatchProof
from lightning_lss.proof.passes import Rehearsal
from lightning_lss.proof.report import InexactError, Report
from lightning_lss.sequence.batch import tensors_by_path
from lightning_lss.sequence.padding import pad_batch
from lightning_lss.sequence.segment import SequenceShard, segment_modules
from lightning_lss.strategy.adapters import Adapted
from lightning_lss.strategy.averaging import GradientAveraging
from lightning_lss.strategy.balancing import BatchLayouts, static_shard
from lightning_lss.strategy.sequence import SequenceParallel
from lightning_lss.strategy.verification import (
    Verification,
    first_of,
    pretend,
    suspects,
    warn_of_layout,
    warn_of_unverified,
)

_ZIGZAG = "LSSStrategy(layout='zigzag') may train it exactly: this batch was split under layout='balanced'."


class ProvedRuns(SequenceParallel, GradientAveraging):
    """The part of :class:`~lightning_lss.LSSStrategy` that proves every run on its first batch, if it is to ``verify``, and
    says which layouts batches may have."""

    _layouts: BatchLayouts
    _place: SequenceShard
    """In the base layout."""

    def __init__(self, *args: Any, verify: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verification = Verification(verify)
        self._on_host: Any = None  # the batch that is being split
        self._adapted = Adapted(())

    def _start_proof(self) -> None:
        if self._shard.size == 1:
            return
        self._verification.start()
        if not self._verification.wanted and suspects(self._module):
            warn_of_unverified(self._module, "verify=False")

    @property
    def verification(self) -> Report | None:
        """What the proof of the last run found; None where there was none."""
        return self._verification.report

    @property
    @override
    def proves_batches(self) -> bool:
        return self._verification.wanted and self._module.trainer.state.fn == TrainerFn.FITTING

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        self._on_host = batch
        try:
            return super().batch_to_device(batch, device, dataloader_idx)
        finally:
            self._on_host = None

    @override
    def arrange(self, batch: Any) -> None:
        shard = self._layouts.shard_for(batch, self._module, self._place, self._sequence_dims)
        if not self._may_have(shard):
            shard = self._place
        any_length = self._shows_whole_split or bool(self._layouts.pad_values)
        if shard.layout == "balanced" and shard.assignment is None and any_length:
            shard = self._layouts.for_any_length(shard)
        if not self._shows_whole_split:
            shard = self._layouts.padded(shard, batch, self._sequence_dims)
        self._layouts.follow(shard, self._module.trainer.state.stage)
        if shard != self._shard:
            self._shard = shard
            for module in segment_modules(self._module):
                module.set_shard(shard)

    @property
    def _shows_whole_split(self) -> bool:
        """Whether the module is shown whole sequences that are split."""
        return self.shard_of_module.size < self.shard_of_run.size

    def _is_current(self, shard: SequenceShard) -> bool:
        """Whether ``shard`` is that of the batch at hand, or, in a hook of a whole epoch or stage, that of all batches."""
        module = self.lightning_module
        trainer, hook = getattr(module, "_trainer", None), getattr(module, "_current_fx_name", None) or ""
        between = hook.startswith("on_") and hook.endswith(("_start", "_end")) and "batch" not in hook
        return self._layouts.is_current(shard, trainer.state.stage if trainer is not None and between else None)

    def _may_have(self, shard: SequenceShard) -> bool:
        """Whether the batch at hand may have the layout that was chosen: an evaluation step is not proved itself."""
        if self._module.trainer.training or self._layouts.requested != "auto" or not self._verification.wanted:
            return True
        return self.proves_batches and self._verification.has_proved(shard)

    @override
    def split_batch(self, batch: Any) -> Any:
        if self._module.trainer.training and self._verification.rehearsal is None:
            self._verification.batch = batch
            if self._shard.size > 1:
                self._verification.look_at(self._on_host, self._shard, self._sequence_dims)
        return super().split_batch(batch)

    @override
    def split_entries(self, batch: Any) -> Any:
        padded = pad_batch(batch, self._shard.padding, self._layouts.pad_values, self._sequence_dims)
        return super().split_entries(padded)

    @override
    def _follow_members(self, old: Members, new: Members) -> None:
        super()._follow_members(old, new)
        self._start_proof()  # what is trained now was not compared

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        together = self._verification.is_due or self._rehearses_with_replicas
        if self._verification.is_due or self._has_news():
            self._prove(args, self.data_group_of_run if together else None)
        self._verification.batch = None
        return super().training_step(*args, **kwargs)

    def _prove(self, args: tuple[Any, ...], replicas: dist.ProcessGroup | None) -> None:
        """Prove the step; with ``layout="auto"``, a balanced batch that cannot be trained exactly is split anew."""
        batch, requested = self._verification.batch, self._layouts.requested
        try:
            remedy = _ZIGZAG if requested == "balanced" else ""
            self._verification.prove(self._batch_proof(args[1:], replicas), replicas, remedy)
        except InexactError as refusal:
            balanced = self._shard.layout != self._place.layout
            if requested != "auto" or not first_of("balanced" if balanced else "", replicas):
                raise
            self._layouts.stay()
            self._split_anew(batch, args[0])
            self._prove_instead(args, replicas, refusal)
            if balanced and self._shard.rank == 0:
                warn_of_layout(refusal)

    def _split_anew(self, batch: Any, part: Any) -> None:
        """Let ``part``, which Lightning and callbacks have already, be this rank's of ``batch`` under the layout as it is now."""
        self.arrange(batch)
        self._on_host = batch
        new = dict(tensors_by_path(self.split_batch(batch)))
        self._on_host = None
        for path, x in tensors_by_path(part):
            if path in new:
                x.data = new[path]

    def _prove_instead(self, args: tuple[Any, ...], replicas: dist.ProcessGroup | None, refusal: InexactError) -> None:
        """Prove the step in the base layout; raise the ``refusal`` of another one where that fails as well."""
        try:
            self._verification.prove(self._batch_proof(args[1:], replicas), replicas)
        except InexactError:
            raise refusal from None
        report = self._verification.report
        assert report is not None
        if first_of(report.unverified, replicas):
            raise refusal

    @property
    def _rehearses_with_replicas(self) -> bool:
        sequence_group, data_group = self._shard.group, self.data_group_of_run
        if sequence_group is None or data_group is None:
            return False
        return self._parameters.rehearsing_group(sequence_group) is not sequence_group

    def _has_news(self) -> bool:
        """Whether the batch of this step shows what was not proved, or one that must be proved together with it."""
        news = self._verification.has_news
        if not (self._verification.wanted and self._rehearses_with_replicas):
            return news
        shown = torch.tensor(float(news), device=self.root_device)
        dist.all_reduce(shown, op=dist.ReduceOp.MAX)
        return bool(shown)

    def _batch_proof(self, more: tuple[Any, ...], replicas: dist.ProcessGroup | None = None) -> BatchProof:
        assert self.model is not None
        module, root, parameters = self._module, self.model, self._parameters
        step = module.training_step  # DistributedDataParallel would average the gradients of the whole batch as well
        if root is not module and not isinstance(root, DistributedDataParallel):
            step = partial(self._forward_redirection, root, module, "training_step")
        run = (self._shard, self.precision_plugin, self.root_device, self._pretend, self.split_batch)
        varies = first_of("balanced" if self._shard.assignment is not None else "", replicas)
        before = static_shard(self._shard) if varies else None
        rehearsal = Rehearsal(module, step, parameters, *run, more, before, self._shows_whole_split)
        return self._verification.batch_proof(rehearsal, self._sequence_dims)

    @contextmanager
    def _pretend(self, shard: SequenceShard) -> Generator[None, None, None]:
        """Pretend that the ranks of ``shard`` are all there are; on one device a module is as its user made it."""
        with pretend(self, shard), self._adapted.away() if shard.size == 1 else nullcontext():
            yield

    @override
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        rehearsal = self._verification.rehearsal
        if rehearsal is None or not rehearsal.is_running:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        rehearsal.backward(closure_loss, *args, **kwargs)
        return closure_loss

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self._verification.explains_failure("validation_step"):
            return super().validation_step(*args, **kwargs)
