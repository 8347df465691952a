"""The strategy's memory options: activation checkpointing and MLP tiles for the blocks of any module."""

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_lss.nn.recompute import (
    ActivationCheckpointing,
    Calls,
    apply_checkpointing,
    apply_tiles,
    calls_of,
    check_checkpointing,
    named_blocks,
    repeated_blocks,
)
from lightning_lss.sequence.layout import check_positive


class MemoryOptions:
    """Memory options that a strategy applies to a module during a run; for the arguments see
    :class:`~lightning_lss.LSSStrategy`.

    Raises:
        ValueError: if the kind of checkpointing is unknown, the number of tiles is not positive, or names are given for
            an option that is off.
    """

    def __init__(
        self,
        checkpointing: ActivationCheckpointing | None = None,
        checkpointed_modules: Sequence[str] | None = None,
        tiles: int = 1,
        tiled_modules: Sequence[str] | None = None,
    ) -> None:
        check_positive(mlp_tiles=tiles)
        if checkpointing is not None:
            check_checkpointing(checkpointing)
        elif checkpointed_modules is not None:
            raise ValueError(
                f"checkpointed_modules={checkpointed_modules!r} has no effect without activation_checkpointing: add"
                " activation_checkpointing='full', 'selective' or 'offload'."
            )
        if tiles == 1 and tiled_modules is not None:
            raise ValueError(
                f"tiled_modules={tiled_modules!r} has no effect with mlp_tiles=1: add mlp_tiles=4, for example."
            )
        self._checkpointing = checkpointing
        self._checkpointed_modules = checkpointed_modules
        self._tiles = tiles
        self._tiled_modules = tiled_modules
        self._before: list[tuple[nn.Module, Calls]] = []

    def apply(self, module: nn.Module) -> None:
        """Change how blocks of ``module`` are called.

        Raises:
            MisconfigurationException: if a name matches no block, or there are no blocks to take by default.
        """
        if self._tiles > 1:  # first, since checkpointing recomputes a block that contains tiles differently
            blocks = self._find(module, self._tiled_modules, _mlps(module), "tiled_modules", "mlp_tiles=1")
            self._before += [(block, calls_of(block)) for block in blocks]
            try:
                apply_tiles(blocks, self._tiles)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None
        if self._checkpointing is not None:
            default = repeated_blocks(module)
            off = "activation_checkpointing=None"
            blocks = self._find(module, self._checkpointed_modules, default, "checkpointed_modules", off)
            self._before += [(block, calls_of(block)) for block in blocks]
            apply_checkpointing(blocks, self._checkpointing)

    def reset(self) -> None:
        """Undo :meth:`apply`."""
        for block, calls in reversed(self._before):
            apply_tiles([block], calls.tiles)
            apply_checkpointing([block], calls.checkpointing)
        self._before = []

    def _find(
        self, module: nn.Module, names: Sequence[str] | None, default: list[nn.Module], option: str, off: str
    ) -> list[nn.Module]:
        if names is None and not default:
            raise MisconfigurationException(
                f"{type(module).__name__} has no blocks that {option}=None would find. Name them, as in named_modules():"
                f" {option}=['layers'], or leave them unchanged with {off}."
            )
        try:
            return default if names is None else named_blocks(module, names)
        except ValueError as error:
            raise MisconfigurationException(f"{option}: {error}") from None


def _mlps(root: nn.Module) -> list[nn.Module]:
    return [module for name, module in root.named_modules() if name.rpartition(".")[2] == "mlp"]
