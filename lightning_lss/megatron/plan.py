"""Plan Nvidia's sequence parallelism as a baseline."""

import lightning.pytorch as pl
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_lss.megatron.parallelize import DATA, TENSOR, check_sizes, parallelize, reduce_gradients
from lightning_lss.models.transformer import Transformer


class MegatronScheme:
    """A baseline for ``lightning_lss.plan(..., baselines=[MegatronScheme()])``; see
    :class:`lightning_lss.planner.Scheme`.

    It plans modules whose ``model`` is a :class:`~lightning_lss.models.transformer.Transformer`.
    """

    name = "megatron"

    def check(self, module: pl.LightningModule, length: int, size: int) -> None:
        """Raise ``ValueError`` if the model cannot be divided among ``size`` ranks."""
        check_sizes(_model_of(module).config, size)

    def prepare(self, module: pl.LightningModule, rank: int, group: dist.ProcessGroup) -> None:
        """Split the model over ``group``."""
        groups, ranks = [dist.new_group([rank]), group], [list(range(group.size()))]
        module._device_mesh = DeviceMesh.from_group(groups, "cpu", mesh=ranks, mesh_dim_names=(DATA, TENSOR))
        parallelize(_model_of(module), module._device_mesh)

    def after_backward(self, module: pl.LightningModule) -> None:
        """Sum the gradients of whole weights over the group."""
        assert module.device_mesh is not None
        reduce_gradients(module.parameters(), module.device_mesh)


def _model_of(module: pl.LightningModule) -> Transformer:
    model = getattr(module, "model", None)
    if not isinstance(model, Transformer):
        raise ValueError(f"{type(module).__name__} has no Transformer for Megatron to split: leave the baseline out.")
    return model
