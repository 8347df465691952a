"""Follow parameters that are frozen, unfrozen, added or removed while a run goes on.

Whoever averages gradients looks at a module once: DistributedDataParallel averages those of the parameters that were
trainable when it wrapped the module, and no others. Ranks would drift apart in silence. So the strategy compares the
module's members at the start of every batch, and arranges for their gradients anew where they have changed.
"""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_lss.parallel.segment_local import SegmentLocal
from lightning_lss.sequence.meeting import meet
from lightning_lss.sequence.segment import segment_modules


class Members:
    """The parameters and :class:`~lightning_lss.ShardedModule` objects of a module at one moment.

    Args:
        module: the module.
        named: its parameters by name, as optimizers hold them.
        averaged: those whose gradients are averaged over the ranks.
    """

    def __init__(self, module: nn.Module, named: Mapping[str, nn.Parameter], averaged: Iterable[nn.Parameter]) -> None:
        self.named = dict(named)
        self.modules = segment_modules(module)
        self.averaged = {id(x): x for x in averaged}  # kept alive, so that no other object gets an id of theirs

    def follows(self, old: "Members", keeps_frozen: bool) -> bool:
        """Whether what was arranged for ``old`` still holds; with ``keeps_frozen``, also where shared parameters are
        frozen now."""
        known = {id(x) for x in (*old.named.values(), *old.modules)}
        if any(id(x) not in known for x in (*self.named.values(), *self.modules)):
            return False
        more, fewer = self.averaged.keys() - old.averaged.keys(), old.averaged.keys() - self.averaged.keys()
        if keeps_frozen:
            fewer = fewer & {id(getattr(x, name, None)) for x in old.modules for name in x.segment_local}
        return not more and not fewer

    def check_ranks(self, timeout: timedelta | None) -> None:
        """Compare the members of all ranks.

        It takes no collective, since a rank without a change does not come here; it raises after ``timeout`` instead.

        Raises:
            MisconfigurationException: if the ranks have different members, or some have not changed theirs.
        """
        facts = [(name, tuple(x.shape), str(x.dtype), id(x) in self.averaged) for name, x in self.named.items()]
        digest = hashlib.blake2b(repr((facts, len(self.modules))).encode(), digest_size=16).hexdigest()
        if meet("members", dist.get_world_size(), digest, timeout) != dist.get_world_size():
            trained = [name for name, x in self.named.items() if id(x) in self.averaged]
            raise MisconfigurationException(
                f"The ranks do not train the same parameters from this step on (here {len(trained)} of {len(self.named)}:"
                f" {some(trained)}), so their gradients cannot be averaged. Freeze, unfreeze, add and remove parameters on"
                " all ranks before the same step: not by rank, nor by a value that differs between ranks."
            )

    def average_accumulated(self, old: "Members", local: SegmentLocal) -> None:
        """Average the gradients of parameters that are no longer averaged, which may be in the midst of an accumulation;
        every rank must call it.

        An optimizer still steps by such a gradient. One that has been averaged already does not change. Those of
        sharded parameters are complete after every backward pass.
        """
        left = [x for key, x in old.averaged.items() if key not in self.averaged and not isinstance(x, DTensor)]
        if not left:
            return
        exist = torch.tensor([x.grad is not None for x in left], dtype=torch.uint8, device=left[0].device)
        dist.all_reduce(exist, op=dist.ReduceOp.MAX)
        for parameter, exists in zip(left, exist.tolist()):
            own = any(parameter is x for x in local.parameters)
            group = local.grid.data_group if own else dist.group.WORLD
            if exists and group is not None:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(grad, group=group)
                parameter.grad = grad.div_(group.size())

    def check_gradients(self, now: "Members", optimizers: Iterable[Optimizer]) -> None:
        """Refuse gradients that nobody averages, after a backward pass.

        Raises:
            MisconfigurationException: if a parameter of the module ``now``, or of an optimizer, has such a gradient.
        """
        strangers = [name for name, x in now.named.items() if self._is_stranger(x)]
        if strangers:
            raise MisconfigurationException(
                f"{some(strangers)}: unfrozen or added during a training step, whose gradients would not be averaged over"
                " the ranks. Do it before the step: in on_train_epoch_start, on_train_batch_start or a callback's."
            )
        held = {id(x) for x in now.named.values()}
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        if any(self._is_stranger(x) and id(x) not in held for group in groups for x in group["params"]):
            raise MisconfigurationException(
                "An optimizer has a parameter that does not belong to the LightningModule, so its gradient would not be averaged"
                " over the ranks. Make it an attribute of the module, or of one of its submodules."
            )

    def _is_stranger(self, parameter: Tensor) -> bool:
        return parameter.requires_grad and parameter.grad is not None and id(parameter) not in self.averaged


def some(names: list[str]) -> str:
    """Join the first names of a list, and say how many there are beyond."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
