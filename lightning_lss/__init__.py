"""Long Short-Sequence (LSS) Transformer training for PyTorch Lightning: one long sequence over many devices, exactly.

Importing the package registers the strategies ``"lss"``, ``"lss_fsdp"``, ``"lss_spawn"``, ``"lss_fork"`` and ``"lss_notebook"`` with
Lightning.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_lss.attention.functional import lss_attention
from lightning_lss.attention.masks import AttentionMask
from lightning_lss.attention.module import LSSAttention
from lightning_lss.integrations import huggingface
from lightning_lss.models.lightning_module import LSSTransformer
from lightning_lss.nn.convolution import SegmentConv1d
from lightning_lss.nn.dropout import SegmentDropout
from lightning_lss.nn.loss import linear_cross_entropy, token_mean
from lightning_lss.nn.metrics import BitsPerByte
from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.nn.rotary import RotaryEmbedding
from lightning_lss.planner import plan
from lightning_lss.proof.report import InexactError
from lightning_lss.sequence.segment import SequenceShard, ShardedModule, sequence_shard
from lightning_lss.strategy.adapters import ADAPTERS
from lightning_lss.strategy.lss import LSSStrategy
from lightning_lss.strategy.validation import refuse_other_lightning
from lightning_lss.tensor import SplitTensor
from lightning_lss.verifier import verify
from lightning_lss.version import __version__

__all__ = [
    "__version__",
    "AttentionMask",
    "BitsPerByte",
    "InexactError",
    "LSSAttention",
    "LSSStrategy",
    "LSSTransformer",
    "RotaryEmbedding",
    "SegmentConv1d",
    "SegmentDropout",
    "SegmentPositionalEmbedding",
    "SequenceShard",
    "ShardedModule",
    "SplitTensor",
    "linear_cross_entropy",
    "lss_attention",
    "plan",
    "sequence_shard",
    "token_mean",
    "verify",
]

LSSStrategy.register_strategies(StrategyRegistry)
ADAPTERS.append(huggingface.adapt)
refuse_other_lightning()
