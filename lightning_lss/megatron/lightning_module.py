"""``MegatronTransformer``: the LSS Transformer's model, split over a tensor-parallel group."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.distributed.tensor import DTensor

from lightning_lss.megatron.parallelize import parallelize
from lightning_lss.megatron.strategy import MegatronStrategy
from lightning_lss.models.lightning_module import LSSTransformer


class MegatronTransformer(LSSTransformer):
    """:class:`~lightning_lss.LSSTransformer` for :class:`~lightning_lss.megatron.MegatronStrategy`; arguments and
    checkpoints are the same."""

    def configure_model(self) -> None:
        """Split the model over the ranks of the tensor-parallel group; without one, do nothing.

        Raises:
            MisconfigurationException: under any other ModelParallelStrategy than MegatronStrategy.
        """
        if self.device_mesh is None or isinstance(self.model.head.weight, DTensor):  # Lightning may call it again
            return
        if not isinstance(self.trainer.strategy, MegatronStrategy):
            raise MisconfigurationException(
                f"{type(self.trainer.strategy).__name__} would neither split batches along the sequence nor reduce the"
                " gradients. Use lightning_lss.megatron.MegatronStrategy: it is a ModelParallelStrategy and does both."
            )
        parallelize(self.model, self.device_mesh)
