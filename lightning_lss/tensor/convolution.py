"""Rules of convolutions: a rank needs some positions beside each of its chunks."""

from typing import Any

from torch import Tensor

from lightning_lss.sequence.borders import with_halo
from lightning_lss.tensor.split_tensor import Function, SplitTensor, name_of, rule, split_tensor


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    func: Function,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Along the sequence with stride 1, if it keeps its length; or along other dimensions."""
    spatial = int(name_of(func)[-2])
    if not isinstance(x, SplitTensor) or isinstance(weight, SplitTensor) or x.part.dim() != spatial + 2:
        return NotImplemented
    axis, placement = x.placement.dim - 2, x.placement
    if axis == -2:  # rows of the batch
        return split_tensor(func(x.part, weight, bias, stride, padding, dilation, groups), placement)
    strides, dilations = ([n] * spatial if isinstance(n, int) else [*n] for n in (stride, dilation))
    reach = [d * (n - 1) for d, n in zip(dilations, weight.shape[2:])]  # beyond a position
    if padding == "same":
        before = [n // 2 for n in reach]
    elif padding == "valid":
        return NotImplemented
    else:
        before = [padding] * spatial if isinstance(padding, int) else [*padding]
    keeps = padding == "same" or 2 * before[axis] == reach[axis]
    if axis < 0 or strides[axis] != 1 or not keeps or placement.outer * placement.inner > 1:
        return NotImplemented
    if padding == "same" and any(
        n % 2 for d, n in enumerate(reach) if d != axis
    ):  # torch pads one side of the other dimensions more
        return NotImplemented
    others = [0 if d == axis else n for d, n in enumerate(before)]
    result = with_halo(
        lambda t: func(t, weight, bias, stride, others, dilation, groups),
        placement.counting(x.part),
        placement.shard,
        placement.dim,
        before[axis],
        reach[axis] - before[axis],
    )
    return split_tensor(result, placement)
