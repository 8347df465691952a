"""The transformer as plain ``nn.Module``s, independent of launchers and strategies.

It is a pre-norm transformer like GPT-2, with later options: rotary positions (arXiv 2104.09864), SwiGLU (arXiv
2002.05202) and grouped-query heads (arXiv 2305.13245). On a segment of the sequence it returns that segment's logits:
attention is :class:`~lightning_lss.LSSAttention`, and every other layer works token by token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss.attention.masks import AttentionMask
from lightning_lss.attention.module import LSSAttention
from lightning_lss.attention.spec import HeadChunks, check_head_chunks
from lightning_lss.nn.dropout import SegmentDropout
from lightning_lss.nn.loss import linear_cross_entropy
from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.nn.recompute import ActivationCheckpointing, apply_checkpointing, apply_tiles
from lightning_lss.nn.rotary import RotaryEmbedding
from lightning_lss.sequence.layout import check_positive

Positions = Literal["learned", "rotary"]
MLP = Literal["gelu", "swiglu"]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and kinds of layers of a :class:`Transformer`.

    Args:
        vocab_size: vocabulary size V, 256 for bytes.
        seq_len: global sequence length L, the number of learned positions.
        width: model width E.
        num_layers: number of blocks.
        num_heads: query heads H; the head width is ``width / num_heads``.
        num_kv_heads: key/value heads G, a divisor of H; None for as many as query heads.
        positions: ``"learned"``, a segment-local table as in the paper, or ``"rotary"``.
        mlp: ``"gelu"`` or ``"swiglu"``.
        mlp_width: hidden width of the MLP; None for 4 E with GELU and 8/3 E, rounded up to a multiple of 64, with
            SwiGLU.
        causal: true for a decoder, false for an encoder, where every token sees all others.
        tie_embeddings: whether the output head is the embedding's transpose.
        dropout: probability of dropping an element of the embedding and of each residual branch.

    Raises:
        ValueError: if a size is not positive, sizes are incompatible, or a kind of layer is unknown.
    """

    vocab_size: int = 256
    seq_len: int = 4096
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    positions: Positions = "learned"
    mlp: MLP = "gelu"
    mlp_width: int | None = None
    causal: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "seq_len", "width", "num_layers", "num_heads", "kv_heads", "hidden_width")
        check_positive(**{name: getattr(self, name) for name in sizes})
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}.")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.kv_heads}.")
        for name, known in (("positions", get_args(Positions)), ("mlp", get_args(MLP))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose {' or '.join(map(repr, known))}.")

    @property
    def kv_heads(self) -> int:
        """Key/value heads G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Head width D."""
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        """Hidden width of the MLP."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // 3 // 64) * 64

    def training_flops(self, batch_size: int, length: int, pairs: float | None = None) -> float:
        """Count the floating-point operations of one training step, forward and backward, on ``batch_size`` sequences
        of ``length`` tokens with as many visible ``pairs`` each; None for what ``causal`` says.

        It counts matrix multiplications only, as for model FLOP/s utilization (PaLM, arXiv 2204.02311, appendix B): 6
        for each weight and token, and 12 E for each layer and visible query-key pair. A causal mask hides half of the
        pairs. The embedding look-up counts 0.
        """
        hidden_weights = self.hidden_width * (3 if self.mlp == "swiglu" else 2)
        projections = self.width * (2 * self.width + 2 * self.kv_heads * self.head_dim)
        weights = self.num_layers * (projections + self.width * hidden_weights) + self.width * self.vocab_size
        if pairs is None:
            pairs = length**2 / (2 if self.causal else 1)
        return batch_size * (6.0 * weights * length + 12.0 * self.num_layers * self.width * pairs)


@dataclass(frozen=True)
class ExecutionConfig:
    """How a step of a :class:`Transformer` is computed; no option changes the result.

    Args:
        head_chunks: number of parts in which the key/value heads are gathered, a divisor of their number, or
            ``"auto"``. More parts need less memory and send smaller messages. See :func:`lightning_lss.lss_attention`.
        keep_gathered: keep gathered keys and values for the backward pass; see :func:`lightning_lss.lss_attention`.
        activation_checkpointing: what autograd keeps of a block: ``"none"`` (everything it asks for), ``"full"``,
            ``"selective"`` or ``"offload"``; see :func:`lightning_lss.nn.recompute.apply_checkpointing`.
        mlp_tiles: number of parts along the sequence in which the MLP is computed; the backward pass computes each part
            again. It lowers the peak where one block's hidden MLP activations dominate it, as with checkpointing.
        compile_blocks: compile each block with ``torch.compile``, without graph breaks unless there is dropout.
    """

    head_chunks: HeadChunks = "auto"
    keep_gathered: bool = False
    activation_checkpointing: ActivationCheckpointing = "none"
    mlp_tiles: int = 1
    compile_blocks: bool = False


class SelfAttention(nn.Module):
    """Attention and its projections: [B, l, E] -> [B, l, E]."""

    def __init__(self, config: TransformerConfig, execution: ExecutionConfig, rotary: RotaryEmbedding | None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key_value = nn.Linear(config.width, 2 * config.kv_heads * config.head_dim, bias=False)
        self.rotary = rotary
        self.attention = LSSAttention(
            config.causal, head_chunks=execution.head_chunks, keep_gathered=execution.keep_gathered
        )
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, **mask: AttentionMask) -> Tensor:
        """Attend from each local token to what it sees of the whole sequence; a ``mask`` is handed to attention."""
        q = self.query(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, l, D]
        # key and value of a head side by side, so that heads can be split over ranks (tensor parallelism)
        k, v = self.key_value(x).unflatten(-1, (-1, 2, self.head_dim)).permute(3, 0, 2, 1, 4)  # [B, G, l, D] each
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        return self.out(self.attention(q, k, v, **mask).transpose(1, 2).flatten(2))


class MLPBlock(nn.Module):
    """Two layers with GELU, or three with SwiGLU: [B, l, E] -> [B, l, E]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_width
        self.gate = nn.Linear(width, hidden, bias=False) if config.mlp == "swiglu" else None
        self.up = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself."""
        return self.out(F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm layer: attention and MLP, each with a residual connection."""

    def __init__(self, config: TransformerConfig, execution: ExecutionConfig, rotary: RotaryEmbedding | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config, execution, rotary)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLPBlock(config)
        self.dropout = SegmentDropout(config.dropout)
        self._compiled: Callable[..., Tensor] | None = None

    def compile_forward(self, **options: Any) -> None:
        """Compile the block with ``torch.compile(**options)``, without the hooks around it, since those of FSDP cannot
        be traced."""
        self._compiled = torch.compile(self._forward, **options)

    def __getstate__(self) -> dict[str, Any]:  # compiled code belongs to this object and this process
        return {**super().__getstate__(), "_compiled": None}

    def forward(self, x: Tensor, **mask: AttentionMask) -> Tensor:
        """Apply attention and MLP: [B, l, E] -> [B, l, E]; a ``mask`` is handed to attention."""
        return self._forward(x, **mask) if self._compiled is None else self._compiled(x, **mask)

    def _forward(self, x: Tensor, **mask: AttentionMask) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), **mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Head(nn.Linear):
    """Map features [..., E] to logits [..., V], or to their loss without holding all logits."""

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Sum the cross entropies of features [N, E] with targets, int64 [N]; see
        :func:`~lightning_lss.linear_cross_entropy`."""
        return linear_cross_entropy(features, self.weight, targets)


class Transformer(nn.Module):
    """Map tokens of a segment to logits: int64 [B, l] -> [B, l, V].

    Raises:
        ValueError: if an option of ``execution`` is out of range, or its head chunks do not divide the key/value heads.
    """

    def __init__(self, config: TransformerConfig, execution: ExecutionConfig | None = None) -> None:
        super().__init__()
        execution = execution or ExecutionConfig()
        check_positive(mlp_tiles=execution.mlp_tiles)
        check_head_chunks(execution.head_chunks, config.kv_heads, execution.keep_gathered)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.positions = SegmentPositionalEmbedding(config.seq_len, config.width) if learned else None
        self.rotary = None if learned else RotaryEmbedding(config.head_dim)  # one for all layers
        self.dropout = SegmentDropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, execution, self.rotary) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = Head(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        # as in GPT-2: layers that add to the residual stream start smaller
        residual_std = 0.02 / (2 * config.num_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=residual_std if name.endswith(".out") else 0.02)
        apply_tiles([block.get_submodule("mlp") for block in self.blocks], execution.mlp_tiles)
        apply_checkpointing(self.blocks, execution.activation_checkpointing)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, mask: AttentionMask | None = None) -> Tensor:
        """Compute logits [B, l, V] of the local tokens, int64 [B, l]; with targets, int64 [B, l], the sum of their
        cross entropies instead. A mask takes the place of the configuration's ``causal``."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(tokens.size(1))
        if self.rotary is not None:
            self.rotary.prepare(x)
        x = self.dropout(x)
        # by name and only if there is one: hooks and other kinds of attention know q, k and v alone
        given = {} if mask is None else {"mask": mask}
        for block in self.blocks:
            x = block(x, **given)
        x = self.norm(x)
        return self.head(x) if targets is None else self.head.loss(x.flatten(0, 1), targets.flatten())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Group parameters for an optimizer, with weight decay only for the matrices of linear layers."""
        linear = {m.weight for m in self.modules() if isinstance(m, nn.Linear)}
        linear -= {m.weight for m in self.modules() if isinstance(m, nn.Embedding)}  # a tied head is an embedding
        decayed, others = ([p for p in self.parameters() if (p in linear) == decays] for decays in (True, False))
        return [
            {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
            {"name": "others", "params": others, "weight_decay": 0.0},
        ]
