"""What is planned for: how many ranks of which kind train on what, and the options that change memory or time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_lss.attention.kernels import KERNELS
from lightning_lss.attention.spec import check_head_chunks, choose_head_chunks
from lightning_lss.models.transformer import TransformerConfig
from lightning_lss.nn.loss import logit_rows
from lightning_lss.sequence.layout import LAYOUTS, check_length, check_positive

Scheme = Literal["lss", "megatron"]
SCHEMES: tuple[str, ...] = get_args(Scheme)


@dataclass(frozen=True)
class Precision:
    """Bytes of a number, by Lightning's name of a precision.

    Args:
        parameter: of parameters, gradients and optimizer moments.
        residual: of the sum that runs through the layers, and of the inputs of the norms.
        compute: of what matrix multiplications and attention read and write.
    """

    name: str
    parameter: int
    residual: int
    compute: int


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("64-true", 8, 8, 8),
        Precision("32-true", 4, 4, 4),
        Precision("bf16-true", 2, 2, 2),
        Precision("16-true", 2, 2, 2),
        Precision("bf16-mixed", 4, 4, 2),
        Precision("16-mixed", 4, 4, 2),
    )
}


@dataclass(frozen=True)
class Options:
    """Choices that change a rank's memory, traffic or time and are neither the model's sizes nor the number of ranks.

    Args:
        precision: a name in :data:`PRECISIONS`, as Lightning's Trainer takes it.
        layout: how LSS splits a sequence, ``"zigzag"`` or ``"contiguous"``.
        communication_dtype: ``"bfloat16"`` or ``"float16"``, in which keys, values and gradients travel under LSS; None
            for the dtype that they have.
        accumulate_grad_batches: batches of one step, one after the other.
        head_chunks: in how many parts LSS gathers the key/value heads; None for the model's.
        activation_checkpointing: ``"none"``; ``"full"`` keeps the input of each block; ``"selective"`` keeps what
            attention returns as well; ``"offload"`` is full with the inputs in host memory. None for the model's.
        mlp_tiles: in how many tiles along the sequence an MLP is computed, and computed again in the backward pass; None for
            the model's.
        loss_rows: rows of logits that exist at a time; None for what the loss chooses by itself.
        sharding: None, every rank has all parameters; ``"fsdp"``, parameters, gradients and optimizer state are spread over
            all ranks; ``"hybrid"``, over the ranks of a sequence group.
        ddp: whether DistributedDataParallel keeps buckets of gradients beside the gradients.
        gradient_as_bucket_view: whether its buckets are the gradients.
        kernel: name of the kernel of attention, see :data:`lightning_lss.attention.kernels.KERNELS`.
        optimizer_temporaries: what AdamW makes during its step: ``"largest"``, two tensors of the size of the largest
            parameter (on a CPU); ``"all"``, one of the size of all parameters (on a GPU); ``"none"`` (fused).
        explicit_scores: whether attention writes out its matrix of scores, as before FlashAttention; it is then kept for the
            backward pass together with the probabilities.
        fractional_heads: let Megatron split heads and widths over more ranks than there are heads, which no
            implementation can: a bound that favours it.
    """

    precision: str = "32-true"
    layout: str = "zigzag"
    communication_dtype: str | None = None
    accumulate_grad_batches: int = 1
    head_chunks: int | None = None
    activation_checkpointing: str | None = None
    mlp_tiles: int | None = None
    loss_rows: int | None = None
    sharding: str | None = None
    ddp: bool = True
    gradient_as_bucket_view: bool = False
    kernel: str = "cpu_flash"
    optimizer_temporaries: str = "largest"
    explicit_scores: bool = False
    fractional_heads: bool = False

    def __post_init__(self) -> None:
        known = {
            "precision": PRECISIONS,
            "layout": LAYOUTS,
            "communication_dtype": (None, "bfloat16", "float16"),
            "activation_checkpointing": (None, "none", "full", "selective", "offload"),
            "sharding": (None, "fsdp", "hybrid"),
            "kernel": KERNELS,
            "optimizer_temporaries": ("largest", "all", "none"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(map(str, values))}."
                )
        counts = ("accumulate_grad_batches", "mlp_tiles", "loss_rows", "head_chunks")
        check_positive(**{name: getattr(self, name) for name in counts if getattr(self, name) is not None})


def unsharded(options: Options) -> Options:
    """The same for Megatron, which averages gradients where they are and has shared out every parameter already."""
    return replace(options, ddp=False, sharding=None)


@dataclass(frozen=True)
class Setup:
    """One way to train a model: a scheme on D x S ranks.

    Args:
        config: the model; its ``seq_len`` is of no account.
        scheme: ``"lss"``, or ``"megatron"``: tensor parallelism with sequence-sharded norms (arXiv 2205.05198), the
            baseline of the LSS paper.
        data_size: D, batches in flight.
        size: S, ranks that share a sequence.
        seq_len: global sequence length L.
        batch_size: sequences B that a sequence group trains on at a time.

    Raises:
        ValueError: if the sizes do not fit together, saying in one sentence which.
    """

    config: TransformerConfig
    scheme: Scheme
    data_size: int
    size: int
    seq_len: int
    batch_size: int = 1
    options: Options = Options()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme={self.scheme!r} is unknown: choose one of {', '.join(SCHEMES)}.")
        check_positive(data_size=self.data_size, size=self.size, seq_len=self.seq_len, batch_size=self.batch_size)
        if self.scheme == "lss":
            check_length(self.seq_len, self.size, self.options.layout)
            self._check_head_chunks()
            self._check_sharding()
        else:
            self._check_tensor_parallel()
            if self.options.sharding is not None:
                raise ValueError(
                    f"sharding={self.options.sharding!r} goes with LSS only: MegatronStrategy shares out parameters by itself."
                )

    def _check_head_chunks(self) -> None:
        if self.options.head_chunks is not None:
            check_head_chunks(self.options.head_chunks, self.config.kv_heads, self.config.keep_gathered)

    def _check_sharding(self) -> None:
        if self.options.sharding == "hybrid" and self.size == 1 < self.data_size:
            raise ValueError("sharding='hybrid' shards over the sequence group, which has one rank here: use 'fsdp'.")

    def _check_tensor_parallel(self) -> None:
        shared = {"seq_len": self.seq_len}
        if not self.options.fractional_heads:
            shared |= {"num_heads": self.config.num_heads, "hidden width": self.config.hidden_width}
        for name, count in shared.items():
            if count % self.size:
                raise ValueError(
                    f"Megatron cannot share {name}={count} out over {self.size} ranks: use a size that divides it."
                )

    @property
    def world_size(self) -> int:
        """W = D x S."""
        return self.data_size * self.size

    @property
    def local_tokens(self) -> int:
        """Tokens of a rank, B x l."""
        return self.batch_size * self.seq_len // self.size

    @property
    def shards(self) -> int:
        """Over how many ranks each parameter is sharded."""
        return {None: 1, "hybrid": self.size, "fsdp": self.world_size}[self.options.sharding]

    @property
    def precision(self) -> Precision:
        """Bytes of the numbers involved."""
        return PRECISIONS[self.options.precision]

    def travelling(self, size: int) -> int:
        """Bytes in which a number of ``size`` bytes, of keys, values or gradients, travels between ranks."""
        return size if self.scheme == "megatron" or self.options.communication_dtype is None else 2

    @property
    def sequences(self) -> int:
        """Sequences of a step in all."""
        return self.data_size * self.batch_size * self.options.accumulate_grad_batches

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values: G x D. Where Megatron has more ranks than there are key/value heads, ranks have
        some of them twice."""
        heads = self.config.kv_heads
        if self.scheme == "megatron" and not self.options.fractional_heads:
            heads = max(heads, self.size)
        return heads * self.config.head_dim

    @property
    def activation_checkpointing(self) -> str:
        """The choice in force."""
        chosen = self.options.activation_checkpointing
        return self.config.activation_checkpointing if chosen is None else chosen

    @property
    def head_chunks(self) -> int:
        """In how many parts LSS gathers the key/value heads of a layer."""
        chosen = self.config.head_chunks if self.options.head_chunks is None else self.options.head_chunks
        if chosen != "auto":
            return chosen
        sent = 2 * self.local_tokens * self.kv_width * self.precision.compute
        return choose_head_chunks(self.config.kv_heads, sent, self.config.keep_gathered)

    @property
    def mlp_tiles(self) -> int:
        """The choice in force."""
        chosen = self.options.mlp_tiles
        return self.config.mlp_tiles if chosen is None else chosen

    @property
    def loss_rows(self) -> int:
        """Rows of logits that exist at a time."""
        chosen = logit_rows(self.local_tokens, self.config.width, self.config.vocab_size)
        return min(self.local_tokens, chosen if self.options.loss_rows is None else self.options.loss_rows)

    @property
    def chunked_loss(self) -> bool:
        """Whether the loss computes its gradients together with its value, chunk by chunk of rows."""
        return self.options.loss_rows is not None or self.config.vocab_size > self.config.width
