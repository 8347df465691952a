"""Convolutions along a split sequence: each rank is sent a few positions beside its chunks."""

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss.sequence.borders import as_rows, of_rows, with_halo
from lightning_lss.sequence.segment import SequenceShard, ShardedModule


def halo_of(conv: nn.Conv1d) -> tuple[int, int]:
    """Return how many positions before and after its own a convolution reads.

    Raises:
        ValueError: if it does not give every position of a sequence one result that is computed from the positions around
            it and zeros; the message names the setting.
    """
    reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
    if conv.stride[0] != 1:
        raise ValueError(
            f"stride={conv.stride[0]} does not keep the length of the sequence, whose segments are shared by all layers: use"
            " stride=1, or shorten sequences before the batch is split."
        )
    if conv.padding_mode != "zeros":
        raise ValueError(
            f"padding_mode={conv.padding_mode!r} needs the ends of the sequence on every rank: use 'zeros', or call nn.Conv1d"
            " through sequence_shard(self).on_whole."
        )
    if conv.padding == "causal":
        return reach, 0
    if conv.padding == "same":
        return reach // 2, reach - reach // 2
    before = 0 if isinstance(conv.padding, str) else conv.padding[0]
    if 2 * before != reach:
        raise ValueError(
            f"padding={conv.padding if isinstance(conv.padding, str) else before} does not keep the length of the sequence with"
            f" kernel_size={conv.kernel_size[0]} and dilation={conv.dilation[0]}: use lightning_lss.SegmentConv1d with"
            " padding='same', or with padding='causal' for one that sees only earlier positions."
        )
    return before, before


class SegmentConv1d(nn.Conv1d, ShardedModule):
    """A convolution along the split sequence, ``nn.Conv1d`` with the same parameters.

    Each rank is sent the positions that the kernel reads beside its chunks; a kernel that reaches further than a chunk is
    long gets the whole sequence. On one device it is ``nn.Conv1d``.

    Args:
        in_channels: C of the input; the other arguments are those of ``nn.Conv1d`` too.
        out_channels: C of the output.
        kernel_size: in positions.
        stride: 1.
        padding: ``"same"``; ``"causal"``, where the last entry of the kernel is for the position itself and the others for
            earlier ones; or the number of zeros that keeps the length, ``dilation * (kernel_size - 1) / 2``.
        dilation: distance between the positions that the kernel reads.
        groups: blocks of channels that are convolved separately.
        bias: whether to add a learned bias.
        padding_mode: ``"zeros"``, which is what lies beyond the ends of the whole sequence.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if the settings would not keep the length of the sequence, or pad with something else.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = "same",
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        mode: Any = padding_mode
        kept = padding in ("same", "causal")  # torch refuses the one with strides, and does not know the other
        of_torch: Any = 0 if kept else padding
        super().__init__(
            in_channels, out_channels, kernel_size, stride, of_torch, dilation, groups, bias, mode, device, dtype
        )
        self.padding = padding if kept else self.padding  # type: ignore[assignment]
        self.halo = halo_of(self)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [B, C, l] -> [B, C', l], or [C, l] -> [C', l]; ``ValueError`` if no sequence has segments of length l."""
        if self.shard.size == 1 and self.padding != "causal":
            return super().forward(x)
        if self.shard.size == 1:
            return self._without_padding(F.pad(x, self.halo))
        rows = x if x.dim() == 3 else x.unsqueeze(0)
        y = with_halo(self._without_padding, rows, self.shard, 2, *self.halo)
        return y if x.dim() == 3 else y.squeeze(0)

    def _without_padding(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, dilation=self.dilation, groups=self.groups)


@contextmanager
def crossing_borders(
    convolutions: Iterable[nn.Conv1d], shard_now: Callable[[], SequenceShard]
) -> Generator[None, None, None]:
    """Let modules of ``nn.Conv1d`` convolve along the split sequence, as :class:`SegmentConv1d`, within the ``with`` statement.

    Hooks do it: the modules stay what and where they are. Before a call each chunk is extended by its neighbours and
    becomes a row of the batch. After it the ends are cut off, where the padding of the module counted.

    Raises:
        ValueError: at once, as :func:`halo_of`; from a call, if the input is not [B, C, l], or no sequence can be divided
            into segments of length l.
    """
    halos = {conv: halo_of(conv) for conv in convolutions}
    with ExitStack() as stack:
        if halos and "torch._dynamo" in sys.modules:  # compiled code does not ask for hooks that come or go
            torch.compiler.reset()
            stack.callback(torch.compiler.reset)
        for conv, (before, after) in halos.items():
            halo = _Halo(before, after, shard_now)
            stack.callback(conv.register_forward_pre_hook(halo.extend, with_kwargs=True).remove)
            stack.callback(conv.register_forward_hook(halo.cut, prepend=True).remove)
        yield


@dataclass(frozen=True)
class _Halo:
    """The hooks of a convolution."""

    before: int
    after: int
    shard_now: Callable[[], SequenceShard]

    @torch.compiler.disable
    def extend(self, conv: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """[B, C, l] -> [n B, C, before + c + after], for n chunks of c positions."""
        shard = self.shard_now()
        (x,) = (*args, *kwargs.values())
        if shard.size == 1:
            return args, kwargs
        if x.dim() != 3:
            raise ValueError(
                f"A convolution along the split sequence needs [B, C, l]; got {list(x.shape)}. Add a dimension: conv(x[None])[0]."
            )
        return (as_rows(x, shard, 2, self.before, self.after),), {}

    @torch.compiler.disable
    def cut(self, conv: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor | None:
        """[n B, C', before + c + after] -> [B, C', l]."""
        shard = self.shard_now()
        if shard.size == 1:
            return None
        rows = result.narrow(2, self.before, result.size(2) - self.before - self.after)
        return of_rows(rows, rows.size(0) * shard.size // shard.num_chunks, 2)


def crosses_borders(module: nn.Module) -> bool:
    """Whether a convolution is one of those in this file, or is within :func:`crossing_borders`."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, SegmentConv1d) or any(isinstance(getattr(x, "__self__", None), _Halo) for x in hooks)
