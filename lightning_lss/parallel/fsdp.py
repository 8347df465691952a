"""Shard parameters, gradients and optimizer state evenly over the ranks with torch's ``fully_shard`` (FSDP2).

Every repeated block of a model is a *unit*. Its parameters are whole only during its forward and backward. Parameters
outside of units (embeddings, a head, weights that several modules share) belong to the root and are whole during a
step. Sharded tensors are torch's DTensors. Segment-local parameters are not sharded: a rank has only its own already.
"""

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lss.nn.recompute import outermost, repeated_blocks
from lightning_lss.parallel.members import Members
from lightning_lss.parallel.segment_local import SegmentLocal, average_over, not_zero
from lightning_lss.parallel.sharded_root import ShardedRoot, sharded_root
from lightning_lss.sequence.grid import SequenceGrid
from lightning_lss.sequence.segment import segment_local_names

Sharding = Literal["fsdp", "hybrid"]


def sharding_mesh(grid: SequenceGrid, sharding: Sharding, device_type: str) -> DeviceMesh:
    """Mesh of the ranks to shard over: all ranks, or for ``"hybrid"`` each sequence group, with D copies of the
    parameters."""
    if sharding == "hybrid" and grid.data_group is not None:
        return grid.device_mesh(device_type)  # [data, sequence]: fully_shard replicates over the first dimension
    everyone = dist.group.WORLD
    assert everyone is not None
    return DeviceMesh.from_group(everyone, device_type, mesh_dim_names=("world",))


def units_of(module: nn.Module, types: Collection[type[nn.Module]] | None = None) -> list[nn.Module]:
    """Find the units, in the order of the model: modules of ``types``, or the repeated blocks, whose parameters are gathered
    together.

    A module that shares a parameter with one outside of it (tied weights) is not a unit; its parameters belong to the
    root.
    """
    holders = _holders(module)
    if types is None:
        return repeated_blocks(module, lambda block: _is_closed(block, holders))
    return outermost(module, lambda _, child: isinstance(child, tuple(types)) and _is_closed(child, holders))


def _holders(module: nn.Module) -> Counter[int]:
    """Count the modules that hold each parameter, by the parameter's id."""
    holders: Counter[int] = Counter()
    for owner in module.modules():
        holders.update(id(x) for _, x in owner.named_parameters(recurse=False, remove_duplicate=False))
    return holders


def _is_closed(unit: nn.Module, holders: Counter[int]) -> bool:
    """Whether ``unit`` has parameters and no module outside of it holds any of them."""
    inside = _holders(unit)
    return bool(inside) and all(holders[key] == count for key, count in inside.items())


class FullyShard:
    """How :class:`~lightning_lss.LSSStrategy` treats parameters that are sharded over the ranks.

    :class:`~lightning_lss.parallel.replicated.Replicated` has the same methods. Gradients are sent and summed in
    ``reduce_dtype``, None for their own.
    """

    stay_on_device = True  # after a run, so that their process groups can gather them for a checkpoint
    keeps_frozen = False  # those of members() that are not sharded

    def __init__(
        self,
        sharding: Sharding,
        unit_types: Collection[type[nn.Module]] | None = None,
        broadcast_buffers: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self._sharding = sharding
        self._unit_types = unit_types
        self._broadcast_buffers = broadcast_buffers
        self._policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        self._root: ShardedRoot | None = None

    def check(self, module: pl.LightningModule, size: int, world_size: int) -> None:
        """Refuse a run whose parameters cannot be sharded over ``world_size`` ranks in sequence groups of ``size``.

        Raises:
            MisconfigurationException: if an earlier run has sharded them in another way, a callback averages or compares weights,
                ``"hybrid"`` has only one rank to shard over, or parameters have no values.
        """
        copies = self._sharding == "hybrid" and size < world_size  # sharded over one dimension, copied along another
        check_sharding(module, (world_size, 1 + copies))
        callbacks: list[pl.Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
        averaging = [x for x in callbacks if isinstance(x, (WeightAveraging, StochasticWeightAveraging))]
        if averaging:
            raise MisconfigurationException(
                f"{type(averaging[0]).__name__} keeps a copy of the whole model, but sharded parameters cannot be copied"
                f" (sharding={self._sharding!r}). Leave the callback out, or use sharding=None."
            )
        scalars = [name for name, x in module.named_parameters() if x.dim() == 0]
        apart = scalars + (segment_local_names(module) if size > 1 else [])
        if apart and any(isinstance(x, BaseFinetuning) for x in callbacks):
            raise MisconfigurationException(
                "Lightning's finetuning callbacks compare parameters with each other, but sharded ones cannot be compared with"
                f" those that are not ({', '.join(apart[:5])}: scalars and positional tables). Freeze and unfreeze in"
                " on_train_epoch_start, use RotaryEmbedding and one-element vectors, or use sharding=None."
            )
        if self._sharding == "hybrid" and size == 1 < world_size:
            raise MisconfigurationException(
                "sharding='hybrid' shards over the sequence group, but that has one rank (sequence_parallel_size=1). Use"
                " sharding='fsdp', which shards over all ranks."
            )
        without_values = [name for name, x in module.named_parameters() if x.is_meta]
        if without_values:
            raise MisconfigurationException(
                f"Parameters on the meta device have no values to start from: {', '.join(without_values[:5])}. Build them in"
                " configure_model without `torch.device('meta')`; they stay on the CPU until they are sharded."
            )

    def check_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse optimizers that do not work with sharded parameters.

        Raises:
            MisconfigurationException: for ``ZeroRedundancyOptimizer``, and ``foreach`` or ``fused`` with sharded and other
                parameters in one group.
        """
        for optimizer in optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                raise MisconfigurationException(
                    "ZeroRedundancyOptimizer shards the state of an optimizer, but it is sharded with its parameters already."
                    " Use the optimizer that it wraps."
                )
            for group in optimizer.param_groups:
                kinds = {isinstance(parameter, DTensor) for parameter in group["params"]}
                if len(kinds) > 1 and (group.get("foreach") or group.get("fused")):
                    raise MisconfigurationException(
                        f"{type(optimizer).__name__}(foreach=True) and fused=True do not take sharded parameters and others"
                        " (positional tables, scalars) in one group. Leave these options out, or give the others a group of"
                        " their own."
                    )

    def init_context(self) -> AbstractContextManager[Any]:
        """Return the context in which modules are built: on the CPU, since the rank's device never holds a whole one."""
        return torch.device("cpu")

    def layer_sync(self, module: nn.Module, layer_sync: LayerSync | None) -> LayerSync | None:
        """Drop ``layer_sync`` for a module that is sharded already: its layers were replaced before, and FSDP does not
        support it later."""
        return None if sharded_root(module) is not None else layer_sync

    def place(self, module: pl.LightningModule, local: SegmentLocal, device: torch.device) -> nn.Module:
        """Shard ``module``, unless an earlier run has, and return the root that runs its steps."""
        trainer = module.trainer
        evaluation = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
        for loop in (trainer.fit_loop.epoch_loop.val_loop, *evaluation):
            # FSDP allocates the memory of whole parameters once and cannot train with tensors that were made in inference
            # mode. (Lightning uses ``torch.no_grad`` with its own FSDP strategy too.)
            loop.inference_mode = False
        root = sharded_root(module)
        if root is None:
            mesh, units = sharding_mesh(local.grid, self._sharding, device.type), units_of(module, self._unit_types)
            root = ShardedRoot(module, units, mesh, device, local, self._policy, self._broadcast_buffers)
        # Outside of fitting, Lightning broadcasts all parameters and buffers that are not ignored. None needs it: shared
        # ones are equal already, and the others must differ.
        root._ddp_params_and_buffers_to_ignore = [*dict(root.named_parameters()), *dict(root.named_buffers())]  # type: ignore[assignment]
        self._root = root
        return root

    def register_hooks(self, should_sync: Callable[[], bool]) -> Iterable[RemovableHandle]:
        """Average the gradients of scalars over the world, since FSDP does not take scalars, and keep the root whole
        between the optimizer steps of manual optimization; return the hooks' handles."""
        assert self._root is not None
        assert dist.group.WORLD is not None
        trained = [x for x in self._root.scalars if x.requires_grad]
        scalars = [average_over(scalar, dist.group.WORLD, should_sync) for scalar in trained]
        return scalars + self._root.follow_manual_steps()

    def clipping_group(self, local: SegmentLocal) -> dist.ProcessGroup | None:
        """All ranks, since each holds different parts."""
        return dist.group.WORLD

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The sharded parameters, as optimizers hold them, also while modules hold whole ones."""
        assert self._root is not None
        return self._root.own_parameters

    def members(self, module: nn.Module) -> Members:
        """The parameters by name, and those whose gradients are averaged: the sharded ones always, since ``fully_shard``
        follows ``requires_grad`` itself, and others where they are trained."""
        assert self._root is not None
        self._root.share_requires_grad()
        parts = self._root.parts_of_whole()
        named = {name: parts.get(id(x), x) for name, x in module.named_parameters()}
        return Members(module, named, [x for x in named.values() if isinstance(x, DTensor) or x.requires_grad])

    def check_members(self, old: Members, new: Members) -> None:
        """Raise ``MisconfigurationException`` if parameters were added, which nobody would shard or reduce."""
        known = {id(x) for x in old.named.values()}
        added = [name for name, x in new.named.items() if id(x) not in known]
        if added:
            raise MisconfigurationException(
                f"{', '.join(added[:5])}: added after the parameters were sharded (sharding={self._sharding!r}), so nobody would"
                " average their gradients. Make them in __init__ or configure_model, frozen if need be and unfrozen later; or use"
                " sharding=None."
            )

    def before_backward(self, loss: Tensor) -> None:
        """Have the root's gradients reduced at the end of a manual backward from ``loss``, which its forward did not
        return."""
        if self._root is None:
            return
        self._root.share_requires_grad()
        if self._root.is_manual:
            fully_shard.state(self._root)._register_pre_backward_hook(loss)  # type: ignore[attr-defined]

    def reshard(self) -> None:
        """Reshard the root, whose parameters stay whole after a forward without backward."""
        if self._root is not None:
            self._root.reshard_own()

    def keep_for_checkpoint(self, tensor: Tensor) -> Any:
        """Return a tensor that was gathered for a checkpoint on the CPU of global rank 0, and None on other ranks:
        sharded models may not fit whole on every rank."""
        return tensor.cpu() if dist.get_rank() == 0 else None

    def hand_over(self, module: nn.Module) -> None:
        """Make the next ``module.state_dict()`` whole, for the process that spawned this one; every rank must call
        that."""
        module.register_state_dict_post_hook(_make_whole)

    @contextmanager
    def rehearse(self, module: nn.Module) -> Generator[dict[str, nn.Parameter], None, None]:
        """Set the gradients of the parameters aside and yield these by name; a step leaves gradients on them. Those that
        are zero get other values, as with ``Replicated``."""
        assert self._root is not None
        own = dict(zip((name for name, _ in module.named_parameters()), self._root.own_parameters))
        with _without_zeros(own.values()), self._root.passes_apart():
            yield {name: x for name, x in own.items() if x.requires_grad}

    def rehearsing_group(self, sequence_group: dist.ProcessGroup) -> dist.ProcessGroup:
        """The ranks that rehearse a step together: all, since FSDP sums over them."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def average(self, gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the gradient that a rehearsed step has left, which FSDP has averaged."""
        return gradient

    def release(self) -> None:
        """Forget the module at the end of a run."""
        self.reshard()
        self._root = None


@contextmanager
def _without_zeros(parameters: Iterable[nn.Parameter]) -> Generator[None, None, None]:
    """Fill parameters that are zero on all ranks with small random values; every rank must call it."""
    trained = [x for x in parameters if x.requires_grad]
    local = [x.to_local() if isinstance(x, DTensor) else x.detach() for x in trained]
    exist = torch.stack([x.any() for x in local]).to(torch.uint8)
    dist.all_reduce(exist, op=dist.ReduceOp.MAX)
    zero = [(x, part.detach()) for x, part, exists in zip(trained, local, exist.tolist()) if not exists]
    for parameter, part in zero:  # copies of a part get the same values
        place = parameter.device_mesh.get_coordinate() if isinstance(parameter, DTensor) else None
        part.copy_(not_zero(part, place[-1] if place else 0))
    try:
        yield
    finally:
        for _, part in zero:
            part.zero_()


def _make_whole(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    state.update({name: x.full_tensor().cpu() for name, x in state.items() if isinstance(x, DTensor)})


def check_sharding(module: nn.Module, wanted: tuple[int, int] | None) -> None:
    """Refuse parameters that an earlier run has sharded over another mesh than one of the ``wanted`` size and number of
    dimensions, if any; raise ``MisconfigurationException``."""
    root = sharded_root(module)
    by_others = root is None and any(isinstance(x, DTensor) for x in module.parameters())
    if by_others or (root is not None and (root.mesh.size(), root.mesh.ndim) != wanted):
        raise MisconfigurationException(
            "The parameters of this module are sharded in another way already. Make a new module, and load a checkpoint."
        )
