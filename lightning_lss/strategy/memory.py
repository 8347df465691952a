"""The strategy's memory options: activation checkpointing and MLP tiles for the blocks of any module."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_lss.nn.recompute import (
    ActivationCheckpointing,
    apply_checkpointing,
    apply_tiles,
    calls_of,
    check_checkpointing,
    named_blocks,
    repeated_blocks,
)
from lightning_lss.sequence.layout import check_positive


@dataclass(eq=False)
class MemoryOptions:
    """Memory options that a strategy applies to a module during a run; for the arguments see
    :class:`~lightning_lss.LSSStrategy`.

    Raises:
        ValueError: if the kind of checkpointing is unknown, the number of tiles is not positive, or names are given for
            an option that is off.
    """

    checkpointing: ActivationCheckpointing | None = None
    checkpointed_modules: Sequence[str] | None = None
    tiles: int = 1
    tiled_modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_positive(mlp_tiles=self.tiles)
        if self.checkpointing is not None:
            check_checkpointing(self.checkpointing)
        elif self.checkpointed_modules is not None:
            raise ValueError(
                f"checkpointed_modules={self.checkpointed_modules!r} has no effect without activation_checkpointing: add"
                " activation_checkpointing='full', 'selective' or 'offload'."
            )
        if self.tiles == 1 and self.tiled_modules is not None:
            raise ValueError(
                f"tiled_modules={self.tiled_modules!r} has no effect with mlp_tiles=1: add mlp_tiles=4, for example."
            )
        self._undo = ExitStack()

    def apply(self, module: nn.Module) -> None:
        """Change how blocks of ``module`` are called.

        Raises:
            MisconfigurationException: if a name matches no block, or there are no blocks to take by default.
        """
        if self.tiles > 1:  # first, since checkpointing recomputes a block that contains tiles differently
            mlps = [x for name, x in module.named_modules() if name.rpartition(".")[2] == "mlp"]
            blocks = self._find(module, self.tiled_modules, mlps, "tiled_modules", "mlp_tiles=1")
            try:
                apply_tiles(blocks, self.tiles)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None
        if self.checkpointing is not None:
            off = "activation_checkpointing=None"
            default = repeated_blocks(module)
            blocks = self._find(module, self.checkpointed_modules, default, "checkpointed_modules", off)
            apply_checkpointing(blocks, self.checkpointing)

    def reset(self) -> None:
        """Undo :meth:`apply`."""
        self._undo.close()

    def _find(
        self, module: nn.Module, names: Sequence[str] | None, default: list[nn.Module], option: str, off: str
    ) -> list[nn.Module]:
        """Find the blocks that an option is for, and remember how they are called."""
        if names is None and not default:
            raise MisconfigurationException(
                f"{type(module).__name__} has no blocks that {option}=None would find. Name them, as in named_modules():"
                f" {option}=['layers'], or leave them unchanged with {off}."
            )
        try:
            blocks = default if names is None else named_blocks(module, names)
        except ValueError as error:
            raise MisconfigurationException(f"{option}: {error}") from None
        for block in blocks:
            calls = calls_of(block)
            self._undo.callback(apply_tiles, [block], calls.tiles)
            self._undo.callback(apply_checkpointing, [block], calls.checkpointing)
        return blocks
