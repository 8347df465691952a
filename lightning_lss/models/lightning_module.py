"""``LSSTransformer``: the LightningModule of the LSS Transformer."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_lss.attention.masks import AttentionMask
from lightning_lss.models.language import Batch, LanguageModule, OptimizerConfig, with_options
from lightning_lss.models.transformer import Block, ExecutionConfig, Transformer, TransformerConfig
from lightning_lss.nn.loss import IGNORED
from lightning_lss.sequence.segment import sequence_shard


class LSSTransformer(LanguageModule):
    """The LSS Transformer (arXiv 2311.02382): a decoder by default, an encoder with ``causal=False``.

    A batch is a dict of ``inputs`` and ``targets``, int64 [B, L]. Targets must be shifted already (targets[i] =
    inputs[i + 1]), since a shift after the split would lose a target at every border between chunks. Targets of -100 do
    not count. A further entry ``mask``, an :class:`~lightning_lss.AttentionMask`, says what each token sees, for example
    only its own document.

    It runs under any strategy. Under :class:`~lightning_lss.LSSStrategy` each rank works on its segment.

    Args:
        config: sizes of the model.
        optimizer: options of the optimizer and its schedule.
        execution: how a step is computed.
        bytes_per_token: mean number of bytes of text per token, for bits per byte; 1 where tokens are bytes.
        **options: fields of the three configurations by name, such as ``width=512, lr=1e-3, keep_gathered=True``. They
            override the fields of ``config``, ``optimizer`` and ``execution``.

    Raises:
        ValueError: if an option is out of range, or options are incompatible.
        TypeError: if an option is not a field of a configuration.
    """

    model: Transformer

    def __init__(
        self,
        config: TransformerConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        execution: ExecutionConfig | None = None,
        *,
        bytes_per_token: float = 1.0,
        **options: Any,
    ) -> None:
        given = (config or TransformerConfig(), optimizer or OptimizerConfig(), execution or ExecutionConfig())
        config, optimizer, execution = (with_options(part, options) for part in given)
        # flat, so that a checkpoint holds plain values and loads as LSSTransformer(**hparams)
        flat = {**asdict(config), **asdict(optimizer), **asdict(execution)}
        if options:
            raise TypeError(f"LSSTransformer does not take {', '.join(options)}. It takes {', '.join(flat)}.")
        super().__init__(Transformer(config, execution), optimizer, bytes_per_token)
        # what a subclass takes too; LightningCLI would have its own way to build the module from nested values
        self.save_hyperparameters(ignore=["config", "optimizer", "execution", "_instantiator"])
        self.save_hyperparameters({**flat, "bytes_per_token": bytes_per_token})
        self.execution = execution
        self._flops = 0.0

    @property
    def flops_per_batch(self) -> float | None:
        """Floating-point operations of this rank in the last training batch, for throughput monitors; None during
        evaluation."""
        return self._flops if self.training else None

    def setup(self, stage: str) -> None:
        """Compile the blocks with ``compile_blocks``, without graph breaks unless there is dropout."""
        for block in self.model.blocks if self.execution.compile_blocks else ():
            assert isinstance(block, Block)
            block.compile_forward(fullgraph=self.model.config.dropout == 0)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, mask: AttentionMask | None = None) -> Tensor:
        """Compute logits [B, l, V] of tokens, int64 [B, l]; with targets, int64 [B, l], the sum of their cross
        entropies instead. During a run under LSS tokens are this rank's segment, else whole sequences."""
        return self.model(tokens, targets, mask)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this rank's loss; its average over the ranks is the mean cross entropy over all tokens, in nats."""
        loss = super().training_step(batch, batch_idx)
        self._count_flops(batch)
        return loss

    @torch.compiler.disable  # a mask counts its pairs outside of any graph
    def _count_flops(self, batch: Batch) -> None:
        shard, (batch_size, local_length) = sequence_shard(self), batch["inputs"].shape
        length, chunks = shard.true_length(local_length), 1 if shard.padding else shard.num_chunks
        sizes = {"batch": batch_size, "heads": self.model.config.num_heads}
        pairs = [mask.visible_pairs(length, chunks, **sizes) for mask in _mask_of(batch).values()]
        self._flops = self.model.config.training_flops(batch_size, length, *pairs) / shard.size

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predict the most probable token at every position of the whole sequence, int64 [B, L], on every rank."""
        return sequence_shard(self).gather(self(batch["inputs"], **_mask_of(batch)).argmax(-1))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Group parameters for an optimizer, with weight decay only for the matrices of linear layers."""
        return self.model.parameter_groups(weight_decay)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum the cross entropies of the local tokens that count; also return their number."""
        return self(batch["inputs"], batch["targets"], **_mask_of(batch)), (batch["targets"] != IGNORED).sum()


def _mask_of(batch: Batch) -> dict[str, AttentionMask]:
    """The mask as an argument of ``forward``; nothing where there is none, since a subclass may not take any."""
    return {"mask": batch["mask"]} if isinstance(batch.get("mask"), AttentionMask) else {}
