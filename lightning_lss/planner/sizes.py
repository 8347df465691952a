"""Bytes of the tensors of a training step."""

from __future__ import annotations

from lightning_lss.planner.parameters import count
from lightning_lss.planner.setup import Setup


class Sizes:
    """Bytes of a rank's tensors, by what they are.

    ``rows`` are the tokens that the matrices of attention and MLP see and ``shares`` the ranks that share out their heads
    and hidden widths: (N, 1) under LSS, (B x L, S) under Megatron, where N = B x l are the local tokens.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config, self.options = setup, setup.config, setup.options
        self.parameters = count(setup)
        self.tensor_parallel = setup.scheme == "megatron" and setup.size > 1
        self.split = setup.scheme == "lss" and setup.size > 1
        self.tokens = setup.local_tokens
        self.rows = setup.batch_size * setup.seq_len if self.tensor_parallel else self.tokens
        self.shares = setup.size if self.tensor_parallel else 1
        self.chunks = setup.head_chunks
        self.cast = setup.precision.compute < setup.precision.residual  # autocast

    @property
    def stream(self) -> float:
        """The residual stream [B, l, E]."""
        return self.tokens * self.config.width * self.setup.precision.residual

    @property
    def local(self) -> float:
        """[B, l, E] in the dtype of computation."""
        return self.tokens * self.config.width * self.setup.precision.compute

    def shared(self, width: float) -> float:
        """[rows, width / shares] in the dtype of computation."""
        return self.rows * width / self.shares * self.setup.precision.compute

    @property
    def gathered(self) -> float:
        """What Megatron's matrices read, [B, L, E]; under LSS [B, l, E]."""
        return self.rows * self.config.width * self.setup.precision.compute

    @property
    def statistics(self) -> float:
        """Mean and inverse deviation of each token in one norm."""
        return 2 * self.tokens * max(4, self.setup.precision.residual)

    @property
    def keys_values(self) -> float:
        """Keys and values of the rank's own tokens and heads."""
        return self.shared(2 * self.setup.kv_width)

    @property
    def chunk(self) -> float:
        """One chunk of keys and values of the whole sequence."""
        return self.setup.size * self.keys_values / self.chunks

    @property
    def hidden(self) -> float:
        """A tensor of the hidden width, of one tile of the sequence."""
        return self.shared(self.config.hidden_width) / self.setup.mlp_tiles

    @property
    def logits(self) -> float:
        """As many rows of [N, V] as exist at a time, never less than float32; Megatron's head is not shared out."""
        return self.setup.loss_rows * self.config.vocab_size * max(4, self.setup.precision.compute)
