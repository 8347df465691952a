"""Rules of what a tensor is, and of functions that ask only for its shape, dtype or device."""

from math import prod
from typing import Any, NoReturn

from torch import Tensor

from lightning_lss.tensor.split_tensor import (
    Function,
    SplitTensor,
    part,
    part_like,
    rule,
    shape_of,
    split,
    split_tensor,
    whole,
)

_OF_PART = [
    "dim",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "element_size",
    "is_contiguous",
    "get_device",
    "is_conj",
    "is_neg",
    "is_inference",
    "is_signed",
    "is_shared",
    "is_pinned",
    "is_same_size",
    "storage_offset",
    "retain_grad",
    "requires_grad_",
    "detach_",
]
_PROPERTIES = [
    "dtype",
    "device",
    "requires_grad",
    "grad_fn",
    "is_leaf",
    "layout",
    "ndim",
    "is_cuda",
    "is_cpu",
    "is_sparse",
    "is_sparse_csr",
    "is_quantized",
    "is_meta",
    "is_mps",
    "is_nested",
    "is_xpu",
    "is_mkldnn",
    "is_xla",
    "is_hpu",
    "is_mtia",
    "_version",
    "output_nr",
    "names",
    "itemsize",
    "retains_grad",
    "_backward_hooks",
]


@rule(*_OF_PART, *(f"get {name}" for name in _PROPERTIES), "set requires_grad")
def of_part(func: Function, x: SplitTensor, *args: Any, **kwargs: Any) -> Any:
    """The same of the part as of the whole."""
    return func(x, *args, **kwargs)  # its own data are the part


@rule("get _base")
def base(func: Function, x: SplitTensor) -> None:
    """No tensor that a user could see."""


@rule("_is_view")
def is_view(func: Function, x: SplitTensor) -> bool:
    """Of no tensor that a user could see."""
    return False


@rule("size", "get shape")
def size(func: Function, x: SplitTensor, dim: int | None = None) -> Any:
    """Of the whole."""
    return shape_of(x) if dim is None else shape_of(x)[dim]


@rule("numel", "nelement")
def numel(func: Function, x: SplitTensor) -> int:
    """Of the whole."""
    return prod(shape_of(x))


@rule("len")
def length(func: Function, x: SplitTensor) -> int:
    """Of the whole."""
    return shape_of(x)[0]


@rule("stride")
def stride(func: Function, x: SplitTensor, dim: int | None = None) -> Any:
    """Of a contiguous whole."""
    shape = shape_of(x)
    strides = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
    return strides if dim is None else strides[dim]


# What autograd computes for a part is that of the sum of all ranks' losses, which are one and the same: shard.size times
# what one device computes.


@rule("get grad")
def gradient(func: Function, x: SplitTensor) -> Tensor | None:
    """Of a leaf, or of what retains it."""
    grad = x.grad
    return None if grad is None else split_tensor(grad / x.placement.shard.size, x.placement)


@rule("register_hook")
def register_hook(func: Function, x: SplitTensor, hook: Function) -> Any:
    """A function of the gradient, which it sees as it does the tensor."""
    placement = x.placement

    def of_part(grad: Tensor) -> Tensor | None:
        seen = hook(split_tensor(grad / placement.shard.size, placement))
        return None if seen is None else part_like(seen, placement, grad.dim()) * placement.shard.size

    return func(x, of_part)


@rule("backward")
def backward(func: Function, tensors: Any, gradients: Any = None, *args: Any, **kwargs: Any) -> None:
    """Of one tensor or several, with the gradients of the whole."""
    for name in ("gradient", "grad_tensors"):
        gradients = kwargs.pop(name, gradients)
    if isinstance(tensors, Tensor):
        func(tensors, _gradient_of_part(tensors, gradients), *args, **kwargs)
        return
    func(tensors, [_gradient_of_part(*pair) for pair in zip(tensors, gradients)], *args, **kwargs)


def _gradient_of_part(x: Tensor, gradient: Tensor | None) -> Tensor | None:
    if not isinstance(x, SplitTensor) or gradient is None:
        return whole(gradient)
    return x.placement.counting(part_like(gradient, x.placement, x.part.dim())) * x.placement.shard.size


@rule("grad")
def differentiate(func: Function, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse ``torch.autograd.grad``: gradients of losses that other ranks share would be missing."""
    raise NotImplementedError(
        "torch.autograd.grad is not known for a sequence that is split. Call backward() instead, or train with LSSStrategy(view='segment')."
    )


@rule("data_ptr", "storage", "untyped_storage", "get __cuda_array_interface__")
def memory(func: Function, x: SplitTensor) -> None:
    """Refuse what would read memory beyond a part."""
    raise NotImplementedError(
        f"{func.__name__} is not known for a sequence that is split: this rank does not hold all of it. Give a kernel of your own whole"
        " tensors, in a torch.autograd.Function or a custom operator (torch.library)."
    )


_SAME_SHAPE = [
    "contiguous",
    "clone",
    "detach",
    "alias",
    "to",
    "type",
    "float",
    "half",
    "bfloat16",
    "double",
    "cpu",
    "cuda",
    "long",
    "int",
    "short",
    "bool",
    "byte",
    "char",
    "pin_memory",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "zero_",
    "fill_",
    "resolve_conj",
    "resolve_neg",
]


@rule(*_SAME_SHAPE, "get data", "deepcopy")
def same_shape(func: Function, x: SplitTensor, *args: Any, **kwargs: Any) -> Any:
    """The shape stays, whatever the entries."""
    if not isinstance(x, SplitTensor):  # of another's dtype and device
        return func(x, *map(part, args), **{key: part(value) for key, value in kwargs.items()})
    own = x.part
    result = func(own, *map(part, args), **{key: part(value) for key, value in kwargs.items()})
    if not isinstance(result, Tensor):
        return result
    return x if result is own else split_tensor(result, x.placement)


@rule("type_as")
def type_as(func: Function, x: Tensor, other: Tensor) -> Tensor:
    """The dtype of another."""
    result: Tensor = func(part(x), part(other))
    return split_tensor(result, x.placement) if isinstance(x, SplitTensor) else result


@rule("new_tensor", "new_zeros", "new_ones", "new_empty", "new_full")
def new(func: Function, x: SplitTensor, *args: Any, **kwargs: Any) -> Tensor:
    """A tensor that every rank makes; it is split where it is as long as ``x`` in the same dimension."""
    made: Tensor = func(x.part, *args, **kwargs)
    same = made.dim() == x.part.dim() and made.size(x.placement.dim) == x.placement.size
    return split(made, x.placement) if same else made


@rule("repr", "format", "str")
def show(func: Function, x: SplitTensor, *args: Any, **kwargs: Any) -> str:
    """Without communication, since one rank alone may ask."""
    return f"SplitTensor(shape={list(shape_of(x))}, dtype={x.part.dtype}, part={x.part!r})"


@rule("hash")
def identity(func: Function, x: SplitTensor) -> int:
    """As of any tensor, the object's."""
    return id(x)


@rule("set data")
def set_data(func: Function, x: Tensor, value: Tensor) -> None:
    """Take another tensor's entries, and its place."""
    if isinstance(x, SplitTensor):
        value = value if isinstance(value, SplitTensor) else split(value, x.placement)
        x.placement = value.placement
    func(x, part(value) if isinstance(x, SplitTensor) else whole(value))
