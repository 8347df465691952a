"""Convert a checkpoint folder to one file."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lightning_lss.checkpoint.folder import load_folder, load_meta


def consolidate(folder: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Write the checkpoint in ``folder`` as one standard Lightning file, in a single process.

    Any strategy and ``load_from_checkpoint`` can load the file.

    Args:
        folder: a folder of LSSStrategy, or of Lightning's ModelParallelStrategy (such as MegatronStrategy).
        file: where to write.

    Raises:
        ValueError: if ``folder`` is not a distributed checkpoint.
    """
    folder = Path(folder)
    rest = load_meta(folder, weights_only=False)
    torch.save(
        load_folder(folder, weights_only=False) if "state_dict" in rest else _load_lightnings(folder, rest), file
    )


def _load_lightnings(folder: Path, rest: dict[str, Any]) -> dict[str, Any]:
    """Load a folder of ModelParallelStrategy; ``rest`` is its metadata file.

    The folder keys optimizers by number, and their parameters by name. Lightning's own script for this only knows the
    keys of FSDPStrategy.
    """
    tensors: dict[str, Any] = {}
    _load_state_dict(
        tensors, storage_reader=dcp.FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    numbers = range(sum(key.startswith("optimizer_") for key in tensors))
    states = [_by_index(tensors[f"optimizer_{number}"]) for number in numbers]
    return {**rest, "state_dict": tensors["state_dict"], "optimizer_states": states}


def _by_index(state: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of parameters in an optimizer's state dict by indices."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    index = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {index[name]: x for name, x in state["state"].items()}, "param_groups": groups}
