"""Attention of one tile by FlexAttention (arXiv 2412.05496), which torch compiles to Triton kernels for CUDA; for the
signatures see :mod:`lightning_lss.attention.kernels`.

What torch expects, from its sources (``torch/_inductor/kernel/flex``): heads of at least 16 numbers (Triton multiplies no
smaller matrices). It rounds other widths up to a power of 2 in the kernel, but knows block sizes only for powers of 2 up
to 256, and others may not fit into shared memory; heads are therefore padded here. Any number of rows and keys will do.
Fewer than 128 rows go to a kernel of its own, for decoding, unless it is turned off, as here. Sizes are dynamic, heads and
widths are compiled for; numbers that a function of the scores reads must be tensors or constants. A row that sees no key
gets 0 and minus infinity.

torch's backward pass takes the output and the log-sum-exp of the tile. Those of the whole row are handed to ours. With
``w = exp(lse_of_tile - lse)``, the gradients ``w * grad`` of the tile's output and ``w * grad . (out_of_tile - out)`` of
its log-sum-exp give the tile's contribution.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.utils._python_dispatch import _disable_current_modes

from lightning_lss.attention.kernels.scores import Scores

TAKES = frozenset({"bias", "softcap", "windows", "offset_diagonal"})
WIDEST_HEAD = 256
_NARROWEST_HEAD = 16
# FlexAttention computes what a diagonal hides, unless a table of blocks says otherwise. A tile with a diagonal is therefore
# computed in strips of this many rows, each over the keys that some of its rows see.
_ROWS = 1024
_FAR = 2**30
# torch compiles for each combination of what is there (bias, diagonals, gradients), of constants, and of sizes that are 1,
# equal or neither. Where it would stop, at 8 of them, it would raise an error.
_MOST_VARIANTS = 256

Gradients = tuple[Tensor, Tensor, Tensor]


def is_available() -> bool:
    """Return whether this machine can compile the kernel for CUDA."""
    from torch.utils._triton import has_triton  # starts CUDA

    return torch._dynamo.is_dynamo_supported() and has_triton()


class _Part(NamedTuple):
    """Some rows of a tile and the keys that they see: row i sees key j where low <= i - j <= high."""

    rows: slice
    keys: slice
    limits: tuple[int, int] | None = None


def _parts(scores: Scores, m: int, n: int) -> Iterator[_Part]:
    """Cut a tile with a diagonal to strips; rows that see nothing are left out."""
    left, right = scores.band()
    if left < 0 and right < 0:
        yield _Part(slice(0, m), slice(0, n))
        return
    for start in range(0, m, _ROWS):
        stop = min(start + _ROWS, m)
        first = 0 if left < 0 else max(0, start + n - m - left)
        last = n if right < 0 else min(n, stop + n - m + right)
        shift = first - start - (n - m)
        limits = -_FAR if right < 0 else shift - right, _FAR if left < 0 else shift + left
        if first < last:
            yield _Part(slice(start, stop), slice(first, last), limits)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    limits: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """What is compiled: attention of a part, with its bias and the limits of its diagonals, int32 [2]."""
    low, high = (None, None) if limits is None else limits.unbind()

    def change(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            # sizes of 1 are known when it is compiled
            score = (
                score + bias[batch if bias.size(0) > 1 else 0 * batch, head if bias.size(1) > 1 else 0 * head, row, key]
            )
        if low is not None and high is not None:
            score = torch.where((row - key >= low) & (row - key <= high), score, float("-inf"))
        return score

    options: Any = {"FORCE_USE_FLEX_ATTENTION": True}  # not the kernel for decoding
    out, others = flex_attention(
        q, k, v, change, scale=scale, enable_gqa=True, kernel_options=options, return_aux=AuxRequest(lse=True)
    )
    assert others.lse is not None
    return out, others.lse


compile_function: Any = partial(torch.compile, fullgraph=True, dynamic=True)
"""How :func:`_attend` is compiled: tests replace it."""


@cache
def _compiled() -> Any:
    return compile_function(_attend)


@lru_cache(maxsize=1024)
def _limits(limits: tuple[int, int], device: torch.device) -> Tensor:
    return torch.tensor(limits, dtype=torch.int32, device=device)


def _compute(q: Tensor, k: Tensor, v: Tensor, scores: Scores, part: _Part) -> tuple[Tensor, Tensor]:
    """Attention of the padded queries, keys and values of a part."""
    # copies, or torch compiles anew for other relations of strides and sizes
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    bias = None if scores.bias is None else scores.bias[:, :, part.rows, part.keys].contiguous()
    limits = None if part.limits is None else _limits(part.limits, q.device)
    try:
        # torch makes floats symbols, and then does not take them
        with torch._dynamo.config.patch(specialize_float=True, recompile_limit=_MOST_VARIANTS):
            return _compiled()(q, k, v, bias, limits, scores.scale, scores.softcap)
    except Exception as error:
        error.add_note("kernel='flex' could not be compiled or run here. Use kernel='reference'.")
        raise


def _padded(*tensors: Tensor) -> list[Tensor]:
    """Pad heads with zeros to a power of 2."""
    widths = [max(_NARROWEST_HEAD, 1 << (x.size(-1) - 1).bit_length()) for x in tensors]
    return [F.pad(x, (0, width - x.size(-1))) if x.size(-1) < width else x for x, width in zip(tensors, widths)]


def forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Call FlexAttention."""
    m, n = q.size(2), k.size(2)
    assert scores.needs(m, n) <= TAKES
    padded_q, padded_k, padded_v = _padded(q.detach(), k.detach(), v.detach())
    out = q.new_zeros(*q.shape[:3], v.size(-1))
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for part in _parts(scores, m, n):
        keys = padded_k[:, :, part.keys], padded_v[:, :, part.keys]
        with _outermost(with_grad=False):
            own_out, own_lse = _compute(padded_q[:, :, part.rows], *keys, scores, part)
        out[:, :, part.rows] = own_out[..., : v.size(-1)]
        lse[:, :, part.rows] = own_lse
    return out, lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores) -> Gradients:
    """Compute the adjoint of :func:`forward`."""
    m, n = q.size(2), k.size(2)
    assert scores.needs(m, n) <= TAKES
    padded_grad, padded_q, padded_k, padded_v, padded_out = _padded(grad, q, k, v, out)
    grad_q = torch.zeros_like(q)
    # each addition to a sum in half precision rounds it
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    for part in _parts(scores, m, n):
        grad_of_rows, out_of_rows, q_of_rows = (x[:, :, part.rows] for x in (padded_grad, padded_out, padded_q))
        leaves = [q_of_rows, padded_k[:, :, part.keys], padded_v[:, :, part.keys]]
        own = _backward_of_part(grad_of_rows, leaves, out_of_rows, lse[:, :, part.rows], scores, part)
        grad_q[:, :, part.rows] = own[0][..., : q.size(-1)]
        grad_k[:, :, part.keys] += own[1][..., : k.size(-1)]
        grad_v[:, :, part.keys] += own[2][..., : v.size(-1)]
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _backward_of_part(
    grad: Tensor, queries_keys_values: list[Tensor], out: Tensor, lse: Tensor, scores: Scores, part: _Part
) -> Gradients:
    q, k, v = leaves = [x.detach().requires_grad_() for x in queries_keys_values]
    with _outermost(with_grad=True):
        own_out, own_lse = _compute(q, k, v, scores, part)
        weight = (own_lse.detach() - lse).exp().unsqueeze(-1)  # 0 for rows that see nothing
        grad_out = (weight * grad).to(own_out.dtype)
        grad_lse = (grad_out.to(lse.dtype) * (own_out.detach().to(lse.dtype) - out)).sum(-1)
        grad_q, grad_k, grad_v = torch.autograd.grad((own_out, own_lse), leaves, (grad_out, grad_lse))
    return grad_q, grad_k, grad_v


@contextmanager
def _outermost(with_grad: bool) -> Iterator[None]:
    """Let torch compile and record as outside of any operator or mode. Within an operator autograd does not record, even if
    it is enabled, and below a mode torch cannot compile."""
    keys = torch._C._ForceDispatchKeyGuard(*_outermost_keys())
    with _disable_current_modes(), keys, torch.set_grad_enabled(with_grad):
        yield


@cache
def _outermost_keys() -> tuple[Any, Any]:
    """The dispatch keys that a new thread includes and excludes."""
    with ThreadPoolExecutor(1) as thread:
        included = thread.submit(torch._C._dispatch_tls_local_include_set)
        excluded = thread.submit(torch._C._dispatch_tls_local_exclude_set)
        return included.result(), excluded.result()
