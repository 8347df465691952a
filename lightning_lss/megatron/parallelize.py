"""Nvidia's sequence parallelism for the same model, the baseline of the LSS Transformer's paper.

It is tensor parallelism, with norms, dropout and residuals on segments of the sequence (Megatron-LM, "Reducing
Activation Recomputation in Large Transformer Models", arXiv 2205.05198, section 4.2.2). The implementation is that of a
Lightning user today: a plan for torch's ``parallelize_module`` under Lightning's ``ModelParallelStrategy``. Attention
and MLP each gather the sequence, compute a part of the heads or of the hidden width, and scatter the sum. That makes
four collectives a layer forward and four backward, each of [B, L, E].
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

from lightning_lss.attention.module import LSSAttention
from lightning_lss.models.transformer import Head, Transformer, TransformerConfig
from lightning_lss.nn.dropout import SegmentDropout
from lightning_lss.nn.loss import linear_cross_entropy
from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.parallel.broadcast import broadcast_from_first
from lightning_lss.sequence.dtypes import in_autocast_dtype
from lightning_lss.sequence.layout import check_heads
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, ShardedModule

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""Names of the dimensions of Lightning's device mesh."""


def parallelize(model: Transformer, mesh: DeviceMesh) -> None:
    """Split ``model`` over the ranks of a tensor-parallel group, in place; every rank of the mesh must call it.

    Afterwards the model maps a rank's contiguous segment of the tokens, int64 [B, l], to its logits [B, l, V]. All
    parameters are DTensors on the mesh's tensor-parallel dimension and start from the values of its first rank.

    The group's loss is the *sum* of the losses of its ranks. Call :func:`reduce_gradients` between backward and the
    optimizer's step. (:class:`~lightning_lss.megatron.strategy.MegatronStrategy` does both.) As with torch's styles,
    autograd keeps the gathered inputs of attention and MLP.

    Args:
        model: the whole model.
        mesh: a mesh with the dimensions ``data_parallel`` and ``tensor_parallel``, such as Lightning's
            ``ModelParallelStrategy`` makes.

    Raises:
        ValueError: if heads, hidden width or learned positions cannot be divided evenly, before anything is sent.
    """
    tensor = mesh[TENSOR]
    check_sizes(model.config, tensor.size())
    for module in model.modules():
        if isinstance(module, SegmentDropout):  # the masks of the segments differ
            module.set_shard(SequenceShard(tensor.get_local_rank(), tensor.size(), "contiguous"))
        elif isinstance(module, LSSAttention):
            # gathers nothing; the configured head chunks may not divide its own heads
            module.head_chunks = "auto"
    if model.positions is not None:
        _keep_own_rows(model.positions, tensor)
    # The layers around the blocks work on segments with whole weights, and so does the loss.
    for layer in (model.embedding, model.norm):
        parallelize_module(layer, tensor, SequenceParallel(use_local_output=True))
    _keep_whole(model.head, tensor)
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight
    for block in model.blocks:
        _parallelize_block(block, model.config, tensor)
    # As in DDP every rank starts from the first one's weights; torch's styles broadcast only the weights they split.
    weights: list[Any] = [x.detach() for x in model.parameters()]  # DTensors
    broadcast_from_first((x._local_tensor for x in weights if x.placements[0].is_replicate()), tensor.get_group())
    broadcast_from_first((x._local_tensor for x in weights), mesh[DATA].get_group())


def check_sizes(config: TransformerConfig, size: int) -> None:
    """Raise ``ValueError`` if heads or hidden width cannot be divided evenly among ``size`` ranks."""
    check_heads(config.num_heads, size)
    if config.hidden_width % size:
        raise ValueError(
            f"The MLP's hidden width of {config.hidden_width} cannot be divided evenly among {size} tensor-parallel ranks. Set"
            f" mlp_width to a multiple of {size}, or change sequence_parallel_size."
        )


def _parallelize_block(block: nn.Module, config: TransformerConfig, tensor: DeviceMesh) -> None:
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    for name in ("attention", "mlp"):  # norms return float32 under autocast: twice the bytes for the same result
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs: in_autocast_dtype(*inputs))
    plan: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(use_local_output=True),
        "attention": gather,
        "attention.query": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(use_local_output=True),
        "mlp": gather,
        "mlp.up": ColwiseParallel(),
        "mlp.out": RowwiseParallel(output_layouts=Shard(1)),
    }
    if config.mlp == "swiglu":
        plan["mlp.gate"] = ColwiseParallel()
    if config.kv_heads % tensor.size() == 0:
        plan["attention.key_value"] = ColwiseParallel()
    else:  # each rank projects only those heads that its query heads attend to
        rows = 2 * config.head_dim  # of a head's key and value
        own_heads = own_key_value_heads(config, tensor.get_local_rank(), tensor.size())
        own_rows = [slice(head * rows, (head + 1) * rows) for head in own_heads]
        _keep_whole(block.get_submodule("attention.key_value"), tensor, own_rows)
    parallelize_module(block, tensor, plan)


def _keep_own_rows(table: SegmentPositionalEmbedding, tensor: DeviceMesh) -> None:
    """Let each rank hold and learn the rows of its segment in a learned positional table."""
    table.set_shard(SequenceShard(tensor.get_local_rank(), tensor.size(), "contiguous"))
    rows = DTensor.from_local(table.weight.detach(), tensor, [Shard(0)], run_check=False)
    ShardedModule.set_shard(table, WHOLE_SEQUENCE)  # as a DTensor the table is whole
    table.weight = nn.Parameter(rows)
    table.__class__ = _OwnRowsTable  # the parameter keeps its place and its name


class _OwnRowsTable(SegmentPositionalEmbedding):
    def forward(self, local_length: int) -> Tensor:
        assert isinstance(self.weight, DTensor)
        rows = self.weight.to_local()
        if local_length != rows.size(0):
            ranks = self.num_positions // rows.size(0)
            raise ValueError(
                f"A sequence of length {local_length * ranks} ({local_length} on each of {ranks} ranks) does not fit a"
                f" learned table of {self.num_positions} positions: under tensor parallelism it takes exactly that many. Use"
                " sequences of that length, set seq_len to the length of yours, or use positions='rotary', which takes any length."
            )
        return rows


def _keep_whole(linear: nn.Module, tensor: DeviceMesh, rows: Sequence[slice] = ()) -> None:
    """Let every rank hold the whole weight of a linear layer without bias, and apply the given rows (by default all) to
    its own tensors.

    ``SequenceParallel`` would also work for the head, but torch gathers the sequence in its backward pass.
    """
    assert isinstance(linear, nn.Linear)
    weight = distribute_tensor(linear.weight, tensor, [Replicate()])
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    linear.__class__ = _WholeWeightHead if isinstance(linear, Head) else _WholeWeightLinear
    assert isinstance(linear, _WholeWeightLinear)
    linear.rows = rows


class _WholeWeightLinear(nn.Linear):
    rows: Sequence[slice]

    def forward(self, x: Tensor) -> Tensor:
        weight = own_copy(self.weight)
        if self.rows:
            weight = torch.cat([weight[rows] for rows in self.rows])
        return F.linear(own_copy(x), weight)


class _WholeWeightHead(_WholeWeightLinear, Head):
    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(features, own_copy(self.weight), targets)


def own_key_value_heads(config: TransformerConfig, rank: int, size: int) -> list[int]:
    """List the key/value heads that the query heads of ``rank`` attend to: each once if all serve equally many query
    heads of the rank, else one for every query head."""
    queries, queries_per_head = config.num_heads // size, config.num_heads // config.kv_heads
    heads = [query // queries_per_head for query in range(rank * queries, (rank + 1) * queries)]
    distinct = sorted(set(heads))
    return distinct if len({heads.count(head) for head in distinct}) == 1 else heads


def own_copy(x: Tensor) -> Tensor:
    """Return this rank's copy of a replicated DTensor, and any other tensor unchanged; the DTensor's gradient is the
    sum of those of the copies."""
    return x.to_local(grad_placements=[Partial()]) if isinstance(x, DTensor) else x


def reduce_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Complete the gradients of a model that :func:`parallelize` has split over ``mesh``, after a backward pass; every
    rank of the mesh must call it.

    Each rank has computed its segment's part of the gradients of whole weights (norms, embedding, head). One all-reduce
    sums the parts of all of them, as Megatron-LM finalizes its gradients. Then all gradients are averaged over the
    data-parallel ranks.
    """
    with_grad: list[Any] = [x for x in parameters if x.grad is not None]  # DTensors
    parts = [x for x in with_grad if x.grad.placements[0].is_partial()]
    if parts:
        flat = torch.cat([x.grad._local_tensor.flatten() for x in parts])
        dist.all_reduce(flat, group=mesh[TENSOR].get_group())
        for x, total in zip(parts, flat.split([x.numel() for x in parts])):
            x.grad = DTensor.from_local(total.view(x.shape).to(x.dtype), mesh[TENSOR], [Replicate()], run_check=False)
    if mesh[DATA].size() > 1:
        grads, group = [x.grad._local_tensor for x in with_grad], mesh[DATA].get_group()
        pending = [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]
        for grad, work in zip(grads, pending):
            work.wait()
            grad /= group.size()
