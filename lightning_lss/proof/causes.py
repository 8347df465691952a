"""Say in words why an operation differs on a segment, and what to write instead."""

from collections.abc import Collection
from typing import NamedTuple

from lightning_lss.proof.operations import Fault


class Cause(NamedTuple):
    """Why a run is not the training of one device."""

    what: str
    """One sentence."""
    write: str
    """What to write, or to set, instead."""


POSITIONS = Cause(
    "Positions are counted from 0 on every rank: they are those of the segment, not of the sequence.",
    "positions = sequence_shard(self).positions(x.size(1), device=x.device), instead of torch.arange; for rotary embeddings"
    " lightning_lss.RotaryEmbedding, for a learned table lightning_lss.SegmentPositionalEmbedding.",
)
TABLE = Cause(
    "A positional table is indexed locally: every rank takes the first rows of {name}, which are those of the first positions"
    " of the sequence.",
    "{name} = lightning_lss.SegmentPositionalEmbedding(length, width), called with x.size(1); or index it by"
    " sequence_shard(self).positions(x.size(1)).",
)
LABELS = Cause(
    "Labels are shifted inside the step: the last token of a segment needs the first of the next, which is on another rank.",
    "inputs, targets = tokens[:, :-1], tokens[:, 1:] in the dataset or collate_fn, before the batch is split; or"
    " targets = sequence_shard(self).shift(tokens, 1, fill=-100).",
)
CONVOLUTION = Cause(
    "A convolution or pooling window reaches across the border of a segment, where its neighbour's tokens are on another rank.",
    "LSSStrategy(convert=True), or lightning_lss.SegmentConv1d instead of nn.Conv1d; for anything else shard ="
    " sequence_shard(self); y = shard.on_whole(conv, x, dim), with dim the dimension of the sequence.",
)
RECURRENCE = Cause(
    "A recurrence along the sequence starts anew in every segment.",
    "y = sequence_shard(self).on_whole(recurrent, x), which computes the whole sequence on every rank; or an attention layer in its"
    " place.",
)
POOLING = Cause(
    "Pooling over the tokens sees one segment only.",
    "shard = sequence_shard(self); shard.mean(x) or shard.sum(x); for other pooling shard.gather(x) instead of x.",
)
CLASS_TOKEN = Cause(
    "A class token, or one token for the whole sequence, is taken from, or added to, one segment only.",
    "shard = sequence_shard(self); take it by shard.first(x) or shard.last(x); put a class token into the data, before the split.",
)
NORMALIZATION = Cause(
    "Normalization over the tokens computes its statistics over one segment.",
    "LayerNorm or RMSNorm, which normalize each token; for batch normalization Trainer(sync_batchnorm=True); or"
    " shard = sequence_shard(self); shard.split(norm(shard.gather(x))).",
)
ATTENTION = Cause(
    "Attention that was not recognized: every token sees only those of its own segment.",
    "lightning_lss.LSSAttention(causal=...), or lightning_lss.lss_attention(q, k, v, shard=sequence_shard(self), causal=...).",
)
SPLIT_DIMENSION = Cause(
    "The batch entry {name} is cut along a dimension that is not the sequence: the channels of images, or features.",
    "LSSStrategy(sequence_dims={{{name!r}: 2}}), with its dimension of the sequence, or None to leave it whole; or"
    " shard_batch(self, batch, shard) on the LightningModule. Where no dimension is a sequence, use strategy='ddp'.",
)
FAILS = Cause(
    "The step fails on a segment of the batch, though not on the whole.",
    "what depends on the length of the sequence by sequence_shard(self); and LSSStrategy(sequence_dims={{key: dimension or None}})"
    " for batch entries whose dimension 1 is not the sequence, or shard_batch(self, batch, shard) on the LightningModule. Where no"
    " dimension is a sequence, use strategy='ddp'.",
)
SHOWN_WHOLE = Cause(
    "A function that the step calls on whole sequences does not give each rank its part of what one device computes.",
    "LSSStrategy(view='segment') and the parts of lightning_lss in the module; or strategy='ddp'. Every function should be exact"
    " when it is shown whole sequences, but for writing to a slice of one in place, and for padding on the left under Hugging Face's"
    " attn_implementation='eager', where rows that see no key count (pad on the right, or use 'sdpa'): please report any other.",
)
FAILS_SHOWN_WHOLE = Cause(
    "The step fails where its sequences are split, though not on one device.",
    "what the error says; or LSSStrategy(view='segment') and the parts of lightning_lss in the module; or strategy='ddp'.",
)
UNSPLIT = Cause(
    "The batch entry {name} has the whole sequence, since it was not split, and the other tensors have a segment.",
    "LSSStrategy(sequence_dims={{{name!r}: 0}}), with its dimension of the sequence.",
)
LENGTH_WEIGHT = Cause(
    "A weight of the sequence's length mixes the tokens, and a segment has only some of them.",
    "shard = sequence_shard(self); y = shard.split(layer(shard.gather(x))).",
)
RANDOM = Cause(
    "Random numbers are drawn for one segment: every rank draws the same ones.",
    "draw them for the whole sequence and take shard.split(numbers), with shard = sequence_shard(self), or draw them in the"
    " data; for dropout lightning_lss.SegmentDropout.",
)
ORDER = Cause(
    "An operation along the sequence ({operation}) sees one segment only.",
    "shard = sequence_shard(self); y = shard.split({operation}(shard.gather(x))).",
)
COUNTS = Cause(
    "The loss is a plain mean, and segments have different numbers of tokens that count: a mean of their means is not the mean.",
    "loss = token_mean(F.cross_entropy(logits, targets, reduction='sum'), (targets != -100).sum()), with"
    " lightning_lss.token_mean.",
)
SUM = Cause(
    "The loss is a sum over the segment. The ranks' losses are averaged, so that it is {times:.3g} times that of one device.",
    "loss = token_mean(loss_sum, num_tokens), with lightning_lss.token_mean; or the sum times sequence_shard(self).size.",
)
BACKWARD = Cause(
    "The outputs agree, but gradients do not: what one rank's loss owes to another rank's tokens is lost, or counted twice, in the"
    " backward pass.",
    "shard.gather(x), whose backward pass is exact, instead of torch.distributed's own collectives.",
)
UNKNOWN = Cause(
    "The result of {operation} on a segment is not this segment's part of the whole result.",
    "shard = sequence_shard(self); y = shard.split({operation}(shard.gather(x))).",
)

_OPERATIONS = {
    POSITIONS: "arange range linspace",
    RECURRENCE: "lstm gru rnn_tanh rnn_relu cumprod cummax cummin logcumsumexp lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
    CONVOLUTION: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d unfold max_pool1d max_pool2d"
    " avg_pool1d avg_pool2d interpolate diff max_pool1d_with_indices",
    NORMALIZATION: "batch_norm group_norm instance_norm std var std_mean var_mean",
    POOLING: "mean sum max min amax amin logsumexp adaptive_avg_pool1d adaptive_max_pool1d adaptive_avg_pool2d median norm",
    ATTENTION: "scaled_dot_product_attention multi_head_attention_forward native_multi_head_attention softmax triu tril"
    " transformer_encoder_layer_fwd",
    RANDOM: "rand randn rand_like randn_like randint randint_like bernoulli multinomial normal uniform randperm dropout",
    ORDER: "flip sort argsort fft rfft irfft ifft fft2 searchsorted",
}
_BY_OPERATION = {name: cause for cause, names in _OPERATIONS.items() for name in names.split()}
_SELECTIONS = {"getitem", "narrow", "select", "index_select", "chunk", "split", "take_along_dim", "gather", "unbind"}


def cause_of(fault: Fault, inputs: Collection[str]) -> Cause:
    """Return the cause of a fault; ``inputs`` are the names of the batch entries."""
    cause = _cause_of(fault, inputs)
    name = next((x.name for x in fault.arguments if x.name), "the table")
    fill = {"name": name, "operation": fault.operation.strip("_")}
    return Cause(*(text.format(**fill) for text in cause))


def _cause_of(fault: Fault, inputs: Collection[str]) -> Cause:
    name, arguments = fault.operation.strip("_"), fault.arguments
    unsplit = [x for x in arguments if x.name in inputs and x.shape == x.whole_shape]
    if unsplit and (fault.message or name in _SELECTIONS):
        return UNSPLIT
    if fault.message:
        return _cause_of_exception(fault, inputs)
    if name in ("pad", "roll", "cumsum"):
        tokens = not any(x.is_floating for x in arguments)
        return {"pad": (CONVOLUTION, LABELS), "roll": (ORDER, LABELS), "cumsum": (RECURRENCE, POSITIONS)}[name][tokens]
    if name in ("cat", "concat", "concatenate", "stack"):
        return CLASS_TOKEN
    if name in _SELECTIONS:
        return _cause_of_selection(fault)
    if name not in _BY_OPERATION and len(_grown(fault.shape, fault.whole_shape)) == 2:
        return ATTENTION  # scores of the segment's queries and keys, or a mask of that shape
    return _BY_OPERATION.get(name, UNKNOWN)


def _cause_of_selection(fault: Fault) -> Cause:
    source = fault.arguments[0] if fault.arguments else None
    if source is not None and source.shape == source.whole_shape:
        return TABLE
    return CLASS_TOKEN if fault.shape == fault.whole_shape else LABELS


def _cause_of_exception(fault: Fault, inputs: Collection[str]) -> Cause:
    cut = [x for x in fault.arguments if x.shape != x.whole_shape]
    if any(x.name in inputs for x in cut):
        return SPLIT_DIMENSION
    fixed = [x for x in fault.arguments if x.name and x.shape == x.whole_shape]
    if cut and fixed and fault.operation.strip("_") in ("add", "radd", "iadd", "mul", "rmul", "sub"):
        return TABLE
    return LENGTH_WEIGHT if cut and fixed else FAILS


def _grown(shape: tuple[int, ...], whole_shape: tuple[int, ...]) -> list[int]:
    """Return the dimensions in which the whole result is larger."""
    return [d for d, (own, whole) in enumerate(zip(shape, whole_shape)) if own != whole]
