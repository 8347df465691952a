"""Nvidia's sequence parallelism for the same model: the baseline of the LSS paper."""

from lightning_lss.megatron.lightning_module import MegatronTransformer
from lightning_lss.megatron.parallelize import parallelize
from lightning_lss.megatron.plan import MegatronScheme
from lightning_lss.megatron.strategy import MegatronStrategy

__all__ = ["MegatronScheme", "MegatronStrategy", "MegatronTransformer", "parallelize"]
