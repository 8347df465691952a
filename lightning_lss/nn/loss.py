"""Cross entropy over long sequences, and the scale of a loss that ranks average."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_lss.sequence.dtypes import in_autocast_dtype

IGNORED = -100  # the target of a token that does not count, as in torch's ``cross_entropy``


def token_mean(loss_sum: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Scale this rank's loss so that its average over the world is (sum over all tokens) / (number of all tokens).

    DDP then averages gradients to those of the mean over all tokens. (An average of the ranks' own means differs from
    it where ranks count different numbers of tokens: padding, masked targets.) Every rank must call it.

    Args:
        loss_sum: sum of the losses of the local tokens, a scalar.
        num_tokens: number of local tokens that count; with 0 this rank contributes 0. ``loss_sum`` must depend on the
            model's output all the same: other ranks wait for this one in the backward pass of attention.

    Returns:
        a scalar of the dtype of ``loss_sum``; 0 if no rank has tokens.
    """
    count = torch.as_tensor(num_tokens, device=loss_sum.device).detach().to(torch.int64)
    total, world_size = count.clone(), 1
    if dist.is_available() and dist.is_initialized():
        world_size = dist.get_world_size()
        dist.all_reduce(total)
    counted = torch.where(count > 0, loss_sum, loss_sum.new_zeros(()))
    wide = counted.to(torch.promote_types(counted.dtype, torch.float32))  # in float16 the product would overflow
    return (wide * world_size / total.clamp(min=1)).to(loss_sum.dtype)


_LEAST_ROWS = 256  # of logits at a time: with fewer, memory bandwidth limits matrix multiplications


def linear_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross entropies of the logits ``features @ weight.T`` without holding all logits [N, V].

    Where the vocabulary V is larger than the width E, a few rows are computed at a time, with logits about as large as
    all ``features``, and their gradients with them (after Cut Your Losses, arXiv 2411.09009). In float32 and float64
    this is torch's own ``F.linear_cross_entropy`` where it exists (2.13); in lower precision it rounds the sum itself.

    Args:
        features: [N, E]; under autocast the product is computed in autocast's dtype.
        weight: [V, E].
        targets: int64 [N]; rows with the target :data:`IGNORED` do not count.

    Returns:
        a scalar: float64 for float64 features, else float32.
    """
    features, weight = in_autocast_dtype(features, weight)
    (rows, width), vocabulary = features.shape, weight.size(0)
    if vocabulary <= width:
        logits = F.linear(features, weight)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")
    at_a_time = max(1, min(rows, max(_LEAST_ROWS, rows * width // vocabulary)))
    own = not hasattr(F, "linear_cross_entropy") or torch.compiler.is_compiling()  # torch's breaks the graph
    if own or features.dtype not in (torch.float32, torch.float64):
        return _CrossEntropyByRows.apply(features, weight, targets, at_a_time, torch.is_grad_enabled())
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=at_a_time, chunking_method=None)
    return F.linear_cross_entropy(features, weight, targets, reduction="sum", ignore_index=IGNORED, options=options)


class _CrossEntropyByRows(torch.autograd.Function):
    """Sum of cross entropies with its gradients, ``rows`` rows of logits at a time.

    ======== ============================================ =====================================
    forward  features [N, E], weight [V, E], targets [N]  loss, and its gradients for backward
    backward gradient of the loss, a scalar               gradients [N, E] and [V, E] times it
    ======== ============================================ =====================================
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, rows: int, grad_enabled: bool) -> Tensor:
        loss = features.new_zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
        wanted = grad_enabled and any(ctx.needs_input_grad[:2])
        grad_features = torch.empty_like(features) if wanted else features
        grad_weight = torch.zeros_like(weight, dtype=loss.dtype) if wanted else weight
        for x, y, grad_x in zip(*(t.split(rows) for t in (features, targets, grad_features))):
            part, grad = _loss_of_rows(x, weight, y, wanted)
            loss += part
            if grad is not None:
                torch.mm(grad, weight, out=grad_x)
                grad_weight += grad.T @ x
                del grad  # before the next rows
        if wanted:
            # float16 overflows at the gradient of a sum over all tokens, until backward scales it to that of a mean
            narrow = weight.dtype != torch.float16
            ctx.save_for_backward(grad_features, grad_weight.to(weight.dtype) if narrow else grad_weight)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_features, grad_weight = ctx.saved_tensors
        return (grad_features * grad).to(grad_features.dtype), (grad_weight * grad).to(ctx.dtype), None, None, None


def _loss_of_rows(x: Tensor, weight: Tensor, targets: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum the cross entropies of some rows; also return the gradient with respect to their logits [rows, V]."""
    logits = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    counts = targets != IGNORED
    index = targets.where(counts, 0)[:, None]
    target = logits.gather(1, index)[:, 0]
    highest = logits.amax(-1)
    likelihoods = logits.sub_(highest[:, None]).exp_()
    total = likelihoods.sum(-1)
    loss = (highest + total.log() - target).where(counts, 0).sum()
    if not wants_grad:
        return loss, None
    grad = likelihoods.div_(total[:, None])  # probabilities, less one at the target
    grad.scatter_add_(1, index, grad.new_full((), -1.0).expand(index.shape))
    return loss, grad.mul_(counts[:, None]).to(x.dtype)
