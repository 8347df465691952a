"""Activation checkpointing and MLP tiles, applied from outside to the blocks of any module.

They change only how existing modules are called: names of parameters, hooks, and compiled code within the block stay as
they are. (torchtitan also applies activation checkpointing to a finished model.)
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

from lightning_lss.attention.operator import ATTENTION
from lightning_lss.nn.dropout import SegmentDropout, Tile

ActivationCheckpointing = Literal["none", "full", "selective", "offload"]

# Attention's operators in torch, by device and kernel; their backward needs their outputs and log-sum-exps.
_ATTENTION = [
    ATTENTION,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
_keep_attention = partial(create_selective_checkpoint_contexts, _ATTENTION)


# -- which modules -----------------------------------------------------------------------------------------------------


def outermost(root: nn.Module, wanted: Callable[[nn.Module, nn.Module], bool]) -> list[nn.Module]:
    """Find the outermost submodules of ``root`` for which ``wanted(parent, child)`` is true, each once, in order."""
    found: dict[nn.Module, None] = {}

    def visit(parent: nn.Module) -> None:
        for child in parent.children():
            if wanted(parent, child):
                found[child] = None
            elif child not in found:
                visit(child)

    visit(root)
    return list(found)


def repeated_blocks(root: nn.Module, wanted: Callable[[nn.Module], bool] = lambda block: True) -> list[nn.Module]:
    """Find the blocks of a transformer: outermost children of an ``nn.ModuleList`` or ``nn.Sequential`` that have children
    of their own and a class that occurs there more than once, and that are ``wanted``."""

    def is_block(parent: nn.Module, child: nn.Module) -> bool:
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)) or not any(True for _ in child.children()):
            return False
        classes = Counter(_own_class(other) for other in parent.children())
        return classes[_own_class(child)] > 1 and wanted(child)

    return outermost(root, is_block)


def _own_class(module: nn.Module) -> type[nn.Module]:
    return module._lss_class if isinstance(module, Recomputed) else type(module)


def named_blocks(root: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Find submodules of ``root`` by their names in ``named_modules()``, each once.

    In a name ``*`` and ``?`` match as in the shell. An ``nn.ModuleList`` stands for its children.

    Raises:
        ValueError: if a name matches no submodule; the message lists some that ``root`` has.
    """
    blocks: dict[nn.Module, None] = {}
    for pattern in names:
        found = [module for name, module in root.named_modules() if name and fnmatchcase(name, pattern)]
        if not found:
            stacks = [name for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
            known = stacks or [name for name, _ in root.named_children()]
            raise ValueError(
                f"{type(root).__name__} has no submodule {pattern!r}. Name submodules as in named_modules(), such as"
                f" {', '.join(map(repr, known[:5]))}; '*' matches any part of a name."
            )
        for module in found:
            blocks |= dict.fromkeys(module.children() if isinstance(module, nn.ModuleList) else [module])
    return outermost(root, lambda _, child: child in blocks)  # "layers.*" also matches what lies within a layer


# -- how they are called -----------------------------------------------------------------------------------------------


def apply_checkpointing(modules: Iterable[nn.Module], how: ActivationCheckpointing) -> None:
    """Change what autograd keeps between forward and backward when a module is called.

    Args:
        modules: modules to change in place. Apply tiles to their submodules first.
        how: what to keep; ``ValueError`` if unknown.

            - ``none``: everything that autograd asks for;
            - ``full``: only the module's inputs; the backward pass computes the module again;
            - ``selective``: also the output of attention with its log-sum-exp; the backward pass does not compute again
              what is quadratic in the sequence length;
            - ``offload``: only the inputs, in (pinned) host memory.
    """
    check_checkpointing(how)
    for module in modules:
        _set_calls(module, checkpointing=how)


def apply_tiles(modules: Iterable[nn.Module], tiles: int) -> None:
    """Compute each module in ``tiles`` parts along the sequence from now on, and each part again in the backward pass.

    The modules must take [B, l, E] as their first argument and work token by token. Their intermediate activations are
    then those of one tile (TiledMLP of ALST, arXiv 2506.13996, section 3.2).

    Raises:
        ValueError: if a module contains batch normalization, whose statistics would be those of a tile; from the call, if
            the first argument is not [B, l, E].
    """
    for module in modules:
        if tiles > 1 and any(isinstance(x, _BatchNorm) for x in module.modules()):
            raise ValueError(
                f"{type(module).__name__} contains batch normalization, so computing it in mlp_tiles={tiles} parts would be"
                " another training. Name other modules in tiled_modules, or use LayerNorm."
            )
        _set_calls(module, tiles=tiles)


def check_checkpointing(how: object) -> None:
    """Raise ``ValueError`` if ``how`` is not a kind of activation checkpointing."""
    known = get_args(ActivationCheckpointing)
    if how not in known:
        raise ValueError(f"activation_checkpointing={how!r} is unknown: choose {' or '.join(map(repr, known))}.")


@dataclass(frozen=True)
class Calls:
    """How a module is called."""

    checkpointing: ActivationCheckpointing = "none"
    tiles: int = 1


def calls_of(module: nn.Module) -> Calls:
    """How ``module`` is called: as it is, unless it was changed here."""
    return getattr(module, "_lss_calls", Calls())


class Recomputed(nn.Module):
    """Mixin that wraps a module's call, with all its hooks, those of FSDP and tensor parallelism included.

    It is mixed into the class of a module at run time, as torch's ``fully_shard`` does with its own, since Python looks
    ``__call__`` up on the class. The module's other names are its author's.
    """

    _lss_calls: Calls
    _lss_class: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, in tiles and under activation checkpointing where these are on."""
        call = super().__call__
        if self._lss_calls.tiles > 1:
            call = partial(_call_in_tiles, self, call)
        if self._lss_calls.checkpointing == "none" or not torch.is_grad_enabled():
            return call(*args, **kwargs)
        return _call_checkpointed(self, call, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot find a class that was made at run time by its name
        reduced: Any = super().__reduce_ex__(protocol)
        constructor, (_, *arguments), *state = reduced
        return (_rebuild, (constructor, self._lss_class, *arguments), *state)


def _call_checkpointed(
    module: Recomputed, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    how, number, names = module._lss_calls.checkpointing, len(args), list(kwargs)
    taken_apart = [_part_of_shown(x) for x in (*args, *kwargs.values())]
    inputs, structures = [x for x, _ in taken_apart], [structure for _, structure in taken_apart]

    # Torch offloads only tensors that are given by position. The function must not hold the inputs itself: they are to be
    # freed.
    def call_by_position(*inputs: Any) -> Any:
        shown = [x if structure is None else tree_unflatten([x], structure) for x, structure in zip(inputs, structures)]
        return call(*shown[:number], **dict(zip(names, shown[number:])))

    # Recomputation normally stops at the last tensor that backward needs. In a block of tiles that is within the last
    # tile, before the results are joined. Under tensor parallelism each result comes from a collective, and torch keeps
    # it forever if nothing waits for it. A single tile stops before its collective.
    holds_tiles = not torch.compiler.is_compiling() and any(calls_of(x).tiles > 1 for x in module.modules())
    on_cuda = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    options: dict[str, Any] = {"context_fn": _keep_attention} if how == "selective" else {}
    with _early_stop(not holds_tiles), save_on_cpu(pin_memory=on_cuda) if how == "offload" else nullcontext():
        return checkpoint(call_by_position, *inputs, use_reentrant=False, **options)


def _part_of_shown(x: Any) -> tuple[Any, TreeSpec | None]:
    """Take apart a tensor that shows itself as whole: what is kept is a rank's part, and how it is shown again."""
    if not isinstance(x, Tensor):
        return x, None
    (part,), structure = tree_flatten(x)
    return part, structure


def _call_in_tiles(module: Recomputed, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the module for parts of the first argument along the sequence; autograd keeps only the arguments.

    Dropout within the module is told which part of the segment it works on, and drops what it would of the whole.
    """
    tiles = module._lss_calls.tiles
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3:
        raise ValueError(
            f"{type(module).__name__} is computed in mlp_tiles={tiles} parts along the sequence, so its first argument must be a"
            " tensor [B, l, E], given by position. Name other modules in tiled_modules."
        )
    x, structure = _part_of_shown(args[0])  # a rank computes its tokens
    others, length = args[1:], x.size(1)
    dropouts = [(part, list[Tensor]()) for part in module.modules() if isinstance(part, SegmentDropout)]

    def compute(part: Tensor, start: int) -> Tensor:
        with ExitStack() as stack:
            for dropout, seeds in dropouts:
                tile = Tile(start, start + part.size(1), length, seeds)
                stack.enter_context(dropout.computing(tile))
            return call(part, *others, **kwargs)

    run = partial(checkpoint, compute, use_reentrant=False) if torch.is_grad_enabled() else compute
    parts = x.chunk(tiles, dim=1)
    starts = accumulate((part.size(1) for part in parts), initial=0)
    with _early_stop(True):
        joined = torch.cat([run(part, start) for part, start in zip(parts, starts)], dim=1)
    return joined if structure is None else tree_unflatten([joined], structure)


def _early_stop(wanted: bool) -> AbstractContextManager[Any]:
    return nullcontext() if torch.compiler.is_compiling() else set_checkpoint_early_stop(wanted)


def _set_calls(module: nn.Module, **changes: Any) -> None:
    calls = replace(calls_of(module), **changes)
    if not isinstance(module, Recomputed):
        module.__class__ = _recomputed(type(module))  # type: ignore[arg-type]  # mypy: a class is hashable
    module._lss_calls = calls  # type: ignore[assignment]


@cache
def _recomputed(cls: Any) -> type[nn.Module]:
    names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_lss_class": cls}
    return type(cls.__name__, (Recomputed, cls), names)


def _rebuild(constructor: Callable[..., Any], cls: Any, *arguments: Any) -> Any:
    return constructor(_recomputed(cls), *arguments)
