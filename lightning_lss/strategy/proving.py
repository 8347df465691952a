"""Which batches a strategy proves, and how it runs a step apart from the training."""

from functools import partial
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_lss.parallel.members import Members
from lightning_lss.proof.first_batch import FirstBatch
from lightning_lss.proof.passes import Rehearsal
from lightning_lss.proof.report import Report
from lightning_lss.strategy.averaging import GradientAveraging
from lightning_lss.strategy.sequence import SequenceParallel
from lightning_lss.strategy.verification import Verification, alone, suspects, warn_of_unverified


class ProvedRuns(SequenceParallel, GradientAveraging):
    """The part of :class:`~lightning_lss.LSSStrategy` that proves every run on its first batch, if it is to ``verify``."""

    def __init__(self, *args: Any, verify: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verification = Verification(verify)

    def _start_proof(self) -> None:
        self._verification.start(is_split=self._shard.size > 1)
        if self._shard.size > 1 and not self._verification.wanted and suspects(self._module):
            warn_of_unverified(self._module, "verify=False")

    @property
    def verification(self) -> Report | None:
        """What the proof of the last run found; None where there was none."""
        return self._verification.report

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self._verification.is_due:
            self._prove(args[1:])
        self._verification.forget()
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with self._verification.explains_failure("validation_step"):
            return super().validation_step(*args, **kwargs)

    @property
    @override
    def proves_batches(self) -> bool:
        return self._verification.wanted and self._module.trainer.state.fn == TrainerFn.FITTING

    @override
    def _follow_members(self, old: Members, new: Members) -> None:
        super()._follow_members(old, new)
        self._verification.start(is_split=self._shard.size > 1)  # what is trained now was not compared

    @override
    def split_batch(self, batch: Any) -> Any:
        if self._module.trainer.training:
            self._verification.keep(batch, self._shard, self._sequence_dims)
        return super().split_batch(batch)

    def _prove(self, more: tuple[Any, ...]) -> None:
        self._verification.prove(self._first_batch(more))

    def _first_batch(self, more: tuple[Any, ...]) -> FirstBatch:
        assert self._grid is not None
        assert self.model is not None
        module, root, parameters = self._module, self.model, self._parameters
        step = module.training_step
        if not isinstance(root, DistributedDataParallel):  # that would average the gradients of the whole batch as well
            step = partial(self._forward_redirection, root, module, "training_step")
        run = (self._shard, self.precision_plugin, self.root_device, partial(alone, self), self.split_batch)
        rehearsal = Rehearsal(module, step, parameters, *run, more)
        return self._verification.first_batch(
            rehearsal, self._sequence_dims, self._communication_dtype, self._grid.data_group
        )

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._verification.ends_manual_step(closure_loss)
        return super().backward(closure_loss, *args, **kwargs)
