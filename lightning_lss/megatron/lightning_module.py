"""``MegatronTransformer``: the LSS Transformer's model, split over a tensor-parallel group."""

from __future__ import annotations

from torch.distributed.tensor import DTensor

from lightning_lss.megatron.parallelize import parallelize
from lightning_lss.models.lightning_module import LSSTransformer


class MegatronTransformer(LSSTransformer):
    """:class:`~lightning_lss.LSSTransformer` for :class:`~lightning_lss.megatron.MegatronStrategy`; arguments and
    checkpoints are the same."""

    def configure_model(self) -> None:
        """Split the model over the ranks of the tensor-parallel group; without one it is an LSSTransformer."""
        if self.device_mesh is not None and not isinstance(self.model.head.weight, DTensor):  # it may be called again
            parallelize(self.model, self.device_mesh)
