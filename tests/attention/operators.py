"""Stand-ins for torch's operators for CUDA: they check what the real ones rely on without a check of their own, and
compute with the reference."""

from typing import Any

import torch
from torch import Tensor

from lightning_lss.attention.kernels import KERNELS, Scores, Segments
from tests.kernel_checks import packed_loop

FORWARD, BACKWARD = KERNELS["reference"].forward, KERNELS["reference"].backward


def rows_contiguous(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1
        assert all(number % 8 == 0 for number in (x.size(-1), *x.stride()[:-1], x.storage_offset()))


def equal_widths(*tensors: Tensor) -> None:
    assert len({x.size(-1) for x in tensors}) == 1


def checked_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Check what the memory-efficient operators expect of a bias beside q and k [B, m, H, D]."""
    if bias is None:
        return None
    assert bias.shape == (q.size(0), q.size(2), q.size(1), k.size(1))
    assert bias.dtype == q.dtype
    assert bias.stride(-1) == 1
    assert all(x % 8 == 0 for x in (*bias.stride()[:3], bias.storage_offset()))
    return bias


def batched(x: Tensor) -> Tensor:
    """[m, H, D] -> [1, H, m, D]."""
    assert x.dim() == 3
    return x.transpose(0, 1)[None]


def flat(x: Tensor) -> Tensor:
    """[1, H, m, D] -> [m, H, D]."""
    return x[0].transpose(0, 1)


def checked_segments(cum_q: Tensor, cum_k: Tensor, rows: int, keys: int, q: Tensor, k: Tensor) -> Segments:
    """Check what the operators for segments expect beside q [m, H, D] and k [n, G, D]."""
    for bounds, longest, size in ((cum_q, rows, q.size(0)), (cum_k, keys, k.size(0))):
        assert bounds.dtype == torch.int32
        assert bounds.is_contiguous()
        assert (bounds[0], bounds[-1]) == (0, size)
        assert bounds.diff().min() >= 0
        assert bounds.diff().max() <= longest
    assert cum_q.shape == cum_k.shape
    assert rows > 1  # or version 2 takes it that every segment has one row
    return Segments(tuple(cum_q.tolist()), tuple(cum_k.tolist()))


class Operators:
    """In the place of ``torch.ops.aten``."""

    cudnn_dims = 4  # of the log-sum-exp

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout, causal, debug, *, scale) -> tuple[Any, ...]:
        rows_contiguous(q, k, v)
        equal_widths(q, k, v)
        assert not debug
        return *FORWARD(q, k, v, Scores(scale, causal)), *(None for _ in range(7))

    def _scaled_dot_product_flash_attention_backward(
        self, grad, q, k, v, out, lse, cum_q, cum_k, rows, keys, dropout, causal, seed, offset, *, scale
    ) -> tuple[Tensor, ...]:
        rows_contiguous(grad, q, k, v, out)
        equal_widths(grad, q, k, v, out)
        assert lse.is_contiguous()
        assert (rows, keys) == (q.size(2), k.size(2))
        assert (seed.shape, seed.dtype) == ((2,), torch.uint64)
        return BACKWARD(grad, q, k, v, out, lse, Scores(scale, causal))

    def _flash_attention_forward(
        self,
        q,
        k,
        v,
        cum_q,
        cum_k,
        rows,
        keys,
        dropout,
        causal,
        debug,
        *,
        scale,
        window_size_left,
        window_size_right,
    ) -> tuple[Any, ...]:
        rows_contiguous(q, k, v)
        equal_widths(q, k, v)
        if cum_q is not None:
            assert causal == ((window_size_left, window_size_right) == (-1, 0))
            segments = checked_segments(cum_q, cum_k, rows, keys, q, k)
            how = Scores(scale, window=(window_size_left, window_size_right))
            out, lse = packed_loop("reference").forward(*map(batched, (q, k, v)), segments, how)
            for blind in segments.blind_rows:
                out[:, :, blind] = lse[:, :, blind] = float("nan")  # the worst that no block leaves behind
            return flat(out), lse[0].masked_fill(lse[0].isneginf(), float("inf")), *(None for _ in range(3))
        assert (rows, keys) == (q.size(1), k.size(1))
        assert not causal  # it would overrule the window
        window = window_size_left, window_size_right
        out, lse = FORWARD(*(x.transpose(1, 2) for x in (q, k, v)), Scores(scale, window=window))
        return out.transpose(1, 2), lse.masked_fill(lse.isneginf(), float("inf")), *(None for _ in range(3))

    def _flash_attention_backward(
        self,
        grad,
        q,
        k,
        v,
        out,
        lse,
        cum_q,
        cum_k,
        rows,
        keys,
        dropout,
        causal,
        seed,
        unused,
        *,
        scale,
        window_size_left,
        window_size_right,
    ) -> tuple[Tensor, ...]:
        rows_contiguous(grad, q, k, v, out)
        equal_widths(grad, q, k, v, out)
        assert lse.is_contiguous()
        assert (seed.shape, seed.dtype) == ((2,), torch.uint64)
        if cum_q is not None:
            assert causal == ((window_size_left, window_size_right) == (-1, 0))
            segments = checked_segments(cum_q, cum_k, rows, keys, q, k)
            how = Scores(scale, window=(window_size_left, window_size_right))
            grads = packed_loop("reference").backward(*map(batched, (grad, q, k, v, out)), lse[None], segments, how)
            for blind in segments.blind_rows:
                grads[0][:, :, blind] = float("nan")
            for unseen in segments.unseen_keys:
                grads[1][:, :, unseen] = grads[2][:, :, unseen] = float("nan")
            return tuple(map(flat, grads))
        assert (rows, keys) == (q.size(1), k.size(1))
        assert not causal
        heads_first = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
        grads = BACKWARD(*heads_first, lse, Scores(scale, window=(window_size_left, window_size_right)))
        return tuple(x.transpose(1, 2) for x in grads)

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, with_lse, dropout=0.0, causal=False, *, scale=1.0
    ) -> tuple[Any, ...]:
        rows_contiguous(q, k, v)
        assert with_lse
        equal_widths(q, k, v)
        assert bias is None
        out, lse = FORWARD(q, k, v, Scores(scale, causal))
        return out, lse.unsqueeze(-1) if self.cudnn_dims == 4 else lse, *(None for _ in range(7))

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, rows, keys, dropout, causal, *, scale
    ) -> tuple[Tensor, ...]:
        rows_contiguous(q, k, v)
        assert grad.is_contiguous()
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert lse.dim() == self.cudnn_dims
        assert (rows, keys) == (q.size(2), k.size(2))
        equal_widths(grad, q, k, v, out)
        return BACKWARD(grad, q, k, v, out, lse.view(q.shape[:3]), Scores(scale, causal))

    def _efficient_attention_forward(
        self, q, k, v, bias, seqs_q, seqs_k, rows, keys, dropout, mask, with_lse, *, scale
    ) -> tuple[Any, ...]:
        rows_contiguous(q, k, v)
        assert q.size(2) == k.size(2)
        assert with_lse
        how = Scores(scale, {0: False, 2: True}[mask], checked_bias(bias, q, k))
        out, lse = FORWARD(*(x.transpose(1, 2) for x in (q, k, v)), how)
        out[lse.isneginf()] = float("nan")  # the worst that a version can make of rows without a key
        lse[lse.isneginf()] = float("nan")
        padded = lse.new_full((*lse.shape[:2], -(-lse.size(2) // 32) * 32), float("inf"))
        padded[..., : lse.size(2)] = lse
        return out.transpose(1, 2).contiguous(), padded, *(None for _ in range(4))

    def _efficient_attention_backward(
        self,
        grad,
        q,
        k,
        v,
        bias,
        out,
        seqs_q,
        seqs_k,
        rows,
        keys,
        lse,
        dropout,
        seed,
        offset,
        mask,
        bias_grad,
        *,
        scale,
    ) -> tuple[Any, ...]:
        rows_contiguous(grad, q, k, v)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert lse.size(2) % 32 == 0
        assert torch.isposinf(lse[..., rows:]).all()
        assert (rows, keys) == (q.size(1), k.size(1))
        heads_first = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
        how = Scores(scale, {0: False, 2: True}[mask], checked_bias(bias, q, k))
        grads = BACKWARD(*heads_first, lse[..., :rows], how)
        return *(x.transpose(1, 2).contiguous() for x in grads), None
